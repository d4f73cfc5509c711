"""Magnitude pruning: the smallest weights of a layer go (Han et al. 2015, arXiv 1506.02626)."""

from __future__ import annotations

from torch import Tensor

from holdfast.prune.masks import keep_highest


def magnitude_mask(weight: Tensor, sparsity_frac: float) -> Tensor:
    """Weights of one layer that stay, compared over the whole layer.

    Arguments:
        weight: finite, [out, in].
        sparsity_frac: share that is dropped, rounded down to whole weights of the layer.

    Returns:
        bool [out, in], False where a weight is dropped.
    """
    return keep_highest(weight.abs().reshape(1, -1), sparsity_frac).reshape(weight.shape)
