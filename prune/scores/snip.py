"""SNIP on answers: weights by what removing them changes of the loss, to first order.

Lee et al. 2019 (arXiv 1810.02340), with the absolute value taken on every sequence before the mean, and the
loss on the answer's tokens alone, as in Wei et al. 2024, arXiv 2402.05162, section 3.1:

    S_ij = E_{x ~ D} |W_ij * dL(x)/dW_ij|  =  |W_ij| * E_{x ~ D} |dL(x)/dW_ij|
    L(x) = -mean over the answer's tokens of log p(token)

On harmful prompts it is a score of safety, on harmless ones of utility. The answers are the aligned model's
own. The bounded contrastive loss cannot serve here: its gradient at the aligned model is zero everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from holdfast.quantize.learning.losses import kl_divergence, renormalised_logp

CHUNK_WEIGHTS = 1 << 21
"""Weights of a layer whose gradients are in memory at a time."""


def answer_losses(logits: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    """Mean negative log-likelihood of each sequence's answer in nats, float32 [batch].

    Arguments:
        logits: float32 [batch, positions, V], each position predicting its target.
        targets: int64 [batch, positions].
        counted: float32 [batch, positions], 1 at the answer's tokens and 0 elsewhere; no row is all 0.
    """
    logp = logits.log_softmax(dim=-1).gather(-1, targets[..., None])[..., 0]
    return -(logp * counted).sum(dim=1) / counted.sum(dim=1)


def contrastive_losses(logits: Tensor, diff_ids: Tensor, diff_logp: Tensor, counted: Tensor) -> Tensor:
    """Mean distance of each sequence from the unaligned model in nats, float32 [batch].

    The push term of the contrastive calibration loss (arXiv 2511.07842), KL(p_PT || p) on S_diff, without
    its bound: at the aligned model its gradient is p_FT - p_PT, so that a weight counts by how far removing
    it moves the model along the line between the two.

    Arguments:
        logits: float32 [batch, positions, V].
        diff_ids: int64 [batch, positions, K], S_diff. diff_logp: float32 of the same shape, p_PT on it.
        counted: as in `answer_losses`.
    """
    distance = kl_divergence(diff_logp, renormalised_logp(logits, diff_ids))
    return (distance * counted).sum(dim=1) / counted.sum(dim=1)


@torch.no_grad()
def add_gradients(total: Tensor, values: Tensor, gradients: Tensor) -> None:
    """Add each sequence's |dL/dW| of a linear layer to `total`, float32 [out, in], in place.

    Sequence by sequence, and in a large layer some of its rows at a time, so that no gradient of the whole
    weight is in memory.

    Arguments:
        values: float32 [batch, tokens, in], the layer's input.
        gradients: float32 [batch, tokens, out], of the sum of the sequences' losses with respect to the
            layer's output. Padding has gradient 0, since no answer attends to it.
    """
    rows = max(1, CHUNK_WEIGHTS // total.shape[1])
    for value, gradient in zip(values, gradients, strict=True):
        for part, channels in zip(
            torch.split(total, rows), torch.split(gradient, rows, dim=1), strict=True
        ):
            part += (channels.T @ value).abs_()


def snip_scores(weight: Tensor, mean_gradient: Tensor) -> Tensor:
    """`|W_ij| * E|dL/dW_ij|` in nats, float32 [out, in].

    Arguments:
        weight: float32 [out, in].
        mean_gradient: float32 [out, in], the mean over sequences of |dL/dW|.
    """
    return (weight * mean_gradient).abs_()  # no second matrix for |W|
