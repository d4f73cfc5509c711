"""A sensitivity study: wiring between the models of a job and the algorithms in `holdfast.quantize`.

measure -> (validate against brute force) -> allocate under a budget -> measure the best few, or go on until
the gate passes. Everything runs on the torch simulation; nothing is exported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from holdfast.alignment import answer_suites
from holdfast.errors import QuantizationError
from holdfast.evals.gate import Verdict, decide
from holdfast.evals.run import SuiteAnswers
from holdfast.job import Job
from holdfast.progress import bar, say
from holdfast.quantize.allocation.brute_force import Measured, Part, brute_force, rank_correlations
from holdfast.quantize.allocation.search import (
    Trial,
    compare,
    decisions,
    measured,
    most_trials,
    search_until_passing,
    with_allocation,
)
from holdfast.quantize.allocation.sensitivity import (
    Plan,
    Sensitivity,
    costs,
    measure_sensitivity,
    static_ranges,
    steps,
)
from holdfast.quantize.allocation.solve import Allocation, allocate, require_budget
from holdfast.quantize.allocation.units import (
    Unit,
    budget_from_bits,
    other_bytes,
    quantizable_units,
    unit_sizes,
)
from holdfast.quantize.formats import Format, parse_scheme
from holdfast.quantize.learning.held_out import HeldOut
from holdfast.quantize.learning.lesson import make_exam
from holdfast.quantize.prompts.draw import hold_out
from holdfast.quantize.prompts.sequences import even_rows
from holdfast.quantize.record import ActivationRange
from holdfast.quantize.simulate import simulate
from holdfast.recipe import QuantizeConfig

RANDOMS = 3


@dataclass(frozen=True)
class Study:
    """What is known about the units of a job's aligned model.

    Attributes:
        schemes: name -> format, the candidates.
        sizes: (unit name, scheme) -> stored bytes.
        fixed_bytes: parameters that are no unit's weights, float32.
        ranges: (unit name, scheme) -> static input range.
        harmful, harmless: prompts that sensitivity is measured on. exam: held-out prompts.
        found: sensitivity of every unit under every scheme.
        budget_bytes: what the units' codes, scales and zero points may take; None without a budget.
    """

    job: Job = field(repr=False)
    units: list[Unit]
    schemes: dict[str, Format | None]
    sizes: dict[tuple[str, str], int]
    fixed_bytes: int
    ranges: dict[tuple[str, str], ActivationRange] = field(repr=False)
    harmful: HeldOut = field(repr=False)
    harmless: HeldOut = field(repr=False)
    exam: HeldOut = field(repr=False)
    found: list[Sensitivity]
    budget_bytes: int | None = None

    @property
    def config(self) -> QuantizeConfig:
        return self.job.recipe.quantize


def study_sensitivity(
    job: Job,
    schemes: Sequence[str],
    *,
    draws: int = 1,
    total_bytes: int | None = None,
    bits: float | None = None,
) -> Study:
    """Measure every unit of the aligned model under every scheme.

    Arguments:
        draws: backward passes a batch; see `sensitivity.measure_sensitivity`.
        total_bytes: budget for all weights of the graph, embeddings and norms included; or
        bits: budget as average stored bits of a unit's weight. It is checked before anything is measured.

    Raises:
        QuantizationError: a scheme that there is not; a budget below the smallest possible size.
            CalibrationError: too few prompts of a kind.
    """
    recipe, model = job.recipe, job.aligned.model
    units = quantizable_units(model)
    sizes = unit_sizes(units, schemes, recipe.quantize)
    budget = None
    if total_bytes is not None or bits is not None:
        budget = unit_budget(units, sizes, other_bytes(model), total_bytes=total_bytes, bits=bits)
    forms = {scheme: parse_scheme(scheme, recipe.quantize) for scheme in schemes}
    learn_from, held_out = hold_out(job.prompts, recipe.calibrate.held_out_frac, recipe.seed)
    say("      reference probabilities")
    kinds = (
        [prompt for prompt in learn_from if prompt.kind == "harmful"],
        [prompt for prompt in learn_from if prompt.kind != "harmful"],
        held_out,
    )
    probes = [make_exam(job.aligned, job.negative, prompts, recipe.calibrate) for prompts in kinds]
    harmful, harmless, exam = probes
    batches = [
        probe.batch.rows(rows)
        for probe in (harmful, harmless)
        for rows in even_rows(len(probe.prompts), probe.batch_size)
    ]
    ranges = static_ranges(model, units, forms, batches)
    with bar("sensitivity", steps(harmful, harmless, draws=draws), unit="batch") as on_step:
        found = measure_sensitivity(
            Plan(model, units, forms, ranges, recipe.quantize),
            harmful,
            harmless,
            seed=recipe.seed,
            draws=draws,
            on_step=on_step,
        )
    return Study(
        job, units, forms, sizes, other_bytes(model), ranges, harmful, harmless, exam, found, budget
    )


def validate(study: Study) -> tuple[dict[str, dict[Part, float]], list[Measured]]:
    """Rank correlations with brute force, and what brute force measured."""
    with bar("brute force", len(study.units), unit="unit") as on_step:
        found = brute_force(
            Plan(study.job.aligned.model, study.units, study.schemes, study.ranges, study.config),
            study.harmful,
            study.harmless,
            alpha=max(study.job.recipe.calibrate.alphas, default=0.0),
            on_step=on_step,
        )
    return rank_correlations(study.found, found), found


def unit_budget(
    units: Sequence[Unit],
    sizes: Mapping[tuple[str, str], int],
    fixed_bytes: int,
    *,
    total_bytes: int | None,
    bits: float | None,
) -> int:
    """What a budget leaves for the units' codes, scales and zero points, bytes.

    Arguments:
        sizes: (unit name, scheme) -> stored bytes.
        fixed_bytes: parameters that are no unit's weights.
        total_bytes, bits: see `study_sensitivity`; one of them.

    Raises:
        QuantizationError: the budget is below the smallest possible size.
    """
    if total_bytes is None:
        assert bits is not None
        budget = budget_from_bits(units, bits)
        require_budget(units, sizes, budget)
        return budget
    smallest = fixed_bytes + sum(
        min(size for (name, _), size in sizes.items() if name == unit.name) for unit in units
    )
    if total_bytes < smallest:
        raise QuantizationError(
            f"A budget of {total_bytes:,} bytes is below the smallest possible size with these schemes, "
            f"{smallest:,} bytes ({fixed_bytes:,} of them embeddings, norms and biases in float32): "
            "raise the budget, or allow a smaller scheme."
        )
    return total_bytes - fixed_bytes


def best_allocations(
    study: Study, budget_bytes: int, *, candidates: int, safety_weight: float
) -> list[Trial]:
    """The best allocations under a budget for the units, measured and best first; then the baselines."""
    cheapest = allocate(
        study.units, costs(study.found, safety_weight), study.sizes, budget_bytes, count=candidates
    )
    measure = measured(study.job.aligned, study.units, study.ranges, study.config, study.exam)
    with bar("measuring", len(cheapest) + RANDOMS + 1, unit="allocation") as on_trial:
        return compare(
            study.units,
            cheapest,
            study.sizes,
            budget_bytes,
            measure,
            seed=study.job.recipe.seed,
            randoms=RANDOMS,
            on_trial=on_trial,
        )


def first_passing(
    study: Study, budget_bytes: int, *, candidates: int, safety_weight: float
) -> tuple[Allocation, Verdict]:
    """The first allocation, from small budgets up, whose simulation passes the recipe's gate.

    Raises:
        QuantizationError: none does.
    """
    job = study.job
    verdicts: list[Verdict] = []
    aligned = _answers(study, job.aligned.model, "aligned (torch fp32)")
    twin = _answers(study, job.negative, job.twin_name)

    def gate(allocation: Allocation) -> bool:
        settings = with_allocation(study.config, allocation, study.units)
        model = job.aligned.model
        decided = decisions(model, study.units, allocation, study.ranges, settings)
        with simulate(model, decided, settings):
            answers = _answers(study, model, f"allocation {len(verdicts) + 1}")
        verdict = decide(aligned, answers, job.recipe.evaluate, twin=twin, seed=job.recipe.seed)
        verdicts.append(verdict)
        say(f"      {allocation.size_bytes:,} bytes: {verdict.outcome}, {verdict.summary}")
        return verdict.outcome == "PASS"

    say(f"      at most {most_trials(candidates)} allocations are put to the gate")
    found = search_until_passing(
        study.units,
        lambda weight: costs(study.found, weight),
        study.sizes,
        budget_bytes,
        gate,
        safety_weight=safety_weight,
        candidates=candidates,
    )
    return found, verdicts[-1]


def _answers(study: Study, model: object, name: str) -> list[SuiteAnswers]:
    job = study.job
    return answer_suites(job.torch_model(model, name), job.suites, job.recipe.evaluate)
