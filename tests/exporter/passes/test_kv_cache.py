"""A narrower KV cache: what is stored, how far logits move, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from holdfast.errors import ExportError
from holdfast.exporter.export import export_model
from holdfast.exporter.passes.kv_cache import Scales, halve_cache, measure_scales, quantize_cache
from holdfast.recipe import ExportConfig
from holdfast.runtime.graph import DecoderGraph
from tests.tiny import tiny_llama

ROWS = [[5, 40, 7, 260, 11, 90, 33], [21, 22, 23, 24], [200, 100, 50, 25, 12]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fused graph: 2 layers, 2 KV heads of 16."""
    out = tmp_path_factory.mktemp("fused")
    export_model(tiny_llama(tmp_path_factory.mktemp("source")), out, ExportConfig())
    return out


@pytest.fixture(scope="module")
def graph(folder: Path) -> DecoderGraph:
    return DecoderGraph.open(folder, threads=1)


@pytest.fixture(scope="module")
def scales(graph: DecoderGraph) -> Scales:
    return measure_scales(graph, ROWS)


@pytest.fixture
def proto(folder: Path) -> onnx.ModelProto:
    return onnx.load(folder / "model.onnx")


def saved(proto: onnx.ModelProto, out: Path) -> DecoderGraph:
    onnx.save(proto, out / "model.onnx")
    return DecoderGraph.open(out, threads=1)


def prefill(graph: DecoderGraph, row: list[int]) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Logits [1, token, vocabulary] and the caches [1, kv_heads, token, head_size]."""
    ids = np.array([row])
    logits, cache = graph.forward(ids, np.ones_like(ids), graph.empty_cache(1))
    return logits, cache.arrays  # type: ignore[union-attr]


def test_a_scale_is_the_largest_value_over_127(graph: DecoderGraph, scales: Scales) -> None:
    caches = [prefill(graph, row)[1] for row in ROWS]
    for layer in (0, 1):
        for part in (0, 1):
            largest = max(np.abs(cache[2 * layer + part]).max() for cache in caches)
            assert scales[layer][part] == pytest.approx(largest / 127, rel=1e-6)
    assert set(scales) == {0, 1}


def test_int8_holds_the_rounded_quotient(
    graph: DecoderGraph, scales: Scales, proto: onnx.ModelProto, tmp_path: Path
) -> None:
    """Keys and values of layer 0 depend on no other cache: they are the fp32 ones over the scale."""
    quantize_cache(proto, scales)
    narrow = saved(proto, tmp_path)
    for row in ROWS:
        _, stored = prefill(narrow, row)
        _, exact = prefill(graph, row)
        for part in (0, 1):
            assert stored[part].dtype == np.int8
            wanted = exact[part] / scales[0][part]
            np.testing.assert_allclose(stored[part], wanted, rtol=0, atol=0.51)  # round to nearest
        assert np.abs(stored[0]).max() > 60  # the range is used


@pytest.mark.parametrize(("narrower", "atol"), [("int8", 0.12), ("float16", 5e-3)])
def test_logits_stay_close(
    graph: DecoderGraph, scales: Scales, proto: onnx.ModelProto, tmp_path: Path, narrower: str, atol: float
) -> None:
    if narrower == "int8":
        quantize_cache(proto, scales)
    else:
        halve_cache(proto)
    narrow = saved(proto, tmp_path)
    for row in ROWS:
        expected, _ = prefill(graph, row)
        found, cache = prefill(narrow, row)
        assert {array.dtype.name for array in cache} == {narrower}
        np.testing.assert_allclose(found, expected, rtol=0, atol=atol)
        assert expected.std() > 0.6


def test_padding_stays_hidden_in_float16(
    graph: DecoderGraph, proto: onnx.ModelProto, tmp_path: Path
) -> None:
    """A bias of -1e9 would be infinite in float16, and a padded row NaN."""
    halve_cache(proto)
    narrow = saved(proto, tmp_path)
    ids = np.array([[0, 0, 0, *ROWS[1]]])
    mask = np.array([[0, 0, 0, 1, 1, 1, 1]])
    found = narrow.logits(ids, mask, keep=1)
    np.testing.assert_allclose(found[:, -1], prefill(graph, ROWS[1])[0][:, -1], rtol=0, atol=5e-3)


@pytest.mark.parametrize("wrong", [{}, {0: (0.1, 0.1)}, {0: (0.1, 0.1), 1: (0.0, 0.1)}])
def test_a_layer_without_a_scale_is_refused(proto: onnx.ModelProto, wrong: Scales) -> None:
    with pytest.raises(ExportError, match=r"positive, finite scales for the keys and values of layer [01]"):
        quantize_cache(proto, wrong)
    assert not any("scale" in tensor.name for tensor in proto.graph.initializer)  # left as it was


def test_a_cache_is_narrowed_once(proto: onnx.ModelProto, scales: Scales) -> None:
    quantize_cache(proto, scales)
    with pytest.raises(ExportError, match="is not float32"):
        halve_cache(proto)


def test_a_graph_without_the_operator_is_refused(proto: onnx.ModelProto, scales: Scales) -> None:
    for node in proto.graph.node:
        node.op_type = node.op_type.replace("GroupQueryAttention", "Attention")
    with pytest.raises(ExportError, match="has no GroupQueryAttention"):
        quantize_cache(proto, scales)


def test_nothing_to_measure_with_is_refused(graph: DecoderGraph) -> None:
    with pytest.raises(ExportError, match="found none"):
        measure_scales(graph, [])
