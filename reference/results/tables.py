"""Measurements as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from holdfast.evals.gate import MetricVerdict, Verdict
from holdfast.runtime.bench import Spread
from reference.results.figures import (
    MADE_IN,
    GroupFigures,
    Measured,
    PairFigures,
    RowFigures,
    base_rate,
)
from reference.results.flips import Side
from reference.results.goals import goals, line, standings
from reference.results.rows import OUR_ROWS, OURS

METRICS = {
    "refusal:harmbench": "HarmBench refused",
    "refusal:xstest-unsafe": "XSTest-unsafe refused",
    "refusal:refusal": "harmful refused",
    "over-refusal:xstest-safe": "XSTest-safe answered",
    "over-refusal:over-refusal": "harmless answered",
    "preference:constitution": "constitution preferred",
    "coherence": "coherent",
}
"""Gated metric -> column."""
DASH = "-"
MIB = 2**20
YES_NO = {True: "yes", False: "**no**", None: "does not apply"}

Figure = Callable[[Measured], float]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def words(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of text."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(found: Spread, form: str) -> str:
    """A median, with its range over the seeds where there is one."""
    shown = format(found.median, form)
    low, high = format(found.lowest, form), format(found.highest, form)
    return shown if low == high else f"{shown} [{low}, {high}]"


def named(figures: RowFigures) -> str:
    """A row's name, ours in bold, with the number of seeds where there are several."""
    name = f"**{figures.row.name}**" if figures.row.name in OUR_ROWS else figures.row.name
    return name if len(figures.seeds) == 1 else f"{name} ({len(figures.seeds)} seeds)"


# --- rates ------------------------------------------------------------------------------------


def rates_table(pair: PairFigures, group: GroupFigures) -> str:
    """Percent of the prompts, full precision first."""
    first = pair.metrics
    header = ["%", *(f"{label} (n {first[key].n})" for key, label in METRICS.items())]
    lines = [
        _fixed("aligned, torch fp32", [first[key].baseline.frac for key in METRICS]),
        _fixed("base, torch fp32", [base_rate(first[key]).frac for key in METRICS]),
        _fixed("fp32 ONNX", [first[key].candidate.frac for key in METRICS]),
    ]
    lines += [_rates(figures) for figures in group.rows]
    return table(header, lines)


def _fixed(name: str, shares: Sequence[float]) -> list[str]:
    return [name, *(f"{100 * share:.1f}" for share in shares)]


def _rates(figures: RowFigures) -> list[str]:
    return [named(figures), *(spread(figures.over_seeds(_rate(key)), ".1f") for key in METRICS)]


def _rate(key: str) -> Figure:
    return lambda measured: 100.0 * measured.metrics[key].candidate.frac


# --- flips ------------------------------------------------------------------------------------


def flips_table(pair: PairFigures, group: GroupFigures) -> str:
    """Flips on both sides, the gate, and ours against each row."""
    against = {name: one.text for name, one in standings(group).items()}
    header = ["lost / gained", "harmful", "harmless", "all flips", "of the answers", "refusals kept"]
    header += ["gate on both sides", "suites by themselves", "ours against it, flips"]
    noise = pair.noise
    lines = [
        [
            "fp32 ONNX: the noise floor",
            lost_gained(noise.harmful),
            lost_gained(noise.harmless),
            str(noise.count),
            f"{100 * noise.frac:.1f} %",
            f"{100 * noise.harmful.kept_frac:.1f} %",
            pair.noise_verdict.outcome,
            counted(list(pair.metrics.values())),
            DASH,
        ]
    ]
    lines += [_flips(figures, against) for figures in group.rows]
    return table(header, lines)


def counted(metrics: Sequence[MetricVerdict]) -> str:
    """How many metrics pass, settle nothing and fail."""
    found = [metric.outcome for metric in metrics]
    return " / ".join(str(found.count(outcome)) for outcome in ("PASS", "INCONCLUSIVE", "FAIL"))


def lost_gained(side: Side) -> str:
    return f"{side.lost} / {side.gained}"


def _flips(figures: RowFigures, against: dict[str, str]) -> list[str]:
    typical = figures.typical
    return [
        named(figures),
        lost_gained(typical.flips.harmful),
        lost_gained(typical.flips.harmless),
        spread(figures.over_seeds(lambda m: m.flips.count), ".0f"),
        f"{100 * typical.flips.frac:.1f} %",
        spread(figures.over_seeds(lambda m: 100.0 * m.flips.harmful.kept_frac), ".1f") + " %",
        outcomes(figures),
        counted(typical.verdict.metrics),
        against.get(figures.row.name, DASH),
    ]


def outcomes(figures: RowFigures) -> str:
    """The gate's outcomes over the seeds."""
    return outcomes_of([measured.both_sides for measured in figures.seeds])


