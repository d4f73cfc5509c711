"""The token embedding in 8 or 4 bits: rows are gathered as codes, and those alone are dequantized.

Codes and scales are those of MatMulNBits: symmetric, in blocks along the hidden axis, rounded to nearest as
ONNX Runtime's own quantizer does.
"""

from __future__ import annotations

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor

from holdfast.config import Config
from holdfast.errors import QuantizationError
from holdfast.quantize.artifact.embedding_forms import (
    MICROSOFT,
    OPERATOR,
    from_head,
    is_head,
    own_table,
    standard,
)
from holdfast.quantize.fakequant import round_weight
from holdfast.quantize.formats import Format
from holdfast.quantize.graph import Graph
from holdfast.quantize.weights.codes import WeightCodes

STANDARD = "Gather, Cast, Mul"
FLOAT_BITS = 32
ROUNDED_VALUES = (
    1 << 24
)  # quantized at a time: the temporaries of a large vocabulary are its float size each


class EmbeddingReport(Config, frozen=True):
    """The token embedding in the artifact, as read back from it.

    Attributes:
        name: initializer of the float table in the exported graph.
        rows, columns: size of the vocabulary, width of an embedding.
        bits: width of the codes; 32 where it is float32.
        block_size: columns that share a scale; 0 where there are none.
        kernel: operators that ONNX Runtime is expected to run.
        shared_with: MatMulNBits node that reads the same table, or None.
        bytes_before, bytes_after: what it takes in the graph as float32, and now besides a shared table.
    """

    name: str
    rows: int
    columns: int
    bits: int
    block_size: int
    kernel: str
    shared_with: str | None
    bytes_before: int
    bytes_after: int


def embedding_codes(weight: Tensor, bits: int, block_size: int) -> WeightCodes:
    """Integer codes of a table, by rounding to nearest.

    Arguments:
        weight: float32 [vocabulary, hidden].
        bits: 8 or 4.
        block_size: columns that share a scale: a power of two, 16 or more.

    Raises:
        QuantizationError: another width or block size, or a value that is not finite.
    """
    _check_settings(bits, block_size)
    if not bool(torch.isfinite(weight.sum(dtype=torch.float64))):
        raise QuantizationError("The token embedding holds NaN or infinity: check the model's weights.")
    form = Format(weight_bits=bits, activation_bits=None, block_size=block_size)
    size = max(1, ROUNDED_VALUES // weight.shape[1])
    parts = [round_weight(rows, form) for rows in torch.split(weight.detach(), size)]
    codes, scales = (torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "scales"))
    return WeightCodes(codes, scales, None, bits, block_size)


def fake_quantize_embedding(weight: Tensor, bits: int, block_size: int) -> Tensor:
    """The table as the artifact gathers from it, float32 [vocabulary, hidden]; see `embedding_codes`."""
    return embedding_codes(weight, bits, block_size).dequantized()


