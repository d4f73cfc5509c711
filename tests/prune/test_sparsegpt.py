"""SparseGPT: a hand-worked example, an independent NumPy version, less output error than Wanda."""

import numpy as np
import pytest
import torch

from holdfast.errors import PruneError
from holdfast.prune import sparsegpt as module
from holdfast.prune.masks import Pattern, keep_highest, keep_pattern, pruned_count
from holdfast.prune.scores.wanda import wanda_scores
from holdfast.prune.sparsegpt import output_error, sparsegpt, sparsegpt_


def numpy_sparsegpt(
    weight: np.ndarray, hessian: np.ndarray, frac: float, block: int, pattern: Pattern | None
) -> np.ndarray:
    """Optimal brain surgeon from left to right, the remaining Hessian inverted anew for each column."""
    work, columns = weight.astype(np.float64), weight.shape[1]
    damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(columns)
    inverses = [np.linalg.inv(damped[c:, c:]) for c in range(columns)]
    keep = np.ones(weight.shape, dtype=bool)
    for column in range(columns):
        if column % block == 0:
            part = range(column, min(column + block, columns))
            scores = np.stack([work[:, c] ** 2 / inverses[c][0, 0] for c in part], axis=1)
            if pattern:
                keep[:, part] = keep_pattern(torch.from_numpy(scores).float(), pattern).numpy()
            else:
                ends = [pruned_count(len(work) * c, frac) for c in (part.start, part.stop)]
                order = np.argsort(scores.ravel(), kind="stable")[: ends[1] - ends[0]]
                mask = np.ones(scores.size, dtype=bool)
                mask[order] = False
                keep[:, part] = mask.reshape(scores.shape)
        error = np.where(keep[:, column], 0.0, work[:, column]) / inverses[column][0, 0]
        work[:, column:] -= np.outer(error, inverses[column][0])
        work[~keep[:, column], column] = 0.0
    return work


def correlated(seed: int, columns: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [10, columns] and X X' of inputs that share a few directions."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(6, columns, generator=generator)
    inputs = torch.randn(300, 6, generator=generator) @ mixing
    inputs += 0.3 * torch.randn(300, columns, generator=generator)
    return torch.randn(10, columns, generator=generator), inputs.T @ inputs


def test_by_hand() -> None:
    """H = (2 1; 1 2): W = (1 1) scores (1.5 2), so the first goes, and 1.5 is what the second becomes.

    (d H d' with d = (-1, x) is 2 - 2x + 2x^2, least at x = 1/2.)
    """
    hessian = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    weight, keep = sparsegpt(torch.ones(1, 2), hessian, 0.5, damp_frac=0.0)
    assert keep.tolist() == [[False, True]]
    torch.testing.assert_close(weight, torch.tensor([[0.0, 1.5]]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("columns", [24, 21])
@pytest.mark.parametrize("block", [128, 8])
@pytest.mark.parametrize("frac", [0.3, 0.5])
def test_against_numpy(monkeypatch: pytest.MonkeyPatch, frac: float, block: int, columns: int) -> None:
    monkeypatch.setattr(module, "MASK_COLUMNS", block)
    weight, hessian = correlated(0, columns)
    found, keep = sparsegpt(weight, hessian, frac)
    expected = numpy_sparsegpt(weight.numpy(), hessian.numpy(), frac, block, None)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-4)
    assert (~keep).sum() == (found == 0).sum() == pruned_count(weight.numel(), frac)


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(4, 8), Pattern(1, 3)])
def test_patterns_against_numpy(pattern: Pattern) -> None:
    weight, hessian = correlated(1)
    found, keep = sparsegpt(weight, hessian, pattern.sparsity_frac, pattern=pattern)
    expected = numpy_sparsegpt(weight.numpy(), hessian.numpy(), 0.0, pattern.group, pattern)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-4)
    assert (keep.reshape(-1, pattern.group).sum(dim=1) == pattern.kept).all()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("pattern", [None, Pattern(2, 4)])
def test_less_output_error_than_wanda_on_correlated_inputs(seed: int, pattern: Pattern | None) -> None:
    weight, hessian = correlated(seed)
    scores = wanda_scores(weight, hessian.diagonal().sqrt())
    keep = keep_highest(scores, 0.5) if pattern is None else keep_pattern(scores, pattern)
    wanda = output_error(weight * keep - weight, hessian)
    updated, _ = sparsegpt(weight, hessian, 0.5, pattern=pattern)
    assert output_error(updated - weight, hessian) < 0.5 * wanda


def test_without_correlation_nothing_is_updated() -> None:
    """A diagonal Hessian is Wanda's assumption: weights that stay keep their value."""
    weight, _ = correlated(2)
    updated, keep = sparsegpt(weight, torch.diag(torch.arange(1.0, 25.0)), 0.5)
    torch.testing.assert_close(updated, weight * keep, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pattern", [None, Pattern(2, 4)])
def test_protected_weights_are_dropped_last(pattern: Pattern | None) -> None:
    weight, hessian = correlated(3)
    weight[:, ::4] = 0.001  # would go first
    protected = torch.zeros_like(weight, dtype=torch.bool)
    protected[:, ::4] = True
    assert not sparsegpt(weight, hessian, 0.5)[1][:, 0].all()
    _, keep = sparsegpt(weight, hessian, 0.5, pattern=pattern, protected=protected)
    assert keep[protected].all()
    assert (~keep).sum() == weight.numel() // 2


@pytest.mark.parametrize("pattern", [None, Pattern(2, 4)])
def test_weights_that_are_zero_stay_zero(pattern: Pattern | None) -> None:
    """Though the errors of others reach them; they count as dropped."""
    weight, hessian = correlated(4)
    zero = torch.zeros_like(weight, dtype=torch.bool)
    zero[:, 1::4] = True
    weight[zero] = 0.0
    updated, keep = sparsegpt(weight, hessian, 0.5, pattern=pattern)
    assert (updated[zero] == 0).all()
    assert (~keep).sum() == (updated == 0).sum() == weight.numel() // 2


@pytest.mark.parametrize("pattern", [None, Pattern(2, 4)])
def test_in_place_is_the_same(pattern: Pattern | None) -> None:
    weight, hessian = correlated(5)
    before = weight.clone(), hessian.clone()
    expected = sparsegpt(weight, hessian, 0.5, pattern=pattern)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])
    keep = sparsegpt_(weight, hessian.double(), 0.5, pattern=pattern)
    assert torch.equal(weight, expected[0]) and torch.equal(keep, expected[1])


def test_output_error_is_that_of_the_inputs() -> None:
    generator = torch.Generator().manual_seed(6)
    inputs, change = (torch.randn(*shape, generator=generator) for shape in ((50, 6), (3, 6)))
    expected = float((inputs @ change.T).square().sum())
    assert output_error(change, inputs.T @ inputs) == pytest.approx(expected, rel=1e-5)


def test_a_hessian_that_cannot_be_inverted() -> None:
    with pytest.raises(PruneError) as caught:
        sparsegpt(torch.ones(1, 2), torch.tensor([[1.0, 1.0], [1.0, 1.0]]), 0.5, damp_frac=0.0)
    assert str(caught.value) == (
        "SparseGPT's Hessian cannot be inverted: calibrate with more prompts, or use `wanda`."
    )
