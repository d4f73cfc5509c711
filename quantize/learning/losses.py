"""Losses of contrastive calibration on cached reference probabilities.

Formulas: "Safety-Preserving PTQ via Contrastive Alignment Loss", arXiv 2511.07842. With p_FT the aligned
model, p_PT its unaligned parent, p_Q the quantized one and p^S the renormalisation of p on S:

    L_APC     = KL(p_FT^Stop || p_Q^Stop) - alpha * KL(p_PT^Sdiff || p_Q^Sdiff)
    L_bounded = KL(p_FT^Stop || p_Q^Stop) + alpha * relu(D_ref - KL(p_PT^Sdiff || p_Q^Sdiff))
    D_ref     = KL(p_PT^Sdiff || p_FT^Sdiff)

L_APC is unbounded below and its gradient at p_Q = p_FT is -alpha (p_FT - p_PT). L_bounded is the
default: it is never negative, and zero, with zero gradient, exactly where p_Q = p_FT on S_top.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LossMode = Literal["bounded", "apc", "kl"]


@dataclass(frozen=True)
class References:
    """What the loss needs of the two reference models, for every position.

    Attributes:
        top_ids: int64 [..., K], S_top: the K likeliest tokens of the aligned model.
        top_logp: float32 [..., K], natural log of p_FT renormalised on S_top.
        diff_ids: int64 [..., K], S_diff: the K tokens with the largest |p_FT - p_PT|.
        diff_logp: float32 [..., K], natural log of p_PT renormalised on S_diff.
        diff_floor: float32 [...], D_ref in nats.
    """

    top_ids: Tensor
    top_logp: Tensor
    diff_ids: Tensor
    diff_logp: Tensor
    diff_floor: Tensor

    def rows(self, index: Tensor, positions: slice) -> References:
        """The references of some sequences and positions, ids widened to int64."""
        return References(
            self.top_ids[index, positions].long(),
            self.top_logp[index, positions],
            self.diff_ids[index, positions].long(),
            self.diff_logp[index, positions],
            self.diff_floor[index, positions],
        )


def renormalised_logp(logits: Tensor, ids: Tensor) -> Tensor:
    """Natural log of softmax(logits) renormalised on `ids`; logits [..., V], ids [..., K] to [..., K]."""
    return logits.gather(-1, ids).log_softmax(dim=-1)


def kl_divergence(reference_logp: Tensor, logp: Tensor) -> Tensor:
    """KL(reference || other) in nats over the last axis."""
    return (reference_logp.exp() * (reference_logp - logp)).sum(dim=-1)


def make_references(aligned_logits: Tensor, negative_logits: Tensor, top_k: int) -> References:
    """S_top, S_diff and their reference probabilities.

    Arguments:
        aligned_logits, negative_logits: float32 [..., V], of the same positions.
        top_k: size of both sets; at most V of it is used.
    """
    k = min(top_k, aligned_logits.shape[-1])
    aligned, negative = aligned_logits.softmax(dim=-1), negative_logits.softmax(dim=-1)
    top_ids = aligned.topk(k, dim=-1).indices
    diff_ids = (aligned - negative).abs().topk(k, dim=-1).indices
    diff_logp = renormalised_logp(negative_logits, diff_ids)
    return References(
        top_ids=top_ids,
        top_logp=renormalised_logp(aligned_logits, top_ids),
        diff_ids=diff_ids,
        diff_logp=diff_logp,
        diff_floor=kl_divergence(diff_logp, renormalised_logp(aligned_logits, diff_ids)),
    )


def contrastive_loss(
    logits: Tensor, references: References, weights: Tensor, alpha: float, mode: LossMode
) -> Tensor:
    """Weighted mean loss over positions, a float32 scalar in nats.

    Arguments:
        logits: float32 [..., V] of the quantized model.
        references: of the same positions.
        weights: float32 [...], 0 for positions that do not count; at least one is positive.
        alpha: weight of the push term; 0 leaves KL alone whatever the mode.
        mode: see the module's docstring.
    """
    loss = kl_divergence(references.top_logp, renormalised_logp(logits, references.top_ids))
    if alpha > 0.0 and mode != "kl":
        distance = kl_divergence(references.diff_logp, renormalised_logp(logits, references.diff_ids))
        if mode == "apc":
            loss = loss - alpha * distance
        else:
            loss = loss + alpha * torch.relu(references.diff_floor - distance)
    return (loss * weights).sum() / weights.sum()
