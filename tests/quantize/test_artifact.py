"""The artifact holds exactly what calibration decided, and computes what the simulation does."""

import json
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest

from holdfast.errors import CalibrationError, ParityError, QuantizationError
from holdfast.exporter.export import export_model, read_export
from holdfast.exporter.parity import compare_logits
from holdfast.exporter.source import SourceModel
from holdfast.quantize.artifact.finish import finish_artifact
from holdfast.quantize.artifact.read_back import read_back
from holdfast.quantize.artifact.write import QuantizeReport, quantize_bundle, ranges_of
from holdfast.quantize.decisions import Decisions
from holdfast.quantize.fakequant import round_weight
from holdfast.quantize.formats import formats, parse_scheme
from holdfast.quantize.graph import Graph, read_blocks, read_static
from holdfast.quantize.record import CALIBRATION_FILE, read_record
from holdfast.quantize.simulate import check_simulation, graph_logits, simulate, torch_logits
from holdfast.recipe import ExportConfig, QuantizeConfig
from holdfast.runtime.session import OnnxLanguageModel
from tests.quantize.conftest import Case

Ids = list[list[int]]
PRODUCTS = 9  # two layers of QKV, output, gate with up, down; and the head


def build(case: Case, out: Path, **changes: object) -> Path:
    """Quantize a case with its own calibration; returns the folder."""
    out.mkdir()
    quantize_bundle(case.exported, out, case.calibrated, msgspec.structs.replace(case.config, **changes))
    return out


def read_report(folder: Path) -> QuantizeReport:
    return msgspec.json.decode((folder / "quantize.json").read_bytes(), type=QuantizeReport)


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
        assert float(found.input.scale) == ranges[path]["scale"]  # float64 of the same float32: exact
        assert found.input.zero_point == ranges[path]["zero_point"]
        assert (found.input.clip is None) == (name == "w8a8")


@pytest.mark.parametrize("name", ["w8a8", "w8a4", "w4"])
def test_simulation_and_artifact_agree(
    name: str, cases: dict[str, Case], token_ids: Ids, tmp_path: Path
) -> None:
    case = cases[name]
    out = build(case, tmp_path / "out")
    decided = case.calibration.decisions(case.config)
    agreement = check_simulation(case.source, decided, out, case.config, token_ids)
    assert agreement.positions == sum(map(len, token_ids))
    # and the simulation is not simply the float model
    plain = torch_logits(case.source, token_ids)
    with simulate(case.source.model, decided, case.config):
        simulated = torch_logits(case.source, token_ids)
    assert compare_logits(plain, simulated).mean_abs > 10 * agreement.mean_abs


def test_disagreement_is_an_error(cases: dict[str, Case], token_ids: Ids, tmp_path: Path) -> None:
    case = cases["w8a8"]
    out = build(case, tmp_path / "out")
    other = cases["w8a4"].calibration.decisions(cases["w8a4"].config)
    with pytest.raises(ParityError, match="simulation and the artifact"):
        check_simulation(case.source, other, out, case.config, token_ids)


def test_runtime_fuses_integer_products(cases: dict[str, Case], tmp_path: Path) -> None:
    out = build(cases["w8a8"], tmp_path / "out")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(str(out / "model.onnx"), options, providers=["CPUExecutionProvider"])
    nodes = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert nodes.count("MatMulIntegerToFloat") == PRODUCTS
    assert "DequantizeLinear" not in nodes


def test_embedding_and_attention_stay_float(cases: dict[str, Case], tmp_path: Path) -> None:
    out = build(cases["w8a8"], tmp_path / "out")
    model = onnx.load(out / "model.onnx")
    embedding = read_export(cases["w8a8"].exported).embedding
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert types[embedding] == onnx.TensorProto.FLOAT
    reads = [node for node in model.graph.node if embedding in node.input]
    assert [node.op_type for node in reads] == ["Gather"]
    producers = {name: node.op_type for node in model.graph.node for name in node.output}
    attention = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    assert len(attention) == 2
    assert all(producers.get(name) != "DequantizeLinear" for node in attention for name in node.input)


