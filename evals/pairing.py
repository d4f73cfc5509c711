"""From answers to paired metrics: the same prompts, under the same conditions, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from holdfast.errors import SuiteError
from holdfast.evals.run import SuiteAnswers
from holdfast.evals.suites import SuiteKind

MetricKind = Literal["refusal", "over-refusal", "coherence", "preference"]
METRIC_OF: dict[SuiteKind, MetricKind] = {
    "refusal": "refusal",
    "over-refusal": "over-refusal",
    "pairs": "preference",
}


@dataclass(frozen=True)
class Outcomes:
    """Safe or not, per prompt, for one model; `flips` = (gained, lost) against the aligned model."""

    safe: tuple[bool, ...]
    flips: tuple[int, int]

    @property
    def safe_count(self) -> int:
        return sum(self.safe)


@dataclass(frozen=True)
class Metric:
    """One metric of all models over the same prompts."""

    name: str
    kind: MetricKind
    baseline: Outcomes
    candidate: Outcomes
    twin: Outcomes | None
    noise: Outcomes | None

    @property
    def n(self) -> int:
        return len(self.baseline.safe)


Runs = dict[str, Sequence[SuiteAnswers]]


def pair_metrics(
    baseline: Sequence[SuiteAnswers],
    candidate: Sequence[SuiteAnswers],
    *,
    twin: Sequence[SuiteAnswers] | None = None,
    noise: Sequence[SuiteAnswers] | None = None,
) -> list[Metric]:
    """One metric a suite, and coherence over all generated answers.

    Raises:
        SuiteError: no answers; runs over different suites, prompts, tokenizers (the twin may have
            its own), judges or answer lengths.
    """
    if not baseline:
        raise SuiteError("No suite was run, and no data is not a score: choose at least one suite.")
    for suite in baseline:
        if not suite.answers:
            raise SuiteError(f"The suite {suite.suite} has no answers: no data is not a score.")
    runs: Runs = {"baseline": baseline, "candidate": check_comparable(baseline, candidate)}
    if twin is not None:
        runs["twin"] = check_comparable(baseline, twin, same_tokenizer=False)
    if noise is not None:
        runs["noise"] = check_comparable(baseline, noise)
    metrics = [_suite_metric(index, suite, runs) for index, suite in enumerate(baseline)]
    if any(suite.kind != "pairs" for suite in baseline):
        metrics.append(_metric("coherence", "coherence", {k: _coherent(r) for k, r in runs.items()}))
    return metrics


def check_comparable(
    baseline: Sequence[SuiteAnswers], other: Sequence[SuiteAnswers], *, same_tokenizer: bool = True
) -> list[SuiteAnswers]:
    """`other` in the baseline's order, once every suite is known to be about the same thing."""
    by_name = {answers.suite: answers for answers in other}
    names = [answers.suite for answers in baseline]
    if set(by_name) != set(names) or len(other) != len(names):
        raise SuiteError(
            f"Expected answers to the suites {', '.join(names)}, found {', '.join(by_name) or 'none'}"
            ": run the same suites on every model."
        )
    ordered = [by_name[name] for name in names]
    for reference, answers in zip(baseline, ordered, strict=True):
        _check_same(reference, answers, same_tokenizer=same_tokenizer)
    return ordered


def _check_same(reference: SuiteAnswers, answers: SuiteAnswers, *, same_tokenizer: bool) -> None:
    where = f"the suite {reference.suite} between {reference.model} and {answers.model}"
    expected, found = reference.conditions, answers.conditions
    if not same_tokenizer:
        found = replace(found, tokenizer_digest=expected.tokenizer_digest)
    different = [name for name, value in vars(expected).items() if getattr(found, name) != value]
    if reference.kind != answers.kind:
        different.append("kind")
    if different:
        raise SuiteError(
            f"Different {', '.join(different)} in {where}: run both again under the same conditions."
        )
    if [a.id for a in reference.answers] != [a.id for a in answers.answers]:
        raise SuiteError(f"Different prompt ids in {where}: run the same suite on both.")


def _suite_metric(index: int, suite: SuiteAnswers, runs: Runs) -> Metric:
    kind = METRIC_OF[suite.kind]
    safe = {key: tuple(a.safe for a in run[index].answers) for key, run in runs.items()}
    return _metric(f"{kind}:{suite.suite}", kind, safe)


def _coherent(run: Sequence[SuiteAnswers]) -> tuple[bool, ...]:
    """Every generated answer of a run: True where the judge could read it."""
    generated = (suite for suite in run if suite.kind != "pairs")
    return tuple(a.label != "incoherent" for suite in generated for a in suite.answers)


def _metric(name: str, kind: MetricKind, safe: dict[str, tuple[bool, ...]]) -> Metric:
    against = safe["baseline"]
    outcomes = {key: Outcomes(values, _flips(against, values)) for key, values in safe.items()}
    return Metric(
        name,
        kind,
        outcomes["baseline"],
        outcomes["candidate"],
        outcomes.get("twin"),
        outcomes.get("noise"),
    )


def _flips(reference: Sequence[bool], other: Sequence[bool]) -> tuple[int, int]:
    """(n12, n21): safe only in `other`, safe only in `reference`."""
    pairs = list(zip(reference, other, strict=True))
    return sum(b and not a for a, b in pairs), sum(a and not b for a, b in pairs)
