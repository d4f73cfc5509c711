"""The fused graph: traced with its attention as one operator, then rewritten pass by pass.

Inputs and outputs are Optimum's. `position_ids` stays an input only where the rotary embedding did not move
into the operator; `logits_to_keep` is an optional one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxscript.optimizer
from onnx_ir.passes import common
from onnxscript.rewriter import pattern
from torch import nn

from holdfast.errors import ExportError
from holdfast.exporter.architectures import linear_modules, row_of
from holdfast.exporter.graph import GraphLinear, node_name
from holdfast.exporter.passes import gated_mlp, last_logits, norms, packed_qkv, reshapes, rotary, weights
from holdfast.exporter.passes.packing import COLUMNS
from holdfast.exporter.quiet import quiet
from holdfast.exporter.tracing import MODULE, OPERATOR, WRAPPER, trace

SHARED_CACHE = "holdfast.shared_cache"  # the present cache may be written over the past one, in one buffer
BATCH, NEW, TOTAL, PAST = (
    "batch_size",
    "sequence_length",
    "total_sequence_length",
    "past_sequence_length",
)


@dataclass(frozen=True)
class PassReport:
    """What a rewrite pass did.

    Attributes:
        rewrites: places that it rewrote.
        left: places of its kind that it left alone.
        why: why it left the one that came nearest to matching alone; None where none is left.
    """

    name: str
    rewrites: int
    left: int
    why: str | None


@dataclass(frozen=True)
class _Pass:
    """A rewrite pass, and how a node is recognized that it could have rewritten and did not."""

    name: str
    rules: Sequence[pattern.RewriteRule]
    open: Callable[[ir.Node], bool]


@dataclass(frozen=True)
class FusedGraph:
    """A graph whose weights are still torch's, to be written once.

    Attributes:
        modules: module path -> where the linear layer is; blocks in order, head last.
        passes: what each rewrite pass did, in order.
    """

    model: ir.Model
    modules: dict[str, GraphLinear]
    passes: tuple[PassReport, ...]


def fused_graph(model: Any, *, opset: int, positions: int) -> FusedGraph:
    """Trace and rewrite a causal language model.

    Arguments:
        model: a transformers model of a supported class with pluggable attention.
        positions: longest sequence; the rotary caches have one row for each.

    Raises:
        ExportError: the model cannot be traced, or a weight of the graph is not the model's.
    """
    with quiet():
        graph = trace(model, opset=opset)
        before = _apply(graph, _Pass("weights", weights.rules(), lambda node: False))
        _fold_constants(graph)
        reports = (before, *(_apply(graph, step) for step in _passes(model, positions)))
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(graph)
        common.DeduplicateInitializersPass()(graph)
    _settle_inputs(graph.graph)
    _name_dimensions(graph.graph)
    _name_nodes(graph.graph)
    _name_weights(graph.graph, row_of(model).embedding)
    modules = _find_linears(graph.graph, linear_modules(model))
    common.ClearMetadataAndDocStringPass()(graph)
    graph.metadata_props[SHARED_CACHE] = "1"
    return FusedGraph(graph, modules, reports)


def _fold_constants(model: ir.Model) -> None:
    """onnxscript's optimizer without its rewrite rules, which take most of its time and find nothing."""
    onnxscript.optimizer.fold_constants(model)
    common.RemoveUnusedNodesPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.DeduplicateInitializersPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.IdentityEliminationPass()(model)


def _passes(model: Any, positions: int) -> list[_Pass]:
    return [
        _Pass("norms", norms.rules(), lambda node: node.op_type == "ReduceMean"),
        _Pass("rotary embedding", rotary.rules(positions), _unrotated),
        _Pass("reshapes", reshapes.rules(), lambda node: node.op_type == "Transpose"),
        _Pass(
            "packed QKV", packed_qkv.rules(), lambda node: node.op_type == OPERATOR and bool(node.inputs[1])
        ),
        _Pass(
            "skip norms",
            norms.skip_rules(),
            lambda node: node.op_type.endswith("LayerNormalization") and _summed(node),
        ),
        _Pass("gated MLP", gated_mlp.rules(), lambda node: node.op_type == "Sigmoid"),
        _Pass("last logits", last_logits.rules(row_of(model).head), lambda node: False),
    ]


def _unrotated(node: ir.Node) -> bool:
    return node.op_type == OPERATOR and not node.attributes.get_int("do_rotary", 0)


def _summed(node: ir.Node) -> bool:
    """Whether a norm reads a sum."""
    producer = node.inputs[0].producer() if node.inputs[0] is not None else None
    return producer is not None and producer.op_type == "Add" and not node.op_type.startswith("Skip")


def _apply(model: ir.Model, step: _Pass) -> PassReport:
    """Each rule by itself, so that the next one finds no trace of what the last one left."""
    rewrites = 0
    for rule in step.rules:
        rewrites += rule.apply_to_model(model)
        common.IdentityEliminationPass()(model)
        common.RemoveUnusedNodesPass()(model)
    left = sum(map(step.open, model.graph))
    return PassReport(step.name, rewrites, left, _why(model, step.rules) if left else None)


def _why(model: ir.Model, rules: Sequence[pattern.RewriteRule]) -> str:
    """The reason of the failed match that came furthest."""
    tracer = pattern.MatchingTracer()
    for rule in rules:
        rule.apply_to_model(model, tracer=tracer)
    best = [matches[0] for matches in tracer.best_matches_map.values() if matches]
    failed = [match for match in best if match.status != pattern.MatchStatus.SUCCESS]
    if not failed:
        return "nothing there resembles the pattern"
    nearest = max(failed, key=lambda match: match.score())
    where = nearest.root_node.metadata_props.get(MODULE, "")
    return f"{where or nearest.root_node.op_type}: {nearest.match_result.reason}"


