"""The record of what pruning reached: prune.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from holdfast.prune.structured.remove import StructuredReport
from holdfast.recipe import PruneConfig


@dataclass(frozen=True)
class Sparsity:
    """Zeros of one linear layer.

    Attributes:
        weights: number of weights.
        zeros: how many of them are zero now, those that were zero before among them.
        sparsity_frac: zeros / weights.
        protected: weights that were to be dropped last.
        protected_zeros: those of them that are zero all the same: more were protected than may stay, or
            they were zero before.
    """

    weights: int
    zeros: int
    sparsity_frac: float
    protected: int = 0
    protected_zeros: int = 0


@dataclass(frozen=True)
class PruneReport:
    """What pruning did.

    Attributes:
        method: as in the recipe.
        pattern: `unstructured` or `n:m`.
        allocation: `uniform` or `sensitivity`.
        asked_frac: the share asked for.
        reached_frac: zeros / weights over all pruned layers; 0 for `none`.
        modules: module path -> sparsity; empty for `none`.
        safety_heads: [block, head] of the heads that are protected, strongest first.
        calibration_rows, calibration_tokens: what input norms were taken over.
        safety_rows, utility_rows: sequences that gradients were taken over.
    """

    method: str
    pattern: str
    allocation: str
    asked_frac: float
    reached_frac: float
    modules: dict[str, Sparsity]
    safety_heads: list[tuple[int, int]]
    calibration_rows: int
    calibration_tokens: int
    safety_rows: int
    utility_rows: int


def make_report(
    config: PruneConfig,
    linears: Mapping[str, nn.Linear],
    protected: Mapping[str, tuple[int, int]],
    *,
    safety_heads: Sequence[tuple[int, int]] = (),
    rows: Sequence[Sequence[int]] = (),
    safety_rows: int = 0,
    utility_rows: int = 0,
) -> PruneReport:
    """The report of a pruned model.

    Arguments:
        linears: module path -> pruned linear.
        protected: module path -> (protected weights, those of them that are zero).
        rows: token ids that input norms were taken over.
    """
    modules = {path: _sparsity(module, protected.get(path, (0, 0))) for path, module in linears.items()}
    weights = sum(entry.weights for entry in modules.values())
    zeros = sum(entry.zeros for entry in modules.values())
    return PruneReport(
        method=config.method,
        pattern=config.pattern,
        allocation=config.allocation,
        asked_frac=config.sparsity_frac,
        reached_frac=zeros / weights if weights else 0.0,
        modules=modules,
        safety_heads=list(safety_heads),
        calibration_rows=len(rows),
        calibration_tokens=sum(len(row) for row in rows),
        safety_rows=safety_rows,
        utility_rows=utility_rows,
    )


def _sparsity(module: nn.Linear, protected: tuple[int, int]) -> Sparsity:
    weight = module.weight
    zeros = int((weight == 0).sum())
    return Sparsity(weight.numel(), zeros, zeros / weight.numel(), *protected)


def prune_record(report: PruneReport, removed: StructuredReport | None) -> dict[str, Any]:
    """prune.json: the zeros, and what was removed before them."""
    return asdict(report) | {"structured": None if removed is None else asdict(removed)}


def runtime_use(report: PruneReport, removed: StructuredReport | None) -> dict[str, str]:
    """What the runtime can make of the sparsity, for the manifest.

    ONNX Runtime's CPU kernels multiply zeros like any other number, N:M patterns too, which docs/results.md
    measures. Removed structures are smaller matrices.
    """
    found = {}
    if removed is not None:
        found["runtime_uses"] = f"{removed.reached_frac:.1%} of the decoder blocks' weights removed"
    if report.method != "none":
        kind = "zeros" if report.pattern == "unstructured" else f"zeros in the pattern {report.pattern}"
        found["only_compresses"] = f"{report.reached_frac:.1%} {kind}"
    return found
