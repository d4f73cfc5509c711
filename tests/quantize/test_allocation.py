"""Allocation: a hand-worked instance, equality with enumeration, the budget to the byte."""

import itertools
import random

import pytest

from holdfast.errors import QuantizationError
from holdfast.quantize.allocation.solve import (
    Allocation,
    allocate,
    last_layers_allocation,
    priced,
    random_allocation,
)
from holdfast.quantize.allocation.units import Unit

Table = dict[tuple[str, str], float]
Sizes = dict[tuple[str, str], int]
SCHEMES = ("w8", "w4", "w2")


def make_units(count: int) -> list[Unit]:
    return [Unit((f"m.{index}.q", f"m.{index}.k"), ((4, 8), (2, 8)), index) for index in range(count)]


def hand_worked() -> tuple[list[Unit], Table, Sizes]:
    """Three units of 40, 20 and 10 bytes at w2, twice that at w4.

    Worth of the larger scheme: 9 for 40 bytes, 6 for 20, 4 for 10. With 100 bytes 30 are left over the
    smallest size of 70: the second and the third (10 for 30) go up, though the first is worth most.
    """
    units = make_units(3)
    costs: Table = {}
    sizes: Sizes = {}
    for unit, size, worth in zip(units, (40, 20, 10), (9.0, 6.0, 4.0), strict=True):
        costs |= {(unit.name, "w2"): worth, (unit.name, "w4"): 0.0}
        sizes |= {(unit.name, "w2"): size, (unit.name, "w4"): 2 * size}
    return units, costs, sizes


def random_instance(seed: int) -> tuple[list[Unit], Table, Sizes, int]:
    generator = random.Random(seed)
    units = make_units(6)
    costs, sizes = {}, {}
    for unit in units:
        smallest = generator.randint(1_000, 9_000)
        for scheme, factor in zip(SCHEMES, (4, 2, 1), strict=True):
            costs[unit.name, scheme] = generator.random() * 1e-3 / factor
            sizes[unit.name, scheme] = smallest * factor + generator.randint(0, 7)
    low = sum(sizes[unit.name, "w2"] for unit in units)
    high = sum(sizes[unit.name, "w8"] for unit in units)
    return units, costs, sizes, generator.randint(low, high)


def enumerate_all(units: list[Unit], costs: Table, sizes: Sizes, budget: int) -> list[Allocation]:
    """Every allocation within the budget, cheapest first."""
    names = [unit.name for unit in units]
    every = itertools.product(SCHEMES, repeat=len(units))
    priced_all = [priced(dict(zip(names, schemes, strict=True)), costs, sizes) for schemes in every]
    return sorted((a for a in priced_all if a.size_bytes <= budget), key=lambda a: a.cost)


def test_the_hand_worked_instance() -> None:
    units, costs, sizes = hand_worked()
    first, second = allocate(units, costs, sizes, 100, count=2)
    assert list(first.schemes.values()) == ["w2", "w4", "w4"]
    assert (first.cost, first.size_bytes) == (9.0, 100)
    assert list(second.schemes.values()) == ["w2", "w4", "w2"]
    assert (second.cost, second.size_bytes) == (13.0, 90)


@pytest.mark.parametrize("seed", range(8))
def test_the_best_five_are_those_of_enumeration(seed: int) -> None:
    units, costs, sizes, budget = random_instance(seed)
    expected = enumerate_all(units, costs, sizes, budget)[:5]
    found = allocate(units, costs, sizes, budget, count=5)
    assert [a.schemes for a in found] == [a.schemes for a in expected]
    assert [a.cost for a in found] == pytest.approx([a.cost for a in expected], rel=1e-12)


def test_the_budget_holds_to_the_byte() -> None:
    """Large sizes, where a solver's tolerance is worth thousands of bytes."""
    units = make_units(2)
    big = 4_000_000_000
    sizes = {(units[0].name, "w2"): big, (units[1].name, "w2"): big}
    sizes |= {(unit.name, "w4"): 2 * big for unit in units}
    costs = {choice: 1.0 if choice[1] == "w2" else 0.0 for choice in sizes}
    (exact,) = allocate(units, costs, sizes, 3 * big)
    (short,) = allocate(units, costs, sizes, 3 * big - 1)
    assert sorted(exact.schemes.values()) == ["w2", "w4"]
    assert list(short.schemes.values()) == ["w2", "w2"]


def test_fewer_come_back_where_there_are_no_more() -> None:
    units, costs, sizes = hand_worked()
    assert len(allocate(units, costs, sizes, 140, count=20)) == 8
    assert len(allocate(units, costs, sizes, 70, count=20)) == 1


def test_a_budget_below_the_smallest_size_names_it() -> None:
    units, costs, sizes = hand_worked()
    for attempt in (
        lambda: allocate(units, costs, sizes, 69),
        lambda: random_allocation(units, sizes, 69, seed=0),
        lambda: last_layers_allocation(units, sizes, 69),
    ):
        with pytest.raises(QuantizationError, match="smallest possible size with these schemes, 70 bytes"):
            attempt()


def test_a_cost_that_is_no_number_names_the_unit() -> None:
    units, costs, sizes = hand_worked()
    with pytest.raises(QuantizationError, match=r"`m\.1\.q` at w4 is nan"):
        allocate(units, costs | {("m.1.q", "w4"): float("nan")}, sizes, 100)


def test_linears_of_a_unit_share_their_scheme() -> None:
    units, costs, sizes = hand_worked()
    mixed = allocate(units, costs, sizes, 100)[0].mixed(units)
    assert mixed == {
        "m.0.q": "w2",
        "m.0.k": "w2",
        "m.1.q": "w4",
        "m.1.k": "w4",
        "m.2.q": "w4",
        "m.2.k": "w4",
    }


def test_the_last_layers_go_up_first() -> None:
    units, _, sizes = hand_worked()
    found = last_layers_allocation(units, sizes, 100)
    assert list(found.schemes.values()) == ["w2", "w4", "w4"]
    assert list(last_layers_allocation(units, sizes, 85).schemes.values()) == ["w2", "w2", "w4"]


@pytest.mark.parametrize("seed", range(4))
def test_random_allocations_are_seeded_and_use_the_budget_up(seed: int) -> None:
    units, costs, sizes, budget = random_instance(seed)
    found, again = (random_allocation(units, sizes, budget, seed) for _ in range(2))
    assert found.schemes == again.schemes
    assert found.size_bytes <= budget
    for unit in units:  # nothing more fits
        for scheme in SCHEMES:
            more = sizes[unit.name, scheme] - sizes[unit.name, found.schemes[unit.name]]
            assert more <= 0 or found.size_bytes + more > budget
    best = allocate(units, costs, sizes, budget)[0]
    assert priced(found.schemes, costs, sizes).cost >= best.cost
