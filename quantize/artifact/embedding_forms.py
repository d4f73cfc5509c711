"""The nodes that gather a quantized embedding, in three forms that give the same values bit for bit.

- `own_table`: com.microsoft `GatherBlockQuantized`. 4 bits: ONNX Runtime 1.22 and later, where the node has
  no attribute `bits`; 8 bits: 1.23 and later.
- `from_head`: the same on the table of a MatMulNBits head that holds the same codes: one table in the file.
  The operator gathers from the head's three axes as they are, and its result is reshaped. Reshaping the
  table instead, as onnxruntime-genai's builder does, costs a second copy of it when ONNX Runtime folds
  constants.
- `standard`: ONNX's own operators (8 bits): Gather of codes and of scales, Cast, Mul.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from holdfast.errors import QuantizationError
from holdfast.quantize.weights.codes import WeightCodes, pack

OPERATOR = "GatherBlockQuantized"
MICROSOFT = "com.microsoft"

Builder = Callable[[onnx.GraphProto, onnx.NodeProto, str, WeightCodes], list[onnx.NodeProto]]
"""(graph, Gather of float rows, name of their table, codes) -> nodes in the Gather's place.

New initializers are added to the graph under the table's name and an ending.
"""


def own_table(
    graph: onnx.GraphProto, gather: onnx.NodeProto, name: str, codes: WeightCodes
) -> list[onnx.NodeProto]:
    """GatherBlockQuantized on a table of its own, uint8 [vocabulary, bytes of a row].

    Raises:
        QuantizationError: the last byte of a row would be half full.
    """
    rows, columns = codes.codes.shape
    if columns * codes.bits % 8:
        raise QuantizationError(
            f"A {codes.bits}-bit embedding needs rows of whole bytes, and a row has {columns} columns: "
            "use 8 bits."
        )
    table = pack(codes).packed.reshape(rows, -1)[
        :, : columns * codes.bits // 8
    ]  # the last block is filled up
    _add(graph, f"{name}.codes", table.contiguous().numpy())
    _add(graph, f"{name}.scales", codes.scales.numpy())
    return [_gather_blocks(gather, f"{name}.codes", f"{name}.scales", gather.output[0], codes, axis=1)]


def from_head(graph: onnx.GraphProto, codes: WeightCodes) -> Builder | None:
    """Gathers from the table of the MatMulNBits node that holds exactly these codes; None without one."""
    rows, columns = codes.codes.shape
    if columns % codes.block_size:  # the head's last block is filled up
        return None
    wanted = {"N": rows, "K": columns, "bits": codes.bits, "block_size": codes.block_size}
    packed = pack(codes)
    parts = [packed.packed.numpy(), packed.scales.numpy()]
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in filter(is_head, graph.node):
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        if wanted.items() <= attributes.items() and all(
            np.array_equal(numpy_helper.to_array(tensors[found]).reshape(-1), part.reshape(-1))
            for found, part in zip(node.input[1:3], parts, strict=True)
        ):
            return partial(_shared, node)
    return None


def is_head(node: onnx.NodeProto) -> bool:
    """Whether a node is a MatMulNBits without zero points."""
    return node.op_type == "MatMulNBits" and not any(node.input[3:5])


def _shared(
    head: onnx.NodeProto, graph: onnx.GraphProto, gather: onnx.NodeProto, name: str, codes: WeightCodes
) -> list[onnx.NodeProto]:
    """GatherBlockQuantized on the head's table, uint8 [vocabulary, blocks, bytes of a block]."""
    table, flat = head.input[1:3]
    scales, blocks, shape = f"{name}.scales", f"{gather.output[0]}.blocks", f"{name}.scales.shape"
    _add(graph, shape, np.array([*codes.scales.shape, 1], np.int64))
    _add(graph, f"{name}.rows.shape", np.array([0, 0, codes.codes.shape[1]], np.int64))
    return [
        helper.make_node("Reshape", [flat, shape], [scales], f"{gather.name}/scales"),
        _gather_blocks(gather, table, scales, blocks, codes, axis=2),
        helper.make_node(
            "Reshape", [blocks, f"{name}.rows.shape"], list(gather.output), f"{gather.name}/rows"
        ),
    ]


def standard(
    graph: onnx.GraphProto, gather: onnx.NodeProto, name: str, codes: WeightCodes
) -> list[onnx.NodeProto]:
    """Gather of int8 codes and of scales, the scale of each column picked by its block, Cast, Mul."""
    ids, stem = gather.input[1], gather.output[0]
    rows, values, scales, spread = (f"{stem}.{part}" for part in ("codes", "values", "scales", "spread"))
    _add(graph, f"{name}.codes", codes.codes.numpy())
    _add(graph, f"{name}.scales", codes.scales.numpy())
    _add(graph, f"{name}.block", np.arange(codes.codes.shape[1], dtype=np.int64) // codes.block_size)
    return [
        helper.make_node("Gather", [f"{name}.codes", ids], [rows], f"{gather.name}/codes"),
        helper.make_node("Cast", [rows], [values], f"{gather.name}/values", to=onnx.TensorProto.FLOAT),
        helper.make_node("Gather", [f"{name}.scales", ids], [scales], f"{gather.name}/scales"),
        helper.make_node("Gather", [scales, f"{name}.block"], [spread], f"{gather.name}/spread", axis=-1),
        helper.make_node("Mul", [values, spread], [stem], gather.name),
    ]


def _gather_blocks(
    gather: onnx.NodeProto, table: str, scales: str, output: str, codes: WeightCodes, *, axis: int
) -> onnx.NodeProto:
    width = {"bits": 8} if codes.bits == 8 else {}  # ONNX Runtime 1.22 knows 4 bits alone, and no attribute
    return helper.make_node(
        OPERATOR,
        [table, gather.input[1], scales],
        [output],
        gather.name,
        domain=MICROSOFT,
        block_size=codes.block_size,
        gather_axis=0,
        quantize_axis=axis,
        **width,
    )


def _add(graph: onnx.GraphProto, name: str, array: NDArray[Any]) -> None:
    graph.initializer.append(numpy_helper.from_array(array, name))
