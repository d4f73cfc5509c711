"""The search: the measured best wins, baselines stand beside it, and `--auto` ends."""

import pytest

from holdfast.errors import QuantizationError
from holdfast.exporter.architectures import linear_modules
from holdfast.exporter.source import SourceModel
from holdfast.quantize.allocation.search import (
    Score,
    compare,
    measured,
    most_trials,
    rising_budgets,
    search_until_passing,
    with_allocation,
)
from holdfast.quantize.allocation.solve import Allocation, allocate
from holdfast.quantize.allocation.units import quantizable_units, unit_sizes
from holdfast.quantize.formats import formats
from holdfast.quantize.learning.lesson import make_exam
from holdfast.quantize.prompts.draw import CalibrationPrompt
from holdfast.recipe import QuantizeConfig
from tests.quantize.conftest import SHORT
from tests.quantize.test_allocation import hand_worked

UNITS, COSTS, SIZES = hand_worked()


def score(flips: int, nats: float) -> Score:
    return Score(flips, 0, 0, nats, 0.0, 10)


def test_measurement_decides_and_baselines_follow() -> None:
    """The second candidate has as few flips as the third and less divergence; the first has more flips."""
    candidates = allocate(UNITS, COSTS, SIZES, 100, count=3)
    scores = [score(2, 0.1), score(1, 0.2), score(1, 0.3), score(0, 0.0), score(0, 0.0), score(9, 9.0)]
    given = iter(scores)
    trials = compare(UNITS, candidates, SIZES, 100, lambda _: next(given), seed=0, randoms=2)
    assert [trial.name for trial in trials] == [
        "allocation 2",
        "allocation 3",
        "allocation 1",
        "random 0",
        "random 1",
        "last layers",
    ]
    assert all(trial.allocation.size_bytes <= 100 for trial in trials)


def test_auto_takes_the_smallest_budget_that_passes() -> None:
    assert rising_budgets(UNITS, SIZES, 130) == [90, 110, 130]
    tried: list[Allocation] = []

    def gate(allocation: Allocation) -> bool:
        tried.append(allocation)
        return allocation.schemes["m.2.q"] == "w4"

    found = search_until_passing(
        UNITS, lambda weight: COSTS, SIZES, 130, gate, safety_weight=1.0, candidates=1
    )
    assert found.size_bytes == 100
    assert [a.size_bytes for a in tried] == [90, 100]


def test_auto_raises_the_weight_of_safety() -> None:
    """Only with safety 4 times as heavy is the first unit worth its bytes."""

    def costs_at(weight: float) -> dict[tuple[str, str], float]:
        return COSTS | {("m.0.q", "w2"): 9.0 * weight}

    seen = []

    def gate(allocation: Allocation) -> bool:
        seen.append(allocation.schemes["m.0.q"])
        return allocation.schemes["m.0.q"] == "w4"

    search_until_passing(UNITS, costs_at, SIZES, 110, gate, safety_weight=1.0, candidates=1)
    assert seen == ["w2", "w2", "w2", "w4"]


def test_auto_says_that_nothing_passes_and_tries_nothing_twice() -> None:
    tried = []

    def gate(allocation: Allocation) -> bool:
        tried.append(tuple(allocation.schemes.values()))
        return False

    with pytest.raises(QuantizationError, match=r"No allocation under 140 bytes .*: \d+ were tried"):
        search_until_passing(UNITS, lambda _: COSTS, SIZES, 140, gate, safety_weight=1.0, candidates=2)
    assert len(set(tried)) == len(tried) <= most_trials(2) == 18


def test_an_allocation_is_a_recipe_section(aligned: SourceModel) -> None:
    units = quantizable_units(aligned.model)
    schemes = {unit.name: "w2" if index % 3 else "w4" for index, unit in enumerate(units)}
    config = with_allocation(QuantizeConfig(block_size=16), Allocation(schemes, 0.0, 0), units)
    assert set(config.mixed.values()) == {"w2", "w4"} - {config.scheme}
    chosen = formats(list(linear_modules(aligned.model)), config)
    assert {path: form.name for path, form in chosen.items()} == {
        path: schemes[unit.name] for unit in units for path in unit.paths
    }


def test_measured_in_the_simulation(
    aligned: SourceModel, negative: SourceModel, prompts: list[CalibrationPrompt]
) -> None:
    units, config = quantizable_units(aligned.model), QuantizeConfig(block_size=16, accuracy_level=0)
    exam = make_exam(aligned, negative.model, prompts[:8], SHORT)
    measure = measured(aligned, units, {}, config, exam)
    sizes = unit_sizes(units, ["w8", "w2"], config)

    def everywhere(scheme: str) -> Score:
        schemes = {unit.name: scheme for unit in units}
        return measure(Allocation(schemes, 0.0, sum(sizes[unit.name, scheme] for unit in units)))

    good, bad = everywhere("w8"), everywhere("w2")
    assert good.prompts == 8
    assert good.divergence < 0.01 < bad.divergence
    assert good.changed_tokens_frac < bad.changed_tokens_frac
