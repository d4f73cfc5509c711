"""Gather the rows of a quantized embedding first, and dequantize those alone.

A quantizer puts DequantizeLinear between the table and its Gather, so that every token dequantizes the
whole vocabulary. Element by element both orders compute the same.
"""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from holdfast.exporter.passes.constants import array_of
from holdfast.exporter.passes.rule import Rule, maker, verdict


class GatherFirst(Rule):
    """Gather(DequantizeLinear(table), ids) along the first axis, with one scale or one a column."""

    def __init__(self) -> None:
        super().__init__("gather before dequantize")

    def pattern(self, op: Any, table: Any, ids: Any) -> Any:
        values = op.DequantizeLinear(
            table, _allow_other_inputs=True, _allow_other_attributes=True, _outputs=["values"]
        )
        return op.Gather(values, ids, _allow_other_attributes=True, _outputs=["rows"])

    def check(self, context: Any, table: ir.Value, values: ir.Value, rows: ir.Value, **_: Any) -> Any:
        return verdict(_reason(table, values, rows))

    def rewrite(self, op: Any, table: ir.Value, ids: ir.Value, values: ir.Value, **_: Any) -> Any:
        dequantize = maker(values)
        attributes = dict(dequantize.attributes)
        scale = array_of(dequantize.inputs[1])
        if scale is not None and scale.ndim:
            attributes["axis"] = ir.AttrInt64("axis", -1)  # columns come last in [batch, tokens, columns]
        return op.DequantizeLinear(op.Gather(table, ids), *dequantize.inputs[1:], **attributes)


def gather_first(model: onnx.ModelProto) -> onnx.ModelProto:
    """Apply the pass to a quantized graph; the same object comes back where there is nothing to do."""
    tables = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    if not any(node.op_type == "Gather" and node.input[0] in tables for node in model.graph.node):
        return model
    graph = ir.from_proto(model)
    GatherFirst.rule().apply_to_model(graph)
    common.RemoveUnusedNodesPass()(graph)
    return ir.to_proto(graph)


def _reason(table: ir.Value, values: ir.Value, rows: ir.Value) -> str:
    dequantize, gather = maker(values), maker(rows)
    codes, scale = array_of(table), array_of(dequantize.inputs[1])
    if codes is None or scale is None or codes.ndim != 2:
        return "the table or its scale is not a constant matrix"
    if gather.attributes.get_int("axis", 0) != 0:
        return "it gathers columns"
    if scale.ndim and (scale.ndim > 1 or dequantize.attributes.get_int("axis", 1) not in (1, -1)):
        return "every row has a scale of its own, which DequantizeLinear cannot follow through a Gather"
    return ""
