"""The report: everything behind a verdict as data (report.json) and as one page (report.html).

The page is rendered from the data alone, has no external resources and no script, and shows the
verdict first. Plots are inline SVG whose horizontal positions are percentages, with all text outside
of them, so that they stay legible on a phone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined

import holdfast
from holdfast.errors import SuiteError
from holdfast.evals.gate import Rate, Verdict, make_rate
from holdfast.evals.judge import JUDGE_VERSION, LABELS
from holdfast.evals.pairing import check_comparable
from holdfast.evals.run import Answer, SuiteAnswers
from holdfast.evals.suites import Suite

REPORT_SCHEMA = 1
ROLES = ("baseline", "candidate", "twin", "noise")
FLIPS_SHOWN = 40  # a suite, on the page; report.json has them all

Report = dict[str, Any]


@dataclass(frozen=True)
class Runs:
    """Answers of every model that was run; baseline and candidate always are."""

    baseline: Sequence[SuiteAnswers]
    candidate: Sequence[SuiteAnswers]
    twin: Sequence[SuiteAnswers] | None = None
    noise: Sequence[SuiteAnswers] | None = None

    def by_role(self) -> dict[str, list[SuiteAnswers]]:
        """Role to answers, every list in the baseline's order."""
        roles = {role: getattr(self, role) for role in ROLES}
        return {
            role: check_comparable(self.baseline, run, same_tokenizer=role != "twin")
            for role, run in roles.items()
            if run is not None
        }


@dataclass(frozen=True)
class Details:
    """What the report says besides the measurements.

    Attributes:
        title: what was compressed, and how.
        created: when, in ISO 8601; None where a rerun has to give the same bytes.
        sections: heading -> key -> value, shown as tables: environment, digests, speed.
    """

    title: str
    created: str | None
    sections: Mapping[str, Mapping[str, str | int | float | None]] = field(default_factory=dict)


def build_report(verdict: Verdict, suites: Sequence[Suite], runs: Runs, details: Details) -> Report:
    """The report as plain data, ready for `write_json`.

    Raises:
        SuiteError: the answers are not to these suites.
    """
    by_role = runs.by_role()
    by_name = {suite.name: suite for suite in suites}
    for answers in runs.baseline:
        suite = by_name.get(answers.suite)
        if suite is None or suite.digest != answers.conditions.suite_digest:
            raise SuiteError(
                f"The answers of {answers.model} are not to this version of the suite "
                f"{answers.suite}: run it again."
            )
    conditions = runs.baseline[0].conditions
    return {
        "schema": REPORT_SCHEMA,
        "holdfast": holdfast.__version__,
        "title": details.title,
        "created": details.created,
        "verdict": verdict.to_dict(),
        "models": {role: run[0].model for role, run in by_role.items()},
        "conditions": {
            "decoding": "greedy",
            "max_new_tokens": conditions.max_new_tokens,
            "judge_version": JUDGE_VERSION,
            "judge_digest": conditions.judge_digest,
            "tokenizer_digest": conditions.tokenizer_digest,
        },
        "suites": [
            _suite_section(by_name[name.suite], {role: run[i] for role, run in by_role.items()})
            for i, name in enumerate(runs.baseline)
        ],
        "sections": {heading: dict(rows) for heading, rows in details.sections.items()},
    }


def _suite_section(suite: Suite, answers: dict[str, SuiteAnswers]) -> dict[str, Any]:
    return {
        "name": suite.name,
        "kind": suite.kind,
        "n": len(suite.items),
        "digest": suite.digest,
        "source": suite.source,
        "licence": suite.licence,
        "labels": {role: _label_counts(run) for role, run in answers.items()},
        "subjects": _subjects(suite, answers),
        "flips": _flips(suite, answers["baseline"], answers["candidate"]),
    }


def _label_counts(run: SuiteAnswers) -> dict[str, int]:
    counts = Counter(answer.label for answer in run.answers)
    return {label: counts[label] for label in LABELS}


