"""Wanda: weights by what they contribute on real inputs (Sun et al. 2023, arXiv 2306.11695)."""

from __future__ import annotations

from torch import Tensor


def wanda_scores(weight: Tensor, input_norms: Tensor) -> Tensor:
    """`|W_ij| * ||X_j||_2`, compared within each output row (section 3 of the paper).

    Arguments:
        weight: float32 [out, in].
        input_norms: float32 [in], L2 norm of each input channel over all calibration tokens.

    Returns:
        float32 [out, in].
    """
    return weight.abs() * input_norms
