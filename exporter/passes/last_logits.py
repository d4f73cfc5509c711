"""Logits of the last positions only, where the consumer needs no more.

`logits_to_keep` is an initializer that is also a graph input: a caller who does not know it gets the
logits of every position, and one who gives 1 pays for the head at one position of a long prompt.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import pattern

from holdfast.exporter.passes.rule import Rule, maker, module_of, verdict
from holdfast.exporter.tracing import MODULE

NAME = "logits_to_keep"
EVERY = np.iinfo(np.int32).max
END = np.iinfo(np.int64).max


class LastLogits(Rule):
    """The head reads a slice of the hidden states.

    Arguments:
        head: module path of the head.
    """

    def __init__(self, head: str) -> None:
        super().__init__("last logits")
        self._head = head

    def pattern(self, op: Any, hidden: Any, weight: Any) -> Any:
        return op.MatMul(hidden, weight, _outputs=["scores"])

    def check(self, context: Any, hidden: ir.Value, scores: ir.Value, **_: Any) -> Any:
        if module_of(scores) != self._head:
            return verdict("it is not the head")
        node = hidden.producer()
        sliced = node is not None and node.op_type == "Slice"
        return verdict("the head reads a slice already" if sliced else "")

    def rewrite(self, op: Any, hidden: ir.Value, weight: ir.Value, **_: Any) -> Any:
        keep = op.initializer(ir.tensor(np.array([EVERY]), name=NAME))
        last = op.Slice(hidden, op.Neg(keep), op.Constant(value_ints=[END]), op.Constant(value_ints=[1]))
        result = op.MatMul(last, weight)
        maker(result).metadata_props[MODULE] = self._head
        return result


def rules(head: str) -> list[pattern.RewriteRule]:
    """For the head at one module path."""
    return [LastLogits.rule(head)]
