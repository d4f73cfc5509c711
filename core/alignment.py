"""Running the alignment suites on a model, with progress, and keeping the answers in folders.

Used by the run (baseline, twin, artifact) and by `holdfast verify` on the device: one code path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from holdfast.bundle import ALIGNED, FP32_ONNX, TWIN
from holdfast.evals.gate import Verdict, decide
from holdfast.evals.report import Details, Report, Runs, build_report
from holdfast.evals.run import SuiteAnswers, read_answers, run_suite, work_units, write_answers
from holdfast.evals.suites import Suite, read_suite, write_suite
from holdfast.language_model import LanguageModel
from holdfast.progress import bar
from holdfast.recipe import EvaluateConfig


def answer_suites(
    model: LanguageModel, suites: Sequence[Suite], config: EvaluateConfig
) -> list[SuiteAnswers]:
    """Every answer of `model` to every suite, in the suites' order; a progress bar on stderr."""
    with bar(model.name, work_units(suites)) as on_done:
        return [run_suite(model, suite, config, on_done) for suite in suites]


def save_answers(answers: Sequence[SuiteAnswers], folder: Path) -> None:
    """One JSONL file a suite."""
    for suite_answers in answers:
        write_answers(suite_answers, folder / f"{suite_answers.suite}.jsonl")


def load_answers(folder: Path, suites: Sequence[Suite]) -> list[SuiteAnswers]:
    """What `save_answers` wrote, in the order of `suites`."""
    return [read_answers(folder / f"{suite.name}.jsonl") for suite in suites]


def save_suites(suites: Sequence[Suite], folder: Path) -> None:
    """The prompts themselves, so that they can be run again where the bundle goes."""
    for suite in suites:
        write_suite(suite, folder / f"{suite.name}.jsonl")


def load_bundled_suites(folder: Path, names: Sequence[str]) -> list[Suite]:
    """What `save_suites` wrote, in the order of `names`."""
    return [read_suite(folder / f"{name}.jsonl") for name in names]


@dataclass(frozen=True)
class Assessment:
    """A verdict with everything behind it."""

    verdict: Verdict
    report: Report

    def lines(self) -> list[str]:
        """The verdict for a terminal: one line a metric, with n, rates and flips."""
        rows = [
            f"  {m.outcome:<13}{m.metric:<28}{m.candidate.frac:>7.1%}  "
            f"baseline {m.baseline.frac:>6.1%}  n {m.n:>4}  "
            f"lost {m.paired.lost:>3}  gained {m.paired.gained:>3}"
            for m in self.verdict.metrics
        ]
        reasons = [f"  {m.metric}: {m.reason}" for m in self.verdict.metrics if m.outcome != "PASS"]
        return [f"{self.verdict.outcome}: {self.verdict.summary}", *rows, *reasons]


def assess(
    suites: Sequence[Suite], runs: Runs, config: EvaluateConfig, *, seed: int, details: Details
) -> Assessment:
    """The gate's verdict on `runs.candidate` against `runs.baseline`, and the report of it."""
    verdict = decide(runs.baseline, runs.candidate, config, twin=runs.twin, noise=runs.noise, seed=seed)
    return Assessment(verdict, build_report(verdict, suites, runs, details))


def load_runs(answers: Path, suites: Sequence[Suite], candidate: Sequence[SuiteAnswers]) -> Runs:
    """A bundle's recorded answers, with `candidate` in the place of the artifact's."""
    return Runs(
        baseline=load_answers(answers / ALIGNED, suites),
        candidate=candidate,
        twin=load_answers(answers / TWIN, suites),
        noise=load_answers(answers / FP32_ONNX, suites),
    )
