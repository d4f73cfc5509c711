"""One score of utility and safety: `utility + safety_weight * safety`.

Of the two SNIP scores of Wei et al. 2024, arXiv 2402.05162. They come from losses of different size, so
each is divided by its own mean over the layer first. A mean and not the largest value: scores are
heavy-tailed, and one outlier would decide how much the other score counts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def normalised(scores: Tensor) -> Tensor:
    """Scores of one layer with mean 1, float32 [out, in]; unchanged where all of them are 0."""
    mean = scores.mean()
    return scores / mean if mean > 0 else scores


def combined_scores(utility: Tensor, safety: Tensor, safety_weight: float) -> Tensor:
    """`utility + safety_weight * safety` after `normalised`, times the mean of utility: its own unit again.

    Arguments:
        utility, safety: not negative, float32 [out, in], of one layer; safety may be float16.
        safety_weight: lambda, at least 0; with 0 the scores are those of utility.

    Returns:
        float32 [out, in].
    """
    means = float(utility.mean()), float(safety.float().mean())
    if 0.0 in means:  # one of them says nothing
        return utility + safety_weight * safety
    return torch.add(utility, safety, alpha=safety_weight * means[0] / means[1])
