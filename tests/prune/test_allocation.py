"""Sparsity by layer: brute force on small cases, the total never above what was asked."""

import itertools
import math

import numpy as np
import pytest

from holdfast.errors import PruneError
from holdfast.prune.allocation import allocate, anchors, interpolated, sparsity_grid, topped_up


def test_by_hand() -> None:
    """Two layers of 100: 0.3 + 0.7 costs 5 + 1 = 6, 0.5 twice 3 + 2 = 5, 0.7 + 0.3 costs 9."""
    costs = {("a", 0.3): 0, ("a", 0.5): 3, ("a", 0.7): 9, ("b", 0.3): 0, ("b", 0.5): 2, ("b", 0.7): 6}
    zeros = {choice: round(100 * choice[1]) for choice in costs}
    assert allocate(costs, zeros, least=100, most=100) == {"a": 0.5, "b": 0.5}
    assert allocate(costs | {("b", 0.7): 4.5}, zeros, least=100, most=100) == {"a": 0.3, "b": 0.7}


@pytest.mark.parametrize("seed", range(8))
def test_against_brute_force(seed: int) -> None:
    generator = np.random.default_rng(seed)
    grid, sizes = sparsity_grid(0.5)[::2], generator.integers(50, 200, size=4)
    paths = [f"layer{index}" for index in range(4)]
    zeros = {(p, s): int(n * s) for p, n in zip(paths, sizes, strict=True) for s in grid}
    costs = {choice: float(generator.random() * count) for choice, count in zeros.items()}
    least = sum(zeros[path, 0.5] for path in paths)
    most = int(sizes.sum() * 0.5)
    found = allocate(costs, zeros, least=least, most=most)
    possible = [
        sum(costs[choice] for choice in zip(paths, fracs, strict=True))
        for fracs in itertools.product(grid, repeat=4)
        if least <= sum(zeros[choice] for choice in zip(paths, fracs, strict=True)) <= most
    ]
    assert sum(costs[choice] for choice in found.items()) == pytest.approx(min(possible))
    assert sum(zeros[choice] for choice in found.items()) <= most


def test_the_sensitive_layer_stays_denser() -> None:
    grid = sparsity_grid(0.5)
    costs = {(path, frac): weight * frac**2 for path, weight in (("a", 1.0), ("b", 100.0)) for frac in grid}
    zeros = {choice: round(1_000_000 * choice[1]) for choice in costs}
    found = allocate(costs, zeros, least=1_000_000, most=1_000_000)
    assert found["a"] == pytest.approx(0.95)
    assert found["b"] == pytest.approx(0.05)


@pytest.mark.parametrize("asked", [0.5, 0.07, 0.98])
def test_the_grid_has_no_pruning_the_asked_and_nearly_all(asked: float) -> None:
    grid = sparsity_grid(asked)
    assert grid == sorted(set(grid))
    assert {0.0, 0.05, asked, 0.95} <= set(grid)
    assert set(anchors(asked)) <= set(grid)
    assert anchors(asked)[0] > 0.0


def test_costs_between_anchors_by_hand() -> None:
    """From 1 at 0.25 to 8 at 0.5: the third power. From there to 8 * 1.5^2 at 0.75: the second."""
    costs = {0.25: 1.0, 0.5: 8.0, 0.75: 18.0}
    assert interpolated(costs, 0.4) == pytest.approx(1.6**3)
    assert interpolated(costs, 0.6) == pytest.approx(8 * 1.2**2)
    assert [interpolated(costs, frac) for frac in (0.0, 0.25, 0.75)] == pytest.approx([0.0, 1.0, 18.0])
    assert interpolated({0.25: 0.0, 0.5: 0.0}, 0.3) == pytest.approx(0.0)


def test_what_is_missing_is_spread_by_hand() -> None:
    """300 weights to 0.5 are 150; 0.4 of 100 and 0.5 of 200 are 140."""
    assert topped_up({"a": 0.4, "b": 0.5}, {"a": 100, "b": 200}, 0.5) == pytest.approx(
        {"a": 0.4 + 1 / 30, "b": 0.5 + 1 / 30}
    )


def test_a_cost_that_is_not_a_number() -> None:
    with pytest.raises(PruneError, match=r"^The loss by pruning `a` to 50% is nan, not a number: "):
        allocate({("a", 0.5): math.nan}, {("a", 0.5): 1}, least=1, most=1)


def test_bounds_that_nothing_meets() -> None:
    with pytest.raises(PruneError, match="No choice of sparsities drops between 5 and 6 weights"):
        allocate({("a", 0.5): 1.0}, {("a", 0.5): 1}, least=5, most=6)
