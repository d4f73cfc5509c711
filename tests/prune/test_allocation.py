"""Sparsity by layer: brute force on small cases, the total never above what was asked."""

import itertools
import math

import numpy as np
import pytest
import torch

from holdfast.errors import PruneError
from holdfast.prune.allocation import allocate, first_order_cost, sparsity_grid


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
    assert found["a"] == pytest.approx(0.7)
    assert found["b"] == pytest.approx(0.3)


@pytest.mark.parametrize(("asked", "ends"), [(0.5, (0.3, 0.7)), (0.1, (0.0, 0.3)), (0.98, (0.78, 0.98))])
def test_the_grid_stays_in_range_and_has_the_asked(asked: float, ends: tuple[float, float]) -> None:
    grid = sparsity_grid(asked)
    assert (grid[0], grid[-1]) == pytest.approx(ends)
    assert asked in grid
    assert grid == sorted(grid)


def test_first_order_cost_by_hand() -> None:
    scores = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    assert first_order_cost(scores, torch.tensor([[False, True], [True, False]])) == 9.0


def test_a_cost_that_is_not_a_number() -> None:
    with pytest.raises(PruneError, match=r"^The loss by pruning `a` to 50% is nan, not a number: "):
        allocate({("a", 0.5): math.nan}, {("a", 0.5): 1}, least=1, most=1)


def test_bounds_that_nothing_meets() -> None:
    with pytest.raises(PruneError, match="No choice of sparsities drops between 5 and 6 weights"):
        allocate({("a", 0.5): 1.0}, {("a", 0.5): 1}, least=5, most=6)
