"""Sensitivity by brute force, what estimates are held against: one unit quantized alone, the loss measured.

It costs a pass over all prompts for every unit, scheme and part, where the estimate costs one in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from holdfast.errors import CalibrationError
from holdfast.exporter.architectures import linear_modules
from holdfast.quantize.allocation.sensitivity import Plan, Sensitivity
from holdfast.quantize.allocation.units import Unit
from holdfast.quantize.learning.held_out import HeldOut
from holdfast.quantize.learning.losses import contrastive_loss
from holdfast.quantize.learning.reference_cache import position_logits
from holdfast.quantize.prompts.sequences import even_rows
from holdfast.quantize.simulate import SimulatedLinear

Part = Literal["weights", "activations"]
PARTS: tuple[Part, ...] = ("weights", "activations")
LEAST_PAIRS = 3


@dataclass(frozen=True)
class Measured:
    """One part of one unit quantized alone.

    Attributes:
        safety: bounded loss on harmful prompts, nats. utility: KL on harmless ones, nats.
        changed_tokens_frac: share of answer positions, of all prompts, with another likeliest token.
    """

    unit: str
    scheme: str
    part: Part
    safety: float
    utility: float
    changed_tokens_frac: float


class PartlyQuantized(nn.Module):
    """A linear of which only the weight or only the input is as the artifact has it."""

    def __init__(self, linear: nn.Linear, simulated: SimulatedLinear, part: Part) -> None:
        super().__init__()
        self.bias, self.simulated, self.part = linear.bias, simulated, part
        self.weight = simulated.weight if part == "weights" else linear.weight

    def forward(self, values: Tensor) -> Tensor:
        if self.part == "activations":
            values = self.simulated.quantized_input(values)
        return nn.functional.linear(values, self.weight, self.bias)


def brute_force(
    plan: Plan,
    harmful: HeldOut,
    harmless: HeldOut,
    *,
    alpha: float,
    on_step: Callable[[int], None] | None = None,
) -> list[Measured]:
    """Every unit, scheme and part, quantized alone. Float32 schemes are left out: they change nothing.

    Arguments:
        alpha: weight of the bounded loss's push term.
        on_step: counts units.
    """
    found = []
    for unit in plan.units:
        for scheme, form in plan.schemes.items():
            if form is None:
                continue
            for part in PARTS:
                with _quantized(plan, unit, scheme, part):
                    safety, lost = _loss(plan.model, harmful, alpha)
                    utility, other = _loss(plan.model, harmless, 0.0)
                changed = (lost + other) / (_positions(harmful) + _positions(harmless))
                found.append(Measured(unit.name, scheme, part, safety, utility, changed))
        if on_step is not None:
            on_step(1)
    return found


def rank_correlations(
    estimated: Sequence[Sensitivity], measured: Sequence[Measured]
) -> dict[str, dict[Part, float]]:
    """Spearman's rank correlation of estimate and brute force, `safety` and `utility` by part.

    Over all units and schemes. A part that no scheme quantizes has none.

    Raises:
        CalibrationError: fewer than three pairs.
    """
    known = {(entry.unit, entry.scheme): entry for entry in estimated}
    found: dict[str, dict[Part, float]] = {"safety": {}, "utility": {}}
    for part in PARTS:
        for aim, of_part in found.items():
            pairs = [
                (getattr(getattr(known[m.unit, m.scheme], aim), part), getattr(m, aim))
                for m in measured
                if m.part == part
            ]
            if len(pairs) < LEAST_PAIRS:
                raise CalibrationError(
                    f"A rank correlation needs {LEAST_PAIRS} pairs and there are {len(pairs)}: "
                    "give more schemes."
                )
            if any(expected > 0.0 for expected, _ in pairs):
                of_part[part] = float(spearmanr(*zip(*pairs, strict=True)).statistic)
    return found


@contextmanager
def _quantized(plan: Plan, unit: Unit, scheme: str, part: Part) -> Iterator[None]:
    linears = linear_modules(plan.model)
    for path in unit.paths:
        simulated = plan.simulated(linears[path], unit.name, scheme)
        if simulated is not None:
            plan.model.set_submodule(path, PartlyQuantized(linears[path], simulated, part))
    try:
        yield
    finally:
        for path in unit.paths:
            plan.model.set_submodule(path, linears[path])


@torch.no_grad()
def _loss(model: Any, probe: HeldOut, alpha: float) -> tuple[float, float]:
    """Weighted mean bounded loss in nats, and the number of positions with another likeliest token."""
    weight = total = changed = 0.0
    for rows in even_rows(len(probe.prompts), probe.batch_size):
        batch = probe.batch.rows(rows)
        references = probe.references.rows(rows, slice(-batch.positions, None))
        logits = position_logits(model, batch)
        loss = contrastive_loss(logits, references, batch.weights, alpha=alpha, mode="bounded")
        share = float(batch.weights.sum())
        weight, total = weight + share, total + share * float(loss)
        differs = logits.argmax(dim=-1) != references.top_ids[..., 0]
        changed += float((differs & (batch.weights > 0)).sum())
    return total / weight, changed


def _positions(probe: HeldOut) -> int:
    return int((probe.batch.weights > 0).sum())
