"""The torch simulation of the artifact, and how closely the artifact follows it on the same tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from holdfast.errors import ParityError
from holdfast.exporter.architectures import linear_modules
from holdfast.exporter.batching import pad_left, positions
from holdfast.exporter.parity import (
    Agreement,
    compare_logits,
    empty_cache,
    open_session,
)
from holdfast.exporter.source import SourceModel
from holdfast.quantize.fakequant import (
    fake_quantize,
    fake_quantize_blocks,
    fake_quantize_blocks_inc,
    fake_quantize_channels,
    fake_quantize_rows_int8,
)
from holdfast.quantize.plan import quantized_paths
from holdfast.quantize.record import ActivationRange
from holdfast.recipe import QuantizeConfig
from holdfast.runtime.external_data import graph_files

INT8_COMPUTE = 4  # accuracy_level at which MatMulNBits quantizes its input to int8


@dataclass(frozen=True)
class SimulationAgreement(Agreement):
    """`Agreement`, and the share of positions where every logit is within the tolerance.

    Attributes:
        within_frac: 0 to 1.
    """

    within_frac: float


class SimulatedLinear(nn.Module):
    """A linear as the artifact computes it: quantized weight, quantized input, float32 product."""

    def __init__(self, linear: nn.Linear, learned: ActivationRange | None, config: QuantizeConfig) -> None:
        super().__init__()
        self.bias, self.learned, self.config = linear.bias, learned, config
        self.weight = _quantized_weight(linear.weight.detach(), config)

    def forward(self, values: Tensor) -> Tensor:
        return nn.functional.linear(self._quantized_input(values), self.weight, self.bias)

    def _quantized_input(self, values: Tensor) -> Tensor:
        if self.learned is not None:
            scale = torch.tensor(self.learned.scale, dtype=torch.float32)
            zero_point = torch.tensor(float(self.learned.zero_point))
            return fake_quantize(values, scale, zero_point, 0, 2**self.config.activation_bits - 1)
        if self.config.scheme == "w4" and self.config.accuracy_level == INT8_COMPUTE:
            return fake_quantize_rows_int8(values, self.config.block_size)
        return values


@contextmanager
def simulate(model: Any, ranges: dict[str, ActivationRange], config: QuantizeConfig) -> Iterator[None]:
    """The torch model computes as the artifact does, inside this block.

    Arguments:
        model: transformers model of the calibrated source (scales folded, clips baked).
        ranges: module path -> input range; empty for weight-only quantization.
    """
    linears = linear_modules(model)
    paths = [] if config.scheme == "none" else quantized_paths(list(linears), config.exclude)
    for path in paths:
        model.set_submodule(path, SimulatedLinear(linears[path], ranges.get(path), config))
    try:
        yield
    finally:
        for path in paths:
            model.set_submodule(path, linears[path])


def check_simulation(
    source: SourceModel,
    ranges: dict[str, ActivationRange],
    artifact: Path,
    config: QuantizeConfig,
    prompts: Sequence[Sequence[int]],
) -> SimulationAgreement:
    """Simulation against artifact, at every position of the prompts.

    Arguments:
        source: the calibrated model.
        artifact: the quantized folder.
        prompts: token ids.

    A value within one float32 rounding error of a tie may get the neighbouring code on one of the two
    sides, which is a whole quantization step; so the tolerance holds for a share of the positions.

    Raises:
        ParityError: at less than `config.agreement_frac` of the positions all logits are within
            `config.atol`, or the next token is the same.
    """
    with simulate(source.model, ranges, config):
        expected = torch_logits(source, prompts)
    found = graph_logits(graph_files(artifact)[0], prompts, pad_id=source.tokenizer.pad_id)
    agreement = simulation_agreement(expected, found, atol=config.atol)
    require_simulation(agreement, config)
    return agreement


def simulation_agreement(
    expected: NDArray[np.float32], found: NDArray[np.float32], *, atol: float
) -> SimulationAgreement:
    """Compare logits [positions, V] of both sides."""
    plain = compare_logits(expected, found)
    within = np.abs(expected - found).max(axis=-1) <= atol
    return SimulationAgreement(**asdict(plain), within_frac=float(within.mean()))


def require_simulation(agreement: SimulationAgreement, config: QuantizeConfig) -> None:
    """Raise ParityError unless both shares reach `config.agreement_frac`."""
    if min(agreement.within_frac, agreement.same_top_frac) < config.agreement_frac:
        raise ParityError(
            f"The simulation and the artifact agree within {config.atol:g} at "
            f"{agreement.within_frac:.1%} of {agreement.positions} positions and choose the same token "
            f"at {agreement.same_top_frac:.1%}, and {config.agreement_frac:.1%} is needed: quantize "
            "again from the calibrated model, or raise `quantize.atol` if the logits are just larger."
        )


@torch.inference_mode()
def torch_logits(
    source: SourceModel, prompts: Sequence[Sequence[int]], *, batch_size: int = 16
) -> NDArray[np.float32]:
    """Logits at every token of the prompts, one after another, float32 [tokens, V]."""
    found = []
    for start in range(0, len(prompts), batch_size):
        ids, mask = pad_left(prompts[start : start + batch_size], source.tokenizer.pad_id)
        output = source.model(
            input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False
        )
        found.append(output.logits[mask.bool()].numpy())
    return np.concatenate(found)


def graph_logits(
    graph: Path, prompts: Sequence[Sequence[int]], *, pad_id: int, batch_size: int = 16
) -> NDArray[np.float32]:
    """The same of an ONNX graph, float32 [tokens, V].

    Raises:
        ExecutionError: ONNX Runtime refuses the graph.
    """
    session = open_session(graph)
    wanted = {item.name for item in session.get_inputs()}
    found = []
    for start in range(0, len(prompts), batch_size):
        ids, mask = pad_left(prompts[start : start + batch_size], pad_id)
        feeds = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        if "position_ids" in wanted:
            feeds["position_ids"] = positions(mask).numpy()
        feeds |= empty_cache(session, rows=len(ids))
        found.append(session.run(["logits"], feeds)[0][mask.bool().numpy()])
    return np.concatenate(found)


def _quantized_weight(weight: Tensor, config: QuantizeConfig) -> Tensor:
    if config.scheme == "w4":
        if config.backend == "inc":
            return fake_quantize_blocks_inc(weight, config.block_size)
        return fake_quantize_blocks(weight, config.block_size)
    return fake_quantize_channels(weight)
