"""SiLU as one node, gate and up as one product."""

import json

import numpy as np
import pytest

from holdfast.exporter.passes import gated_mlp
from holdfast.exporter.passes.packing import COLUMNS
from tests.exporter.passes.graphs import apply, assert_same, drawn, model_of, operators, run

INPUT, OUTPUT = "(float[B, S, 8] x)", "(float[B, S, 12] y)"
WEIGHTS = {"w_gate": drawn(8, 12), "w_up": drawn(8, 12, seed=1)}
GATE_UP = """
    [mlp.gate_proj] gate = MatMul(x, w_gate)
    sigmoid = Sigmoid(gate)
    silu = Mul(gate, sigmoid)
    [mlp.up_proj] up = MatMul(x, w_up)
    [mlp] y = Mul(silu, up)
"""


def test_gate_and_up_become_one_product() -> None:
    model = model_of(f"{INPUT} => {OUTPUT} {{ {GATE_UP} }}", WEIGHTS)
    feeds = {"x": drawn(2, 3, 8)}
    before = run(model, feeds)
    assert apply(model, gated_mlp.rules()).rewrites == 2
    assert operators(model) == {"MatMul": 1, "Split": 1, "QuickGelu": 1, "Mul": 1}
    assert_same(before, run(model, feeds), atol=1e-5)
    product = next(node for node in model.graph if node.op_type == "MatMul")
    columns = json.loads(product.metadata_props[COLUMNS])
    assert columns == {"mlp.gate_proj": [0, 12], "mlp.up_proj": [12, 24]}
    weight = product.inputs[1].const_value.numpy()  # type: ignore[union-attr]
    assert np.array_equal(weight, np.concatenate(list(WEIGHTS.values()), axis=1))


@pytest.mark.parametrize(
    ("nodes", "why"),
    [
        (GATE_UP.replace("MatMul(x, w_up)", "MatMul(x, computed)"), "a weight is not a constant"),
        (
            GATE_UP.replace("Mul(silu, up)", "Mul(silu, up)\n z = Neg(up)"),
            "a product is read elsewhere as well",
        ),
        (GATE_UP.replace("w_up", "w_one"), "gate and up have unequal widths: [8,12] and [8,1]"),
    ],
)
def test_what_is_not_packed(nodes: str, why: str) -> None:
    inputs = "(float[B, S, 8] x, float[8, 12] computed)"
    outputs = "(float[B, S, 12] y, float[B, S, 12] z)" if "z =" in nodes else OUTPUT
    model = model_of(f"{inputs} => {outputs} {{ {nodes} }}", {**WEIGHTS, "w_one": drawn(8, 1)})
    report = apply(model, gated_mlp.rules(), left=lambda node: node.op_type == "QuickGelu")
    assert (report.rewrites, report.left) == (1, 1)  # SiLU alone
    assert report.why is not None and report.why.endswith(why)


def test_gelu_stays() -> None:
    nodes = GATE_UP.replace("Sigmoid", "Gelu").replace("Mul(gate, sigmoid)", "Identity(sigmoid)")
    model = model_of(f"{INPUT} => {OUTPUT} {{ {nodes} }}", WEIGHTS)
    assert apply(model, gated_mlp.rules()).rewrites == 0
    assert operators(model)["Gelu"] == 1


def test_the_sigmoid_of_something_else_is_no_silu() -> None:
    nodes = GATE_UP.replace("Sigmoid(gate)", "Sigmoid(x2)").replace(
        "[mlp.gate_proj]", "x2 = Neg(w_bias)\n [mlp.gate_proj]"
    )
    model = model_of(f"{INPUT} => {OUTPUT} {{ {nodes} }}", {**WEIGHTS, "w_bias": drawn(12)})
    assert apply(model, gated_mlp.rules()).rewrites == 0
