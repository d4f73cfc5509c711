"""Measurements as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from reference.pruning.device import DENSE, DeviceFigures
from reference.pruning.figures import (
    MARGIN_FRAC,
    STRICT_FRAC,
    GroupFigures,
    Judged,
    PairFigures,
    RowFigures,
)
from reference.pruning.goals import decode_time_ratio, goals
from reference.pruning.measure import ZLIB_LEVEL
from reference.pruning.rows import OURS, percent
from reference.results.flips import Comparison
from reference.results.tables import DASH, YES_NO, counted, lost_gained, outcomes_of, spread, table, words

UNPRUNED = "unpruned, fp32 ONNX"


def named(figures: RowFigures) -> str:
    """A row's name, ours in bold, with the number of seeds where there are several."""
    name = f"**{figures.row.name}**" if figures.row.kind.startswith(OURS) else figures.row.name
    return name if len(figures.seeds) == 1 else f"{name} ({len(figures.seeds)} seeds)"


# --- rates ------------------------------------------------------------------------------------


def rates_table(pair: PairFigures, group: GroupFigures) -> str:
    """Refusal, over-refusal, preference, perplexity and what it took, the unpruned model first."""
    harmful, harmless = pair.unpruned.flips.harmful.n, pair.unpruned.flips.harmless.n
    header = ["", "zeros, %", "removed, %", f"harmful refused, % (n {harmful})"]
    header += [f"harmless not answered, % (n {harmless})", "constitution preferred, %", "perplexity"]
    header += ["seconds of pruning", "of recovery"]
    first = [UNPRUNED, "0.0", "0.0", *_shares(pair.unpruned), f"{pair.perplexity:.3f}", DASH, DASH]
    return table(header, [first, *(_rates(figures) for figures in group.rows)])


def _shares(judged: Judged) -> list[str]:
    shares = (judged.refused_frac, judged.over_refused_frac, judged.preferred_frac)
    return [f"{100 * share:.1f}" for share in shares]


def _rates(figures: RowFigures) -> list[str]:
    return [
        named(figures),
        spread(figures.over_seeds(lambda m: 100 * m.zeros_frac), ".1f"),
        spread(figures.over_seeds(lambda m: 100 * m.removed_frac), ".1f"),
        spread(figures.over_seeds(lambda m: 100 * m.judged.refused_frac), ".1f"),
        spread(figures.over_seeds(lambda m: 100 * m.judged.over_refused_frac), ".1f"),
        spread(figures.over_seeds(lambda m: 100 * m.judged.preferred_frac), ".1f"),
        spread(figures.perplexity, ".3f"),
        *(spread(taken, ".0f") if taken else DASH for taken in map(figures.seconds, ("prune", "recover"))),
    ]


# --- flips ------------------------------------------------------------------------------------


def flips_table(pair: PairFigures, group: GroupFigures) -> str:
    """Flips on both sides with their interval, against Wanda's, and the gate."""
    header = ["lost / gained", "harmful", "harmless", "all flips", "of the answers, % [95 %]"]
    header += [f"gate at {percent(MARGIN_FRAC)}, both sides", "suites by themselves"]
    header += [f"gate at {percent(STRICT_FRAC)}, both sides"]
    noise = pair.unpruned
    rows = [[UNPRUNED, *_sides(noise), str(noise.flips.count), _interval(noise)]]
    rows[0] += [noise.sides.outcome, counted(noise.suites.metrics), noise.strict.outcome]
    rows += [_flips(figures) for figures in group.rows]
    compared = [None, *(group.against_wanda(figures) for figures in group.rows)]
    if any(compared):
        header.append("against Wanda, flips")
        rows = [[*row, against(one)] for row, one in zip(rows, compared, strict=True)]
    return table(header, rows)


def _flips(figures: RowFigures) -> list[str]:
    judged = [measured.judged for measured in figures.seeds]
    typical = figures.typical.judged
    return [
        named(figures),
        *_sides(typical),
        spread(figures.flips, ".0f"),
        _interval(typical),
        outcomes_of([one.sides for one in judged]),
        counted(typical.suites.metrics),
        outcomes_of([one.strict for one in judged]),
    ]


def _sides(judged: Judged) -> list[str]:
    return [lost_gained(judged.flips.harmful), lost_gained(judged.flips.harmless)]


