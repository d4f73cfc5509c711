"""Magnitude: the smallest weights matter least (Han et al. 2015, arXiv 1506.02626)."""

from __future__ import annotations

from torch import Tensor


def magnitude_scores(weight: Tensor) -> Tensor:
    """`|W_ij|`, compared over the whole layer; float32 [out, in] to [out, in]."""
    return weight.abs()