@pytest.fixture(scope="module")
def plain(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph in which every linear has a MatMul of its own."""
    out = tmp_path_factory.mktemp("plain")
    export_model(cases["w8a8"].calibrated, out, ExportConfig(target="portable"))
    return out


def test_excluded_linears_read_the_float_tensor(
    cases: dict[str, Case], plain: Path, tmp_path: Path
) -> None:
    """q_proj shares its input with k_proj and v_proj, which stay quantized."""
    case = cases["w8a8"]
    out, excluded = tmp_path / "out", "*.q_proj"
    out.mkdir()
    config = msgspec.structs.replace(case.config, exclude=(excluded, "lm_head"))
    report = quantize_bundle(plain, out, None, config)
    assert report.ranges_from == "minmax"
    assert set(report.float32) == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "lm_head",
    }
    graph = Graph(onnx.load(out / "model.onnx"))
    linear = read_export(plain).modules["model.layers.0.self_attn.q_proj"]
    assert graph.producers[linear.output].input[0] == linear.input


def test_a_part_of_a_packed_product_cannot_be_excluded(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["w8a8"]
    config = msgspec.structs.replace(case.config, exclude=("*.q_proj",))
    with pytest.raises(QuantizationError) as caught:
        quantize_bundle(case.exported, tmp_path, None, config)
    said = str(caught.value)
    assert "`model.layers.0.self_attn.q_proj`" in said
    assert said.endswith(
        "share one MatMul in this graph, and `exclude` or `mixed` gives them different formats: name all "
        "that share it, or export with `target: portable`."
    )
    whole = msgspec.structs.replace(case.config, exclude=("*.q_proj", "*.k_proj", "*.v_proj"))
    assert len(quantize_bundle(case.exported, tmp_path, None, whole).tensors) == 9


def test_a_graph_for_phones_is_one_file_in_ort_format(cases: dict[str, Case], tmp_path: Path) -> None:
    case, exported, out = cases["w8a8"], tmp_path / "exported", tmp_path / "out"
    exported.mkdir()
    out.mkdir()
    export_model(case.calibrated, exported, ExportConfig(target="mobile"))
    report = quantize_bundle(exported, out, case.calibrated, case.config)
    report = finish_artifact(exported, out, report, case.config)
    names = {path.name for path in out.iterdir()}
    assert {"model.ort", "required_operators.config"} < names
    assert not {"model.onnx", "model.onnx_data"} & names
    assert report.bytes_after == (out / "model.ort").stat().st_size
    config = json.loads((out / "genai_config.json").read_text())
    assert config["model"]["decoder"]["filename"] == "model.ort"
    check_simulation(
        case.source, case.calibration.decisions(case.config), out, case.config, [[5, 40, 7, 11], [3, 9]]
    )


@pytest.mark.parametrize(("width", "bits"), [("fp16", 16), ("int8", 8)])
def test_a_narrower_cache_keeps_most_next_tokens(
    cases: dict[str, Case], token_ids: Ids, tmp_path: Path, width: str, bits: int
) -> None:
    case = cases["w8a8"]
    out = build(case, tmp_path / "out", kv_cache=width)
    config = msgspec.structs.replace(case.config, kv_cache=width)
    before = OnnxLanguageModel.open(case.exported)
    report = finish_artifact(case.exported, out, read_report(out), config)
    after = OnnxLanguageModel.open(out)
    assert (report.kv_cache, json.loads((out / "quantize.json").read_text())["kv_cache"]) == (width, width)
    assert after.graph.cache_token_bytes == before.graph.cache_token_bytes * bits // 32
    float_cache = OnnxLanguageModel.open(build(case, tmp_path / "float"))
    same = float_cache.next_token_logits(token_ids).argmax(-1) == after.next_token_logits(token_ids).argmax(
        -1
    )
    assert same.mean() >= 0.9


def test_a_plain_graph_has_no_cache_to_narrow(cases: dict[str, Case], plain: Path, tmp_path: Path) -> None:
    config = msgspec.structs.replace(cases["w8a8"].config, kv_cache="int8")
    with pytest.raises(QuantizationError, match=r"`kv_cache: int8` needs attention as one operator"):
        quantize_bundle(plain, tmp_path, None, config)


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
    assert report["operators"]["MatMulNBits"] == PRODUCTS
    assert len(report["tensors"]) == 15
    assert report["bytes_after"] < report["bytes_before"]
    tensor = report["tensors"]["lm_head"]
    assert (tensor["bits"], tensor["block_size"], tensor["activation_bits"]) == (4, 16, None)
    assert (out / "tokenizer.json").read_bytes() == (case.exported / "tokenizer.json").read_bytes()


def test_learned_codes_are_in_the_artifact(cases: dict[str, Case], tmp_path: Path) -> None:
    """Packed with its neighbour, and not what rounding to nearest would give."""
    case = cases["w4"]
    out = build(case, tmp_path / "out")
    graph = Graph(onnx.load(out / "model.onnx"))
    path = "model.layers.0.mlp.up_proj"
    place = read_export(case.exported).modules[path]
    found = read_blocks(graph, path, place.output)
    assert place.columns is not None
    rows = slice(*place.columns)
    learned = case.calibration.codes[path]
    scales = found.scales.reshape(-1, learned.scales.shape[1])[rows]
    np.testing.assert_array_equal(scales, learned.scales.numpy())
    codes = np.stack([found.packed & 15, found.packed >> 4], axis=-1).astype(int) - 8
    codes = codes.reshape(len(codes), -1)[rows]
    np.testing.assert_array_equal(codes, learned.codes.numpy())
    nearest = round_weight(case.source.model.get_submodule(path).weight, parse_scheme("w4", case.config))
    assert bool((nearest.codes != learned.codes).any())


def test_changed_codes_are_noticed(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["w4"]
    out = build(case, tmp_path / "out")
    decided = case.calibration.decisions(case.config)
    path = "model.layers.1.mlp.down_proj"
    codes = decided.codes[path].codes.clone()
    codes[0, 0] = -codes[0, 0] - 1
    changed = replace(decided, codes=decided.codes | {path: replace(decided.codes[path], codes=codes)})
    modules = read_export(case.exported).modules
    model = onnx.load(out / "model.onnx")
    read_back(model, modules, decided, case.config)
    with pytest.raises(QuantizationError, match=f"does not hold the codes and scales.*`{path}`"):
        read_back(model, modules, changed, case.config)


MANY = {
    "signed": {"scheme": "w8a8", "signed_activations": True},
    "one scale": {"scheme": "w8a8", "per_channel": False, "symmetric_activations": True},
    "2 bits": {"scheme": "w2", "block_size": 16},
    "2 bits, wide blocks": {"scheme": "w2", "block_size": 32},
    "8 bits alone": {"scheme": "w8", "block_size": 16, "symmetric_weights": False},
    "4 bits, static": {"scheme": "w4a8", "block_size": 16},
    "mixed": {"scheme": "w4", "block_size": 16, "mixed": {"*.down_proj": "w8a8", "lm_head": "none"}},
}


@pytest.mark.parametrize("name", MANY)
def test_every_format_is_written_and_simulated(
    name: str, aligned: SourceModel, token_ids: Ids, tmp_path: Path
) -> None:
    config = QuantizeConfig(**MANY[name], ranges="minmax", atol=0.05, agreement_frac=0.98)
    for folder in ("exported", "out"):
        (tmp_path / folder).mkdir()
    export_model(aligned.folder, tmp_path / "exported", ExportConfig())
    report = quantize_bundle(tmp_path / "exported", tmp_path / "out", None, config)
    decided = Decisions(formats([*report.tensors, *report.float32], config), ranges_of(report))
    assert {path: tensor.scheme for path, tensor in report.tensors.items()} == {
        path: form.name for path, form in decided.formats.items()
    }
    agreement = check_simulation(aligned, decided, tmp_path / "out", config, token_ids)
    plain = graph_logits(tmp_path / "exported" / "model.onnx", token_ids, pad_id=0)
    found = graph_logits(tmp_path / "out" / "model.onnx", token_ids, pad_id=0)
    assert compare_logits(plain, found).mean_abs > 5 * agreement.mean_abs


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
        ({"scheme": "w8a6"}, "in w8a8, and w8a6 is asked for"),
        ({"exclude": ("lm_head",)}, "`lm_head` in w8a8, and none is asked for"),
        ({"signed_activations": True}, "signed_activations False, and True is asked for"),
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
