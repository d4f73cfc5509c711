"""Input ranges and int8 weights in the QDQ graph that neural-compressor wrote: read, and overwritten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from holdfast.errors import QuantizationError
from holdfast.exporter.graph import GraphLinear
from holdfast.quantize.fakequant import activation_codes
from holdfast.quantize.formats import Format
from holdfast.quantize.graph import Array, Graph
from holdfast.quantize.record import ActivationRange, activation_range
from holdfast.quantize.weights.codes import WeightCodes


def read_ranges(
    model: onnx.ModelProto, modules: Mapping[str, GraphLinear], formats: Mapping[str, Format]
) -> dict[str, ActivationRange]:
    """Static input ranges as the graph holds them: module path -> range.

    `low` and `high` are the ends of the range of codes, those that the format allows.

    Raises:
        QuantizationError: the input of a linear with static activations is not quantized.
    """
    graph, found = Graph(model), {}
    for path, format in formats.items():
        if format.activation_bits is not None:
            quantize = input_quantizer(graph, path, modules[path])
            scale = np.float32(graph.value(quantize.input[1]))
            zero_point = int(graph.value(quantize.input[2]))
            low, high = (float((code - zero_point) * scale) for code in code_ends(format))
            found[path] = ActivationRange(low=low, high=high, scale=float(scale), zero_point=zero_point)
    return found


def input_quantizer(graph: Graph, path: str, linear: GraphLinear) -> onnx.NodeProto:
    """The QuantizeLinear that gives what the linear multiplies."""
    product = graph.producers.get(linear.output)
    if product is None or product.op_type not in ("MatMul", "MatMulNBits"):
        raise QuantizationError(f"The quantized graph has no product that gives the output of `{path}`.")
    dequantize = graph.producer(product.input[0], "DequantizeLinear", path)
    return graph.producer(dequantize.input[0], "QuantizeLinear", path)


def code_ends(format: Format) -> tuple[int, int]:
    """Smallest and largest code of a static activation."""
    return activation_codes(format.activation_bits or 8, signed=format.signed_activations)


def own_ranges(
    model: onnx.ModelProto, modules: Mapping[str, GraphLinear], formats: Mapping[str, Format]
) -> dict[str, ActivationRange]:
    """neural-compressor's measured ranges in the format that was asked for.

    It measures uint8, asymmetric; that is kept as it is, other formats are derived from its ends.
    """
    eight = {path: Format(8, 8, 0) for path, format in formats.items() if format.activation_bits}
    measured = read_ranges(model, modules, eight)
    return {path: _derived(found, formats[path]) for path, found in measured.items()}


def _derived(found: ActivationRange, format: Format) -> ActivationRange:
    plain = format.activation_bits == 8 and not format.symmetric_activations
    if plain and not format.signed_activations:
        return found
    return activation_range(found.low, found.high, format)


def finish(
    model: onnx.ModelProto,
    modules: Mapping[str, GraphLinear],
    formats: Mapping[str, Format],
    ranges: Mapping[str, ActivationRange] | None,
) -> None:
    """The given ranges, or neural-compressor's own, in the formats asked for, with their clips."""
    write_ranges(model, modules, ranges or own_ranges(model, modules, formats), formats)
    write_clips(model, modules, formats)


def write_ranges(
    model: onnx.ModelProto,
    modules: Mapping[str, GraphLinear],
    ranges: Mapping[str, ActivationRange],
    formats: Mapping[str, Format],
) -> None:
    """Put scales and zero points in place of neural-compressor's, in the initializers.

    Raises:
        QuantizationError: a linear is not quantized in the graph, or has no range.
    """
    graph = Graph(model)
    for path, format in formats.items():
        if format.activation_bits is None:
            continue
        if path not in ranges:
            raise QuantizationError(
                f"There is no range for the input of `{path}`: calibrate this model again."
            )
        quantize, wanted = input_quantizer(graph, path, modules[path]), ranges[path]
        code = np.int8 if format.signed_activations else np.uint8
        for name, value in (
            (quantize.input[1], np.float32(wanted.scale)),
            (quantize.input[2], code(wanted.zero_point)),
        ):
            tensor = graph.initializers[name]
            filled = np.full(tuple(tensor.dims), value)
            tensor.CopyFrom(numpy_helper.from_array(filled, name))
    _forget_types(model)


def _forget_types(model: onnx.ModelProto) -> None:
    """Noted element types may say uint8 where codes are int8 now; ONNX Runtime infers them anew."""
    del model.graph.value_info[:]


def write_clips(
    model: onnx.ModelProto, modules: Mapping[str, GraphLinear], formats: Mapping[str, Format]
) -> None:
    """A Clip before each QuantizeLinear that may reach fewer codes than 8 bits have."""
    graph = Graph(model)
    ends: dict[str, tuple[np.float32, np.float32]] = {}
    for path, format in formats.items():
        if format.activation_bits is not None and format.activation_bits < 8:
            node = input_quantizer(graph, path, modules[path])
            scale, zero = np.float32(graph.value(node.input[1])), int(graph.value(node.input[2]))
            first, last = (np.float32(code - zero) * scale for code in code_ends(format))
            ends[node.name] = first, last
    nodes = []
    for node in model.graph.node:
        if node.name in ends:
            nodes.append(_clip(model, node, ends[node.name]))
        nodes.append(node)
    _replace_nodes(model, nodes)


def _replace_nodes(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> None:
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)


def _clip(
    model: onnx.ModelProto, quantize: onnx.NodeProto, ends: tuple[np.float32, np.float32]
) -> onnx.NodeProto:
    names = [f"{quantize.name}_clip_{end}" for end in ("low", "high")]
    for name, end in zip(names, ends, strict=True):
        model.graph.initializer.append(numpy_helper.from_array(np.float32(end), name))
    source, clipped = quantize.input[0], f"{quantize.input[0]}_clipped"
    quantize.input[0] = clipped
    return helper.make_node("Clip", [source, *names], [clipped], f"{quantize.name}_Clip")


def write_codes(
    model: onnx.ModelProto, modules: Mapping[str, GraphLinear], codes: Mapping[str, WeightCodes]
) -> None:
    """Learned int8 weights, one scale for each output channel, in place of neural-compressor's.

    Linears that share a MatMul each write their own columns.

    Raises:
        QuantizationError: a weight is not quantized in the graph, or has one scale in all.
    """
    graph = Graph(model)
    for path, learned in codes.items():
        linear = modules[path]
        matmul = graph.producer(linear.output, "MatMul", path)
        dequantize = graph.producer(matmul.input[1], "DequantizeLinear", path)
        weight, scales = graph.value(dequantize.input[0]).copy(), graph.value(dequantize.input[1]).copy()
        if scales.shape != weight.shape[1:]:
            raise QuantizationError(
                f"neural-compressor gave `{path}` one weight scale in all, and learned codes have one for "
                "each output channel: use `per_channel: true`."
            )
        columns = slice(*(linear.columns or (0, weight.shape[1])))
        weight[:, columns] = learned.codes.numpy().T
        scales[columns] = learned.scales.numpy()[:, 0]
        for name, array in ((dequantize.input[0], weight), (dequantize.input[1], scales)):
            _replace(graph, name, array)


def _replace(graph: Graph, name: str, array: Array) -> None:
    graph.initializers[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), name))
