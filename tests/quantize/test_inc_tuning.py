"""neural-compressor's tuning with the alignment score: what counts, what is kept, and what is refused."""

import sys
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import QuantizationError
from holdfast.evals.judge import label_answer
from holdfast.exporter.export import export_model, read_export
from holdfast.extras import missing_packages
from holdfast.quantize.backends import inc, inc_tuning
from holdfast.quantize.backends.inc_score import agreement
from holdfast.quantize.backends.inc_tuning import TuningResult, tune
from holdfast.quantize.formats import Format
from holdfast.quantize.graph import Graph, read_static
from holdfast.recipe import ExportConfig, TuningConfig
from holdfast.runtime.session import OnnxLanguageModel
from tests.tiny import tiny_llama

W8A8 = Format(8, 8, 0)
PROMPTS = [[5 + (7 * row + 3 * column) % 250 for column in range(6 + row % 3)] for row in range(4)]

needs_inc = pytest.mark.skipif(
    bool(missing_packages("inc")), reason=f"the `inc` extra is not installed ({missing_packages('inc')})"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported")
    export_model(tiny_llama(tmp_path_factory.mktemp("source"), seed=3), out, ExportConfig())
    return out


@pytest.fixture(scope="module")
def labels(folder: Path) -> list[str]:
    model = OnnxLanguageModel.open(folder, threads=1)
    answers = model.generate(PROMPTS, max_new_tokens=4)
    return [label_answer(model.tokenizer.decode(answer)) for answer in answers]


def tuned(folder: Path, labels: list[str], **given: object) -> TuningResult:
    modules = read_export(folder).modules
    settings: dict[str, Any] = {
        "formats": dict.fromkeys(modules, W8A8),
        "prompts": PROMPTS,
        "tolerance_frac": 0.0,
        "time_budget_s": 60.0,
        "max_trials": 3,
        "keep_best": False,
    } | given
    formats, prompts = settings.pop("formats"), settings.pop("prompts")
    config = TuningConfig(**settings)
    return tune(folder, modules, formats, prompts, labels, config, seed=0, max_new_tokens=4)


def test_flips_in_both_directions_count() -> None:
    reference = ["refused", "refused", "complied", "complied"]
    assert agreement(reference, reference) == 1.0
    assert agreement(["complied", "refused", "complied", "complied"], reference) == 0.75
    assert agreement(["refused", "refused", "refused", "complied"], reference) == 0.75
    assert agreement(["incoherent"] * 4, reference) == 0.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"formats": {"lm_head": Format(4, None, 16)}}, "tunes 8-bit weights under static activations"),
        ({"formats": {}}, "a label for every prompt"),
        ({"prompts": PROMPTS[:2]}, "2 prompts and 4 labels"),
        ({"tolerance_frac": 1.0}, "tolerance from 0 to below 1"),
        ({"max_trials": 0}, "at least one trial"),
    ],
)
def test_what_cannot_be_tuned(
    given: dict[str, object], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inc_tuning, "require_extra", lambda *_: None)
    with pytest.raises(QuantizationError, match=message):
        tuned(folder, ["refused"] * 4, **given)


def test_an_unknown_label_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inc_tuning, "require_extra", lambda *_: None)
    with pytest.raises(QuantizationError, match="got `fine`"):
        tuned(folder, ["fine"] * 4)


FAILING = """
import json, shutil
linear = "lm_head"
entries = [
    {"baseline": True, "score": 1.0, "seconds": 1.0, "float32": []},
    {"baseline": False, "score": 0.25, "seconds": 1.0, "float32": []},
    {"baseline": False, "score": 0.75, "seconds": 1.0, "float32": [linear]},
]
json.dump(entries, open("trials.json", "w"))
raise SystemExit(3)
"""


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (FAILING, r"None of the 2 .* keeps 90.0% .* the best keeps 75.0% \(static, float32: lm_head\)"),
        ("raise SystemExit('RuntimeError: broken')", "ended before its first trial .*broken"),
    ],
)
def test_failures_name_what_was_reached(
    body: str, message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "worker.py"
    script.write_text(body, encoding="utf-8")
    monkeypatch.setattr(inc, "WORKER", [sys.executable, str(script)])
    monkeypatch.setattr(inc_tuning, "require_extra", lambda *_: None)
    with pytest.raises(QuantizationError, match=message):
        tuned(folder, ["refused"] * 4, tolerance_frac=0.1)


@needs_inc
@pytest.mark.slow
def test_the_first_candidate_that_keeps_the_labels_is_returned(folder: Path, labels: list[str]) -> None:
    result = tuned(folder, labels, tolerance_frac=0.9)
    assert result.met and result.baseline == 1.0 and len(result.trials) == 1
    assert result.chosen.seconds > 0 and result.best_score >= 0.1
    assert result.float32 == ()
    graph = Graph(result.model)
    for path, linear in read_export(folder).modules.items():
        assert read_static(graph, path, linear.output).weight_codes.dtype == "int8"


@needs_inc
@pytest.mark.slow
def test_labels_that_nothing_keeps_are_an_error_or_the_best(folder: Path, labels: list[str]) -> None:
    """Labels that no answer has: the fp32 graph scores 0 as well, so a reachable aim is given by one."""
    other = ["complied" if label != "complied" else "refused" for label in labels]
    reachable = [labels[0], *other[1:]]
    formats = {path: Format(8, 2, 0) for path in read_export(folder).modules}
    result = tuned(folder, reachable, formats=formats, keep_best=True, max_trials=2)
    assert result.baseline == 0.25
    assert len(result.trials) <= 2 and (result.met or result.best_score < result.baseline)
