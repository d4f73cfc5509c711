"""Small graphs in ONNX's text form, a pass over them, and both run without ONNX Runtime's own rewriting."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from holdfast.exporter import fused
from holdfast.exporter.tracing import MODULE

HEADER = '<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>\ngraph '
DOT = "__"  # in names, which have no dots in the text form
CACHE = "float[B, 2, P, 16] past_key, float[B, 2, P, 16] past_value, int32[B] seqlens_k, int32[1] total"
PRESENT = "float[B, S, 64] out, float[B, 2, T, 16] present_key, float[B, 2, T, 16] present_value"
ATTENTION = "out, present_key, present_value = com.microsoft.GroupQueryAttention"


def model_of(text: str, constants: Mapping[str, Any]) -> ir.Model:
    """`(inputs) => (outputs) { nodes }` with constants; a node called `[path]` is of that module."""
    names = re.sub(r"\[[\w.]+\] ", lambda found: found[0].replace(".", DOT), text)
    model = onnx.parser.parse_model(HEADER + names)
    for name, value in constants.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    graph = ir.from_proto(onnx.shape_inference.infer_shapes(model))
    for node in graph.graph:
        node.metadata_props[MODULE] = (node.name or "").replace(DOT, ".")
    return graph


def apply(
    model: ir.Model, rules: Sequence[Any], *, left: Callable[[ir.Node], bool] = lambda node: True
) -> fused.PassReport:
    """What a pass did; `why` where a node is left that `left` takes for one of its kind."""
    return fused._apply(model, fused._Pass("pass", rules, left))


def operators(model: ir.Model) -> dict[str, int]:
    """How often each operator is in the graph."""
    return dict(Counter(node.op_type for node in model.graph))


def run(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs, as the graph says and not as ONNX Runtime rewrites it."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = ir.to_proto(model).SerializeToString()
    found: list[np.ndarray] = ort.InferenceSession(data, options, ["CPUExecutionProvider"]).run(
        None, dict(feeds)
    )
    return found


def assert_same(before: list[np.ndarray], after: list[np.ndarray], *, atol: float) -> None:
    """Equal shapes, and values within `atol`."""
    for first, second in zip(before, after, strict=True):
        np.testing.assert_allclose(second, first, rtol=0, atol=atol)


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    """Float32 of a normal distribution."""
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def cache(rows: int, past: int, new: int) -> dict[str, np.ndarray]:
    """Feeds of the operator besides query, key and value, with a filled cache."""
    return {
        "past_key": drawn(rows, 2, past, 16, seed=1),
        "past_value": drawn(rows, 2, past, 16, seed=2),
        "seqlens_k": np.full(rows, past + new - 1, np.int32),
        "total": np.array([past + new], np.int32),
    }
