"""Weights of linear layers, turned once instead of at run time."""

import numpy as np
import onnx_ir as ir

from holdfast.exporter.passes import weights
from tests.exporter.passes.graphs import apply, assert_same, drawn, model_of, operators, run

NODES = "turned = Transpose<perm = [1, 0]>(weight)\n y = MatMul(x, turned)"
TEXT = f"(float[B, 8] x) => (float[B, 5] y) {{ {NODES} }}"


def test_a_constant_is_turned() -> None:
    weight = drawn(5, 8)
    model = model_of(TEXT, {"weight": weight})
    feeds = {"x": drawn(3, 8)}
    before = run(model, feeds)
    assert apply(model, weights.rules()).rewrites == 1
    assert operators(model) == {"MatMul": 1}
    assert_same(before, run(model, feeds), atol=0.0)
    turned = next(value.const_value for value in model.graph.initializers.values())
    assert isinstance(turned, ir.LazyTensor)  # no copy until it is saved
    assert np.array_equal(turned.numpy(), weight.T)
    assert list(turned.shape) == [8, 5]


def test_a_computed_weight_stays() -> None:
    model = model_of(TEXT.replace("float[B, 8] x", "float[B, 8] x, float[5, 8] weight"), {})
    report = apply(model, weights.rules(), left=lambda node: node.op_type == "Transpose")
    assert (report.rewrites, report.left) == (0, 1)
    assert report.why is not None and report.why.endswith("it is not a constant")


def test_other_transposes_stay() -> None:
    text = "(float[B, 8] x) => (float[2, 4, 3] y) { y = Transpose<perm = [0, 2, 1]>(weight) }"
    assert apply(model_of(text, {"weight": drawn(2, 3, 4)}), weights.rules()).rewrites == 0
