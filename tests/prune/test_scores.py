"""Scores by gradients: hand-worked examples, NumPy versions, orders that they must get right."""

import math

import numpy as np
import pytest
import torch

from holdfast.prune.masks import keep_highest
from holdfast.prune.scores.combined import combined_scores, normalised
from holdfast.prune.scores.set_difference import top
from holdfast.prune.scores.ships import head_channels, ships_scores, strongest_heads
from holdfast.prune.scores.snip import (
    add_gradients,
    answer_losses,
    contrastive_losses,
    snip_scores,
)
from holdfast.prune.scores.wanda import wanda_scores

# --- SNIP -------------------------------------------------------------------------------------


def test_snip_by_hand() -> None:
    """Gradients g x' of two sequences: (3 0) and (-1 -2); their |.| average to (2 1), times |W| = (2 1)."""
    total = torch.zeros(1, 2)
    values = torch.tensor([[[1.0, 0.0]], [[1.0, 2.0]]])
    add_gradients(total, values, torch.tensor([[[3.0]], [[-1.0]]]))
    assert snip_scores(torch.tensor([[2.0, -1.0]]), total / 2).tolist() == [[4.0, 1.0]]


def test_gradients_that_cancel_between_sequences_still_count() -> None:
    """The mean of the signed gradients of column 0 is 0; removing that weight hurts every sequence."""
    total = torch.zeros(1, 2)
    values = torch.tensor([[[1.0, 0.1]], [[1.0, 0.1]]])
    add_gradients(total, values, torch.tensor([[[1.0]], [[-1.0]]]))
    scores = snip_scores(torch.ones(1, 2), total / 2)
    assert scores[0, 0] > scores[0, 1]


def test_snip_against_numpy() -> None:
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(5, 4)).astype(np.float32)
    values = generator.normal(size=(3, 6, 4)).astype(np.float32)
    gradients = generator.normal(size=(3, 6, 5)).astype(np.float32)
    total = torch.zeros(5, 4)
    for row in range(3):  # batches of one sequence each add up as one batch of three does
        add_gradients(
            total, torch.from_numpy(values[row : row + 1]), torch.from_numpy(gradients[row : row + 1])
        )
    expected = np.zeros((5, 4))
    for row in range(3):
        expected += np.abs(sum(np.outer(g, v) for g, v in zip(gradients[row], values[row], strict=True)))
    found = snip_scores(torch.from_numpy(weight), total / 3)
    np.testing.assert_allclose(found.numpy(), np.abs(weight) * expected / 3, rtol=1e-5)


def test_answer_losses_by_hand() -> None:
    """Two equal logits give log 2 at each counted position, whatever the others hold."""
    logits = torch.tensor([[[9.0, 0.0], [0.0, 0.0], [1.0, 1.0]]])
    losses = answer_losses(logits, torch.tensor([[1, 0, 1]]), torch.tensor([[0.0, 1.0, 1.0]]))
    assert losses.tolist() == pytest.approx([math.log(2.0)])


def test_contrastive_losses_have_a_gradient_at_the_aligned_model() -> None:
    """It is p - p_PT for a mean over one position, where the bounded loss has none."""
    logits = torch.tensor([[[1.0, 0.0, -1.0]]], requires_grad=True)
    unaligned = torch.tensor([[[0.0, 0.0, 2.0]]])
    ids = torch.arange(3).reshape(1, 1, 3)
    contrastive_losses(logits, ids, unaligned.log_softmax(dim=-1), torch.ones(1, 1)).sum().backward()
    expected = logits.detach().softmax(dim=-1) - unaligned.softmax(dim=-1)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, expected, rtol=1e-5, atol=1e-6)


# --- combined ---------------------------------------------------------------------------------


def test_combined_by_hand() -> None:
    """Over their means 2 and 20, (1 3) is (0.5 1.5) and (30 10) is (1.5 0.5); their sum, times 2 again."""
    utility, safety = torch.tensor([[1.0, 3.0]]), torch.tensor([[30.0, 10.0]])
    assert combined_scores(utility, safety, 1.0).tolist() == [[4.0, 4.0]]
    assert combined_scores(utility, safety, 2.0).tolist() == [[7.0, 5.0]]


