"""The quantized graph, read back: what each linear layer multiplies and with which parameters."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from holdfast.errors import QuantizationError

Array = NDArray[Any]


@dataclass(frozen=True)
class QuantizedInput:
    """A QuantizeLinear and DequantizeLinear pair in front of a product.

    Attributes:
        name: float tensor that is quantized (before a Clip, where there is one).
        scale: float32 scalar.
        zero_point: code of 0.
        clip: float32 ends of a Clip before QuantizeLinear, or None.
    """

    name: str
    scale: np.float32
    zero_point: int
    clip: tuple[np.float32, np.float32] | None


@dataclass(frozen=True)
class StaticLinear:
    """A MatMul between QuantizeLinear/DequantizeLinear pairs.

    Attributes:
        input: how its input is quantized.
        weight_scale: float32 [out].
        weight_codes: int8 [in, out].
    """

    input: QuantizedInput
    weight_scale: Array
    weight_codes: Array


@dataclass(frozen=True)
class BlockLinear:
    """A MatMulNBits node.

    Attributes:
        input: tensor that it multiplies.
        bits, block_size, accuracy_level: its attributes; the level is 0 where the node has none.
        scales: float32 [out * blocks].
        packed: uint8 [out, blocks, block_size * bits / 8].
        symmetric: no zero points are stored (they are in the middle).
    """

    input: str
    bits: int
    block_size: int
    accuracy_level: int
    scales: Array
    packed: Array
    symmetric: bool


class Graph:
    """Lookups over an ONNX graph that is not changed meanwhile."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.producers = {name: node for node in model.graph.node for name in node.output}
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.constants = {
            node.output[0]: node.attribute[0].t
            for node in model.graph.node
            if node.op_type == "Constant" and node.attribute[0].name == "value"
        }

    def value(self, name: str) -> Array:
        """An initializer or constant as an array."""
        tensor = self.initializers.get(name, self.constants.get(name))
        if tensor is None:
            raise QuantizationError(f"The quantized graph has no constant `{name}`: quantize again.")
        array: Array = numpy_helper.to_array(tensor)
        return array

    def producer(self, name: str, op_type: str, path: str) -> onnx.NodeProto:
        """The node that gives `name`, which has to be of one operator type."""
        node = self.producers.get(name)
        if node is None or node.op_type != op_type:
            found = "a constant or graph input" if node is None else node.op_type
            raise QuantizationError(
                f"`{path}` should read from {op_type} in the quantized graph, found {found}: "
                "the backend left it in full precision."
            )
        return node


def read_static(graph: Graph, path: str, output: str) -> StaticLinear:
    """The QDQ linear whose MatMul gives the tensor `output`.

    Raises:
        QuantizationError: it is not quantized the way that static W8A8 is.
    """
    matmul = graph.producer(output, "MatMul", path)
    weight = graph.producer(matmul.input[1], "DequantizeLinear", path)
    return StaticLinear(
        input=read_input(graph, path, matmul.input[0]),
        weight_scale=graph.value(weight.input[1]),
        weight_codes=graph.value(weight.input[0]),
    )


def read_input(graph: Graph, path: str, name: str) -> QuantizedInput:
    """The pair that gives the tensor `name`.

    Raises:
        QuantizationError: there is none, or its two halves differ.
    """
    dequantize = graph.producer(name, "DequantizeLinear", path)
    quantize = graph.producer(dequantize.input[0], "QuantizeLinear", path)
    if list(quantize.input[1:]) != list(dequantize.input[1:]):
        raise QuantizationError(f"`{path}` is quantized and dequantized with different parameters.")
    before = graph.producers.get(quantize.input[0])
    clipped = before is not None and before.op_type == "Clip"
    return QuantizedInput(
        name=before.input[0] if before is not None and clipped else quantize.input[0],
        scale=np.float32(graph.value(quantize.input[1])),
        zero_point=int(graph.value(quantize.input[2])),
        clip=_clip_ends(graph, before) if before is not None and clipped else None,
    )


def _clip_ends(graph: Graph, clip: onnx.NodeProto) -> tuple[np.float32, np.float32]:
    return np.float32(graph.value(clip.input[1])), np.float32(graph.value(clip.input[2]))


def read_blocks(graph: Graph, path: str, output: str) -> BlockLinear:
    """The MatMulNBits linear that gives the tensor `output`.

    Raises:
        QuantizationError: it is not a MatMulNBits node.
    """
    node = graph.producer(output, "MatMulNBits", path)
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return BlockLinear(
        input=node.input[0],
        bits=attributes["bits"],
        block_size=attributes["block_size"],
        accuracy_level=attributes.get("accuracy_level", 0),
        scales=graph.value(node.input[2]),
        packed=graph.value(node.input[1]),
        symmetric=len(node.input) < 4 or not node.input[3],
    )


def histogram(model: onnx.ModelProto) -> dict[str, int]:
    """Operator type -> number of nodes, sorted by name."""
    return dict(sorted(Counter(node.op_type for node in model.graph.node).items()))