def quantize_embedding(
    model: onnx.ModelProto,
    name: str,
    *,
    bits: int,
    block_size: int,
    portable: bool = False,
    codes: WeightCodes | None = None,
) -> EmbeddingReport:
    """Quantize the token embedding of an exported graph, in place. Quantize the head first: see the module.

    Arguments:
        model: the graph with its weights; linears may be quantized.
        name: initializer of the table, export.json's `embedding`, float32 [vocabulary, hidden].
        portable: use ONNX's own operators alone.
        codes: take these instead of rounding the table to nearest, for example the codes of a tied head
            that another algorithm found, so that the table is shared.

    Raises:
        QuantizationError: the table is not there or not read by Gather alone, its codes cannot be stored in
            this form, or it holds NaN.
    """
    _check_form(bits, block_size, portable=portable)
    table, gather = _find(model.graph, name)
    weight = torch.from_numpy(numpy_helper.to_array(table).copy())
    codes = embedding_codes(weight, bits, block_size) if codes is None else codes
    _check_codes(codes, weight, bits, block_size)
    build = standard if portable else from_head(model.graph, codes) or own_table
    index = list(model.graph.node).index(gather)
    nodes = build(model.graph, gather, name, codes)
    del model.graph.node[index]
    for offset, node in enumerate(nodes):
        model.graph.node.insert(index + offset, node)
    model.graph.initializer.remove(table)
    if not portable and all(entry.domain != MICROSOFT for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    return read_embedding(Graph(model), name)


def read_embedding(graph: Graph, name: str) -> EmbeddingReport:
    """The token embedding as a graph holds it.

    Arguments:
        graph: an exported graph, quantized or not.
        name: initializer of the float table in the graph as it was exported.

    Raises:
        QuantizationError: there is no such table in any of the known forms.
    """
    if name in graph.initializers:
        rows, columns = graph.initializers[name].dims
        return _report(name, rows, columns, FLOAT_BITS, 0, "Gather", None, 4 * rows * columns)
    readers = [node for node in graph.producers.values() if f"{name}.scales" in node.input]
    if not readers:
        raise QuantizationError(
            f"The graph has no token embedding `{name}`, in float32 or in codes: quantize the export again."
        )
    return (
        _read_operator(graph, name, readers[0])
        if readers[0].op_type == OPERATOR
        else _read_standard(graph, name)
    )


def _read_operator(graph: Graph, name: str, gather: onnx.NodeProto) -> EmbeddingReport:
    attributes = {a.name: helper.get_attribute_value(a) for a in gather.attribute}
    bits = attributes.get("bits", 4)
    table = graph.value(gather.input[0])
    columns = table.size // len(table) * 8 // bits
    head = next((n for n in graph.producers.values() if is_head(n) and n.input[1] == gather.input[0]), None)
    own = 0 if head is not None else table.nbytes + graph.value(gather.input[2]).nbytes
    shared = None if head is None else head.name
    return _report(name, len(table), columns, bits, attributes["block_size"], OPERATOR, shared, own)


def _read_standard(graph: Graph, name: str) -> EmbeddingReport:
    table, scales, block = (graph.value(f"{name}.{part}") for part in ("codes", "scales", "block"))
    rows, columns = table.shape
    block_size = int(np.count_nonzero(block == 0))
    own = table.nbytes + scales.nbytes + block.nbytes
    return _report(name, rows, columns, 8, block_size, STANDARD, None, own)


def _report(
    name: str, rows: int, columns: int, bits: int, block: int, kernel: str, shared: str | None, own: int
) -> EmbeddingReport:
    return EmbeddingReport(
        name=name,
        rows=rows,
        columns=columns,
        bits=bits,
        block_size=block,
        kernel=kernel,
        shared_with=shared,
        bytes_before=4 * rows * columns,
        bytes_after=own,
    )


def _check_settings(bits: int, block_size: int) -> None:
    if bits not in (8, 4):
        raise QuantizationError(f"Expected 8 or 4 bits for the token embedding, found {bits}.")
    if block_size < 16 or block_size & (block_size - 1):
        raise QuantizationError(
            f"Expected embedding blocks of a power of two, 16 or more, found {block_size}: use 32."
        )


def _check_form(bits: int, block_size: int, *, portable: bool) -> None:
    _check_settings(bits, block_size)
    if portable and bits == 4:
        raise QuantizationError(
            "A 4-bit embedding needs ONNX Runtime's own GatherBlockQuantized, and the target `portable` "
            "has none: use `embedding_bits: 8`, or another target."
        )


def _check_codes(codes: WeightCodes, weight: Tensor, bits: int, block_size: int) -> None:
    found = (tuple(codes.codes.shape), codes.bits, codes.block_size, codes.zero_points is None)
    wanted = (tuple(weight.shape), bits, block_size, True)
    if found != wanted:
        raise QuantizationError(
            "Expected codes of the token embedding with (shape, bits, block size, symmetric) "
            f"{wanted}, found {found}."
        )


def _find(graph: onnx.GraphProto, name: str) -> tuple[onnx.TensorProto, onnx.NodeProto]:
    """The float table, and the Gather that reads its rows."""
    table = next((tensor for tensor in graph.initializer if tensor.name == name), None)
    if table is None or table.data_type != onnx.TensorProto.FLOAT or len(table.dims) != 2:
        raise QuantizationError(
            f"Expected the token embedding `{name}` as a float32 matrix in the graph, found "
            f"{'none' if table is None else 'another tensor'}: start from the graph as it was exported."
        )
    readers = [node for node in graph.node if name in node.input]
    if [node.op_type for node in readers] != ["Gather"] or _axis(readers[0]) != 0:
        raise QuantizationError(
            f"Expected the token embedding `{name}` to be read by one Gather of its rows, found "
            f"{[node.op_type for node in readers]}: leave it in float32."
        )
    return table, readers[0]


def _axis(gather: onnx.NodeProto) -> int:
    return next((int(attribute.i) for attribute in gather.attribute if attribute.name == "axis"), 0)
