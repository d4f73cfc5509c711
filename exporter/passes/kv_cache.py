"""A narrower KV cache for a fused graph: int8 with one scale a tensor, or float16.

Both change the type of every `past_key_values` input and `present` output and nothing that a caller sees
besides. int8 is what GroupQueryAttention does by itself: `k_scale` and `v_scale` are its inputs 12 and 13,
and keys are scaled after the rotary embedding. For float16 the whole operator computes in float16.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from holdfast.errors import ExportError
from holdfast.exporter.tracing import OPERATOR
from holdfast.runtime.graph import DecoderGraph

LARGEST = 127  # of a symmetric int8
PAST_KEY, PAST_VALUE, SCALES = 3, 4, 12
BIAS = 10
FLOATS = (0, 1, 2, 7, 8, 10, 11)  # query, key, value, cos, sin, bias, sinks: of one type with the output
HIDDEN = -3e4  # hides a column, and is finite in float16
FLOOR = "kv_cache.hidden"

Scales = dict[int, tuple[float, float]]
"""Layer -> what one step of its int8 keys and of its int8 values is worth."""


def measure_scales(graph: DecoderGraph, rows: Sequence[Sequence[int]]) -> Scales:
    """Largest absolute key and value of every layer over 127, from the float cache of whole sequences.

    Arguments:
        graph: an fp32 graph.
        rows: token ids, run one by one, so that no padding is measured.

    Raises:
        ExportError: no rows.
        ExecutionError: ONNX Runtime failed.
    """
    if not rows:
        raise ExportError("Expected token ids to measure the KV cache with, found none.")
    largest = np.zeros(len(graph.cache_inputs))
    for row in rows:
        ids = np.array([row], np.int64)
        _, cache = graph.forward(ids, np.ones_like(ids), graph.empty_cache(1), keep=1)
        largest = np.maximum(largest, [np.abs(array).max() for array in cache.arrays])  # type: ignore[union-attr]
    steps = {
        entry.past: float(value) / LARGEST for entry, value in zip(graph.cache_inputs, largest, strict=True)
    }
    layers = range(len(steps) // 2)
    return {n: (steps[f"past_key_values.{n}.key"], steps[f"past_key_values.{n}.value"]) for n in layers}


def quantize_cache(model: onnx.ModelProto, scales: Mapping[int, tuple[float, float]]) -> None:
    """Make the KV cache int8, in place.

    Arguments:
        model: a fused fp32 graph; its other weights may be quantized.
        scales: layer -> (key scale, value scale); an element x is kept as round(x / scale).

    Raises:
        ExportError: no attention operator, a cache that is not float32, or a scale missing or not positive.
    """
    attentions = list(_attentions(model.graph))
    for layer, _ in attentions:
        if not all(np.isfinite(scale) and scale > 0 for scale in scales.get(layer, (0.0,))):
            raise ExportError(
                f"Expected positive, finite scales for the keys and values of layer {layer}, "
                f"found {scales.get(layer)}."
            )
    for layer, node in attentions:
        node.input.extend([""] * (SCALES - len(node.input)))
        for past, scale in zip((node.input[PAST_KEY], node.input[PAST_VALUE]), scales[layer], strict=True):
            name = f"{past}.scale"
            model.graph.initializer.append(numpy_helper.from_array(np.array([scale], np.float32), name))
            node.input.append(name)
        kinds = {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR", "kv_cache_bit_width": 8}
        node.attribute.extend(helper.make_attribute(name, value) for name, value in kinds.items())
    _retype(model.graph, TensorProto.INT8)


def halve_cache(model: onnx.ModelProto) -> None:
    """Make the KV cache float16, and the attention with it, in place; the rest stays float32.

    Raises:
        ExportError: no attention operator, or a cache that is not float32.
    """
    graph = model.graph
    nodes: list[onnx.NodeProto] = []
    narrowed: dict[str, str] = {}
    attentions = {node.name for _, node in _attentions(graph)}
    for node in graph.node:
        if node.name not in attentions:
            nodes.append(node)
            continue
        for index in (index for index in FLOATS if index < len(node.input) and node.input[index]):
            name = node.input[index]
            if name not in narrowed:
                nodes += _narrowing(name, floor=index == BIAS)
                narrowed[name] = nodes[-1].output[0]
            node.input[index] = narrowed[name]
        wide, node.output[0] = node.output[0], f"{node.output[0]}.half"
        nodes += [node, _cast(node.output[0], wide, TensorProto.FLOAT)]
    nodes.insert(0, helper.make_node("Constant", [], [FLOOR], FLOOR, value_float=HIDDEN))
    del graph.node[:]
    graph.node.extend(nodes)
    _retype(graph, TensorProto.FLOAT16)


def _narrowing(name: str, *, floor: bool) -> list[onnx.NodeProto]:
    """A value as float16. What hides padding stays finite: a row of nothing else would be NaN."""
    if not floor:
        return [_cast(name, f"{name}.half", TensorProto.FLOAT16)]
    floored = helper.make_node("Max", [name, FLOOR], [f"{name}.floored"], f"{name}.floor")
    return [floored, _cast(floored.output[0], f"{name}.half", TensorProto.FLOAT16)]


def _cast(source: str, target: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], f"{target}.cast", to=to)


def _attentions(graph: onnx.GraphProto) -> Iterator[tuple[int, onnx.NodeProto]]:
    """(layer, attention operator); ExportError where a cache is not one that can be narrowed."""
    types = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    found = [node for node in graph.node if node.op_type == OPERATOR]
    if not found:
        raise ExportError(
            f"The graph has no {OPERATOR}, which alone can keep a narrower KV cache: export for another "
            "target than `portable`."
        )
    for node in found:
        if types.get(node.input[PAST_KEY]) != TensorProto.FLOAT:
            raise ExportError(
                f"The KV cache of `{node.name}` is not float32: start from the graph as it was exported."
            )
        yield int(node.input[PAST_KEY].split(".")[1]), node


def _retype(graph: onnx.GraphProto, elem_type: int) -> None:
    for value in [*graph.input, *graph.output, *graph.value_info]:
        if value.name.startswith(("past_key_values.", "present.")):
            value.type.tensor_type.elem_type = elem_type
