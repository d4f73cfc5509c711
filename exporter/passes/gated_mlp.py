"""The gated MLP, down(silu(gate(x)) * up(x)): gate and up as one MatMul, SiLU as one node.

SiLU is ONNX Runtime's QuickGelu with alpha 1, x * sigmoid(x).
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern

from holdfast.exporter.passes.packing import concatenated, pack_reason, write_columns
from holdfast.exporter.passes.rule import Rule, module_of, verdict
from holdfast.exporter.tracing import DOMAIN


class Silu(Rule):
    """x * sigmoid(x)."""

    def __init__(self) -> None:
        super().__init__("SiLU")

    def pattern(self, op: Any, x: Any) -> Any:
        return x * op.Sigmoid(x)

    def rewrite(self, op: Any, x: ir.Value, **_: Any) -> Any:
        return op.QuickGelu(x, alpha=1.0, _domain=DOMAIN)


class PackedGateUp(Rule):
    """Two products with one input, one of them through SiLU, multiplied."""

    def __init__(self) -> None:
        super().__init__("packed gate and up")

    def pattern(self, op: Any, x: Any, w_gate: Any, w_up: Any) -> Any:
        gate = op.MatMul(x, w_gate, _outputs=["gate"])
        up = op.MatMul(x, w_up, _outputs=["up"])
        return op.QuickGelu(gate, alpha=1.0, _domain=DOMAIN) * up

    def check(self, context: Any, w_gate: ir.Value, w_up: ir.Value, **bound: ir.Value) -> Any:
        reason = pack_reason([bound["gate"], bound["up"]])
        if not reason and w_gate.shape != w_up.shape:
            reason = f"gate and up have unequal widths: {w_gate.shape} and {w_up.shape}"
        return verdict(reason)

    def rewrite(self, op: Any, x: ir.Value, gate: ir.Value, up: ir.Value, **bound: Any) -> Any:
        stem = f"{module_of(gate).rpartition('.')[0]}.gate_up_proj"
        packed = op.MatMul(
            x, op.initializer(concatenated([bound["w_gate"], bound["w_up"]], f"{stem}.weight_T"))
        )
        write_columns(packed, stem, [gate, up])
        halves = op.Split(packed, axis=-1, num_outputs=2, _outputs=2)
        return op.Mul(op.QuickGelu(halves[0], alpha=1.0, _domain=DOMAIN), halves[1])


def rules() -> list[pattern.RewriteRule]:
    """SiLU first: the packing looks for it."""
    return [Silu.rule(), PackedGateUp.rule()]
