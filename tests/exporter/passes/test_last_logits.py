"""`logits_to_keep`: an optional input that cuts what the head reads."""

import numpy as np
import pytest

from holdfast.exporter.passes import last_logits
from tests.exporter.passes.graphs import apply, drawn, model_of, operators, run

TEXT = """(float[B, S, 8] hidden, float[B, S, 8] other) => (float[B, S, 5] logits, float[B, S, 5] scores) {
    [lm_head] logits = MatMul(hidden, weight)
    [score] scores = MatMul(other, weight)
}"""


@pytest.mark.parametrize("keep", [None, 1, 2, 4, 9])
def test_the_last_positions_alone(keep: int | None) -> None:
    model = model_of(TEXT, {"weight": drawn(8, 5)})
    feeds = {"hidden": drawn(2, 4, 8), "other": drawn(2, 4, 8)}
    logits, scores = run(model, feeds)
    assert apply(model, last_logits.rules("lm_head")).rewrites == 1
    model.graph.inputs.append(model.graph.initializers[last_logits.NAME])
    model.graph.outputs[0].shape = None
    asked = {} if keep is None else {last_logits.NAME: np.array([keep])}
    cut, rest = run(model, {**feeds, **asked})
    assert np.array_equal(cut, logits[:, -keep:] if keep else logits)
    assert np.array_equal(rest, scores)


def test_only_the_head_and_only_once() -> None:
    model = model_of(TEXT, {"weight": drawn(8, 5)})
    report = apply(model, last_logits.rules("another"))
    assert report.rewrites == 0
    assert report.why is not None and report.why.endswith("it is not the head")
    assert apply(model, last_logits.rules("lm_head")).rewrites == 1
    report = apply(model, last_logits.rules("lm_head"))
    assert report.rewrites == 0
    assert operators(model)["Slice"] == 1


def test_a_head_that_reads_a_slice() -> None:
    nodes = "{ cut = Slice(hidden, one, end, one)\n [lm_head] logits = MatMul(cut, weight) }"
    text = f"(float[B, 4, 8] hidden) => (float[B, 3, 5] logits) {nodes}"
    model = model_of(text, {"weight": drawn(8, 5), "one": [1], "end": [4]})
    report = apply(model, last_logits.rules("lm_head"))
    assert report.rewrites == 0
    assert report.why is not None and report.why.endswith("the head reads a slice already")
