"""Measuring pruned models for real, on a tiny random pair: rows that share models, artifacts, graphs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reference.pruning import __main__ as command
from reference.pruning import device
from reference.pruning.device import DENSE, STRUCTURED, ZEROS, Shape
from reference.pruning.figures import Measured, PairFigures
from reference.pruning.rows import UNPRUNED, Group, Row, tasks
from reference.results.closeness import read_passages
from reference.results.kept import forget
from reference.results.setup import Pair
from tests.reference.results_examples import write_tiny_pair

FEW = {"samples": 24}
HALF = {"method": "magnitude", "sparsity_frac": 0.5}
CHANNELS = {"structured": {"kinds": ["channels"], "sparsity_frac": 0.25, "channel_multiple": 8}}
RECOVER = {"steps": 1, "alphas": [], "response_tokens": 4}
PLAIN = Row("plain", "magnitude", 0.5, HALF, calibrate=FEW, model="half")
GROUP = Group(
    "some",
    "Some",
    (
        PLAIN,
        Row("recovered", "magnitude", 0.5, HALF, RECOVER, calibrate=FEW, model="half"),
        Row("longer", "magnitude", 0.5, HALF, {**RECOVER, "steps": 2}, calibrate=FEW, pruned_as="half"),
        Row("channels", "channels", 0.25, CHANNELS, calibrate=FEW),
        Row(
            "quantized",
            "magnitude",
            0.5,
            HALF,
            quantize={"scheme": "w4"},
            calibrate={**FEW, "method": "rtn"},
            model="half",
        ),
        Row("too much", "heads", 0.9, {"structured": {"kinds": ["heads"], "sparsity_frac": 0.9}}),
    ),
)


@pytest.fixture(scope="module")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_tiny_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


def measure(
    pair: Pair, work: Path, *, rows: tuple[str, ...] = (), recorded_only: bool = False
) -> PairFigures:
    wanted = tasks([GROUP], seeds=1, rows=rows)
    return command.measure_pair(pair, work, wanted, [GROUP], device=False, recorded_only=recorded_only)


@pytest.fixture(scope="module")
def found(tiny_pair: Pair, work: Path) -> PairFigures:
    return measure(tiny_pair, work)


def one(found: PairFigures, name: str) -> Measured:
    return next(figures.typical for figures in found.groups[0].rows if figures.row.name == name)


@pytest.mark.slow
def test_rows_say_what_became_of_the_model(found: PairFigures) -> None:
    plain, recovered, quantized = (one(found, name) for name in ("plain", "recovered", "quantized"))
    assert plain.zeros_frac == quantized.zeros_frac == pytest.approx(0.5, abs=0.01)
    assert recovered.zeros_frac >= plain.zeros_frac
    assert (plain.removed_frac, one(found, "channels").zeros_frac) == (0.0, 0.0)
    assert 0.1 < one(found, "channels").removed_frac <= 0.25
    assert plain.flips.n == 4 + 4 + 2 + 2 + 2
    assert plain.perplexity > found.perplexity  # zeros cost likelihood of the unpruned model's answers
    assert plain.seconds("prune") is not None and plain.seconds("recover") is None
    assert recovered.seconds("prune") == plain.seconds("prune")  # of the one pruning that both share
    assert recovered.seconds("recover") is not None
    assert one(found, "longer").seconds("prune") == plain.seconds("prune")
    assert 0 < quantized.facts["zlib_bytes"] < quantized.facts["bytes"] < found.facts["bytes"]


@pytest.mark.slow
def test_what_cannot_be_pruned_costs_no_other_row(found: PairFigures) -> None:
    (failed,) = found.groups[0].failed
    assert failed.task.row.name == "too much"
    assert failed.expected and "Removing heads takes at most" in failed.reason


@pytest.mark.slow
def test_rows_are_kept_until_they_are_forgotten(found: PairFigures, tiny_pair: Pair, work: Path) -> None:
    kept = work / "tiny" / "rows" / "some--plain" / "step.json"
    assert json.loads((kept.parent / "prune.json").read_text(encoding="utf-8"))["method"] == "magnitude"
    before = kept.stat().st_mtime_ns
    again = measure(tiny_pair, work, rows=("plain",))
    assert kept.stat().st_mtime_ns == before
    assert one(again, "plain").flips == one(found, "plain").flips
    forget(work, "*plain", ("rows", "models"))
    shown = measure(tiny_pair, work, recorded_only=True)
    assert [figures.row.name for figures in shown.groups[0].rows] == [
        "recovered",
        "longer",
        "channels",
        "quantized",
    ]


@pytest.mark.slow
def test_graphs_are_made_and_measured_in_turns(
    found: PairFigures, tiny_pair: Pair, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = (
        Shape(DENSE, UNPRUNED),
        Shape(ZEROS, PLAIN),
        Shape(STRUCTURED, Row("channels", "channels", 0.25, CHANNELS, calibrate=FEW)),
    )
    monkeypatch.setattr(device, "SHAPES", shapes)
    monkeypatch.setattr(device, "REPEATS", 2)
    graphs = command.measure_pair(tiny_pair, work, [], [], device=True, recorded_only=False).device
    assert [(graph.form, graph.kind) for graph in graphs] == [
        (form, shape.kind) for form in ("fp32", "W8A8") for shape in shapes
    ]
    dense, sparse, smaller = graphs[:3]
    assert dense.parameters_frac == sparse.parameters_frac == 1.0 > smaller.parameters_frac
    assert dense.size_bytes == pytest.approx(sparse.size_bytes, rel=1e-3)  # zeros take as many bytes
    assert sparse.zlib_bytes < 0.9 * dense.zlib_bytes
    assert smaller.size_bytes < dense.size_bytes
    assert all(graph.decode_tokens_per_s.median > 0.0 for graph in graphs)
    assert read_passages(work / "tiny" / "fp32-onnx" / "passages.json")
