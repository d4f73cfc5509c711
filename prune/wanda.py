"""Wanda: weights by what they contribute on real inputs (Sun et al. 2023, arXiv 2306.11695)."""

from __future__ import annotations

from torch import Tensor

from holdfast.prune.masks import keep_highest


def wanda_mask(weight: Tensor, input_norms: Tensor, sparsity_frac: float) -> Tensor:
    """Weights of one layer that stay, compared within each output row (section 3 of the paper).

    The score of weight `ij` is `|W_ij| * ||X_j||_2`.

    Arguments:
        weight: finite, [out, in].
        input_norms: L2 norm of each input channel over all calibration tokens, [in].
        sparsity_frac: share that is dropped, rounded down to whole weights of a row.

    Returns:
        bool [out, in], False where a weight is dropped.
    """
    return keep_highest(weight.abs() * input_norms, sparsity_frac)