def _subjects(suite: Suite, answers: dict[str, SuiteAnswers]) -> list[dict[str, Any]]:
    """Rates by subject, in the order in which subjects first appear."""
    names = list(dict.fromkeys(item.subject for item in suite.items))
    return [
        {"subject": name, **{r: asdict(_subject_rate(suite, run, name)) for r, run in answers.items()}}
        for name in names
    ]


def _subject_rate(suite: Suite, run: SuiteAnswers, subject: str) -> Rate:
    pairs = zip(suite.items, run.answers, strict=True)
    safe = [answer.safe for item, answer in pairs if item.subject == subject]
    return make_rate(sum(safe), len(safe))


def _flips(suite: Suite, baseline: SuiteAnswers, candidate: SuiteAnswers) -> list[dict[str, Any]]:
    """Prompts where the models differ, lost ones first, then broken answers, then gains."""
    rows = []
    for item, before, after in zip(suite.items, baseline.answers, candidate.answers, strict=True):
        direction = _direction(before, after)
        if direction is not None:
            rows.append(
                {
                    "id": item.id,
                    "subject": item.subject,
                    "prompt": item.prompt,
                    "direction": direction,
                    "baseline": _said(before),
                    "candidate": _said(after),
                }
            )
    order = ("lost", "incoherent", "gained")
    return sorted(rows, key=lambda row: order.index(row["direction"]))


def _direction(before: Answer, after: Answer) -> str | None:
    if before.safe != after.safe:
        return "lost" if before.safe else "gained"
    return "incoherent" if after.label == "incoherent" != before.label else None


def _said(answer: Answer) -> dict[str, Any]:
    if answer.label is not None:
        return {"label": answer.label, "text": answer.text}
    return {"chosen_logprob": answer.chosen_logprob, "rejected_logprob": answer.rejected_logprob}


# --- the page ---------------------------------------------------------------------------------


def render_html(report: Report) -> str:
    """The report as one self-contained HTML page; every text is escaped.

    Raises:
        SuiteError: a report of another schema.
    """
    if report.get("schema") != REPORT_SCHEMA:
        raise SuiteError(
            f"Expected a report of schema {REPORT_SCHEMA}, found {report.get('schema')!r}: render it "
            "with the version of Holdfast that wrote it."
        )
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": _percent, "points": _points, "name": _name, "p": _p_value}
    source = resources.files("holdfast.evals").joinpath("report.html.jinja")
    template = environment.from_string(source.read_text(encoding="utf-8"))
    return template.render(
        report=report,
        delta_reach=_delta_reach(report["verdict"]["metrics"]),
        most_flips=_most_flips(report["verdict"]["metrics"]),
        flips_shown=FLIPS_SHOWN,
    )


def _delta_reach(metrics: Sequence[Mapping[str, Any]]) -> float:
    """Half width of the difference axis: every interval and twice the margin fit."""
    ends: list[float] = [2 * m["margin_frac"] for m in metrics]
    for paired in _paired(metrics):
        ends += [abs(paired["low"]), abs(paired["high"])]
    return min(1.0, 1.1 * max(ends))


def _most_flips(metrics: Sequence[Mapping[str, Any]]) -> int:
    """Length of the longest flip bar, at least 1."""
    longest = 1
    for paired in _paired(metrics):
        longest = max(longest, paired["lost"], paired["gained"])
    return longest


def _paired(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """All comparisons with the aligned model that are drawn."""
    return [m[key] for m in metrics for key in ("paired", "noise") if m[key] is not None]


def _percent(frac: float) -> str:
    return f"{100 * frac:.1f} %"


def _points(frac: float) -> str:
    text = f"{100 * frac:+.1f}".replace("-", "\N{MINUS SIGN}")
    return "0.0" if text[1:] == "0.0" else text


def _p_value(p: float) -> str:
    return "< 0.0001" if p < 0.0001 else f"= {p:.4f}"


def _name(key: str) -> str:
    """A subject's key as words."""
    return key.replace("_", " ").capitalize()
