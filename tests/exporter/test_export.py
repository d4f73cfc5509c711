"""Export: the graph computes what torch does, holds its weights exactly, and never varies."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from holdfast.chat import ChatTokenizer
from holdfast.errors import ExecutionError, ExportError, ParityError
from holdfast.exporter.architectures import linear_modules
from holdfast.exporter.export import export_model, export_source, read_export
from holdfast.exporter.graph import map_linears, node_name
from holdfast.exporter.parity import graph_agreement
from holdfast.exporter.source import SourceModel, load_source, save_source
from holdfast.recipe import ExportConfig
from tests.tiny import tiny_llama, tiny_model

CONFIG = ExportConfig(atol=5e-5)
PLAIN = ExportConfig(target="portable", atol=5e-5)


def export(source: Path, out: Path, config: ExportConfig = CONFIG) -> Any:
    out.mkdir()
    return export_model(source, out, config)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def exported(llama: Path) -> Path:
    export(llama, llama.parent / "exported")
    return llama.parent / "exported"


def initializers(folder: Path) -> dict[str, np.ndarray]:
    graph = onnx.load(folder / "model.onnx").graph
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


@pytest.mark.parametrize("prompt_tokens", [(1,), (2, 1), (124,), (3, 70, 5, 5, 18)])
def test_any_number_of_rows_of_any_length(
    llama: Path, exported: Path, prompt_tokens: tuple[int, ...]
) -> None:
    agreement = graph_agreement(
        exported / "model.onnx", load_source(llama), seed=1, prompt_tokens=prompt_tokens
    )
    assert agreement.max_abs < 2e-5
    assert agreement.positions == sum(prompt_tokens) + 4 * len(prompt_tokens)


@pytest.mark.parametrize(
    ("target", "opset"), [("portable", 17), ("portable", 21), ("cpu-x86", 18), ("cpu-x86", 21)]
)
def test_opsets(llama: Path, tmp_path: Path, target: Any, opset: int) -> None:
    report = export(llama, tmp_path / "out", ExportConfig(target=target, opset=opset, atol=5e-5))
    assert report.opset == opset
    assert onnx.load(tmp_path / "out" / "model.onnx").opset_import[0].version == opset


def test_what_is_written(llama: Path, exported: Path) -> None:
    names = {path.name for path in exported.iterdir()}
    assert names == {
        "model.onnx",
        "export.json",
        "config.json",
        "genai_config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (exported / name).read_bytes() == (llama / name).read_bytes()
    assert ChatTokenizer.from_folder(exported).digest() == ChatTokenizer.from_folder(llama).digest()
    assert str(llama) not in "".join((exported / name).read_text() for name in names - {"model.onnx"})


def test_the_report_reads_back(exported: Path) -> None:
    report = read_export(exported)
    assert report.graph_bytes == (exported / "model.onnx").stat().st_size
    assert report.embedding == "model.embed_tokens.weight"
    assert report.modules["model.layers.0.mlp.down_proj"].node == "/model/layers.0/mlp/down_proj/MatMul"
    assert report.modules["model.layers.0.mlp.down_proj"].weight == "model.layers.0.mlp.down_proj.weight_T"
    packed = [report.modules[f"model.layers.0.self_attn.{name}_proj"] for name in "qkv"]
    assert {place.node for place in packed} == {"/model/layers.0/self_attn/qkv_proj/MatMul"}
    assert [place.columns for place in packed] == [(0, 64), (64, 96), (96, 128)]
    assert json.loads((exported / "export.json").read_text())["tied"] is True


def test_a_tied_head_has_an_initializer_of_its_own(llama: Path, exported: Path) -> None:
    """So that the head can be quantized while the embedding stays a float table for its Gather."""
    found = initializers(exported)
    report = read_export(exported)
    assert report.tied
    assert np.array_equal(found[report.embedding], found[report.modules["lm_head"].weight].T)


def test_exporting_twice_gives_the_same_bytes(llama: Path, exported: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)
    torch.rand(7)
    export(llama, tmp_path / "again")
    for path in exported.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_exporting_leaves_the_random_state_and_the_weights(llama: Path, tmp_path: Path) -> None:
    source = load_source(llama)
    before = {name: value.clone() for name, value in source.model.state_dict().items()}
    state = torch.random.get_rng_state()
    (tmp_path / "out").mkdir()
    export_source(source, tmp_path / "out", CONFIG)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in source.model.state_dict().items())


def test_changed_weights_arrive_exactly(llama: Path, tmp_path: Path) -> None:
    """What pruning and calibration do: values edited in torch, saved, exported."""
    source = load_source(llama)
    linear = source.model.model.layers[1].mlp.down_proj
    linear.weight[::2, 1::3] = 0.0
    linear.weight[0] *= 1.0 + 2.0**-23
    save_source(source, tmp_path / "edited")
    report = export(tmp_path / "edited", tmp_path / "out")
    found = initializers(tmp_path / "out")[report.modules["model.layers.1.mlp.down_proj"].weight]
    assert np.array_equal(found, linear.weight.numpy().T)


@pytest.mark.parametrize("target", ["cpu-x86", "portable"])
def test_large_models_keep_their_weights_beside_the_graph(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: Any
) -> None:
    monkeypatch.setenv("FORCE_ONNX_EXTERNAL_DATA", "1")  # Optimum's switch for what 2 GB would force
    monkeypatch.setattr("holdfast.exporter.export.LARGEST_INLINE_BYTES", 0)
    report = export(llama, tmp_path / "out", ExportConfig(target=target, atol=5e-5))
    assert (tmp_path / "out" / "model.onnx_data").is_file()
    assert report.graph_bytes == sum(
        (tmp_path / "out" / name).stat().st_size for name in ("model.onnx", "model.onnx_data")
    )
    assert report.parity.max_abs < 5e-5


def test_nothing_is_said(llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    export(llama, tmp_path / "out")
    assert capfd.readouterr() == ("", "")


def test_stages_are_announced(llama: Path, tmp_path: Path) -> None:
    stages: list[str] = []
    (tmp_path / "out").mkdir()
    export_model(llama, tmp_path / "out", CONFIG, on_stage=stages.append)
    assert stages == ["tracing", "comparing with torch"]


def test_a_used_folder_is_refused(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ExportError) as caught:
            export_model(llama, out, CONFIG)
        assert str(caught.value) == f"Expected an existing, empty folder to export into, found {out}."


def test_an_opset_that_torch_cannot_write(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="Optimum could not export the LlamaForCausalLM at opset 99"):
        export(llama, tmp_path / "out", ExportConfig(target="portable", opset=99))


def test_attention_as_one_operator_needs_a_newer_opset(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError) as caught:
        export(llama, tmp_path / "out", ExportConfig(opset=17))
    assert str(caught.value) == (
        "The target cpu-x86 needs opset 18 or newer, found 17: leave the opset to the target, or export "
        "with `--target portable`."
    )


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_length_dependent_rotary_embeddings_are_refused(tmp_path: Path, key: str) -> None:
    source = tiny_model(
        tmp_path / "model", "LlamaForCausalLM", rope_scaling={key: "dynamic", "factor": 2.0}
    )
    with pytest.raises(ExportError) as caught:
        export(source, tmp_path / "out")
    assert str(caught.value) == (
        f"The model in {source} scales its rotary embedding by `dynamic`, which depends on the input's "
        "length and cannot be traced: use a checkpoint with a fixed scaling."
    )


def test_weights_that_are_not_numbers(llama: Path, tmp_path: Path) -> None:
    source = load_source(llama)
    source.model.model.layers[0].mlp.up_proj.weight[3, 4] = torch.nan
    (tmp_path / "out").mkdir()
    with pytest.raises(
        ParityError, match="The logits hold NaN or infinity: check the weights of the model"
    ):
        export_source(source, tmp_path / "out", CONFIG)


def test_a_tolerance_below_rounding_fails(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ParityError, match=r"and 1e-12 is allowed \(check `prefill`"):
        export(llama, tmp_path / "out", ExportConfig(atol=1e-12))


@pytest.mark.parametrize("change", ["model.norm.weight", "model.layers.1.input_layernorm.weight"])
def test_the_comparison_sees_a_wrong_graph(
    llama: Path, exported: Path, tmp_path: Path, change: str
) -> None:
    """A weight that no linear check covers, off by one per mille in one channel."""
    model = onnx.load(exported / "model.onnx")
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == change)
    values = numpy_helper.to_array(tensor).copy()
    values[5] *= 1.001
    tensor.CopyFrom(numpy_helper.from_array(values, change))
    onnx.save(model, tmp_path / "model.onnx")
    assert graph_agreement(tmp_path / "model.onnx", load_source(llama), seed=0).max_abs > 2e-5


def test_the_comparison_sees_a_lost_padding_mask(llama: Path, exported: Path, tmp_path: Path) -> None:
    """A graph that attends to the padding is right for one row and wrong for a padded batch."""
    model = onnx.load(exported / "model.onnx")
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == "attention_mask":
                node.input[index] = "every_one"
    shape = onnx.helper.make_node("Shape", ["attention_mask"], ["mask_shape"])
    one = onnx.helper.make_tensor("one", onnx.TensorProto.INT64, [1], [1])
    ones = onnx.helper.make_node("ConstantOfShape", ["mask_shape"], ["every_one"], value=one)
    model.graph.node.insert(0, ones)
    model.graph.node.insert(0, shape)
    onnx.save(model, tmp_path / "model.onnx")
    assert graph_agreement(tmp_path / "model.onnx", load_source(llama), seed=0).max_abs > 0.1


def test_a_graph_that_onnx_runtime_refuses(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(ExecutionError, match="ONNX Runtime cannot load"):
        graph_agreement(tmp_path / "model.onnx", load_source(llama), seed=0)


def test_a_foreign_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"Expected the export\.json that `holdfast export` writes"):
        read_export(tmp_path)
    for content in ("{}", "[", '{"modules": {}, "proof": {}}'):
        (tmp_path / "export.json").write_text(content)
        with pytest.raises(
            ExportError, match=r"export\.json is not one that this version of `holdfast exp"
        ):
            read_export(tmp_path)


class TestMapping:
    """What the map of linear layers in a plain graph refuses."""

    @pytest.fixture(scope="class")
    def plain(self, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        out = tmp_path_factory.mktemp("plain") / "out"
        export(llama, out, PLAIN)
        return out

    @pytest.fixture
    def graph(self, plain: Path) -> onnx.GraphProto:
        return onnx.load(plain / "model.onnx").graph

    @pytest.fixture
    def source(self, llama: Path) -> SourceModel:
        return load_source(llama)

    def test_a_linear_that_is_not_there(self, graph: onnx.GraphProto, source: SourceModel) -> None:
        node = next(node for node in graph.node if node.name == "/model/layers.1/mlp/up_proj/MatMul")
        node.name = "/fused"
        with pytest.raises(ExportError) as caught:
            map_linears(graph, linear_modules(source.model), source.folder)
        assert str(caught.value) == (
            "The graph has no weight for the linear layer `model.layers.1.mlp.up_proj`: this version of "
            "Optimum writes it differently, so use the versions that Holdfast names."
        )

    def test_a_weight_that_differs_in_one_bit(self, graph: onnx.GraphProto, source: SourceModel) -> None:
        weight = source.model.model.layers[0].self_attn.k_proj.weight
        weight[1, 2] = torch.nextafter(weight[1, 2], torch.tensor(9.0))
        with pytest.raises(
            ExportError, match=r"The graph's weight for `model.layers.0.self_attn.k_proj` is"
        ):
            map_linears(graph, linear_modules(source.model), source.folder)

    def test_a_product_that_no_module_accounts_for(
        self, graph: onnx.GraphProto, source: SourceModel
    ) -> None:
        modules = linear_modules(source.model)
        del modules["model.layers.1.mlp.gate_proj"]
        with pytest.raises(ExportError) as caught:
            map_linears(graph, modules, source.folder)
        assert str(caught.value) == (
            "The graph multiplies by a weight at `/model/layers.1/mlp/gate_proj/MatMul` that belongs to "
            "no linear layer of the architecture table."
        )

    def test_names(self) -> None:
        assert node_name("model.layers.10.self_attn.q_proj") == "/model/layers.10/self_attn/q_proj"
        assert node_name("lm_head") == "/lm_head"


def test_a_folder_without_generation_config_keeps_its_stop_ids(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "model")
    (source / "generation_config.json").unlink()
    export(source, tmp_path / "out")
    assert ChatTokenizer.from_folder(tmp_path / "out").eos_ids == (3,)
