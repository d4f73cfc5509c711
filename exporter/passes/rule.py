"""The base of the rewrite rules here, and why one does not apply."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern

from holdfast.exporter.tracing import MODULE


class Rule(pattern.RewriteRuleClassBase):  # type: ignore[misc]  # onnxscript comes without types
    """A rule that leaves what it matched to those who read it elsewhere; what nobody reads goes."""

    def __init__(self, name: str) -> None:
        super().__init__(name, remove_nodes=False)


def verdict(reason: str) -> Any:
    """A match where there is no reason against it."""
    match = pattern.MatchResult()
    return match.fail(reason) if reason else match


def maker(value: ir.Value) -> ir.Node:
    """The node that computes a matched value."""
    node = value.producer()
    if node is None:
        raise ValueError(f"no node computes {value.name}")
    return node


def module_of(value: ir.Value) -> str:
    """Path of the module that a matched value was traced in."""
    return maker(value).metadata_props.get(MODULE, "")
