"""Loading a graph: what is refused, with which sentence, and where positions come from."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from holdfast.errors import ExecutionError
from holdfast.runtime.cache import GrowingCache
from holdfast.runtime.graph import PROVIDER, DecoderGraph, positions


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def test_a_graph_says_what_it_needs(exported: Path) -> None:
    graph = DecoderGraph.open(exported, threads=1)
    assert graph.vocabulary_size == 300
    assert graph.takes_positions
    assert [entry.past for entry in graph.cache_inputs] == [
        f"past_key_values.{layer}.{part}" for layer in (0, 1) for part in ("key", "value")
    ]
    assert not graph.shares_cache
    assert not graph.takes_keep
    cache = graph.empty_cache(3, capacity=50)
    assert isinstance(cache, GrowingCache)
    assert [array.shape for array in cache.arrays] == [(3, 2, 0, 16)] * 4
    assert graph.session.get_providers() == [PROVIDER]


def test_cached_steps_equal_one_pass_over_everything(exported: Path) -> None:
    graph = DecoderGraph.open(exported, threads=1)
    ids = np.arange(30, 42, dtype=np.int64)[None]
    mask = np.ones_like(ids)
    whole, _ = graph.forward(ids, mask, graph.empty_cache(1))
    cache, parts = graph.empty_cache(1), []
    for start, stop in ((0, 5), (5, 6), (6, 12)):
        logits, cache = graph.forward(ids[:, start:stop], mask[:, :stop], cache)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-5, rtol=0)
    assert isinstance(cache, GrowingCache)
    assert cache.arrays[0].shape == (1, 2, 12, 16)
    assert cache.tokens == 12


def test_positions_count_from_the_first_token_that_is_not_padding() -> None:
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert positions(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", r"model\.onnx is empty"),
        (b"not an onnx file at all", "not a readable ONNX graph"),
        (b"\x0a\x03abc", r"ONNX Runtime .* could not load"),
    ],
)
def test_a_broken_file_is_one_sentence(copy: Path, content: bytes, sentence: str) -> None:
    (copy / "model.onnx").write_bytes(content)
    with pytest.raises(ExecutionError, match=sentence) as caught:
        DecoderGraph.open(copy)
    assert "\n" not in str(caught.value)


def test_a_truncated_graph_is_refused(copy: Path) -> None:
    path = copy / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ExecutionError, match="not a readable ONNX graph"):
        DecoderGraph.open(copy)


def test_a_graph_without_a_cache_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("Cast", ["input_ids"], ["logits"], to=TensorProto.FLOAT)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "s"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "s"])],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(proto, tmp_path / "model.onnx")
    with pytest.raises(ExecutionError, match=r"missing: \['attention_mask'\]; unknown inputs: \[\]"):
        DecoderGraph.open(tmp_path)


def test_an_unknown_input_is_named(copy: Path) -> None:
    proto = onnx.load(copy / "model.onnx")
    extra = helper.make_tensor_value_info("token_type_ids", TensorProto.INT64, ["b"])
    proto.graph.input.append(extra)
    onnx.save(proto, copy / "model.onnx")
    with pytest.raises(ExecutionError, match=r"unknown inputs: \['token_type_ids'\]"):
        DecoderGraph.open(copy)


def retype_cache(path: Path, elem_type: int, *, present: bool) -> None:
    """Casts around a plain graph: its cache is of another type, or without `present` its past alone."""
    proto = onnx.load(path)
    pasts = {node.name: f"{node.name}.float" for node in proto.graph.input if "past_key" in node.name}
    presents = {node.name: f"{node.name}.float" for node in proto.graph.output if "present" in node.name}
    renamed = pasts | (presents if present else {})
    for node in proto.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    for past, wide in pasts.items():
        proto.graph.node.insert(0, helper.make_node("Cast", [past], [wide], to=TensorProto.FLOAT))
    if present:
        casts = (helper.make_node("Cast", [wide], [name], to=elem_type) for name, wide in presents.items())
        proto.graph.node.extend(casts)
    for value in (*proto.graph.input, *proto.graph.output):
        if value.name in renamed:
            value.type.tensor_type.elem_type = elem_type
    onnx.save(proto, path)


def test_a_cache_that_cannot_be_allocated_is_refused(copy: Path) -> None:
    retype_cache(copy / "model.onnx", TensorProto.DOUBLE, present=True)
    with pytest.raises(
        ExecutionError, match=r"is tensor\(double\), expected one of tensor\(float\), tensor"
    ):
        DecoderGraph.open(copy)


def test_past_and_present_of_two_types_are_refused(copy: Path) -> None:
    retype_cache(copy / "model.onnx", TensorProto.FLOAT16, present=False)
    with pytest.raises(
        ExecutionError, match=r"is tensor\(float16\) and present\.0\.key is tensor\(float\)"
    ):
        DecoderGraph.open(copy)


def test_a_plain_graph_may_keep_its_cache_in_float16(exported: Path, copy: Path) -> None:
    retype_cache(copy / "model.onnx", TensorProto.FLOAT16, present=True)
    half, whole = DecoderGraph.open(copy, threads=1), DecoderGraph.open(exported, threads=1)
    assert half.cache_token_bytes * 2 == whole.cache_token_bytes
    ids = np.arange(30, 42, dtype=np.int64)[None]
    mask = np.ones_like(ids)
    found = []
    for graph in (half, whole):
        _, cache = graph.forward(ids[:, :8], mask[:, :8], graph.empty_cache(1, 12))
        found.append(graph.forward(ids[:, 8:], mask, cache)[0])
    np.testing.assert_allclose(found[0], found[1], atol=2e-3, rtol=0)  # 11 bits of mantissa
    assert not np.array_equal(found[0], found[1])


def test_an_operator_that_onnx_runtime_does_not_know_is_refused(copy: Path) -> None:
    proto = onnx.load(copy / "model.onnx")
    proto.graph.node[-1].op_type = "NoSuchOperator"
    onnx.save(proto, copy / "model.onnx")
    with pytest.raises(ExecutionError, match=r"could not load .*NoSuchOperator"):
        DecoderGraph.open(copy)
