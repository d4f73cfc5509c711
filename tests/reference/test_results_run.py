"""Measuring rows for real, on a tiny random pair: processes, memory, closeness, resumption, NNCF."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.special import log_softmax as scipy_log_softmax

from holdfast.errors import ExecutionError, MissingExtraError, QuantizationError
from holdfast.exporter.export import export_model
from holdfast.recipe import ExportConfig
from holdfast.runtime.session import OnnxLanguageModel
from reference.results import closeness, nncf_peer
from reference.results.__main__ import forget, measure_pair
from reference.results.figures import Measured
from reference.results.process import Stages, in_fresh_process
from reference.results.rows import OURS, Group, Row, tasks
from reference.results.setup import Pair
from tests.reference.results_examples import write_tiny_pair
from tests.tiny import tiny_llama

MIB = 1 << 20
# --- processes --------------------------------------------------------------------------------


def held_mib(mib: int) -> dict[str, int | None]:
    """Peaks of a stage that holds memory, and of one after it that does not."""
    stages = Stages()
    with stages.stage("held"):
        np.ones(mib * MIB // 8)
    with stages.stage("free"):
        pass
    return {name: stage.peak_bytes for name, stage in stages.done.items()}


def children_mib(mib: int) -> int | None:
    """Peak of a stage whose child process holds memory."""
    stages = Stages()
    with stages.stage("child"):
        subprocess.run([sys.executable, "-c", f"len(bytearray({mib * MIB}))"], check=True)
    return stages.done["child"].peak_bytes


def refuse() -> None:
    raise QuantizationError("Expected something else.")


def die() -> None:
    import os

    os._exit(9)


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_a_stage_has_the_peak_of_its_own_and_of_the_processes_it_waits_for() -> None:
    peaks = in_fresh_process(held_mib, 400)
    assert peaks["held"] is not None and peaks["free"] is not None
    assert peaks["held"] - peaks["free"] > 350 * MIB
    child = in_fresh_process(children_mib, 1500)
    assert child is not None and child > 1500 * MIB


def test_errors_come_back_as_they_are_and_a_killed_process_is_one() -> None:
    with pytest.raises(QuantizationError, match="Expected something else"):
        in_fresh_process(refuse)
    with pytest.raises(ExecutionError, match="ended without a word"):
        in_fresh_process(die)


# --- closeness --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> tuple[OnnxLanguageModel, OnnxLanguageModel]:
    """Two tiny models of different weights, in the runtime."""
    opened = []
    for seed in (0, 1):
        source = tiny_llama(tmp_path_factory.mktemp("source"), seed=seed)
        out = tmp_path_factory.mktemp("onnx")
        export_model(source, out, ExportConfig())
        opened.append(OnnxLanguageModel.open(out, threads=1))
    return opened[0], opened[1]


PASSAGES = [closeness.Passage([5, 6, 7, 8], [9, 10]), closeness.Passage([20, 21], [22, 23, 24, 3])]


def test_a_graph_is_at_no_distance_from_itself(graphs: tuple[OnnxLanguageModel, OnnxLanguageModel]) -> None:
    found = closeness.compare(graphs[0], graphs[0], PASSAGES)
    assert (found.kl_nats, found.same_top_frac, found.positions) == (0.0, 1.0, 6)


def test_perplexity_and_kl_are_those_of_the_definition(
    graphs: tuple[OnnxLanguageModel, OnnxLanguageModel],
) -> None:
    found = closeness.compare(*graphs, PASSAGES)
    own = graphs[1].token_logprobs([p.prompt for p in PASSAGES], [p.answer for p in PASSAGES])
    assert found.perplexity == pytest.approx(np.exp(-np.concatenate(own).mean()), rel=1e-4)
    assert closeness.perplexity(graphs[1], PASSAGES) == pytest.approx(found.perplexity, rel=1e-4)
    divergence, same = [], []
    for passage in PASSAGES:
        for count in range(len(passage.answer)):
            read = [*passage.prompt, *passage.answer[:count]]
            p, q = (scipy_log_softmax(model.next_token_logits([read])[0]) for model in graphs)
            divergence.append(float((np.exp(p) * (p - q)).sum()))
            same.append(p.argmax() == q.argmax())
    assert found.kl_nats == pytest.approx(np.mean(divergence), rel=1e-3)
    assert found.same_top_frac == np.mean(same)


# --- a pair -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_tiny_pair(tmp_path_factory.mktemp("pair"))


GROUP = Group(
    "w4",
    "W4",
    "gate",
    (
        Row("RTN", {"scheme": "w4"}, {"method": "rtn"}),
        Row(OURS, {"scheme": "w4"}, {"steps": 1, "alphas": [0.1], "samples": 24, "batch_size": 8}),
        Row("excluded", {"scheme": "w4", "exclude": ["nowhere"]}, {"method": "rtn"}),
    ),
)


@pytest.mark.slow
def test_rows_are_measured_once_and_kept(tiny_pair: Pair, tmp_path: Path) -> None:
    wanted = tasks([GROUP], seeds=1)
    figures = measure_pair(tiny_pair, tmp_path, wanted, [GROUP], recorded_only=False)
    (group,) = figures.groups
    assert [found.row.name for found in group.rows] == ["RTN", OURS]
    assert group.failed[0].task.row.name == "excluded"
    assert "nowhere" in group.failed[0].reason
    for found in group.rows:
        one: Measured = found.typical
        assert one.closeness.kl_nats > 0.0
        assert 0 < one.size_bytes < figures.facts["bytes"]
        assert list(one.stages) == ["calibrate", "export", "quantize", "answers"]
        assert one.flips.n == 4 + 4 + 2 + 2 + 2
    assert figures.facts["closeness"]["kl_nats"] == 0.0
    kept = tmp_path / "tiny" / "rows" / "w4--rtn" / "step.json"
    assert not list(kept.parent.glob("**/*.onnx"))  # answers and records are kept, models are not
    before = kept.stat().st_mtime_ns
    again = measure_pair(
        tiny_pair, tmp_path, tasks([GROUP], seeds=1, rows="RTN"), [GROUP], recorded_only=False
    )
    assert kept.stat().st_mtime_ns == before
    assert again.groups[0].rows[0].typical.flips == group.rows[0].typical.flips
    forget(tmp_path, "w4--r*")
    assert not kept.exists()
    shown = measure_pair(tiny_pair, tmp_path, wanted, [GROUP], recorded_only=True)
    assert [found.row.name for found in shown.groups[0].rows] == [OURS]


# --- NNCF -------------------------------------------------------------------------------------


def test_without_nncf_the_row_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="NNCF is not installed"):
        nncf_peer.require_nncf()


@pytest.mark.slow
@pytest.mark.parametrize(("drop", "float_linears"), [(0.0, 0), (1.0, 2)])
def test_nncf_quantizes_the_linears_that_its_accuracy_allows(
    drop: float, float_linears: int, graphs: tuple[OnnxLanguageModel, OnnxLanguageModel]
) -> None:
    pytest.importorskip("nncf")
    import onnx

    folder = graphs[0].graph.path.parent
    model = onnx.load(folder / "model.onnx")
    shapes = nncf_peer.input_shapes(model)
    samples = [nncf_peer.feeds(shapes, [5, 6, 7, 8 + index]) for index in range(3)]
    linears = nncf_peer.linear_nodes(folder)[:2]

    def score(candidate: onnx.ModelProto, data: object) -> tuple[float, list[float]]:
        hurt = any(node.op_type == "QuantizeLinear" for node in candidate.graph.node)
        value = 1.0 - drop * hurt
        return value, [value] * 2

    quantized = nncf_peer.quantize(model, linears, samples, score, items=2)
    assert nncf_peer.float_linears(quantized, linears) == float_linears
    others = [node for node in quantized.graph.node if node.op_type == "QuantizeLinear"]
    assert len(others) <= 2
    restored = nncf_peer.with_interface(quantized, model)
    assert list(restored.graph.input) == list(model.graph.input)


def test_passages_survive_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "passages.json"
    path.write_text(json.dumps([vars(passage) for passage in PASSAGES]), encoding="utf-8")
    assert closeness.read_passages(path) == PASSAGES
