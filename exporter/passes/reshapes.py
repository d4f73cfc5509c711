"""Reshapes and Transposes that undo each other, shapes that need not be computed, slices of everything."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern
from onnxscript.rewriter.rules.common import (
    collapse_slice2_rule,
    collapse_slice_rule,
    no_op_transpose_rule,
    transpose_transpose_rule,
    unsqueeze_unsqueeze_rule,
)

from holdfast.exporter.passes.rule import Rule, verdict


class ReshapeAndBack(Rule):
    """Reshape(Reshape(x)) with the shape of x is x."""

    def __init__(self) -> None:
        super().__init__("reshape and back")

    def pattern(self, op: Any, x: Any) -> Any:
        inner = op.Reshape(x, _allow_other_inputs=True, _allow_other_attributes=True)
        return op.Reshape(
            inner, _allow_other_inputs=True, _allow_other_attributes=True, _outputs=["result"]
        )

    def check(self, context: Any, x: ir.Value, result: ir.Value, **_: Any) -> Any:
        if x.shape is None or result.shape is None:
            return verdict("a shape is not known")
        same = list(x.shape) == list(result.shape)
        return verdict("" if same else f"{result.shape} is not the shape {x.shape} from before")

    def rewrite(self, op: Any, x: ir.Value, **_: Any) -> Any:
        return op.Identity(x)


class ConstantShape(Rule):
    """Reshape to a computed shape whose open dimensions are those of the input, at the same places."""

    def __init__(self) -> None:
        super().__init__("constant shape")

    def pattern(self, op: Any, x: Any, shape: Any) -> Any:
        return op.Reshape(x, shape, _allow_other_attributes=True, _outputs=["result"])

    def check(self, context: Any, x: ir.Value, shape: ir.Value, result: ir.Value, **_: Any) -> Any:
        if shape.const_value is not None:
            return verdict("the shape is a constant already")
        if x.shape is None or result.shape is None:
            return verdict("a shape is not known")
        lost = None in _kept(x.shape, result.shape)
        return verdict(f"an open dimension of {result.shape} is not one of {x.shape}" if lost else "")

    def rewrite(self, op: Any, x: ir.Value, result: ir.Value, **_: Any) -> Any:
        sizes = _kept(x.shape, result.shape)  # type: ignore[arg-type]
        return op.Reshape(x, op.Constant(value_ints=sizes))


def _kept(before: ir.Shape, after: ir.Shape) -> list[int | None]:
    """`after` as Reshape reads it: 0 where an open dimension is that of `before`, None where it is not."""
    known = [*before, *[None] * len(after)]
    return [
        size if isinstance(size, int) and size else 0 if size == known[index] else None
        for index, size in enumerate(after)
    ]


def rules() -> list[pattern.RewriteRule]:
    """Transposes first: a Transpose between two Reshapes hides that they undo each other."""
    return [
        transpose_transpose_rule,
        no_op_transpose_rule,
        ReshapeAndBack.rule(),
        collapse_slice_rule,
        collapse_slice2_rule,
        unsqueeze_unsqueeze_rule,
        ConstantShape.rule(),
    ]