def test_combined_against_numpy_and_its_ends() -> None:
    generator = np.random.default_rng(2)
    utility, safety = generator.random((2, 6, 5), dtype=np.float32)
    found = combined_scores(torch.from_numpy(utility), torch.from_numpy(1e-6 * safety), 0.7).numpy()
    expected = utility / utility.mean() + 0.7 * safety / safety.mean()
    np.testing.assert_allclose(found / utility.mean(), expected, rtol=1e-5)
    only_utility = combined_scores(torch.from_numpy(utility), torch.from_numpy(safety), 0.0)
    assert only_utility.flatten().argsort().tolist() == utility.ravel().argsort().tolist()


def test_a_weight_that_safety_alone_needs_rises() -> None:
    """Last by utility, first by the sum, however small the safety scores are in nats."""
    utility = torch.tensor([[0.1, 1.0, 1.1, 1.2]])
    safety = torch.tensor([[9e-6, 1e-6, 1e-6, 1e-6]])
    assert combined_scores(utility, safety, 0.0).argmin() == 0
    assert combined_scores(utility, safety, 2.0).argmax() == 0


def test_a_layer_without_any_score_stays_finite() -> None:
    assert normalised(torch.zeros(2, 2)).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert combined_scores(torch.zeros(1, 2), torch.tensor([[1.0, 2.0]]), 1.0).tolist() == [[1.0, 2.0]]


# --- set difference ---------------------------------------------------------------------------


def test_set_difference_by_hand() -> None:
    """Top half of safety: columns 0 and 1. Utility's top quarter is column 0: column 1 is protected."""
    safety, utility = torch.tensor([[4.0, 3.0, 2.0, 1.0]]), torch.tensor([[9.0, 1.0, 2.0, 3.0]])
    assert (top(safety, 0.5) & ~top(utility, 0.25)).tolist() == [[False, True, False, False]]


def test_set_difference_against_numpy() -> None:
    generator = np.random.default_rng(3)
    safety, utility = generator.random((2, 8, 25), dtype=np.float32)
    found = (top(torch.from_numpy(safety), 0.1) & ~top(torch.from_numpy(utility), 0.2)).numpy()
    highest = [set(np.argsort(-s.ravel())[:n].tolist()) for s, n in ((safety, 20), (utility, 40))]
    assert set(np.flatnonzero(found).tolist()) == highest[0] - highest[1]


def test_planted_safety_weights_survive_where_wanda_drops_them() -> None:
    """Tiny weights on silent channels, with gradients on harmful prompts alone."""
    generator = torch.Generator().manual_seed(4)
    weight, norms = torch.randn(16, 32, generator=generator), torch.ones(32)
    planted = torch.zeros(16, 32, dtype=torch.bool)
    planted[torch.arange(16), torch.arange(16)] = True
    weight[planted] = 0.01
    utility = snip_scores(weight, torch.rand(16, 32, generator=generator))
    safety = snip_scores(weight, torch.where(planted, 1000.0, torch.rand(16, 32, generator=generator)))
    wanda = wanda_scores(weight, norms)
    protected = top(safety, 0.05) & ~top(utility, 0.1)
    assert not keep_highest(wanda, 0.5)[planted].any()
    assert keep_highest(wanda, 0.5, protected)[planted].all()
    assert (keep_highest(wanda, 0.5, protected).sum(dim=1) == 16).all()


def test_a_score_of_zero_is_never_at_the_top() -> None:
    assert top(torch.tensor([[0.0, 0.0, 0.0, 1.0]]), 0.5).tolist() == [[False, False, False, True]]


# --- Ships ------------------------------------------------------------------------------------


def test_ships_by_hand() -> None:
    """KL((1/2 1/2) || (1/4 3/4)) = 1/2 log 2 + 1/2 log 2/3 = 1/2 log 4/3; an idle head has 0."""
    logits = torch.zeros(2, 2)
    without = torch.tensor([[1.0, 3.0], [5.0, 5.0]]).log()
    assert ships_scores(logits, without).tolist() == pytest.approx([0.5 * math.log(4 / 3), 0.0], abs=1e-6)


def test_ships_against_numpy() -> None:
    generator = np.random.default_rng(5)
    first, second = generator.normal(size=(2, 3, 7))
    p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (first, second))
    found = ships_scores(torch.from_numpy(first), torch.from_numpy(second)).numpy()
    np.testing.assert_allclose(found, (p * np.log(p / q)).sum(axis=1), rtol=1e-9)


def test_strongest_heads_and_their_channels() -> None:
    scores = {(0, 0): 0.1, (0, 1): 0.5, (1, 0): 0.5, (1, 1): 0.0}
    assert strongest_heads(scores, 3) == [(0, 1), (1, 0), (0, 0)]
    assert head_channels(2, 4, 64) == slice(32, 48)