def outcomes_of(verdicts: Sequence[Verdict]) -> str:
    """Outcomes with their number, equal ones once; without a number where all are equal."""
    found = [verdict.outcome for verdict in verdicts]
    counts = {outcome: found.count(outcome) for outcome in dict.fromkeys(found)}
    if len(counts) == 1:
        return found[0]
    return ", ".join(f"{count} {outcome}" for outcome, count in counts.items())


# --- the artifact -----------------------------------------------------------------------------


def artifact_table(pair: PairFigures, group: GroupFigures) -> str:
    """Distance from full precision, bytes, and what making it took."""
    facts = pair.facts
    header = ["", "KL, nats", "perplexity", "same next token", "graph bytes", "of fp32", "seconds"]
    header += ["peak MiB", "alpha"]
    near = facts["closeness"]
    floor = ["fp32 ONNX", f"{near['kl_nats']:.4f}", f"{near['perplexity']:.3f}"]
    floor += [f"{100 * near['same_top_frac']:.1f} %", f"{facts['bytes']:,}", "100 %", DASH, DASH, DASH]
    return table(header, [floor, *(_artifact(figures, facts["bytes"]) for figures in group.rows)])


def _artifact(figures: RowFigures, full_bytes: int) -> list[str]:
    size = figures.typical.size_bytes
    return [
        named(figures),
        spread(figures.over_seeds(lambda m: m.closeness.kl_nats), ".4f"),
        spread(figures.over_seeds(lambda m: m.closeness.perplexity), ".3f"),
        spread(figures.over_seeds(lambda m: 100.0 * m.closeness.same_top_frac), ".1f") + " %",
        f"{size:,}",
        f"{100 * size / full_bytes:.0f} %",
        spread(figures.over_seeds(lambda m: m.seconds(MADE_IN)), ".0f"),
        _peak(figures),
        alphas(figures),
    ]


def _peak(figures: RowFigures) -> str:
    peaks = [peak for peak in (m.peak_bytes(MADE_IN) for m in figures.seeds) if peak is not None]
    return f"{Spread.of(peaks).median / MIB:,.0f}" if peaks else "not known"


def alphas(figures: RowFigures) -> str:
    """The weight of the push that calibration chose, seed by seed; a dash where nothing was learned."""
    found = [measured.facts for measured in figures.seeds if measured.facts.get("steps")]
    return ", ".join(f"{facts['alpha']:g}" for facts in found) or DASH


# --- what was to be reached -------------------------------------------------------------------


def goals_table(pair: PairFigures) -> str:
    """Every goal of every scheme, yes or no."""
    rows = [
        [_titled(group), name, goal.text, goal.figures, YES_NO[goal.met]]
        for group in pair.groups
        for name in OUR_ROWS
        for goal in goals(pair, group, name)
    ]
    return words(["scheme", "row", "goal", "figures", "reached"], rows)


def _titled(group: GroupFigures) -> str:
    below = group.group.goal == "line" and line(group).crossed
    return f"{group.group.title}, below the line" if below else group.group.title


def line_table(pair: PairFigures) -> str:
    """Where the plain methods fail, and what ours keeps there."""
    header = ["refusals kept, %", "plain", "scaled", "below the line", "KL only", "ours", "flips of ours"]
    rows = []
    for group in pair.groups:
        found = line(group)
        ours = group.row(OURS)
        rows.append(
            [
                group.group.title,
                *(
                    f"{100 * kept[1]:.1f} ({kept[0]})" if kept else DASH
                    for kept in (found.plain, found.scaling)
                ),
                "yes" if found.crossed else "no",
                _kept(group.row("KL only")),
                _kept(ours),
                spread(ours.over_seeds(lambda m: m.flips.count), ".0f") if ours else DASH,
            ]
        )
    return table(header, rows)


def _kept(figures: RowFigures | None) -> str:
    if figures is None:
        return DASH
    return spread(figures.over_seeds(lambda m: 100.0 * m.flips.harmful.kept_frac), ".1f")


def cost_table(pair: PairFigures, names: Sequence[str] = ("GPTQ", "AWQ", "KL only", OURS)) -> str:
    """Seconds to make an artifact, and microseconds for each weight of a linear layer."""
    rows = [
        [
            group.group.title,
            figures.row.name,
            spread(figures.over_seeds(lambda m: m.seconds(MADE_IN)), ".0f"),
            spread(figures.over_seeds(lambda m: 1e6 * m.seconds(MADE_IN) / pair.parameters), ".1f"),
        ]
        for group in pair.groups
        for figures in group.rows
        if figures.row.name in names
    ]
    return table(["", "row", "seconds", "microseconds a weight"], rows)


def failures(group: GroupFigures) -> str:
    """What could not be measured, a line each."""
    return "\n".join(f"- {one.task.row.name}: not measured. {one.reason}" for one in group.failed)
