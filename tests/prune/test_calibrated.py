"""Pruning and quantization in either order: the zeros are in the artifact, and nothing else changed."""

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor

from holdfast.cli import run_cli
from holdfast.errors import PruneError
from holdfast.exporter.architectures import block_linear_modules
from holdfast.exporter.export import export_model
from holdfast.exporter.graph import GraphLinear
from holdfast.exporter.source import load_source
from holdfast.prune.calibrated import with_zeros
from holdfast.quantize.artifact.write import quantize_bundle
from holdfast.quantize.graph import Graph, read_blocks, read_static
from holdfast.quantize.record import read_record
from holdfast.quantize.weights.codes import PackedWeight, WeightCodes, load_codes, unpack
from holdfast.recipe import ExportConfig, QuantizeConfig
from tests.tiny import tiny_llama

Capture = pytest.CaptureFixture[str]
SCHEMES = {name: ["--scheme", name, "--block-size", "16"] for name in ("w8a8", "w4")}
FEW = ["--samples", "24"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    return tiny_llama(root / "aligned", seed=0), tiny_llama(root / "base", seed=1)


def calibrate(model: Path, base: Path, aligned: Path, scheme: str, out: Path) -> None:
    options = ["--aligned", str(aligned), "--base", str(base), "--steps", "1", "--alpha", "0"]
    assert run_cli(["calibrate", str(model), *options, *SCHEMES[scheme], "--out", str(out)]) == 0


def prune(model: Path, out: Path, *options: str) -> int:
    return run_cli(["prune", str(model), "--method", "magnitude", "--out", str(out), *FEW, *options])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("order", ["prune first", "calibrate first"])
def test_zeros_of_either_order_are_in_the_artifact(
    scheme: str, order: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    aligned, base = folders
    first, second = tmp_path / "first", tmp_path / "second"
    if order == "prune first":
        assert prune(aligned, first) == 0
        calibrate(first, base, aligned, scheme, second)
        zeros = first
    else:
        calibrate(aligned, base, aligned, scheme, first)
        assert prune(first, second) == 0
        zeros = second
    linears = block_linear_modules(load_source(zeros).model)
    masks = {path: linear.weight == 0 for path, linear in linears.items()}
    assert sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values()) > 0.49
    config = QuantizeConfig(scheme=scheme, block_size=16)
    exported, artifact = tmp_path / "exported", tmp_path / "artifact"
    exported.mkdir()
    artifact.mkdir()
    places = export_model(second, exported, ExportConfig()).modules
    quantize_bundle(exported, artifact, second, config)
    graph = Graph(onnx.load(artifact / "model.onnx"))
    for path, mask in masks.items():
        held = held_weight(graph, path, places[path], mask.shape[1], blocks=scheme == "w4")
        assert bool((held[mask] == 0).all()), path
        assert int((held == 0).sum()) < held.numel()


def held_weight(graph: Graph, path: str, place: GraphLinear, inputs: int, *, blocks: bool) -> Tensor:
    """Integer codes of one linear in the artifact, less their zero point, [out, in]."""
    rows = slice(*(place.columns or (None,)))
    if not blocks:
        return torch.from_numpy(read_static(graph, path, place.output).weight_codes.T.copy())[rows]
    found = read_blocks(graph, path, place.output)
    assert found.symmetric
    packed = torch.from_numpy(found.packed.copy())
    scales = torch.from_numpy(found.scales.copy())
    return unpack(PackedWeight(packed, scales, None), bits=found.bits, in_features=inputs).codes[rows]


def test_the_calibration_is_carried_and_only_zeros_are_new(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    aligned, base = folders
    calibrate(aligned, base, aligned, "w4", tmp_path / "first")
    assert prune(tmp_path / "first", tmp_path / "second", "--sparsity", "0.25") == 0
    assert read_record(tmp_path / "first") == read_record(tmp_path / "second")
    before, after = load_codes(tmp_path / "first"), load_codes(tmp_path / "second")
    linears = block_linear_modules(load_source(tmp_path / "second").model)
    for path, weight in before.items():
        kept = linears[path].weight != 0 if path in linears else torch.ones(1, dtype=torch.bool)
        assert torch.equal(torch.where(kept, weight.codes, 0), after[path].codes)


def test_zero_is_the_zero_point() -> None:
    codes = torch.tensor([[1, 2, 3, 4]], dtype=torch.int8)
    points = torch.tensor([[-3.0, 5.0]])
    weight = WeightCodes(codes, torch.ones(1, 2), points, 4, 2)
    zero = torch.tensor([[True, False, False, True]])
    pruned = with_zeros("x", weight, zero)
    assert pruned.codes.tolist() == [[-3, 2, 3, 5]]
    assert pruned.dequantized()[zero].tolist() == [0.0, 0.0]
    between = WeightCodes(codes, torch.ones(1, 2), points + 0.5, 4, 2)
    with pytest.raises(PruneError, match="zero points between two codes"):
        with_zeros("x", between, zero)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "sparsegpt"], "`sparsegpt` changes the weights that stay, whose codes are decided"),
        (["--remove", "channels"], "remove structures first, then calibrate"),
    ],
)
def test_what_changes_decided_weights_is_refused(
    options: list[str], said: str, folders: tuple[Path, Path], tmp_path: Path, capsys: Capture
) -> None:
    aligned, base = folders
    calibrate(aligned, base, aligned, "w4", tmp_path / "first")
    capsys.readouterr()
    assert prune(tmp_path / "first", tmp_path / "second", *options) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "second").exists()
