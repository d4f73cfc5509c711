"""Reshapes and Transposes that undo each other, and shapes that need not be computed."""

import pytest

from holdfast.exporter.passes import reshapes
from tests.exporter.passes.graphs import apply, assert_same, drawn, model_of, operators, run

SHAPES = {"heads": [0, 0, 4, 2], "joined": [0, 0, 8], "other": [0, 0, 2, 4]}
COMPUTED = "rows = Shape<start = 0, end = 1>(x)\n shape = Concat<axis = 0>(rows, minus, sizes)\n"


def test_heads_split_and_joined_are_as_before() -> None:
    nodes = """
        a = Reshape(x, heads)
        b = Transpose<perm = [0, 2, 1, 3]>(a)
        c = Transpose<perm = [0, 2, 1, 3]>(b)
        d = Reshape(c, joined)
        y = Neg(d)
    """
    model = model_of(f"(float[B, S, 8] x) => (float[B, S, 8] y) {{ {nodes} }}", SHAPES)
    feeds = {"x": drawn(2, 3, 8)}
    before = run(model, feeds)
    assert apply(model, reshapes.rules()).rewrites >= 2
    assert operators(model) == {"Neg": 1}
    assert_same(before, run(model, feeds), atol=0.0)


def test_another_shape_stays() -> None:
    nodes = "a = Reshape(x, heads)\n y = Reshape(a, other)"
    model = model_of(f"(float[B, S, 8] x) => (float[B, S, 2, 4] y) {{ {nodes} }}", SHAPES)
    report = apply(model, reshapes.rules()[2:3], left=lambda node: node.op_type == "Reshape")
    assert (report.rewrites, report.left) == (0, 2)
    assert report.why is not None and report.why.endswith("[B,S,2,4] is not the shape [B,S,8] from before")


def test_a_transpose_between_stays() -> None:
    nodes = "a = Reshape(x, heads)\n b = Transpose<perm = [0, 2, 1, 3]>(a)\n y = Reshape(b, flat)"
    model = model_of(f"(float[B, 3, 8] x) => (float[B, 24] y) {{ {nodes} }}", {**SHAPES, "flat": [0, 24]})
    before = run(model, {"x": drawn(2, 3, 8)})
    assert apply(model, reshapes.rules()).rewrites == 0
    assert_same(before, run(model, {"x": drawn(2, 3, 8)}), atol=0.0)


def test_a_shape_that_keeps_open_dimensions_is_constant() -> None:
    model = model_of(
        f"(float[B, S, 8] x) => (float[B, S, 4, 2] y) {{ {COMPUTED} y = Reshape(x, shape) }}",
        {"minus": [-1], "sizes": [4, 2]},
    )
    feeds = {"x": drawn(2, 3, 8)}
    before = run(model, feeds)
    assert apply(model, reshapes.rules()).rewrites == 1
    assert operators(model) == {"Reshape": 1, "Constant": 1}
    assert_same(before, run(model, feeds), atol=0.0)


@pytest.mark.parametrize(
    ("result", "why"),
    [
        ("float[S, B, 8] y", "an open dimension of [S,B,8] is not one of [B,S,8]"),
        ("float[B, M] y", "an open dimension of [B,M] is not one of [B,S,8]"),
    ],
)
def test_a_shape_that_moves_open_dimensions_is_computed(result: str, why: str) -> None:
    model = model_of(f"(float[B, S, 8] x, int64[R] shape) => ({result}) {{ y = Reshape(x, shape) }}", {})
    report = apply(model, reshapes.rules()[-1:])
    assert report.rewrites == 0
    assert report.why is not None and report.why.endswith(why)


def test_unsqueezes_become_one() -> None:
    nodes = "a = Unsqueeze(x, one)\n y = Unsqueeze(a, one)"
    model = model_of(f"(float[B, S] x) => (float[B, 1, 1, S] y) {{ {nodes} }}", {"one": [1]})
    before = run(model, {"x": drawn(2, 3)})
    assert apply(model, reshapes.rules()).rewrites == 1
    assert operators(model)["Unsqueeze"] == 1
    assert_same(before, run(model, {"x": drawn(2, 3)}), atol=0.0)
