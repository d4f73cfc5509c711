"""The artifact holds exactly what calibration decided, and computes what the simulation does."""

import json
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest

from holdfast.errors import CalibrationError, ParityError, QuantizationError
from holdfast.exporter.export import read_export
from holdfast.exporter.parity import compare_logits
from holdfast.quantize.artifact import quantize_bundle
from holdfast.quantize.graph import Graph, read_blocks, read_static
from holdfast.quantize.record import CALIBRATION_FILE, read_record
from holdfast.quantize.simulate import check_simulation, graph_logits, simulate, torch_logits
from holdfast.recipe import QuantizeConfig
from tests.quantize.conftest import Case

Ids = list[list[int]]


def build(case: Case, out: Path, **changes: object) -> Path:
    """Quantize a case with its own calibration; returns the folder."""
    out.mkdir()
    quantize_bundle(case.exported, out, case.calibrated, msgspec.structs.replace(case.config, **changes))
    return out


@pytest.mark.parametrize("name", ["w8a8", "w8a4"])
def test_learned_ranges_are_read_back_bit_for_bit(
    name: str, cases: dict[str, Case], tmp_path: Path
) -> None:
    case = cases[name]
    out = build(case, tmp_path / "out")
    ranges = json.loads((case.calibrated / CALIBRATION_FILE).read_text())["activation_ranges"]
    modules = read_export(case.exported).modules
    assert set(ranges) == set(modules)
    graph = Graph(onnx.load(out / "model.onnx"))
    for path, linear in modules.items():
        found = read_static(graph, path, linear.output)
        assert float(found.scale) == ranges[path]["scale"]  # float64 of the same float32: exact
        assert found.zero_point == ranges[path]["zero_point"]
        assert (found.clip is None) == (name == "w8a8")


@pytest.mark.parametrize("name", ["w8a8", "w8a4", "w4"])
def test_simulation_and_artifact_agree(
    name: str, cases: dict[str, Case], token_ids: Ids, tmp_path: Path
) -> None:
    case = cases[name]
    out = build(case, tmp_path / "out")
    ranges = case.calibration.record.activation_ranges
    agreement = check_simulation(case.source, ranges, out, case.config, token_ids)
    assert agreement.positions == sum(map(len, token_ids))
    # and the simulation is not simply the float model
    plain = torch_logits(case.source, token_ids)
    with simulate(case.source.model, ranges, case.config):
        simulated = torch_logits(case.source, token_ids)
    assert compare_logits(plain, simulated).mean_abs > 10 * agreement.mean_abs


def test_disagreement_is_an_error(cases: dict[str, Case], token_ids: Ids, tmp_path: Path) -> None:
    case = cases["w8a8"]
    out = build(case, tmp_path / "out")
    other = cases["w8a4"].calibration.record.activation_ranges
    with pytest.raises(ParityError, match="simulation and the artifact"):
        check_simulation(case.source, other, out, case.config, token_ids)


def test_runtime_fuses_integer_products(cases: dict[str, Case], tmp_path: Path) -> None:
    out = build(cases["w8a8"], tmp_path / "out")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(str(out / "model.onnx"), options, providers=["CPUExecutionProvider"])
    nodes = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert nodes.count("MatMulIntegerToFloat") == 15
    assert "DequantizeLinear" not in nodes


def test_embedding_and_attention_stay_float(cases: dict[str, Case], tmp_path: Path) -> None:
    out = build(cases["w8a8"], tmp_path / "out")
    model = onnx.load(out / "model.onnx")
    embedding = read_export(cases["w8a8"].exported).embedding
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert types[embedding] == onnx.TensorProto.FLOAT
    reads = [node for node in model.graph.node if embedding in node.input]
    assert [node.op_type for node in reads] == ["Gather"]
    floats = [n for n in model.graph.node if n.op_type == "MatMul" and "proj" not in n.name]
    producers = {name: node.op_type for node in model.graph.node for name in node.output}
    inner = [node for node in floats if "lm_head" not in node.name]
    assert len(inner) == 5  # rotary embedding, and two in each attention
    assert all(producers.get(n) != "DequantizeLinear" for node in inner for n in node.input)