def _settle_inputs(graph: ir.Graph) -> None:
    """Leave `position_ids` out where only the rotary embedding read them; add what is optional."""
    unused = [value for value in graph.inputs if value.name == rotary.POSITIONS and not value.uses()]
    for value in unused:
        graph.inputs.remove(value)
    if last_logits.NAME in graph.initializers:
        graph.inputs.append(graph.initializers[last_logits.NAME])


def _name_dimensions(graph: ir.Graph) -> None:
    """Open dimensions by what they count, as Optimum does, instead of torch's symbols."""
    inputs = {value.name: value for value in graph.inputs}
    ids, mask = inputs["input_ids"].shape, inputs["attention_mask"].shape
    cache = inputs["past_key_values.0.key"].shape
    names = {str(ids[0]): BATCH, str(ids[1]): NEW, str(mask[1]): TOTAL, str(cache[2]): PAST}  # type: ignore[index]
    values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([names.get(str(d), None if "+" in str(d) else d) for d in value.shape])


def _name_weights(graph: ir.Graph, embedding: str) -> None:
    """Initializers by the module they belong to."""
    for value in list(graph.initializers.values()):
        value.name = str(value.name).removeprefix(WRAPPER)
    for node in graph:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is not None and weight.is_initializer():
            weight.name = f"{node.metadata_props[MODULE]}.weight_T"
        if node.op_type == "Gather" and node.metadata_props.get(MODULE) == embedding:
            node.inputs[0].name = f"{embedding}.weight"  # type: ignore[union-attr]


def _name_nodes(graph: ir.Graph) -> None:
    """`/model/layers.0/mlp/up_proj/MatMul`, `.../MatMul_output_0`: module and operator, as Optimum does."""
    kept = {value.name for value in graph.outputs}
    seen: Counter[str] = Counter()
    for node in graph:
        module = node.metadata_props.get(MODULE, "")
        stem = f"{node_name(module) if module else ''}/{node.op_type}"
        node.name = stem if not seen[stem] else f"{stem}_{seen[stem]}"
        seen[stem] += 1
        for index, value in enumerate(node.outputs):
            if value.name not in kept:
                value.name = f"{node.name}_output_{index}"


def _find_linears(graph: ir.Graph, linears: dict[str, nn.Linear]) -> dict[str, GraphLinear]:
    """Where every linear layer is, its weights compared bit for bit with the model's.

    Raises:
        ExportError: a linear is missing or its weight differs, or a product belongs to no linear.
    """
    found: dict[str, GraphLinear] = {}
    for node in graph:
        weight = node.inputs[1] if node.op_type in ("MatMul", "Gemm") else None
        if weight is not None and weight.const_value is not None:
            found |= _linears_of(node, weight, linears)
    missing = [path for path in linears if path not in found]
    if missing:
        raise ExportError(f"The graph has no weight for the linear layer `{missing[0]}`: report this.")
    return {path: found[path] for path in linears}


def _linears_of(node: ir.Node, weight: ir.Value, linears: dict[str, nn.Linear]) -> dict[str, GraphLinear]:
    """The one or several linear layers of a product with a weight [in, out]."""
    packed = json.loads(node.metadata_props.get(COLUMNS, "{}"))
    array = weight.const_value.numpy()  # type: ignore[union-attr]
    parts: dict[str, tuple[int, int] | None] = {
        path: (first, last) for path, (first, last) in packed.items()
    }
    found = {}
    for path, columns in (parts or {node.metadata_props.get(MODULE, ""): None}).items():
        if path not in linears or node.op_type != "MatMul":
            raise ExportError(
                f"The graph multiplies by a weight at `{node.name}` that belongs to no linear layer of the "
                "architecture table."
            )
        expected = linears[path].weight.detach().numpy().T
        part = array if columns is None else array[:, slice(*columns)]
        # as integers: NaN equals itself, and 0.0 is not -0.0
        if part.shape != expected.shape or not np.array_equal(part.view(np.int32), expected.view(np.int32)):
            raise ExportError(
                f"The graph's weight for `{path}` is not the model's: export again, and report this."
            )
        found[path] = GraphLinear(
            node=str(node.name),
            input=str(node.inputs[0].name),  # type: ignore[union-attr]
            weight=str(weight.name),
            output=str(node.outputs[0].name),
            bias=_bias_of(path, node, linears[path]),
            transposed=True,
            shape=tuple(array.shape),
            columns=columns,
        )
    return found


def _bias_of(path: str, node: ir.Node, module: nn.Linear) -> str | None:
    """The initializer that is added next, or that a skip norm adds."""
    if "bias" not in dict(module.named_parameters()):
        return None
    readers = [reader for reader, _ in node.outputs[0].uses()]
    names = [
        str(v.name)
        for r in readers
        for v in r.inputs
        if v is not None and v.is_initializer() and _is_bias(r, v)
    ]
    if len(names) != 1:
        raise ExportError(f"The graph does not add the bias of the linear layer `{path}`.")
    return names[0]


def _is_bias(reader: ir.Node, value: ir.Value) -> bool:
    """Whether an initializer is added: the operand of Add, or the last input of a skip norm."""
    if reader.op_type == "Add":
        return True
    return reader.op_type.startswith("Skip") and value is reader.inputs[-1]
