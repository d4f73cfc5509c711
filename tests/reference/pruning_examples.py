"""Pruned models made up for the tests: answers by a rule, everything else from them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from holdfast.recipe import EvaluateConfig
from holdfast.runtime.bench import Spread
from reference.pruning.device import DENSE, DeviceFigures
from reference.pruning.figures import Judged, Measured, PairFigures, judge, pair_figures
from reference.pruning.rows import GROUPS, Group, Row, Task
from reference.results.figures import References
from reference.results.kept import Failed
from tests.reference.results_examples import answers, base, baseline

BY_KEY = {group.key: group for group in GROUPS}
Safe = dict[str, list[bool]]


def references() -> References:
    """The baseline, the base, and an fp32 graph that flips nothing, at the tool's own margin."""
    return References(
        suites=(),
        baseline=answers(baseline()),
        twin=answers(base()),
        noise=answers(baseline()),
        config=EvaluateConfig(),
    )


@cache
def _judged(safe: tuple[tuple[str, tuple[bool, ...]], ...]) -> Judged:
    return judge(references(), answers({name: list(values) for name, values in safe}))


def row_of(key: str, name: str) -> Row:
    """A row of the table by its name."""
    return next(row for row in BY_KEY[key].rows if row.name == name)


def measured(
    key: str, name: str, safe: Safe, *, seed: int = 0, perplexity: float = 1.2, **facts: Any
) -> Measured:
    """A row whose model answered as `safe` says."""
    row = row_of(key, name)
    removed = row.sparsity_frac if "structured" in row.prune else 0.0
    taken = {"prune": 10.0 + seed, "recover": None if row.recover is None else 100.0}
    return Measured(
        task=Task(BY_KEY[key], row, seed),
        judged=_judged(tuple((suite, tuple(values)) for suite, values in safe.items())),
        perplexity=perplexity,
        zeros_frac=0.0 if removed else row.sparsity_frac,
        removed_frac=removed,
        facts={"seconds": taken, "stopped": None, **facts},
    )


def pair(
    keys: Sequence[str], done: Sequence[Measured | Failed[Task]], device: Sequence[DeviceFigures] = ()
) -> PairFigures:
    """A pair on which these measurements were made."""
    near = {"kl_nats": 0.0, "perplexity": 1.05, "same_top_frac": 1.0, "positions": 100}
    groups: list[Group] = [BY_KEY[key] for key in keys]
    facts = {"bytes": 4000, "closeness": near, "tokens": 32}
    return pair_figures("made-up", references(), groups, done, facts=facts, device=device)


def graph(
    kind: str, frac: float, *, size: int, packed: int, decode: float, left: float = 1.0
) -> DeviceFigures:
    """A graph of made-up size and speed."""
    return DeviceFigures(
        name=f"{kind} {frac}",
        kind=kind,
        form="fp32",
        sparsity_frac=frac,
        parameters_frac=left,
        size_bytes=size,
        zlib_bytes=packed,
        decode_tokens_per_s=Spread.of([decode]),
        prefill_tokens_per_s=Spread.of([1000.0]),
    )


DENSE_GRAPH = graph(DENSE, 0.0, size=1000, packed=900, decode=200.0)
