"""Rotary embedding into the attention operator: `do_rotary`, with cos and sin for every position.

Rotary embedding is x * cos + rotate_half(x) * sin (arXiv 2104.09864), the same angles in both halves of
the rotated channels. The caches are what the graph itself computes from `position_ids`, evaluated once for
every position, so that any fixed frequency scaling (linear, YaRN, Llama 3) is in them.

The operator counts positions from the first column of the batch, padding included. Only differences of
positions enter a score, so rows padded on the left give the same attention.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from onnxscript.rewriter import pattern

from holdfast.exporter.passes.constants import slice_of
from holdfast.exporter.passes.rule import Rule, maker, verdict
from holdfast.exporter.tracing import DOMAIN

Array = NDArray[Any]
TOKENS_FIRST = [0, 2, 1, 3]  # [batch, heads, tokens, size] to [batch, tokens, heads, size], and back
POSITIONS = "position_ids"
# What ONNX Runtime's CPU kernel rotates: heads of a multiple of 16 channels, a multiple of 16 of them
HEAD_SIZE_STEP = ROTATED_STEP = 16


class RotaryInAttention(Rule):
    """Query and key that are rotated just before the operator.

    Arguments:
        partial: only the first channels of a head are rotated and the others pass.
        positions: positions that the caches hold.
    """

    def __init__(self, *, partial: bool, positions: int) -> None:
        super().__init__("partial rotary embedding" if partial else "rotary embedding")
        self._partial = partial
        self._positions = positions
        self._tables: dict[tuple[str, str], list[Array]] = {}
        self._caches: dict[tuple[str, str], tuple[ir.Value, ir.Value]] = {}

    def pattern(self, op: Any, query: Any, key: Any, value: Any, cos: Any, sin: Any) -> Any:
        rotated = _partially_rotated if self._partial else _rotated
        rows = [
            op.Reshape(
                op.Transpose(rotated(op, x, cos, sin, name), perm=TOKENS_FIRST), _allow_other_inputs=True
            )
            for x, name in ((query, "q"), (key, "k"))
        ]
        return op.GroupQueryAttention(
            *rows,
            value,
            _allow_other_inputs=True,
            _allow_other_attributes=True,
            _domain=DOMAIN,
            _outputs=["attention", "present_key", "present_value"],
        )

    def check(self, context: Any, query: ir.Value, cos: ir.Value, sin: ir.Value, **bound: ir.Value) -> Any:
        reasons = (_half_reason(bound, name, self._partial) for name in "qk")
        return verdict(next(filter(None, reasons), "") or self._reason(query, cos, sin))

    def _reason(self, query: ir.Value, cos: ir.Value, sin: ir.Value) -> str:
        """Why the operator cannot turn heads by these angles; empty where it can."""
        if not _multiple(query, HEAD_SIZE_STEP):
            return f"the head size is not a multiple of {HEAD_SIZE_STEP}: {query.shape}"
        leaves = _graph_inputs(cos) | _graph_inputs(sin)
        if leaves != {POSITIONS}:
            return f"the angles depend on {sorted(leaves)}, not on {POSITIONS} alone"
        if not _multiple(cos, ROTATED_STEP):
            return f"the rotated channels are not a multiple of {ROTATED_STEP}: {cos.shape}"
        halves = [np.split(table, 2, axis=-1) for table in self._table(cos, sin)]
        equal = all(np.array_equal(first, second) for first, second in halves)
        return "" if equal else "the angles of the two halves differ"

    def rewrite(self, op: Any, cos: ir.Value, sin: ir.Value, **bound: Any) -> Any:
        node = maker(bound["attention"])
        inputs = [*node.inputs, *[None] * (9 - len(node.inputs))]
        for index, name in enumerate(("query", "key")):
            rotated: Any = node.inputs[index]
            heads = op.Transpose(bound[name], perm=TOKENS_FIRST)
            rows = op.Reshape(heads, *maker(rotated).inputs[1:])
            rows.shape, rows.type = rotated.shape, rotated.type
            inputs[index] = rows
        inputs[7], inputs[8] = self._cos_sin(op, cos, sin)
        attributes = {**node.attributes, "do_rotary": ir.AttrInt64("do_rotary", 1)}
        return op.GroupQueryAttention(*inputs, **attributes, _domain=DOMAIN, _outputs=3)

    def _table(self, cos: ir.Value, sin: ir.Value) -> list[Array]:
        """Cos and sin of every position, float32 [positions, rotated]."""
        key = (str(cos.name), str(sin.name))
        if key not in self._tables:
            self._tables[key] = _evaluate([cos, sin], self._positions)
        return self._tables[key]

    def _cos_sin(self, op: Any, cos: ir.Value, sin: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Both caches float32 [positions, rotated / 2]; layers with the same angles share them."""
        key = (str(cos.name), str(sin.name))
        if key not in self._caches:
            stem = f"{'partial_' if self._partial else ''}rotary.{len(self._caches)}"
            halves = [np.ascontiguousarray(t[:, : t.shape[1] // 2]) for t in self._table(cos, sin)]
            cos_cache, sin_cache = (
                op.initializer(ir.tensor(half, name=f"{stem}.{part}"))
                for half, part in zip(halves, ("cos", "sin"), strict=True)
            )
            self._caches[key] = cos_cache, sin_cache
        return self._caches[key]


def rules(positions: int) -> list[pattern.RewriteRule]:
    """Full and partial rotary embedding, for caches of `positions` positions."""
    return [RotaryInAttention.rule(partial=partial, positions=positions) for partial in (False, True)]


def _rotated(op: Any, x: Any, cos: Any, sin: Any, name: str) -> Any:
    first = op.Slice(x, _allow_other_inputs=True, _outputs=[f"{name}_first"])
    second = op.Slice(x, _allow_other_inputs=True, _outputs=[f"{name}_second"])
    return x * cos + op.Concat(op.Neg(second), first, axis=-1) * sin


def _partially_rotated(op: Any, x: Any, cos: Any, sin: Any, name: str) -> Any:
    turned = op.Slice(x, _allow_other_inputs=True, _outputs=[f"{name}_turned"])
    passed = op.Slice(x, _allow_other_inputs=True, _outputs=[f"{name}_passed"])
    return op.Concat(_rotated(op, turned, cos, sin, name), passed, axis=-1)


def _half_reason(bound: dict[str, ir.Value], name: str, partial: bool) -> str:
    """Why the two halves are not those of rotate_half; empty where they are."""
    first, second = slice_of(bound[f"{name}_first"]), slice_of(bound[f"{name}_second"])
    if first is None or second is None:
        return f"the halves of {name} are cut at places that are not constant, or not side by side"
    if first[0] != 0 or first[1] != second[0] or second[1] != 2 * first[1]:
        return f"{name} is cut at {first} and {second}, not into two halves"
    if partial:
        turned, passed = slice_of(bound[f"{name}_turned"]), slice_of(bound[f"{name}_passed"])
        if turned is None or passed is None or turned[0] != 0 or turned[1] != passed[0]:
            return f"the rotated channels of {name} are not its first ones"
    return ""


def _multiple(value: ir.Value, step: int) -> bool:
    """Whether the last dimension of a value is known and a multiple of `step`."""
    size = None if value.shape is None else value.shape[-1]
    return isinstance(size, int) and size % step == 0


def _ancestors(
    values: list[ir.Value], *, content: bool = False
) -> tuple[list[ir.Node], dict[str, ir.Value]]:
    """Nodes that the values are computed by, and the leaves they are computed from.

    Arguments:
        content: leave out what only its shape is read of.
    """
    nodes: dict[ir.Node, None] = {}
    leaves: dict[str, ir.Value] = {}
    pending = list(values)
    while pending:
        value = pending.pop()
        producer = value.producer()
        if producer is None:
            leaves[str(value.name)] = value
        elif producer not in nodes:
            nodes[producer] = None
            if content and producer.op_type == "Shape":
                continue
            pending += [item for item in producer.inputs if item is not None]
    return list(nodes), leaves


def _graph_inputs(value: ir.Value) -> set[str]:
    """Names of the graph inputs whose content a value depends on; a shape may come from any of them."""
    leaves = _ancestors([value], content=True)[1]
    return {name for name, leaf in leaves.items() if leaf.is_graph_input()}


def _evaluate(values: list[ir.Value], positions: int) -> list[Array]:
    """Values [1, 1, positions, size] at `position_ids` 0, 1, ... as [positions, size]."""
    nodes, leaves = _ancestors(values)
    graph = nodes[0].graph
    assert isinstance(graph, ir.Graph)
    order = {node: index for index, node in enumerate(graph)}
    feeds = {name: _feed(leaf, positions) for name, leaf in leaves.items() if leaf.is_graph_input()}
    angles = onnx.helper.make_graph(
        [ir.to_proto(node) for node in sorted(nodes, key=order.__getitem__)],
        "angles",
        [_input_info(name, feed) for name, feed in feeds.items()],
        [onnx.helper.make_empty_tensor_value_info(str(value.name)) for value in values],
        [_initializer(name, leaf) for name, leaf in leaves.items() if leaf.const_value is not None],
    )
    opset = onnx.helper.make_opsetid("", graph.opset_imports[""])
    model = onnx.helper.make_model(angles, opset_imports=[opset], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [table.reshape(positions, -1) for table in session.run(None, feeds)]


def _input_info(name: str, feed: Array) -> Any:
    return onnx.helper.make_tensor_value_info(
        name, onnx.helper.np_dtype_to_tensor_dtype(feed.dtype), feed.shape
    )


def _initializer(name: str, leaf: ir.Value) -> Any:
    return onnx.numpy_helper.from_array(leaf.const_value.numpy(), name)  # type: ignore[union-attr]


def _feed(leaf: ir.Value, positions: int) -> Array:
    """One row of `positions` tokens; of every input but `position_ids` only the shape is read."""
    if leaf.name == POSITIONS:
        return np.arange(positions)[None]
    sizes = [size if isinstance(size, int) else positions for size in leaf.shape or ()]
    return np.zeros([1, *sizes[1:]], leaf.dtype.numpy() if leaf.dtype else np.int64)
