"""The first node that departs: built faults are found where they were put, in both forms of a graph."""

import os
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch

from holdfast.exporter.batching import pad_left
from holdfast.exporter.departure import Departure, checkpoints, first_departure, written_linears
from holdfast.exporter.source import SourceModel, load_source
from tests.exporter.broken import attribute, changed, export_fused, export_plain, no_change, scaled
from tests.tiny import tiny_model

IDS, MASK = pad_left([[5, 40, 7, 260, 11, 90, 33], [8, 7, 200]], 0)
COLUMN = (slice(None), slice(3, 4))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SourceModel:
    """Heads of 16: GroupQueryAttention rotates no smaller ones."""
    folder = tmp_path_factory.mktemp("llama")
    return load_source(tiny_model(folder, "LlamaForCausalLM", tie_word_embeddings=False, head_dim=16))


@pytest.fixture(scope="module")
def plain(source: SourceModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_plain(source, tmp_path_factory.mktemp("plain") / "out")


@pytest.fixture(scope="module")
def fused(source: SourceModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_fused(source, tmp_path_factory.mktemp("fused") / "out")


@pytest.fixture(params=["plain", "fused"])
def graph(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def search(
    graph: Path, source: SourceModel, cached_tokens: int = 0, rtol: float = 3e-5
) -> Departure | None:
    return first_departure(graph, source, IDS, MASK, atol=1e-6, rtol=rtol, cached_tokens=cached_tokens)


def constant_of(graph: Path, node: str) -> str:
    """The Constant that a node reads."""
    nodes = onnx.load(graph).graph.node
    constants = {item.output[0] for item in nodes if item.op_type == "Constant"}
    return next(name for item in nodes if item.name == node for name in item.input if name in constants)


@pytest.mark.parametrize("cached_tokens", [0, 6])
def test_a_good_graph_has_none(graph: Path, source: SourceModel, cached_tokens: int) -> None:
    assert search(graph, source, cached_tokens) is None


def test_every_linear_and_norm_is_a_checkpoint(graph: Path, source: SourceModel) -> None:
    """Without a map too, for a plain graph: a MatMul is named after its module."""
    points = checkpoints(onnx.load(graph).graph, source.model, written_linears(graph.parent))
    names = [str(point) for point in points]
    block = "model.layers.1."
    for name in ("q", "k", "v", "o"):
        assert f"{block}self_attn.{name}_proj (output)" in names
    for name in (
        f"{block}input_layernorm (output)",
        f"{block}self_attn.o_proj (input)",
        f"{block}post_attention_layernorm (input)",
        f"{block}mlp.down_proj (input)",
        "model.layers.1 (key cache)",
        "model.embed_tokens (output)",
        "model.norm (output)",
        "lm_head (output)",
    ):
        assert name in names, name
    assert [point.index for point in points] == sorted(point.index for point in points)


PLAIN_FAULTS: dict[str, tuple[str, str, float, tuple[slice, ...], str, str]] = {
    "a weight": (
        "",
        "model.layers.1.mlp.up_proj.weight_T",
        1.1,
        COLUMN,
        "/model/layers.1/mlp/up_proj/MatMul",
        "model.layers.1.mlp.up_proj (output)",
    ),
    "an epsilon": (
        "/model/layers.1/post_attention_layernorm/Add",
        "",
        1e4,
        (),
        "/model/layers.1/post_attention_layernorm/Mul_1",
        "model.layers.1.post_attention_layernorm (output)",
    ),
    "the weight of a norm": (
        "",
        "model.norm.weight",
        1.01,
        (slice(5, 6),),
        "/model/norm/Mul_1",
        "model.norm (output)",
    ),
    "an attention scale": (
        "/model/layers.1/self_attn/Mul_8",
        "",
        1.05,
        (),
        "/model/layers.1/self_attn/Reshape_7",
        "model.layers.1.self_attn.o_proj (input)",
    ),
    "the embedding": (
        "",
        "model.embed_tokens.weight",
        1.01,
        (slice(7, 8),),
        "/model/embed_tokens/Gather",
        "model.embed_tokens (output)",
    ),
    "the rotary embedding": (
        "/model/rotary_emb/Mul_1",
        "",
        1.01,
        (),
        "/model/rotary_emb/Cast_4",
        "model.rotary_emb (output 0)",
    ),
}


@pytest.mark.parametrize("fault", PLAIN_FAULTS)
@pytest.mark.parametrize("cached_tokens", [0, 6])
def test_a_fault_of_a_plain_graph(
    plain: Path, source: SourceModel, tmp_path: Path, fault: str, cached_tokens: int
) -> None:
    node, tensor, factor, place, expected, module = PLAIN_FAULTS[fault]
    tensor = tensor or constant_of(plain, node)
    broken = changed(plain, tmp_path / "broken", scaled(tensor, factor, place))
    if fault == "the embedding" and cached_tokens:
        return  # the token is not among the new ones
    found = search(broken, source, cached_tokens)
    assert found is not None
    assert (found.node, found.module) == (expected, module)
    assert found.max_abs > found.allowed > 0
    assert found.region[-1] == expected
    assert not node or node in found.region


GQA = "/model/layers.1/self_attn/GroupQueryAttention"
SKIP = "/model/layers.1/post_attention_layernorm/SkipSimplifiedLayerNormalization"
FUSED_FAULTS: dict[str, tuple[Callable[[onnx.GraphProto], None], str, str, str]] = {  # and what agrees
    "an attention scale": (
        attribute(GQA, "scale", 1.05),
        GQA,
        "model.layers.1.self_attn.o_proj (input)",
        "model.layers.1.self_attn.v_proj (output)",
    ),
    "an epsilon": (
        attribute(SKIP, "epsilon", 1e4),
        SKIP,
        "model.layers.1.post_attention_layernorm (output)",
        "model.layers.1.self_attn.o_proj (output)",
    ),
}


@pytest.mark.parametrize("fault", FUSED_FAULTS)
def test_a_fault_of_a_fused_graph(fused: Path, source: SourceModel, tmp_path: Path, fault: str) -> None:
    change, node, module, agreed = FUSED_FAULTS[fault]
    found = search(changed(fused, tmp_path / "broken", change), source)
    assert found is not None
    assert (found.node, found.module, found.agreed) == (node, module, agreed)
    assert found.region == (node,) or node == GQA


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_a_packed_weight_names_its_module(
    fused: Path, source: SourceModel, tmp_path: Path, part: str
) -> None:
    place = written_linears(fused.parent)[f"model.layers.1.self_attn.{part}_proj"]
    assert place.columns is not None
    column = (slice(None), slice(place.columns[0], place.columns[0] + 1))
    found = search(changed(fused, tmp_path / "broken", scaled(place.weight, 1.1, column)), source)
    assert found is not None
    assert found.node == place.node
    assert found.module == f"model.layers.1.self_attn.{part}_proj (output)"


def test_a_rotary_cache_departs_in_the_attention_that_reads_it(
    fused: Path, source: SourceModel, tmp_path: Path
) -> None:
    nodes = onnx.load(fused).graph.node
    cosines = next(node.input[7] for node in nodes if node.op_type == "GroupQueryAttention")
    found = search(changed(fused, tmp_path / "broken", scaled(cosines, 1.01)), source)
    assert found is not None
    assert found.node == "/model/layers.0/self_attn/GroupQueryAttention"


def test_a_cache_that_only_the_next_run_reads(plain: Path, source: SourceModel, tmp_path: Path) -> None:
    """The graph's own logits are right, and it leaves wrong values behind."""

    def change(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            for names in (node.output, node.input):
                for index, name in enumerate(names):
                    names[index] = "kept" if name == "present.1.value" else name
        graph.node.append(
            onnx.helper.make_node("Add", ["kept", "kept"], ["present.1.value"], name="/wrong")
        )

    broken = changed(plain, tmp_path / "broken", change)
    found = search(broken, source)
    assert found is None or found.node == "/wrong"
    later = search(broken, source, cached_tokens=6)
    assert later is not None
    assert later.node.startswith("/model/layers.1/self_attn/")


def test_weights_in_a_file_of_their_own(plain: Path, source: SourceModel, tmp_path: Path) -> None:
    for name, change in (
        ("good", no_change),
        ("broken", scaled("model.layers.0.mlp.down_proj.weight_T", 1.1, COLUMN)),
    ):
        inline = changed(plain, tmp_path / f"{name} inline", change)
        (tmp_path / name).mkdir()
        model = onnx.load(inline)
        onnx.save(
            model,
            tmp_path / name / "model.onnx",
            save_as_external_data=True,
            location="model.onnx_data",
            size_threshold=0,
        )
    assert os.path.getsize(tmp_path / "good" / "model.onnx_data") > 10_000
    assert search(tmp_path / "good" / "model.onnx", source) is None
    found = search(tmp_path / "broken" / "model.onnx", source)
    assert found is not None
    assert found.node == "/model/layers.0/mlp/down_proj/MatMul"


def test_torch_is_left_without_hooks(plain: Path, source: SourceModel) -> None:
    search(plain, source)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in source.model.modules())


def test_a_looser_tolerance_lets_a_small_fault_pass(
    plain: Path, source: SourceModel, tmp_path: Path
) -> None:
    weight = "model.layers.1.mlp.up_proj.weight_T"
    broken = changed(plain, tmp_path / "broken", scaled(weight, 1.001, COLUMN))
    assert search(broken, source) is not None
    assert search(broken, source, rtol=0.1) is None


def test_nan_departs(plain: Path, source: SourceModel, tmp_path: Path) -> None:
    weight = "model.layers.1.mlp.up_proj.weight_T"
    broken = changed(plain, tmp_path / "broken", scaled(weight, torch.nan, COLUMN))
    found = search(broken, source)
    assert found is not None
    assert found.node == "/model/layers.1/mlp/up_proj/MatMul"
