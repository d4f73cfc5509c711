"""Query, key and value of one layer as one MatMul, whose output the attention operator takes as it is."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern

from holdfast.exporter.passes.constants import slice_of
from holdfast.exporter.passes.packing import concatenated, pack_reason, write_columns
from holdfast.exporter.passes.rule import Rule, maker, module_of, verdict
from holdfast.exporter.tracing import DOMAIN

NAMES = ("q", "k", "v")


class PackedQKV(Rule):
    """Three products with one input, straight into the operator.

    Arguments:
        biased: each product has a bias added.
    """

    def __init__(self, *, biased: bool) -> None:
        super().__init__("packed QKV with biases" if biased else "packed QKV")
        self._biased = biased

    def pattern(self, op: Any, x: Any, w_q: Any, w_k: Any, w_v: Any, b_q: Any, b_k: Any, b_v: Any) -> Any:
        products = [op.MatMul(x, w, _outputs=[n]) for w, n in zip((w_q, w_k, w_v), NAMES, strict=True)]
        if self._biased:
            products = [op.Add(p, b) for p, b in zip(products, (b_q, b_k, b_v), strict=True)]
        return op.GroupQueryAttention(
            *products,
            _allow_other_inputs=True,
            _allow_other_attributes=True,
            _domain=DOMAIN,
            _outputs=["attention", "present_key", "present_value"],
        )

    def check(self, context: Any, **bound: ir.Value) -> Any:
        reason = pack_reason([bound[name] for name in NAMES])
        if not reason and self._biased and any(bound[f"b_{name}"].const_value is None for name in NAMES):
            reason = "a bias is not a constant"
        return verdict(reason)

    def rewrite(self, op: Any, x: ir.Value, **bound: Any) -> Any:
        stem = f"{module_of(bound['attention'])}.qkv_proj"
        packed = op.MatMul(
            x, op.initializer(concatenated([bound[f"w_{n}"] for n in NAMES], f"{stem}.weight_T"))
        )
        write_columns(packed, stem, [bound[name] for name in NAMES])
        if self._biased:
            bias = concatenated([bound[f"b_{n}"] for n in NAMES], f"{stem}.bias")
            packed = op.Add(packed, op.initializer(bias))
        return _fed(op, packed, bound["attention"])


class SlicedQKV(Rule):
    """A model's own packed product, cut into query, key and value in the order that the operator has."""

    def __init__(self) -> None:
        super().__init__("sliced QKV")

    def pattern(self, op: Any, packed: Any) -> Any:
        parts = [op.Slice(packed, _allow_other_inputs=True, _outputs=[name]) for name in NAMES]
        return op.GroupQueryAttention(
            *parts,
            _allow_other_inputs=True,
            _allow_other_attributes=True,
            _domain=DOMAIN,
            _outputs=["attention", "present_key", "present_value"],
        )

    def check(self, context: Any, packed: ir.Value, **bound: ir.Value) -> Any:
        cuts = [cut for name in NAMES if (cut := slice_of(bound[name]))]
        if len(cuts) < len(NAMES):
            return verdict("it is cut at places that are not constant")
        starts, ends = zip(*cuts, strict=True)
        joined = starts == (0, *ends[:-1]) and packed.shape is not None and ends[-1] == packed.shape[-1]
        return verdict("" if joined else f"it is cut at {cuts}, not into query, key and value")

    def rewrite(self, op: Any, packed: ir.Value, attention: ir.Value, **_: Any) -> Any:
        return _fed(op, packed, attention)


class SplitQKV(Rule):
    """A model's own packed product, taken apart by one Split along its last axis."""

    def __init__(self) -> None:
        super().__init__("split QKV")

    def pattern(self, op: Any, packed: Any) -> Any:
        parts = op.Split(
            packed, _allow_other_inputs=True, _allow_other_attributes=True, _outputs=list(NAMES)
        )
        return op.GroupQueryAttention(
            *parts,
            _allow_other_inputs=True,
            _allow_other_attributes=True,
            _domain=DOMAIN,
            _outputs=["attention", "present_key", "present_value"],
        )

    def check(self, context: Any, packed: ir.Value, q: ir.Value, **_: Any) -> Any:
        axis = maker(q).attributes.get_int("axis", 0)
        last = packed.shape is not None and axis in (-1, len(packed.shape) - 1)
        return verdict("" if last else f"it is split along axis {axis} of {packed.shape}")

    def rewrite(self, op: Any, packed: ir.Value, attention: ir.Value, **_: Any) -> Any:
        return _fed(op, packed, attention)


def _fed(op: Any, packed: ir.Value, attention: ir.Value) -> Any:
    """The operator with one packed input instead of three."""
    node = maker(attention)
    return op.GroupQueryAttention(
        packed, None, None, *node.inputs[3:], **node.attributes, _domain=DOMAIN, _outputs=3
    )


def rules() -> list[pattern.RewriteRule]:
    """With and without biases, and packed already."""
    return [*(PackedQKV.rule(biased=biased) for biased in (False, True)), SlicedQKV.rule(), SplitQKV.rule()]
