"""Prompts, formats and graphs that the tests of the neural-compressor backend share."""

import sys
from pathlib import Path

import onnx
import pytest
import torch

from holdfast.exporter.export import read_export
from holdfast.exporter.graph import GraphLinear
from holdfast.extras import missing_packages
from holdfast.quantize.backends import inc
from holdfast.quantize.formats import Format
from holdfast.quantize.weights.codes import WeightCodes
from holdfast.recipe import QuantizeConfig

PROMPTS = [[5 + (7 * row + 3 * column) % 250 for column in range(9 + row % 3)] for row in range(6)]
W8A8, W8A4, W4 = Format(8, 8, 0), Format(8, 4, 0), Format(4, None, 16)

needs_inc = pytest.mark.skipif(
    bool(missing_packages("inc")), reason=f"the `inc` extra is not installed ({missing_packages('inc')})"
)


def modules_of(folder: Path) -> dict[str, GraphLinear]:
    return read_export(folder).modules


def quantize(folder: Path, formats: dict[str, Format], method: str, **given: object) -> onnx.ModelProto:
    config = QuantizeConfig(accuracy_level=1)
    defaults = {"ranges": None, "codes": None, "config": config, "prompts": PROMPTS, "method": method}
    return inc.quantize(folder, modules_of(folder), formats, **(defaults | given))  # type: ignore[arg-type]


def grid_weight(format: Format, width: int, seed: int) -> tuple[WeightCodes, torch.Tensor]:
    """Random codes and the float weight that they stand for."""
    generator = torch.Generator().manual_seed(seed)
    low, high = -(2 ** (format.weight_bits - 1)), 2 ** (format.weight_bits - 1)
    blocks = -(-width // format.block_size)
    codes = torch.randint(low, high, (24, width), generator=generator, dtype=torch.int8)
    scales = 0.01 + torch.rand((24, blocks), generator=generator)
    zeros = torch.randint(low, high, (24, blocks), generator=generator, dtype=torch.int8)
    zero_points = None if format.symmetric_weights else zeros
    weight = WeightCodes(codes, scales, zero_points, format.weight_bits, format.block_size)
    return weight, weight.dequantized()


def worker(tmp_path: Path, body: str) -> list[str]:
    """A worker command that misbehaves."""
    script = tmp_path / "worker.py"
    script.write_text(body, encoding="utf-8")
    return [sys.executable, str(script)]
