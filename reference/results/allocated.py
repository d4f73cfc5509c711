"""Ours with bits allocated: formats chosen under a group's bytes, then calibrated like any other row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from msgspec import structs

from holdfast.exporter.architectures import linear_modules
from holdfast.job import Job
from holdfast.quantize.allocation.search import with_allocation
from holdfast.quantize.allocation.solve import Allocation, last_layers_allocation, random_allocation
from holdfast.quantize.allocation.units import Unit, quantizable_units, unit_bytes, unit_sizes
from holdfast.quantize.formats import formats
from holdfast.study import best_allocations, study_sensitivity
from reference.results.process import Stages
from reference.results.rows import Row

CANDIDATES = 3  # cheapest allocations that are measured on held-out prompts
SAFETY_WEIGHT = 1.0


def allocate_row(job: Job, row: Row, stages: Stages) -> tuple[Job, dict[str, Any]]:
    """The job with `mixed` as the row's allocation says, and what is to be said about it.

    The time that choosing takes is the stage `allocate`.
    """
    units = quantizable_units(job.aligned.model)
    budget = group_bytes(job, units)
    with stages.stage("allocate"):
        found = _allocation(job, row, units, budget)
    config = with_allocation(job.recipe.quantize, found, units)
    facts = {"schemes": found.schemes, "unit_bytes": found.size_bytes, "budget_bytes": budget}
    return replace(job, recipe=structs.replace(job.recipe, quantize=config)), facts


def group_bytes(job: Job, units: Sequence[Unit]) -> int:
    """Stored bytes of the units as the recipe's own formats have them."""
    chosen = formats(list(linear_modules(job.aligned.model)), job.recipe.quantize)
    return sum(unit_bytes(unit, chosen.get(unit.name)) for unit in units)


def _allocation(job: Job, row: Row, units: Sequence[Unit], budget_bytes: int) -> Allocation:
    if row.allocation == "sensitivity":
        study = study_sensitivity(job, row.schemes)
        trials = best_allocations(study, budget_bytes, candidates=CANDIDATES, safety_weight=SAFETY_WEIGHT)
        return trials[0].allocation
    sizes = unit_sizes(units, row.schemes, job.recipe.quantize)
    if row.allocation == "random":
        return random_allocation(units, sizes, budget_bytes, job.recipe.seed)
    return last_layers_allocation(units, sizes, budget_bytes)
