"""The rotary embedding, moved into the attention operator where that is exact."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from holdfast.exporter.fused import PassReport
from holdfast.exporter.passes import rotary
from tests.exporter.passes.graphs import ATTENTION, apply, assert_same, drawn, model_of, operators, run

POSITIONS = 12
ANGLES = """
    numbers = Cast<to = 1>(position_ids)
    column = Unsqueeze(numbers, last)
    angles = Mul(column, frequencies)
    both = Concat<axis = -1>(angles, angles)
    cos2 = Cos(both)
    cos = Unsqueeze(cos2, one)
    sin2 = Sin(both)
    sin = Unsqueeze(sin2, one)
"""


def rotated(name: str, *, partial: bool) -> str:
    """rotate_half of all channels, or of the first ones."""
    source = f"{name}_cut" if partial else name
    cuts = f"""
    {name}_cut = Slice({name}, zero, turned, axis, one)
    {name}_rest = Slice({name}, turned, end, axis, one)
    """
    nodes = f"""
    {name}_first = Slice({source}, zero, half, axis, one)
    {name}_second = Slice({source}, half, end, axis, one)
    {name}_minus = Neg({name}_second)
    {name}_other = Concat<axis = -1>({name}_minus, {name}_first)
    {name}_cos = Mul({source}, cos)
    {name}_sin = Mul({name}_other, sin)
    {name}_turned = Add({name}_cos, {name}_sin)
    """
    joined = f"{name}_joined = Concat<axis = -1>({name}_turned, {name}_rest)\n"
    result = f"{name}_joined" if partial else f"{name}_turned"
    rows = f"""
    {name}_t = Transpose<perm = [0, 2, 1, 3]>({result})
    {name}_rows = Reshape({name}_t, {name}_shape)
    """
    return (cuts if partial else "") + nodes + (joined if partial else "") + rows


def build(*, size: int = 16, turned: int | None = None, **changes: str) -> ir.Model:
    """Attention of 4 and 2 heads; `changes` replaces one line of the graph, by the name of its output."""
    width = turned or size
    partial = turned is not None
    text = ANGLES + rotated("q", partial=partial) + rotated("k", partial=partial)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for name, line in changes.items():
        lines = [line if found.startswith(f"{name} =") else found for found in lines]
    nodes = "\n".join(lines)
    past, present = (
        f"float[B, 2, {length}, {size}] {name}" for length, name in (("P", "past"), ("T", "present"))
    )
    text = f"""
    (int64[B, S] position_ids, float[B, 4, S, {size}] q, float[B, 2, S, {size}] k,
     float[B, S, {2 * size}] v, {past}_key, {past}_value, int32[B] seqlens_k, int32[1] total,
     float[1] stretch)
    => (float[B, S, {4 * size}] out, {present}_key, {present}_value) {{
    {nodes}
    {ATTENTION}<num_heads = 4, kv_num_heads = 2, scale = 0.3>
        (q_rows, k_rows, v, past_key, past_value, seqlens_k, total)
    }}"""
    frequencies = (100.0 ** -np.linspace(0, 1, width // 2)).astype(np.float32)
    constants = {
        **{"frequencies": frequencies, "zero": [0], "half": [width // 2], "end": [np.iinfo(np.int64).max]},
        **{"turned": [width], "axis": [3], "one": [1], "two": [2], "last": [-1], "odd": [width // 2 - 2]},
        **{"q_shape": [0, 0, 4 * size], "k_shape": [0, 0, 2 * size]},
    }
    return model_of(text, constants)


def feeds(size: int, *, rows: int, past: int, new: int) -> dict[str, np.ndarray]:
    """The new tokens of every row follow `past` cached ones."""
    return {
        "position_ids": np.tile(np.arange(past, past + new), (rows, 1)),
        "q": drawn(rows, 4, new, size),
        "k": drawn(rows, 2, new, size, seed=1),
        "v": drawn(rows, new, 2 * size),
        "past_key": drawn(rows, 2, past, size),
        "past_value": drawn(rows, 2, past, size, seed=1),
        "seqlens_k": np.full(rows, past + new - 1, np.int32),
        "total": np.array([past + new], np.int32),
        "stretch": np.array([0.5], np.float32),
    }


def report_of(model: ir.Model) -> PassReport:
    return apply(
        model,
        rotary.rules(POSITIONS),
        left=lambda node: node.op_type == "GroupQueryAttention" and "do_rotary" not in node.attributes,
    )


@pytest.mark.parametrize(("size", "turned"), [(16, None), (64, None), (32, 16), (64, 16), (48, 32)])
def test_the_operator_turns_as_the_graph_did(size: int, turned: int | None) -> None:
    model = build(size=size, turned=turned)
    cases = [feeds(size, rows=2, past=0, new=POSITIONS), feeds(size, rows=2, past=4, new=1)]
    before = [run(model, case) for case in cases]
    report = report_of(model)
    assert (report.rewrites, report.left, report.why) == (1, 0, None)
    assert operators(model) == {"Transpose": 2, "Reshape": 2, "GroupQueryAttention": 1}
    assert not model.graph.inputs[0].uses()  # nothing reads position_ids
    for case, expected in zip(cases, before, strict=True):
        assert_same(expected, run(model, case), atol=1e-5)
    cos = next(value for name, value in model.graph.initializers.items() if name.endswith(".cos"))
    assert list(cos.const_value.shape) == [POSITIONS, (turned or size) // 2]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (
            build(angles="scaled = Mul(column, stretch)\n angles = Mul(scaled, frequencies)"),
            "the angles depend on ['position_ids', 'stretch'], not on position_ids alone",
        ),
        (
            build(both="wider = Add(angles, angles)\n both = Concat<axis = -1>(angles, wider)"),
            "the angles of the two halves differ",
        ),
        (
            build(
                q_first="q_first = Slice(q, zero, odd, axis, one)",
                q_second="q_second = Slice(q, odd, end, axis, one)",
            ),
            "q is cut at (0, 6) and (6, 16), not into two halves",
        ),
        (
            build(
                k_first="k_first = Slice(k, zero, end, axis, two)",  # every other channel: interleaved
                k_second="k_second = Slice(k, one, end, axis, two)",
            ),
            "the halves of k are cut at places that are not constant, or not side by side",
        ),
        (build(size=24), "the head size is not a multiple of 16: [B,4,S,24]"),
        (build(size=24, turned=16), "the head size is not a multiple of 16: [B,4,S,24]"),
        (build(size=16, turned=8), "the rotated channels are not a multiple of 16: [B,1,S,8]"),
        (
            build(
                size=32,
                turned=16,
                q_cut="q_cut = Slice(q, turned, end, axis, one)",
                q_rest="q_rest = Slice(q, zero, turned, axis, one)",
            ),
            "the rotated channels of q are not its first ones",
        ),
        (build(q_t="q_t = Identity(q_turned)"), "expected Transpose, got Add."),
    ],
)
def test_what_stays_in_the_graph(model: ir.Model, why: str) -> None:
    report = report_of(model)
    assert (report.rewrites, report.left) == (0, 1)
    assert report.why is not None and report.why.endswith(why)
