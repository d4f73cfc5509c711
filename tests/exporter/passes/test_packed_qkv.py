"""Query, key and value as one product that the attention operator takes as it is."""

import json
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import pytest

from holdfast.exporter.fused import PassReport
from holdfast.exporter.passes import packed_qkv
from holdfast.exporter.passes.packing import COLUMNS
from tests.exporter.passes.graphs import (
    ATTENTION,
    CACHE,
    PRESENT,
    apply,
    assert_same,
    cache,
    drawn,
    model_of,
    operators,
    run,
)

ATTRIBUTES = "num_heads = 4, kv_num_heads = 2, scale = 0.3"
OPERATOR = f"{ATTENTION}<{ATTRIBUTES}>(q, k, v, past_key, past_value, seqlens_k, total)"
PRODUCTS = f"""
    [attn.q_proj] q = MatMul(x, w_q)
    [attn.k_proj] k = MatMul(x, w_k)
    [attn.v_proj] v = MatMul(x, w_v)
    [attn] {OPERATOR}
"""
BIASED = f"""
    [attn.q_proj] q0 = MatMul(x, w_q)
    [attn.k_proj] k0 = MatMul(x, w_k)
    [attn.v_proj] v0 = MatMul(x, w_v)
    q = Add(q0, b_q)
    k = Add(k0, b_k)
    v = Add(v0, b_v)
    [attn] {OPERATOR}
"""
CONSTANTS = {
    **{"w_q": drawn(8, 64), "w_k": drawn(8, 32), "w_v": drawn(8, 32, seed=1)},
    **{"b_q": drawn(64), "b_k": drawn(32), "b_v": drawn(32, seed=1), "scale": drawn(1)},
    **{"zero": [0], "first": [64], "second": [96], "third": [128], "axis": [2], "one": [1]},
    **{"sizes": [64, 32, 32], "channel": [-1], "w": drawn(8, 128)},
}


def packing(
    nodes: str,
    *,
    x: str = "float[B, S, 8] x",
    more: str = "",
    width: int = 8,
    extra: Mapping[str, np.ndarray] | None = None,
) -> tuple[ir.Model, PassReport]:
    """A graph through the pass; the outputs are compared before and after."""
    model = model_of(f"({x}, {CACHE}) => ({PRESENT}{more}) {{ {nodes} }}", CONSTANTS)
    feeds = {"x": drawn(2, 1, width), **cache(2, 5, 1), **(extra or {})}
    before = run(model, feeds)
    report = apply(
        model, packed_qkv.rules(), left=lambda node: len(node.inputs) > 2 and bool(node.inputs[2])
    )
    assert_same(before, run(model, feeds), atol=1e-5)
    return model, report


@pytest.mark.parametrize("nodes", [PRODUCTS, BIASED])
def test_three_products_become_one(nodes: str) -> None:
    model, report = packing(nodes)
    assert (report.rewrites, report.left, report.why) == (1, 0, None)
    adds = {"Add": 1} if nodes is BIASED else {}
    assert operators(model) == {"MatMul": 1, "GroupQueryAttention": 1, **adds}
    product = next(node for node in model.graph if node.op_type == "MatMul")
    columns = json.loads(product.metadata_props[COLUMNS])
    assert columns == {"attn.q_proj": [0, 64], "attn.k_proj": [64, 96], "attn.v_proj": [96, 128]}
    weight = product.inputs[1].const_value.numpy()  # type: ignore[union-attr]
    assert np.array_equal(weight, np.concatenate([CONSTANTS[f"w_{n}"] for n in "qkv"], axis=1))


@pytest.mark.parametrize(
    ("nodes", "settings", "why"),
    [
        (
            PRODUCTS.replace("[attn] ", "z = Neg(k)\n [attn] "),
            {"more": ", float[B, S, 32] z"},
            "a product is read elsewhere as well",
        ),
        (
            PRODUCTS.replace("w_k", "computed"),
            {"x": "float[B, S, 8] x, float[8, 32] computed", "extra": {"computed": drawn(8, 32)}},
            "a weight is not a constant",
        ),
        (
            BIASED.replace("b_k", "computed"),
            {"x": "float[B, S, 8] x, float[32] computed", "extra": {"computed": drawn(32)}},
            "a bias is not a constant",
        ),
        (
            PRODUCTS.replace(
                "k = MatMul(x, w_k)", "k0 = MatMul(x, w_k)\n k = Tanh(k0)"
            ),  # a norm of the key
            {},
            "expected MatMul, got Tanh.",
        ),
    ],
)
def test_what_is_not_packed(nodes: str, settings: dict, why: str) -> None:
    _, report = packing(nodes, **settings)
    assert (report.rewrites, report.left) == (0, 1)
    assert report.why is not None and report.why.endswith(why)


SLICED = f"""
    [attn.qkv] all = MatMul(x, w)
    q = Slice(all, zero, first, axis, one)
    k = Slice(all, first, second, axis, one)
    v = Slice(all, second, third, axis, one)
    [attn] {OPERATOR}
"""
SPLIT = f"""
    [attn.qkv] all = MatMul(x, w)
    q, k, v = Split<axis = 2>(all, sizes)
    [attn] {OPERATOR}
"""


@pytest.mark.parametrize("nodes", [SLICED, SPLIT])
def test_a_product_that_is_packed_already(nodes: str) -> None:
    model, report = packing(nodes)
    assert (report.rewrites, report.left) == (1, 0)
    assert operators(model) == {"MatMul": 1, "GroupQueryAttention": 1}


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        (
            "k = Slice(all, first, second, axis, one)\n    v = Slice(all, second, third, axis, one)",
            "v = Slice(all, first, second, axis, one)\n    k = Slice(all, second, third, axis, one)",
            "it is cut at [(0, 64), (96, 128), (64, 96)], not into query, key and value",
        ),
        (
            "q = Slice(all, zero, first, axis, one)",
            "from = Identity(start)\n q = Slice(all, from, first, axis, one)",
            "it is cut at places that are not constant",
        ),
    ],
)
def test_another_cut_stays(old: str, new: str, why: str) -> None:
    x = "float[B, S, 8] x, int64[1] start"
    _, report = packing(SLICED.replace(old, new), x=x, extra={"start": np.array([0])})
    assert report.rewrites == 0
    assert report.why is not None and report.why.endswith(why)


def test_a_split_in_another_order_stays() -> None:
    _, report = packing(SPLIT.replace("q, k, v = Split", "q, v, k = Split"))
    assert report.rewrites == 0
