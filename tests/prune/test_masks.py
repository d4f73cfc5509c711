"""Masks: hand-worked examples, an independent NumPy version, exact counts."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from holdfast.prune import masks
from holdfast.prune.masks import Pattern, keep_highest, keep_pattern, parse_pattern, pruned_count
from holdfast.prune.scores.magnitude import magnitude_scores
from holdfast.prune.scores.wanda import wanda_scores


def numpy_keep(scores: np.ndarray, dropped: int, protected: np.ndarray) -> np.ndarray:
    """Written from the definition, one row at a time: by (protected, score, column)."""
    keep = np.ones(scores.shape, dtype=bool)
    for row in range(scores.shape[0]):
        ranked = sorted(range(scores.shape[1]), key=lambda c: (protected[row, c], scores[row, c], c))
        keep[row, ranked[:dropped]] = False
    return keep


def by_layer(scores: Tensor, sparsity_frac: float) -> Tensor:
    return keep_highest(scores.reshape(1, -1), sparsity_frac).reshape(scores.shape)


def test_magnitude_by_hand() -> None:
    """Of |W| = 1 2 3 / 4 5 6 the three smallest go, all of them in the first row."""
    weight = torch.tensor([[1.0, -2.0, 3.0], [-4.0, 5.0, -6.0]])
    assert magnitude_scores(weight).tolist() == [[1, 2, 3], [4, 5, 6]]
    assert by_layer(magnitude_scores(weight), 0.5).tolist() == [[False, False, False], [True, True, True]]


def test_wanda_by_hand() -> None:
    """Norms 9, 1, 4 turn |W| = 1 2 3 / 4 5 6 into 9 2 12 / 36 5 24: the middle column goes."""
    weight = torch.tensor([[1.0, -2.0, 3.0], [-4.0, 5.0, -6.0]])
    scores = wanda_scores(weight, torch.tensor([9.0, 1.0, 4.0]))
    assert scores.tolist() == [[9, 2, 12], [36, 5, 24]]
    assert keep_highest(scores, 0.34).tolist() == [[True, False, True], [True, False, True]]


def test_wanda_keeps_a_small_weight_on_a_loud_channel() -> None:
    """Where the two orders differ: magnitude drops 0.1, Wanda drops 1.0 since its input is silent."""
    weight = torch.tensor([[0.1, 1.0]])
    norms = torch.tensor([100.0, 0.5])
    assert by_layer(magnitude_scores(weight), 0.5).tolist() == [[False, True]]
    assert keep_highest(wanda_scores(weight, norms), 0.5).tolist() == [[True, False]]


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 9),
    sparsity_frac=st.floats(0.0, 0.99),
    protected_frac=st.floats(0.0, 1.0),
    levels=st.integers(1, 50),
    seed=st.integers(0, 10_000),
)
def test_against_numpy_with_exact_counts(
    rows: int, columns: int, sparsity_frac: float, protected_frac: float, levels: int, seed: int
) -> None:
    """Few levels make ties; many protected weights are more than may stay."""
    generator = np.random.default_rng(seed)
    scores = (generator.integers(levels, size=(rows, columns)) / 7).astype(np.float32)
    protected = generator.random((rows, columns)) < protected_frac
    found = keep_highest(torch.from_numpy(scores), sparsity_frac, torch.from_numpy(protected)).numpy()
    count = pruned_count(columns, sparsity_frac)
    np.testing.assert_array_equal(found, numpy_keep(scores, count, protected))
    assert ((~found).sum(axis=1) == count).all()
    plain = keep_highest(torch.from_numpy(scores), sparsity_frac).numpy()
    np.testing.assert_array_equal(plain, numpy_keep(scores, count, np.zeros_like(protected)))


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(23, 8, generator=generator)
    protected = torch.rand(23, 8, generator=generator) < 0.3
    whole = keep_highest(scores, 0.5, protected)
    monkeypatch.setattr(masks, "CHUNK_WEIGHTS", 24)
    assert torch.equal(keep_highest(scores, 0.5, protected), whole)


def test_ties_are_cut_at_the_exact_count() -> None:
    assert by_layer(torch.ones(3, 5), 0.5).sum() == 15 - 7
    assert keep_highest(torch.ones(3, 5), 0.5).sum(dim=1).tolist() == [3, 3, 3]
    assert keep_highest(torch.zeros(1, 4), 0.5).tolist() == [[False, False, True, True]]


@pytest.mark.parametrize(
    ("size", "sparsity_frac", "count"),
    [(10, 0.5, 5), (7, 0.5, 3), (1, 0.99, 0), (100, 0.29, 29), (30, 0.1, 3), (33, 2 / 3, 22), (9, 0.0, 0)],
)
def test_counts_round_down(size: int, sparsity_frac: float, count: int) -> None:
    assert pruned_count(size, sparsity_frac) == count


# --- N:M --------------------------------------------------------------------------------------


def test_two_of_four_by_hand() -> None:
    """4 1 3 2 keeps 4 and 3; 1 1 1 1 keeps the two to the right, as ties go from the left."""
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0]])
    assert keep_pattern(scores, Pattern(2, 4)).int().tolist() == [[1, 0, 1, 0, 0, 0, 1, 1]]


def test_protected_weights_take_their_places_first() -> None:
    """The lowest score is protected and stays, beside the highest; the second highest has to go."""
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0]])
    protected = torch.tensor([[False, True, False, False]])
    assert keep_pattern(scores, Pattern(2, 4), protected).int().tolist() == [[1, 1, 0, 0]]


def test_more_protected_than_places() -> None:
    """Three of four are protected: the two of them with the highest scores stay, and never a third."""
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0]])
    protected = torch.tensor([[False, True, True, True]])
    assert keep_pattern(scores, Pattern(2, 4), protected).int().tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize("text", ["2:4", "4:8", "1:4", "3:5"])
def test_every_group_keeps_exactly_n(text: str) -> None:
    pattern = parse_pattern(text)
    assert pattern is not None
    generator = np.random.default_rng(1)
    scores = generator.random((6, 40), dtype=np.float32)
    protected = generator.random((6, 40)) < 0.4
    keep = keep_pattern(torch.from_numpy(scores), pattern, torch.from_numpy(protected)).numpy()
    groups = [array.reshape(-1, pattern.group) for array in (keep, scores, protected)]
    assert (groups[0].sum(axis=1) == pattern.kept).all()
    expected = numpy_keep(groups[1], pattern.group - pattern.kept, groups[2])
    np.testing.assert_array_equal(groups[0], expected)
    assert pattern.sparsity_frac == pytest.approx((~keep).mean())


def test_unstructured_is_no_pattern() -> None:
    assert parse_pattern("unstructured") is None
