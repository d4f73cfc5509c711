"""The best few allocations, measured: what adds up only approximately is decided by flips.

Measured are held-out prompts, whose greedy answers are compared with the full-precision model's, in both
directions, and the divergence on them. The winner has the fewest flips; among equals, the least divergence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from msgspec import structs

from holdfast.errors import QuantizationError
from holdfast.evals.judge import label_answer
from holdfast.exporter.architectures import linear_modules
from holdfast.exporter.source import SourceModel
from holdfast.exporter.torch_model import TorchLanguageModel
from holdfast.quantize.allocation.sensitivity import Ranges
from holdfast.quantize.allocation.solve import (
    Allocation,
    Choice,
    allocate,
    last_layers_allocation,
    random_allocation,
    require_budget,
)
from holdfast.quantize.allocation.units import Unit
from holdfast.quantize.decisions import Decisions
from holdfast.quantize.formats import formats
from holdfast.quantize.learning.held_out import HeldOut, count_flips
from holdfast.quantize.simulate import simulate
from holdfast.recipe import QuantizeConfig

BUDGET_STEPS = 3
SAFETY_FACTORS = (1.0, 4.0, 16.0)


@dataclass(frozen=True)
class Score:
    """A quantized model against the full-precision one, on held-out prompts.

    Attributes:
        lost: refusals that became something else. gained: the other way round. other: other labels.
        divergence: weighted mean KL, nats.
        changed_tokens_frac: share of answer positions with another likeliest token.
        prompts: how many there were.
    """

    lost: int
    gained: int
    other: int
    divergence: float
    changed_tokens_frac: float
    prompts: int

    @property
    def flips(self) -> int:
        return self.lost + self.gained + self.other

    @property
    def rank(self) -> tuple[int, float]:
        """Smaller is better."""
        return self.flips, self.divergence


@dataclass(frozen=True)
class Trial:
    """An allocation that was measured.

    Attributes:
        name: `allocation 1` and on, `random 0` and on, or `last layers`.
    """

    name: str
    allocation: Allocation
    score: Score


Measure = Callable[[Allocation], Score]
Gate = Callable[[Allocation], bool]
CostsAt = Callable[[float], Mapping[Choice, float]]
"""Weight of safety against utility -> costs."""


def measure_model(source: SourceModel, exam: HeldOut) -> Score:
    """The model as it computes now, against the answers of the exam."""
    model = TorchLanguageModel(source.model, source.tokenizer, "candidate", exam.batch_size)
    ids = model.generate(exam.prompts, max_new_tokens=exam.max_new_tokens)
    changed, divergence = exam.distance(source)
    lost, gained, other = count_flips(
        [label_answer(answer) for answer in exam.answers],
        [label_answer(source.tokenizer.decode(answer)) for answer in ids],
    )
    return Score(lost, gained, other, divergence, changed, len(exam.prompts))


def decisions(
    model: Any, units: Sequence[Unit], allocation: Allocation, ranges: Ranges, config: QuantizeConfig
) -> Decisions:
    """An allocation as the simulation takes it: formats, static ranges, weights rounded to nearest."""
    chosen = formats(list(linear_modules(model)), config)
    found = {
        path: ranges[unit.name, allocation.schemes[unit.name]]
        for unit in units
        for path in unit.paths
        if (unit.name, allocation.schemes[unit.name]) in ranges
    }
    return Decisions(chosen, found, {}, "rtn")


def measured(
    source: SourceModel, units: Sequence[Unit], ranges: Ranges, config: QuantizeConfig, exam: HeldOut
) -> Measure:
    """Measures allocations in the torch simulation of the artifact.

    Arguments:
        config: quantize section whose `scheme` and `mixed` the allocation replaces.
    """

    def measure(allocation: Allocation) -> Score:
        settings = with_allocation(config, allocation, units)
        with simulate(source.model, decisions(source.model, units, allocation, ranges, settings), settings):
            return measure_model(source, exam)

    return measure


def with_allocation(
    config: QuantizeConfig, allocation: Allocation, units: Sequence[Unit]
) -> QuantizeConfig:
    """The quantize section of a recipe that holds an allocation.

    `scheme` is the one that most weights have, and `mixed` names the linears that differ, by exact path.
    """
    weights: dict[str, int] = {}
    for unit in units:
        scheme = allocation.schemes[unit.name]
        weights[scheme] = weights.get(scheme, 0) + unit.weights
    common = max(weights, key=weights.__getitem__)
    mixed = {path: scheme for path, scheme in allocation.mixed(units).items() if scheme != common}
    return structs.replace(config, scheme=common, mixed=mixed)


def compare(
    units: Sequence[Unit],
    candidates: Sequence[Allocation],
    sizes: Mapping[Choice, int],
    budget_bytes: int,
    measure: Measure,
    *,
    seed: int,
    randoms: int = 1,
    on_trial: Callable[[int], None] | None = None,
) -> list[Trial]:
    """The candidates, best first, then random allocations and the last layers at the same budget."""
    baselines = {
        f"random {index}": random_allocation(units, sizes, budget_bytes, seed + index)
        for index in range(randoms)
    }
    baselines["last layers"] = last_layers_allocation(units, sizes, budget_bytes)
    named = {f"allocation {place}": found for place, found in enumerate(candidates, start=1)}
    trials = []
    for name, allocation in (named | baselines).items():
        trials.append(Trial(name, allocation, measure(allocation)))
        if on_trial is not None:
            on_trial(1)
    ours = sorted(trials[: len(named)], key=lambda trial: trial.score.rank)
    return [*ours, *trials[len(named) :]]


def most_trials(candidates: int) -> int:
    """Upper bound of the gate's runs in `search_until_passing`."""
    return BUDGET_STEPS * len(SAFETY_FACTORS) * candidates


def search_until_passing(
    units: Sequence[Unit],
    costs_at: CostsAt,
    sizes: Mapping[Choice, int],
    budget_bytes: int,
    gate: Gate,
    *,
    safety_weight: float,
    candidates: int,
) -> Allocation:
    """The first allocation that passes the gate, from small budgets to the given one.

    Budgets rise in `BUDGET_STEPS` equal steps from the smallest possible size; at each, the weight of
    safety rises by `SAFETY_FACTORS`, and the best `candidates` allocations are put to the gate, none twice.

    Raises:
        QuantizationError: none passes, after at most `most_trials(candidates)`.
    """
    require_budget(units, sizes, budget_bytes)
    tried: list[dict[str, str]] = []
    for budget in rising_budgets(units, sizes, budget_bytes):
        for factor in SAFETY_FACTORS:
            for found in allocate(units, costs_at(safety_weight * factor), sizes, budget, count=candidates):
                if found.schemes in tried:
                    continue
                tried.append(found.schemes)
                if gate(found):
                    return found
    raise QuantizationError(
        f"No allocation under {budget_bytes:,} bytes passes the gate: {len(tried)} were tried, at "
        f"{BUDGET_STEPS} budgets and safety weights up to {safety_weight * SAFETY_FACTORS[-1]:g}; raise "
        "the budget, allow a larger scheme, or calibrate instead of rounding to nearest."
    )


def rising_budgets(units: Sequence[Unit], sizes: Mapping[Choice, int], budget_bytes: int) -> list[int]:
    """`BUDGET_STEPS` budgets between the smallest possible size and the given one, which is the last."""
    smallest = sum(min(sizes[choice] for choice in sizes if choice[0] == unit.name) for unit in units)
    room = budget_bytes - smallest
    return [smallest + room * step // BUDGET_STEPS for step in range(1, BUDGET_STEPS + 1)]
