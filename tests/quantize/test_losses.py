"""The contrastive losses: their minimum, their gradients, and S_top/S_diff the slow way."""

import numpy as np
import pytest
import torch
from torch import Tensor

from holdfast.quantize.learning.losses import contrastive_loss, kl_divergence, make_references
from holdfast.quantize.learning.losses import renormalised_logp as renormalised

POSITIONS, VOCABULARY = 5, 40


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    """(aligned, unaligned) logits [POSITIONS, VOCABULARY]."""
    generator = torch.Generator().manual_seed(0)
    aligned = 3.0 * torch.randn(POSITIONS, VOCABULARY, generator=generator)
    return aligned, aligned + torch.randn(POSITIONS, VOCABULARY, generator=generator)


def test_bounded_loss_is_zero_with_zero_gradient_at_the_aligned_model(
    logits: tuple[Tensor, Tensor],
) -> None:
    references = make_references(*logits, top_k=10)
    at_aligned = logits[0].clone().requires_grad_(True)
    loss = contrastive_loss(at_aligned, references, torch.ones(POSITIONS), 0.75, "bounded")
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert at_aligned.grad is not None
    assert float(at_aligned.grad.abs().max()) < 1e-7


def test_bounded_loss_is_never_negative(logits: tuple[Tensor, Tensor]) -> None:
    references = make_references(*logits, top_k=10)
    generator = torch.Generator().manual_seed(1)
    for spread in (0.01, 0.3, 3.0):
        other = logits[0] + spread * torch.randn(logits[0].shape, generator=generator)
        loss = contrastive_loss(other, references, torch.ones(POSITIONS), 2.0, "bounded")
        assert float(loss) > 0.0


def test_apc_gradient_at_the_aligned_model_is_the_papers(logits: tuple[Tensor, Tensor]) -> None:
    alpha = 0.75
    references = make_references(*logits, top_k=VOCABULARY)  # the full vocabulary
    at_aligned = logits[0].clone().requires_grad_(True)
    contrastive_loss(at_aligned, references, torch.ones(POSITIONS), alpha, "apc").backward()
    p_ft, p_pt = logits[0].softmax(-1), logits[1].softmax(-1)
    assert at_aligned.grad is not None
    # d KL(p_PT || p_Q) / d logits = p_Q - p_PT, entering with -alpha; mean over positions
    torch.testing.assert_close(at_aligned.grad * POSITIONS, -alpha * (p_ft - p_pt), atol=1e-6, rtol=0.0)


def test_push_pulls_a_model_that_slid_back_to_the_base(logits: tuple[Tensor, Tensor]) -> None:
    references = make_references(*logits, top_k=10)
    slid = (0.5 * logits[0] + 0.5 * logits[1]).requires_grad_(True)
    weights = torch.ones(POSITIONS)
    pull = contrastive_loss(slid, references, weights, 0.0, "bounded")
    both = contrastive_loss(slid, references, weights, 1.0, "bounded")
    assert float(both.detach()) > float(pull.detach())


@pytest.mark.parametrize("mode", ["bounded", "apc"])
def test_alpha_zero_is_plain_kl(mode: str, logits: tuple[Tensor, Tensor]) -> None:
    references = make_references(*logits, top_k=10)
    weights = torch.ones(POSITIONS)
    plain = contrastive_loss(logits[1], references, weights, 0.5, "kl")
    found = contrastive_loss(logits[1], references, weights, 0.0, mode)  # type: ignore[arg-type]
    assert float(found) == float(plain)


def test_sets_and_probabilities_against_naive_numpy(logits: tuple[Tensor, Tensor]) -> None:
    k = 7
    references = make_references(*logits, top_k=k)
    for position in range(POSITIONS):
        aligned, negative = (tensor[position].double().numpy() for tensor in logits)
        p_ft, p_pt = (np.exp(x) / np.exp(x).sum() for x in (aligned, negative))
        top = sorted(range(VOCABULARY), key=lambda token: -p_ft[token])[:k]
        diff = sorted(range(VOCABULARY), key=lambda token: -abs(p_ft[token] - p_pt[token]))[:k]
        assert set(references.top_ids[position].tolist()) == set(top)
        assert set(references.diff_ids[position].tolist()) == set(diff)
        on_top = {token: p_ft[token] / sum(p_ft[t] for t in top) for token in top}
        pairs = zip(references.top_ids[position], references.top_logp[position], strict=True)
        for token, logp in pairs:
            assert float(logp.exp()) == pytest.approx(on_top[int(token)], rel=1e-4)
        ours = {t: p_pt[t] / sum(p_pt[u] for u in diff) for t in diff}
        theirs = {t: p_ft[t] / sum(p_ft[u] for u in diff) for t in diff}
        floor = sum(ours[t] * np.log(ours[t] / theirs[t]) for t in diff)
        assert float(references.diff_floor[position]) == pytest.approx(floor, abs=1e-4)


def test_weights_choose_the_positions(logits: tuple[Tensor, Tensor]) -> None:
    references = make_references(*logits, top_k=10)
    weights = torch.tensor([0.0, 0.0, 2.0, 0.0, 0.0])
    found = contrastive_loss(logits[1], references, weights, 0.0, "kl")
    one = kl_divergence(references.top_logp, renormalised(logits[1], references.top_ids))[2]
    assert float(found) == pytest.approx(float(one), rel=1e-6)
