"""What was measured, as the tables and plots read it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from holdfast.alignment import load_answers
from holdfast.bundle import ALIGNED, FP32_ONNX, TWIN
from holdfast.evals.gate import MetricVerdict, Rate, Verdict, decide
from holdfast.evals.run import SuiteAnswers
from holdfast.evals.suites import Suite
from holdfast.recipe import EvaluateConfig
from holdfast.runtime.bench import Spread
from reference.results.closeness import Closeness
from reference.results.flips import Flips, count_flips, pooled
from reference.results.kept import Failed
from reference.results.process import Stage, highest_bytes, total_seconds
from reference.results.rows import Group, Row, Task

T = TypeVar("T")

MADE_IN = ("allocate", "calibrate", "quantize")
"""Stages that a method costs; the export between them is the same for all."""


@dataclass(frozen=True)
class Measured:
    """One measurement.

    Attributes:
        verdict: of the gate, suite by suite, against the aligned model in torch.
        both_sides: of the gate, on the harmful and the harmless prompts of all suites.
        size_bytes: graph with its external data.
        facts: everything else that the measurement said.
    """

    task: Task
    verdict: Verdict
    both_sides: Verdict
    flips: Flips
    closeness: Closeness
    size_bytes: int
    stages: dict[str, Stage]
    facts: dict[str, Any]

    @cached_property
    def metrics(self) -> dict[str, MetricVerdict]:
        return {metric.metric: metric for metric in self.verdict.metrics}

    def seconds(self, stages: Sequence[str]) -> float:
        return total_seconds(self.stages, stages)

    def peak_bytes(self, stages: Sequence[str]) -> int | None:
        return highest_bytes(self.stages, stages)


def median_of(found: Sequence[T], figure: Callable[[T], float]) -> T:
    """The one with the median figure; of two in the middle, the one with the lower."""
    ordered = sorted(found, key=figure)
    return ordered[(len(ordered) - 1) // 2]


@dataclass(frozen=True)
class RowFigures:
    """A row over its seeds; at least one was measured."""

    row: Row
    seeds: tuple[Measured, ...]

    @property
    def typical(self) -> Measured:
        """The measurement with the median number of flips; of two in the middle, the one with fewer."""
        return median_of(self.seeds, lambda measured: measured.flips.count)

    def over_seeds(self, figure: Callable[[Measured], float]) -> Spread:
        """Median and range of a figure."""
        return Spread.of([figure(measured) for measured in self.seeds])


@dataclass(frozen=True)
class GroupFigures:
    """Every row of a scheme that was measured, and those that failed."""

    group: Group
    rows: tuple[RowFigures, ...]
    failed: tuple[Failed[Task], ...]

    def row(self, name: str) -> RowFigures | None:
        return next((figures for figures in self.rows if figures.row.name == name), None)


@dataclass(frozen=True)
class PairFigures:
    """Everything that was measured on a pair.

    Attributes:
        noise: flips of the fp32 graph: what changes without any compression.
        noise_verdict: of the gate on both sides, for that graph.
        metrics: of the fp32 graph against the aligned model, with the base as its twin.
        parameters: weights of all linear layers.
        facts: of the fp32 graph: bytes and closeness.
    """

    name: str
    noise: Flips
    noise_verdict: Verdict
    metrics: dict[str, MetricVerdict]
    groups: tuple[GroupFigures, ...]
    parameters: int
    facts: dict[str, Any]


@dataclass(frozen=True)
class References:
    """Recorded answers that every row of a pair is compared with."""

    suites: Sequence[Suite]
    baseline: Sequence[SuiteAnswers]
    twin: Sequence[SuiteAnswers]
    noise: Sequence[SuiteAnswers]
    config: EvaluateConfig

    @classmethod
    def load(cls, answers: dict[str, Path], suites: Sequence[Suite], config: EvaluateConfig) -> References:
        return cls(
            suites=suites,
            baseline=load_answers(answers[ALIGNED], suites),
            twin=load_answers(answers[TWIN], suites),
            noise=load_answers(answers[FP32_ONNX], suites),
            config=config,
        )

    def judge(self, answers: Sequence[SuiteAnswers]) -> Verdict:
        """The gate's verdict on a candidate's answers."""
        return decide(self.baseline, answers, self.config, twin=self.twin, noise=self.noise)

    def judge_sides(self, answers: Sequence[SuiteAnswers]) -> Verdict:
        """The same on each side's suites together."""
        baseline, candidate, twin, noise = map(pooled, (self.baseline, answers, self.twin, self.noise))
        return decide(baseline, candidate, self.config, twin=twin, noise=noise)


def read_measured(task: Task, folder: Path, result: dict[str, Any], references: References) -> Measured:
    """A finished measurement from its folder and from what its step returned."""
    answers = load_answers(folder / "answers", references.suites)
    return Measured(
        task=task,
        verdict=references.judge(answers),
        both_sides=references.judge_sides(answers),
        flips=count_flips(references.baseline, answers),
        closeness=Closeness(**result["closeness"]),
        size_bytes=result["bytes"],
        stages={name: Stage(**stage) for name, stage in result["stages"].items()},
        facts=result,
    )


def pair_figures(
    name: str,
    references: References,
    groups: Sequence[Group],
    done: Iterable[Measured | Failed[Task]],
    *,
    facts: dict[str, Any],
) -> PairFigures:
    """Measurements of a pair, sorted into groups and rows; groups without any are left out."""
    found = list(done)
    by_group = [group_figures(group, [one for one in found if one.task.group == group]) for group in groups]
    verdict = references.judge(references.noise)
    return PairFigures(
        name=name,
        noise=count_flips(references.baseline, references.noise),
        noise_verdict=references.judge_sides(references.noise),
        metrics={metric.metric: metric for metric in verdict.metrics},
        groups=tuple(group for group in by_group if group.rows or group.failed),
        parameters=facts["parameters"],
        facts=facts,
    )


def group_figures(group: Group, done: Sequence[Measured | Failed[Task]]) -> GroupFigures:
    """The measurements of one group, row by row."""
    rows = []
    for row in group.rows:
        seeds = tuple(one for one in done if isinstance(one, Measured) and one.task.row == row)
        if seeds:
            rows.append(RowFigures(row, seeds))
    return GroupFigures(group, tuple(rows), tuple(one for one in done if isinstance(one, Failed)))


def base_rate(metric: MetricVerdict) -> Rate:
    """Rate of the unaligned base; every run here measures one."""
    assert metric.twin is not None
    return metric.twin