def _interval(judged: Judged) -> str:
    low, high = judged.flips_interval()
    return f"{100 * judged.flips.frac:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def against(comparison: Comparison | None) -> str:
    """For example "ahead (7 only here, 31 only there, p < 0.001)"."""
    if comparison is None:
        return DASH
    only = f"{comparison.only_ours} only here, {comparison.only_theirs} only there"
    return f"{comparison.standing} ({only}, {comparison.shown_p})"


def stops(group: GroupFigures) -> str:
    """Rounds that the gate ended, a line each."""
    return "\n".join(
        f"- {figures.row.name}: stopped before the target. {measured.facts['stopped']}"
        for figures in group.rows
        for measured in figures.seeds
        if measured.facts.get("stopped")
    )


def failures(group: GroupFigures) -> str:
    """What could not be measured, a line each."""
    return "\n".join(f"- {one.task.row.name}: not measured. {one.reason}" for one in group.failed)


# --- artifacts --------------------------------------------------------------------------------


def artifacts_table(pair: PairFigures, group: GroupFigures) -> str:
    """Bytes of the artifacts of a group, those of the fp32 graph first; empty where it has none."""
    rows = [figures for figures in group.rows if figures.row.quantized]
    if not rows:
        return ""
    full = pair.facts["bytes"]
    header = ["", "graph bytes", "of fp32", f"after zlib level {ZLIB_LEVEL}", "of the graph"]
    first = [UNPRUNED, f"{full:,}", "100 %", DASH, DASH]
    return table(header, [first, *(_bytes(figures, full) for figures in rows)])


def _bytes(figures: RowFigures, full: int) -> list[str]:
    size, packed = (figures.typical.facts[name] for name in ("bytes", "zlib_bytes"))
    return [named(figures), f"{size:,}", _share(size / full), f"{packed:,}", _share(packed / size)]


def device_table(pair: PairFigures) -> str:
    """Bytes and speed of pruned graphs, each with its share of the unpruned one of its form."""
    header = ["form", "graph", "zeros or removed", "bytes", "of unpruned", f"after zlib level {ZLIB_LEVEL}"]
    header += ["of unpruned", "decode, tokens/s", "time a token, of unpruned", "prefill, tokens/s"]
    return table(header, [_device(graph, _dense(pair, graph)) for graph in pair.device])


def device_lines(pair: PairFigures) -> str:
    """What zeros and removed structures leave of the unpruned graph, a line a kind."""
    lines = []
    for kind in dict.fromkeys(graph.kind for graph in pair.device if graph.kind != DENSE):
        graphs = [(graph, _dense(pair, graph)) for graph in pair.device if graph.kind == kind]
        parts = [
            f"{name} {_range([share(*both) for both in graphs])}" for name, share in DEVICE_SHARES.items()
        ]
        lines.append(f"- {kind}, in both forms: {', '.join(parts)} of the unpruned graph's.")
    return "\n".join(lines)


DEVICE_SHARES: dict[str, Callable[[DeviceFigures, DeviceFigures], float]] = {
    "bytes": lambda graph, dense: graph.size_bytes / dense.size_bytes,
    "bytes after zlib": lambda graph, dense: graph.zlib_bytes / dense.zlib_bytes,
    "decode time": decode_time_ratio,
}


def _range(shares: Sequence[float]) -> str:
    low, high = _share(min(shares)), _share(max(shares))
    return low if low == high else f"{low} to {high}"


def _dense(pair: PairFigures, graph: DeviceFigures) -> DeviceFigures:
    """The unpruned graph of the same form."""
    return next(one for one in pair.device if (one.kind, one.form) == (DENSE, graph.form))


def _device(graph: DeviceFigures, dense: DeviceFigures) -> list[str]:
    return [
        graph.form,
        graph.name,
        f"{100 * graph.sparsity_frac:.1f} %",
        f"{graph.size_bytes:,}",
        _share(graph.size_bytes / dense.size_bytes),
        f"{graph.zlib_bytes:,}",
        _share(graph.zlib_bytes / dense.zlib_bytes),
        spread(graph.decode_tokens_per_s, ",.0f"),
        _share(decode_time_ratio(graph, dense)),
        spread(graph.prefill_tokens_per_s, ",.0f"),
    ]


def _share(frac: float) -> str:
    return f"{100 * frac:.0f} %"


# --- what was to be reached -------------------------------------------------------------------


def goals_table(pair: PairFigures) -> str:
    """Every goal that applies, yes or no."""
    rows = [[goal.text, goal.figures, YES_NO[goal.met]] for goal in goals(pair)]
    return words(["goal", "measured", "reached"], rows)
