"""Masks: hand-worked examples, an independent NumPy version, exact counts."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.prune.magnitude import magnitude_mask
from holdfast.prune.masks import pruned_count
from holdfast.prune.wanda import wanda_mask


def numpy_magnitude(weight: np.ndarray, sparsity_frac: float) -> np.ndarray:
    """Written from the definition, one weight at a time."""
    count = pruned_count(weight.size, sparsity_frac)
    ranked = sorted(np.ndindex(weight.shape), key=lambda at: abs(float(weight[at])))
    keep = np.ones(weight.shape, dtype=bool)
    for at in ranked[:count]:
        keep[at] = False
    return keep


def numpy_wanda(weight: np.ndarray, norms: np.ndarray, sparsity_frac: float) -> np.ndarray:
    keep = np.ones(weight.shape, dtype=bool)
    for row in range(weight.shape[0]):
        scores = [abs(weight[row, column]) * norms[column] for column in range(weight.shape[1])]
        ranked = sorted(range(len(scores)), key=scores.__getitem__)
        keep[row, ranked[: pruned_count(len(scores), sparsity_frac)]] = False
    return keep


def test_magnitude_by_hand() -> None:
    """Of |W| = 1 2 3 / 4 5 6 the three smallest go, all of them in the first row."""
    weight = torch.tensor([[1.0, -2.0, 3.0], [-4.0, 5.0, -6.0]])
    assert magnitude_mask(weight, 0.5).tolist() == [[False, False, False], [True, True, True]]


def test_wanda_by_hand() -> None:
    """Norms 9, 1, 4 turn |W| = 1 2 3 / 4 5 6 into 9 2 12 / 36 5 24: the middle column goes."""
    weight = torch.tensor([[1.0, -2.0, 3.0], [-4.0, 5.0, -6.0]])
    norms = torch.tensor([9.0, 1.0, 4.0])
    assert wanda_mask(weight, norms, 0.34).tolist() == [[True, False, True], [True, False, True]]


def test_wanda_keeps_a_small_weight_on_a_loud_channel() -> None:
    """Where the two orders differ: magnitude drops 0.1, Wanda drops 1.0 since its input is silent."""
    weight = torch.tensor([[0.1, 1.0]])
    norms = torch.tensor([100.0, 0.5])
    assert magnitude_mask(weight, 0.5).tolist() == [[False, True]]
    assert wanda_mask(weight, norms, 0.5).tolist() == [[True, False]]


def test_equal_inputs_give_magnitude_within_each_row() -> None:
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    by_row = torch.cat([magnitude_mask(row[None], 0.5) for row in weight])
    assert torch.equal(wanda_mask(weight, torch.full((8,), 3.0), 0.5), by_row)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 9),
    sparsity_frac=st.floats(0.0, 0.99),
    seed=st.integers(0, 10_000),
)
def test_against_numpy_with_exact_counts(rows: int, columns: int, sparsity_frac: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    weight = generator.normal(size=(rows, columns)).astype(np.float32)
    norms = generator.uniform(0.0, 4.0, size=columns).astype(np.float32)
    magnitude = magnitude_mask(torch.from_numpy(weight), sparsity_frac).numpy()
    wanda = wanda_mask(torch.from_numpy(weight), torch.from_numpy(norms), sparsity_frac).numpy()
    np.testing.assert_array_equal(magnitude, numpy_magnitude(weight, sparsity_frac))
    np.testing.assert_array_equal(wanda, numpy_wanda(weight, norms, sparsity_frac))
    assert (~magnitude).sum() == pruned_count(weight.size, sparsity_frac)
    assert ((~wanda).sum(axis=1) == pruned_count(columns, sparsity_frac)).all()


def test_ties_are_cut_at_the_exact_count() -> None:
    assert magnitude_mask(torch.ones(3, 5), 0.5).sum() == 15 - 7
    assert wanda_mask(torch.ones(3, 5), torch.ones(5), 0.5).sum(dim=1).tolist() == [3, 3, 3]
    assert wanda_mask(torch.zeros(1, 4), torch.ones(4), 0.5).tolist() == [[False, False, True, True]]


@pytest.mark.parametrize(
    ("size", "sparsity_frac", "count"),
    [(10, 0.5, 5), (7, 0.5, 3), (1, 0.99, 0), (100, 0.29, 29), (30, 0.1, 3), (33, 2 / 3, 22), (9, 0.0, 0)],
)
def test_counts_round_down(size: int, sparsity_frac: float, count: int) -> None:
    assert pruned_count(size, sparsity_frac) == count