def test_excluded_linears_read_the_float_tensor(cases: dict[str, Case], tmp_path: Path) -> None:
    """q_proj shares its input with k_proj and v_proj, which stay quantized."""
    case = cases["w8a8"]
    out, excluded = tmp_path / "out", "*.q_proj"
    out.mkdir()
    config = msgspec.structs.replace(case.config, exclude=(excluded, "lm_head"))
    report = quantize_bundle(case.exported, out, None, config)
    assert report.ranges_from == "minmax"
    assert set(report.float32) == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "lm_head",
    }
    graph = Graph(onnx.load(out / "model.onnx"))
    linear = read_export(case.exported).modules["model.layers.0.self_attn.q_proj"]
    assert graph.producers[linear.output].input[0] == linear.input


def test_without_calibration_ranges_are_minmax(
    cases: dict[str, Case], token_ids: Ids, tmp_path: Path
) -> None:
    case, out = cases["w8a8"], tmp_path / "out"
    out.mkdir()
    report = quantize_bundle(case.exported, out, None, case.config)
    assert report.ranges_from == "minmax"
    plain = graph_logits(case.exported / "model.onnx", token_ids, pad_id=0)
    found = graph_logits(out / "model.onnx", token_ids, pad_id=0)
    assert compare_logits(plain, found).same_top_frac > 0.9


def test_report_accounts_for_the_artifact(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["w4"]
    out = build(case, tmp_path / "out")
    report = json.loads((out / "quantize.json").read_text())
    assert report["operators"]["MatMulNBits"] == 15
    assert report["bytes_after"] < report["bytes_before"]
    tensor = report["tensors"]["lm_head"]
    assert (tensor["bits"], tensor["block_size"], tensor["activation_bits"]) == (4, 16, None)
    assert (out / "tokenizer.json").read_bytes() == (case.exported / "tokenizer.json").read_bytes()


def test_learned_block_clips_are_in_the_artifact(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["w4"]
    out = build(case, tmp_path / "out")
    graph = Graph(onnx.load(out / "model.onnx"))
    path = "model.layers.0.mlp.up_proj"
    found = read_blocks(graph, path, read_export(case.exported).modules[path].output)
    weight = case.source.model.get_submodule(path).weight
    kept = weight.reshape(64, -1, 16).abs().amax(dim=2) / 8.0
    np.testing.assert_allclose(np.abs(found.scales.reshape(64, -1)), kept.numpy(), rtol=1e-6)


def test_scheme_none_copies_the_graph(cases: dict[str, Case], tmp_path: Path) -> None:
    case, out = cases["w8a8"], tmp_path / "out"
    out.mkdir()
    report = quantize_bundle(case.exported, out, None, QuantizeConfig(scheme="none"))
    assert report.tensors == {}
    assert len(report.float32) == 15
    assert onnx.load(out / "model.onnx") == onnx.load(case.exported / "model.onnx")


def test_same_input_same_bytes(cases: dict[str, Case], tmp_path: Path) -> None:
    graphs = [(build(cases["w8a8"], tmp_path / name) / "model.onnx").read_bytes() for name in ("a", "b")]
    assert graphs[0] == graphs[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_bits": 6}, "activation_bits 8, and 6 is asked for"),
        ({"exclude": ("lm_head",)}, "exclude"),
        ({"scheme": "w4"}, "scheme 'w8a8', and 'w4'"),
    ],
)
def test_calibration_for_other_settings_is_refused(
    changes: dict[str, object], message: str, cases: dict[str, Case], tmp_path: Path
) -> None:
    with pytest.raises(QuantizationError, match=message):
        build(cases["w8a8"], tmp_path / "out", **changes)


def test_missing_and_broken_records_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"holds no calibration\.json"):
        read_record(tmp_path)
    (tmp_path / CALIBRATION_FILE).write_text('{"method": 3}', encoding="utf-8")
    with pytest.raises(CalibrationError, match="not a calibration record"):
        read_record(tmp_path)
