"""RMS and layer norms as one node, with and without the addition before them."""

import numpy as np
import pytest

from holdfast.exporter.passes import norms
from tests.exporter.passes.graphs import apply, assert_same, drawn, model_of, operators, run

CONSTANTS = {"two": np.float32(2), "axis": [-1], "epsilon": np.float32(1e-5)}
RMS = """
    square = Pow(x, two)
    mean = ReduceMean<keepdims = 1, noop_with_empty_axes = 0>(square, axis)
    shifted = Add(mean, epsilon)
    root = Sqrt(shifted)
    inverse = Reciprocal(root)
    normal = Mul(x, inverse)
    y = Mul(weight, normal)
"""
TEXT = "(float[B, S, 8] x) => (float[B, S, 8] y)"


def test_an_rms_norm_is_one_node() -> None:
    model = model_of(f"{TEXT} {{ {RMS} }}", {**CONSTANTS, "weight": drawn(8)})
    feeds = {"x": drawn(2, 3, 8)}
    before = run(model, feeds)
    assert apply(model, norms.rules()).rewrites == 1
    assert operators(model) == {"SimplifiedLayerNormalization": 1}
    assert_same(before, run(model, feeds), atol=1e-6)


def test_a_computed_epsilon_stays() -> None:
    inputs = "(float[B, S, 8] x, float epsilon) => (float[B, S, 8] y)"
    constants = {name: value for name, value in CONSTANTS.items() if name != "epsilon"}
    model = model_of(f"{inputs} {{ {RMS} }}", {**constants, "weight": drawn(8)})
    report = apply(model, norms.rules(), left=lambda node: node.op_type == "ReduceMean")
    assert (report.rewrites, report.left) == (0, 1)
    assert report.why is not None and "Epsilon" in report.why


@pytest.mark.parametrize(
    ("norm", "fused"),
    [
        (
            "SimplifiedLayerNormalization<axis = -1, epsilon = 0.00001>(sum, weight)",
            "SkipSimplifiedLayerNormalization",
        ),
        ("LayerNormalization<axis = -1, epsilon = 0.00001>(sum, weight, bias)", "SkipLayerNormalization"),
    ],
)
def test_the_norm_of_a_sum_that_is_read_again(norm: str, fused: str) -> None:
    inputs = "(float[B, S, 8] x, float[B, S, 8] skip) => (float[B, S, 8] y, float[B, S, 8] z)"
    nodes = f"<float[B, S, 8] sum> {{ sum = Add(skip, x)\n y = {norm}\n z = Neg(sum) }}"
    model = model_of(f"{inputs} {nodes}", {"weight": drawn(8), "bias": drawn(8, seed=1)})
    feeds = {"x": drawn(2, 3, 8), "skip": drawn(2, 3, 8, seed=1)}
    before = run(model, feeds)
    assert apply(model, norms.skip_rules()).rewrites == 1
    assert operators(model) == {fused: 1, "Neg": 1}
    assert_same(before, run(model, feeds), atol=1e-6)


def test_a_sum_that_broadcasts_stays() -> None:
    inputs = "(float[B, S, 8] x, float[8] skip) => (float[B, S, 8] y)"
    nodes = "{ sum = Add(skip, x)\n y = SimplifiedLayerNormalization<axis = -1>(sum, weight) }"
    model = model_of(f"{inputs} {nodes}", {"weight": drawn(8)})
    report = apply(model, norms.skip_rules())
    assert report.rewrites == 0
    assert report.why is not None and "Shape mismatch" in report.why
