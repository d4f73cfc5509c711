"""The weight of a linear layer as MatMul reads it, [in, out], instead of a Transpose at run time."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import pattern

from holdfast.exporter.passes.rule import Rule, verdict


class TransposedWeight(Rule):
    """Transpose of a constant matrix; it is turned when the graph is saved, and torch's own until then."""

    def __init__(self) -> None:
        super().__init__("transposed weight")

    def pattern(self, op: Any, weight: Any) -> Any:
        return op.Transpose(weight, perm=[1, 0])

    def check(self, context: Any, weight: ir.Value, **_: Any) -> Any:
        return verdict("" if weight.const_value is not None else "it is not a constant")

    def rewrite(self, op: Any, weight: ir.Value, **_: Any) -> Any:
        name = f"{weight.name}_T"
        return op.initializer(_turned(weight, name), name=name)


def _turned(weight: ir.Value, name: str) -> ir.LazyTensor:
    tensor = weight.const_value
    assert tensor is not None
    rows, columns = tensor.shape.numpy()
    return ir.LazyTensor(
        lambda: ir.tensor(np.transpose(tensor.numpy()), name=name),
        dtype=tensor.dtype,
        shape=ir.Shape([columns, rows]),
        name=name,
    )


def rules() -> list[pattern.RewriteRule]:
    """One rule; it runs before anything that folds constants."""
    return [TransposedWeight.rule()]
