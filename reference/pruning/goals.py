"""What was to be reached, as yes or no with the figures behind it."""

from __future__ import annotations

from collections.abc import Iterator

from reference.pruning.device import DENSE, STRUCTURED, DeviceFigures
from reference.pruning.figures import STRICT_FRAC, PairFigures, RowFigures
from reference.pruning.rows import (
    BOTH,
    DEFAULT,
    HALF,
    MAGNITUDE,
    OURS,
    QUARTER,
    SPARSITIES,
    WANDA,
    percent,
)
from reference.results.goals import Goal
from reference.results.tables import outcomes_of, spread

OF_FLIPS = {WANDA: 0.5, MAGNITUDE: 0.25}
"""At most so much of their flips."""
NEAR_FRAC = 0.05
"""Bytes and decode time are down in proportion where the share that is left is at most so much above that
of the parameters."""


def goals(pair: PairFigures) -> list[Goal]:
    """Every goal whose rows were measured."""
    return [*_score_goals(pair), *_recovery_goals(pair), *_structured_goals(pair), *_device_goals(pair)]


def _score_goals(pair: PairFigures) -> Iterator[Goal]:
    """Flips of ours against those of others at half the weights."""
    ours = pair.row("unstructured", OURS, HALF)
    for name, frac in OF_FLIPS.items():
        other = pair.row("unstructured", name, HALF)
        if ours is not None and other is not None:
            yield _flips_goal(ours, other, frac)


def _flips_goal(ours: RowFigures, other: RowFigures, frac: float) -> Goal:
    name = other.row.kind
    few = ours.flips.median <= frac * other.flips.median
    good = ours.perplexity.median <= other.perplexity.median
    return Goal(
        f"at {percent(HALF)}, at most {percent(frac)} of {name}'s flips at equal or lower perplexity",
        f"flips {spread(ours.flips, '.0f')} against {spread(other.flips, '.0f')}"
        + (f" ({100 * ours.flips.median / other.flips.median:.0f} %)" if other.flips.median else "")
        + f"; perplexity {spread(ours.perplexity, '.3f')} against {spread(other.perplexity, '.3f')}",
        few and good,
    )


def _recovery_goals(pair: PairFigures) -> Iterator[Goal]:
    """The gate after recovery, sparsity by sparsity."""
    for frac in SPARSITIES:
        found = pair.row("recovered", OURS, frac, recover=DEFAULT)
        if found is not None:
            yield _gate_goal(f"at {percent(frac)} zeros, recovered", found)


def _structured_goals(pair: PairFigures) -> Iterator[Goal]:
    found = pair.row("structured", BOTH, QUARTER, recover=DEFAULT)
    if found is not None:
        yield _gate_goal(f"{BOTH} {percent(QUARTER)} removed, recovered", found)


def _gate_goal(what: str, found: RowFigures) -> Goal:
    judged = [measured.judged for measured in found.seeds]
    typical = found.typical.flips
    return Goal(
        f"{what}: the gate passes on both sides",
        f"{outcomes_of([one.sides for one in judged])} (at {percent(STRICT_FRAC)}: "
        f"{outcomes_of([one.strict for one in judged])}); harmful {typical.harmful.lost} lost, "
        f"{typical.harmful.gained} gained of {typical.harmful.n}; harmless {typical.harmless.lost} lost, "
        f"{typical.harmless.gained} gained of {typical.harmless.n}",
        all(one.sides.outcome == "PASS" for one in judged),
    )


def _device_goals(pair: PairFigures) -> Iterator[Goal]:
    """Bytes and decode time of the structured graph against the unpruned one."""
    smaller = _graph(pair, STRUCTURED, QUARTER)
    dense = _graph(pair, DENSE, 0.0)
    if smaller is None or dense is None:
        return
    left = smaller.parameters_frac
    shares = {
        "bytes": smaller.size_bytes / dense.size_bytes,
        "decode time": decode_time_ratio(smaller, dense),
    }
    for name, share in shares.items():
        yield Goal(
            f"{BOTH} {percent(QUARTER)} removed: {name} down in proportion",
            f"{100 * share:.1f} % of the unpruned graph's are left, of the parameters {100 * left:.1f} %",
            share <= left + NEAR_FRAC,
        )


def _graph(pair: PairFigures, kind: str, frac: float) -> DeviceFigures | None:
    """The fp32 graph of that kind with the sparsity that is nearest to `frac`."""
    found = [graph for graph in pair.device if (graph.kind, graph.form) == (kind, "fp32")]
    return min(found, key=lambda graph: abs(graph.sparsity_frac - frac), default=None)


def decode_time_ratio(graph: DeviceFigures, dense: DeviceFigures) -> float:
    """Time for a token, as a share of what the unpruned graph takes."""
    return dense.decode_tokens_per_s.median / graph.decode_tokens_per_s.median
