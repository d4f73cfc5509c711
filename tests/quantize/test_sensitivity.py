"""Sensitivity: the projections against autograd, the estimate against the divergence that it estimates."""

from dataclasses import replace
from typing import Literal

import pytest
import torch

from holdfast.errors import CalibrationError
from holdfast.exporter.source import SourceModel
from holdfast.quantize.allocation.brute_force import Measured, brute_force, rank_correlations
from holdfast.quantize.allocation.sensitivity import (
    Harm,
    Plan,
    Schemes,
    Sensitivity,
    costs,
    divergence,
    measure_sensitivity,
    projected_values,
    projected_weights,
    static_ranges,
    steps,
)
from holdfast.quantize.allocation.units import Unit, quantizable_units
from holdfast.quantize.formats import parse_scheme
from holdfast.quantize.learning.held_out import HeldOut
from holdfast.quantize.learning.lesson import make_exam
from holdfast.quantize.prompts.draw import CalibrationPrompt
from holdfast.quantize.record import ActivationRange
from holdfast.recipe import QuantizeConfig
from tests.quantize.conftest import SHORT

SCHEMES = ("w8a8", "w4a6", "w2")
Probes = tuple[HeldOut, HeldOut]
Ranges = dict[tuple[str, str], ActivationRange]


@pytest.fixture(scope="module")
def probes(aligned: SourceModel, negative: SourceModel, prompts: list[CalibrationPrompt]) -> Probes:
    kinds = ([p for p in prompts if p.kind == "harmful"], [p for p in prompts if p.kind != "harmful"])
    first, second = (make_exam(aligned, negative.model, kind, SHORT) for kind in kinds)
    return first, second


@pytest.fixture(scope="module")
def schemes() -> Schemes:
    return {name: parse_scheme(name, QuantizeConfig(block_size=16)) for name in SCHEMES}


@pytest.fixture(scope="module")
def units(aligned: SourceModel) -> list[Unit]:
    return quantizable_units(aligned.model)


@pytest.fixture(scope="module")
def ranges(aligned: SourceModel, units: list[Unit], schemes: Schemes, probes: Probes) -> Ranges:
    return static_ranges(aligned.model, units, schemes, [probe.batch for probe in probes])


def level(accuracy_level: Literal[0, 4]) -> QuantizeConfig:
    return QuantizeConfig(block_size=16, accuracy_level=accuracy_level)


def estimate(
    source: SourceModel,
    units: list[Unit],
    schemes: Schemes,
    ranges: Ranges,
    probes: Probes,
    *,
    seed: int = 0,
    accuracy_level: Literal[0, 4] = 0,
) -> list[Sensitivity]:
    plan = Plan(source.model, units, schemes, ranges, level(accuracy_level))
    return measure_sensitivity(plan, *probes, seed=seed)


def test_projections_are_directional_derivatives() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 3, 5, generator=generator, requires_grad=True)
    weight = torch.randn(4, 5, generator=generator, requires_grad=True)
    change = torch.randn(4, 5, generator=generator)
    moved = torch.randn(2, 3, 5, generator=generator)
    output = values @ weight.T
    score = output.sin().flatten(1).sum(dim=1)
    (gradient,) = torch.autograd.grad(score.sum(), output, retain_graph=True)
    for row in range(2):
        by_weight, by_value = torch.autograd.grad(score[row], (weight, values), retain_graph=True)
        found = projected_weights(gradient, values.detach(), change, rows=2)[row]
        assert float(found) == pytest.approx(float((by_weight * change).sum()), rel=1e-4)
        found = projected_values(gradient, weight.detach(), moved, rows=2)[row]
        assert float(found) == pytest.approx(float((by_value * moved).sum()), rel=1e-4)


def test_divergence_is_the_weighted_mean_of_half_squares() -> None:
    assert divergence(torch.tensor([1.0, -3.0]), total_weight=4.0) == (1.0 + 9.0) / 8.0


