"""Keep-masks from scores: exactly so many of the lowest are dropped, ties by position.

Protected weights outrank all others whatever their scores. Where more are protected than may stay, those
with the highest scores do, so that a mask always has the sparsity, or the pattern, that was asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

UNSTRUCTURED = "unstructured"
CHUNK_WEIGHTS = 1 << 20
"""Weights that are ranked at a time, so that ranks of a large layer are never in memory whole."""


@dataclass(frozen=True)
class Pattern:
    """N:M sparsity: of each `group` neighbouring input weights of an output row at most `kept` stay."""

    kept: int
    group: int

    @property
    def sparsity_frac(self) -> float:
        return 1.0 - self.kept / self.group


def parse_pattern(text: str) -> Pattern | None:
    """`2:4` as a Pattern; None for `unstructured`. The text is one that the recipe accepts."""
    if text == UNSTRUCTURED:
        return None
    kept, group = map(int, text.split(":"))
    return Pattern(kept, group)


def pruned_count(size: int, sparsity_frac: float) -> int:
    """How many of `size` weights are dropped: rounded down, so never more than was asked for.

    The small term keeps 0.29 * 100 = 28.999999999999996 at 29.
    """
    return math.floor(size * sparsity_frac + 1e-9)


def keep_highest(scores: Tensor, sparsity_frac: float, protected: Tensor | None = None) -> Tensor:
    """Mask of what stays, bool [row, column], with the same number dropped in every row.

    Arguments:
        scores: finite and not negative, float32 [row, column]. Of equal scores the one further left goes
            first, so that the count is exact and the result the same everywhere.
        protected: bool [row, column], what goes last.
    """
    return keep_all_but(scores, pruned_count(scores.shape[1], sparsity_frac), protected)


def keep_all_but(scores: Tensor, count: int, protected: Tensor | None = None) -> Tensor:
    """As `keep_highest`, with `count` dropped in every row."""
    keep = torch.ones(scores.shape, dtype=torch.bool)
    if count == 0:
        return keep
    rows = max(1, CHUNK_WEIGHTS // scores.shape[1])
    for start in range(0, len(scores), rows):
        part = slice(start, start + rows)
        ranks = _ranks(scores[part], None if protected is None else protected[part])
        keep[part] = torch.from_numpy(~_lowest(ranks, count))
    return keep


def keep_pattern(scores: Tensor, pattern: Pattern, protected: Tensor | None = None) -> Tensor:
    """Mask of what stays, bool [out, in], with exactly `kept` weights in every group.

    Arguments:
        scores: as in `keep_highest`, [out, in]; `in` is a multiple of the group.
        protected: bool [out, in]; they take a group's places first.
    """
    grouped = scores.reshape(-1, pattern.group)
    shielded = None if protected is None else protected.reshape(-1, pattern.group)
    return keep_all_but(grouped, pattern.group - pattern.kept, shielded).reshape(scores.shape)


def _ranks(scores: Tensor, protected: Tensor | None) -> NDArray[np.int32]:
    """int32 [row, column] in the order of (protected, score).

    The bits of a float32 that is not negative, read as an integer, are in its order; with the sign bit
    set they are below all others.
    """
    bits: NDArray[np.int32] = scores.contiguous().view(torch.int32).numpy()
    if protected is None:
        return bits
    below_all: NDArray[np.int32] = np.where(protected.numpy(), bits, bits + np.iinfo(np.int32).min)
    return below_all


def _lowest(ranks: NDArray[np.int32], count: int) -> NDArray[np.bool_]:
    """bool [row, column]: the `count` lowest of every row, the leftmost of equal ones."""
    threshold = np.partition(ranks, count - 1, axis=1)[:, count - 1 : count].copy()  # not a view of it all
    below: NDArray[np.bool_] = ranks < threshold
    left = count - below.sum(axis=1, keepdims=True)
    equal = ranks == threshold
    if (equal.sum(axis=1, keepdims=True) > left).any():
        equal &= np.cumsum(equal, axis=1, dtype=np.int32) <= left
    below |= equal
    return below
