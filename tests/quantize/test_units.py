"""Units and their bytes: hand-worked, and against the initializers of really quantized graphs."""

from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper

from holdfast.errors import QuantizationError
from holdfast.exporter.architectures import linear_modules
from holdfast.exporter.export import export_model
from holdfast.exporter.source import SourceModel, load_source
from holdfast.quantize.allocation.units import (
    Unit,
    budget_from_bits,
    other_bytes,
    quantizable_units,
    stored_bits,
    unit_bytes,
    unit_sizes,
)
from holdfast.quantize.artifact.write import quantize_bundle
from holdfast.quantize.formats import formats, parse_scheme
from holdfast.recipe import ExportConfig, QuantizeConfig
from tests.tiny import tiny_llama, tiny_model

UNIT = Unit(("m.q", "m.k"), ((6, 40), (2, 40)), 0)


@pytest.mark.parametrize(
    ("scheme", "asymmetric", "expected"),
    [
        ("none", False, 4 * 8 * 40),
        ("w8a8", False, 8 * 40 + 8 * 5 + 5),  # codes, scale and zero point a channel, one input
        ("w8a4", False, 8 * 40 + 8 * 5 + 5 + 8),  # and two ends of a Clip
        ("w8", False, 8 * 2 * 32 + 8 * 2 * 4),  # two blocks of 32 cover 40 channels
        ("w4", False, 8 * 2 * 16 + 8 * 2 * 4),
        ("w2", False, 8 * 2 * 8 + 8 * 2 * 4),
        ("w4a8", False, 8 * 2 * 16 + 8 * 2 * 4 + 5),
        ("w8", True, 8 * 2 * 32 + 8 * 2 * 4 + 8 * 2),  # two zero points a channel: 2, 1 and 1/2 byte
        ("w4", True, 8 * 2 * 16 + 8 * 2 * 4 + 8 * 1),
        ("w2", True, 8 * 2 * 8 + 8 * 2 * 4 + 8 * 1),
    ],
)
def test_hand_worked_bytes(scheme: str, asymmetric: bool, expected: int) -> None:
    config = QuantizeConfig(block_size=32, symmetric_weights=not asymmetric)
    assert unit_bytes(UNIT, parse_scheme(scheme, config)) == expected


def test_what_exports_as_one_is_one_unit(aligned: SourceModel) -> None:
    units = quantizable_units(aligned.model)
    assert [path for unit in units for path in unit.paths] != []
    assert {path for unit in units for path in unit.paths} == set(linear_modules(aligned.model))
    shared = [{path.rpartition(".")[2] for path in unit.paths} for unit in units if unit.block == 1]
    assert {"q_proj", "k_proj", "v_proj"} in shared
    assert {"gate_proj", "up_proj"} in shared
    assert len(units) == 9
    assert (units[-1].name, units[-1].block) == ("lm_head", None)


@pytest.mark.parametrize("architecture", ["Phi3ForCausalLM", "OPTForCausalLM", "FalconForCausalLM"])
def test_other_layouts_lose_no_linear(architecture: str, tmp_path: Path) -> None:
    model = load_source(tiny_model(tmp_path, architecture)).model
    named = [path for unit in quantizable_units(model) for path in unit.paths]
    assert sorted(named) == sorted(linear_modules(model))


@pytest.mark.parametrize("tied", [True, False])
def test_units_and_the_rest_are_the_fp32_graph(tied: bool, tmp_path: Path) -> None:
    """A tied table is in the graph twice: gathered from, and multiplied by."""
    model = load_source(tiny_llama(tmp_path, tied=tied)).model
    units = quantizable_units(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    again = 300 * 32 if tied else 0
    assert sum(unit_bytes(unit, None) for unit in units) + other_bytes(model) == 4 * (parameters + again)


def test_budgets_in_bits(aligned: SourceModel) -> None:
    units = quantizable_units(aligned.model)
    sizes = unit_sizes(units, ["w4"], QuantizeConfig(block_size=32))
    total = sum(sizes.values())
    assert stored_bits(units, total) == 5.0  # 4, and 32 a block of 32
    assert budget_from_bits(units, 5.0) == total
    for bits in (0.0, 33.0):
        with pytest.raises(QuantizationError, match="above 0 and at most 32"):
            budget_from_bits(units, bits)


def test_schemes_to_choose_among() -> None:
    with pytest.raises(QuantizationError, match="different schemes to choose among, got w4, w4"):
        unit_sizes([UNIT], ["w4", "w4"], QuantizeConfig())
    with pytest.raises(QuantizationError, match="There is no scheme `w5`"):
        unit_sizes([UNIT], ["w5"], QuantizeConfig())


# --- against artifacts ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(aligned: SourceModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    export_model(aligned.folder, folder, ExportConfig())
    return folder


def initializer_bytes(folder: Path) -> int:
    graph = onnx.load(folder / "model.onnx").graph
    return sum(numpy_helper.to_array(tensor).nbytes for tensor in graph.initializer)


@pytest.mark.parametrize(
    "config",
    [
        QuantizeConfig(scheme="w8a8"),
        QuantizeConfig(scheme="w8a4"),
        QuantizeConfig(scheme="w4a8"),
        QuantizeConfig(scheme="w8", block_size=16),
        QuantizeConfig(scheme="w2", symmetric_weights=False),
        QuantizeConfig(scheme="w4", mixed={"*.0.*": "w2", "*.down_proj": "w8a8"}, block_size=16),
    ],
    ids=lambda config: f"{config.scheme}{'-mixed' if config.mixed else ''}",
)
def test_bytes_of_a_quantized_graph(
    config: QuantizeConfig, aligned: SourceModel, exported: Path, tmp_path: Path
) -> None:
    quantize_bundle(exported, tmp_path, None, config)
    chosen = formats(list(linear_modules(aligned.model)), config)
    saved = sum(
        unit_bytes(unit, None) - unit_bytes(unit, chosen[unit.name])
        for unit in quantizable_units(aligned.model)
    )
    assert initializer_bytes(exported) - initializer_bytes(tmp_path) == saved
