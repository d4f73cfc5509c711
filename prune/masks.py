"""Keep-masks from scores: exactly so many of the lowest are dropped, ties by position."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def pruned_count(size: int, sparsity_frac: float) -> int:
    """How many of `size` weights are dropped: rounded down, so never more than was asked for.

    The small term keeps 0.29 * 100 = 28.999999999999996 at 29.
    """
    return math.floor(size * sparsity_frac + 1e-9)


def keep_highest(scores: Tensor, sparsity_frac: float) -> Tensor:
    """Mask of what stays, bool [row, column], with the same number dropped in every row.

    Arguments:
        scores: finite, [row, column]. Of equal scores the one further left goes first, so that the
            count is exact and the result the same everywhere.
    """
    count = pruned_count(scores.shape[1], sparsity_frac)
    lowest = scores.argsort(dim=1, stable=True)[:, :count]
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, lowest, False)