def test_the_mean_estimate_is_the_divergence(
    aligned: SourceModel, units: list[Unit], schemes: Schemes, ranges: Ranges, probes: Probes
) -> None:
    """Small changes, where the second order is all: against the KL of the unit quantized alone."""
    small = {"w8a8": schemes["w8a8"]}
    plan = Plan(aligned.model, units, small, ranges, level(0))
    mean = measure_sensitivity(plan, *probes, seed=0, draws=24)
    measured = brute_force(plan, probes[1], probes[1], alpha=0.0)
    exact = {(m.unit, m.part): m.utility for m in measured}
    for place, unit in enumerate(units):
        for part in ("weights", "activations"):
            found = getattr(mean[place].utility, part)
            assert found == pytest.approx(exact[unit.name, part], rel=0.35), (unit.name, part)


def test_ranks_agree_with_brute_force(
    aligned: SourceModel, units: list[Unit], schemes: Schemes, ranges: Ranges, probes: Probes
) -> None:
    found = estimate(aligned, units, schemes, ranges, probes)
    plan = Plan(aligned.model, units, schemes, ranges, level(0))
    measured = brute_force(plan, *probes, alpha=0.0)
    assert len(measured) == 2 * len(found)
    correlations = rank_correlations(found, measured)
    assert min(value for parts in correlations.values() for value in parts.values()) > 0.85
    pairs = zip(found, reversed(found), strict=True)
    shuffled = [replace(entry, safety=other.safety) for entry, other in pairs]
    assert rank_correlations(shuffled, measured)["safety"]["weights"] < 0.85


def test_the_model_is_left_alone(
    aligned: SourceModel, units: list[Unit], schemes: Schemes, ranges: Ranges, probes: Probes
) -> None:
    before = {name: value.clone() for name, value in aligned.model.state_dict().items()}
    first, second = (estimate(aligned, units, schemes, ranges, probes, seed=7) for _ in range(2))
    assert first == second
    brute_force(Plan(aligned.model, units[:1], schemes, ranges, level(0)), *probes, alpha=0.0)
    after = aligned.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in aligned.model.parameters())
    assert not any(module._forward_hooks for module in aligned.model.modules())


def test_weights_alone_have_no_activations_but_for_int8_inside(
    aligned: SourceModel, units: list[Unit], schemes: Schemes, probes: Probes
) -> None:
    alone = {"w2": schemes["w2"]}
    assert {entry.safety.activations for entry in estimate(aligned, units, alone, {}, probes)} == {0.0}
    four = {"w4": parse_scheme("w4", QuantizeConfig(block_size=16))}  # 2 bits in blocks of 16 stay float
    inside = estimate(aligned, units, four, {}, probes, accuracy_level=4)
    assert all(0.0 < entry.safety.activations < entry.safety.weights for entry in inside)


def test_float32_costs_nothing(aligned: SourceModel, units: list[Unit], probes: Probes) -> None:
    found = estimate(aligned, units, {"none": None}, {}, probes)
    assert {entry.cost(3.0) for entry in found} == {0.0}


def test_cost_weighs_safety() -> None:
    entry = Sensitivity("m", "w4", Harm(1.0, 2.0), Harm(10.0, 20.0))
    assert costs([entry], 0.5) == {("m", "w4"): 31.5}


def test_steps_count_batches(probes: Probes) -> None:
    """8 harmful and 16 harmless prompts in batches of 8."""
    assert steps(*probes) == 1 + 2
    assert steps(*probes, draws=2) == 2 * (1 + 2)


def test_a_damaged_layer_is_named(
    aligned: SourceModel, units: list[Unit], schemes: Schemes, probes: Probes
) -> None:
    linear = aligned.model.get_submodule("model.layers.1.mlp.down_proj")
    kept = float(linear.weight[0, 0])
    linear.weight[0, 0] = float("nan")
    try:
        with pytest.raises(CalibrationError, match=r"sensitivity of `model\.layers\..*not a number"):
            estimate(aligned, units, {"w2": schemes["w2"]}, {}, probes)
    finally:
        linear.weight[0, 0] = kept


def test_too_few_pairs_have_no_rank_correlation() -> None:
    entry = Sensitivity("m", "w4", Harm(1.0, 2.0), Harm(1.0, 2.0))
    measured = [Measured("m", "w4", "weights", 0.1, 0.1, 0.0)]
    with pytest.raises(CalibrationError, match="needs 3 pairs and there are 1"):
        rank_correlations([entry], measured)
