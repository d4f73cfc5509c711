"""Weights that stay, at their best for the mask that was chosen.

    min_V  ||(T - V) X'||^2 + lambda ||T - V||^2   s.t.  V is 0 where the mask is False

Least squares in each output row on the inputs that the row keeps. SparseGPT (arXiv 2301.00774) does not
change weights to the left of a dropped one any more, so that its result is not the minimum. The normal
equations are solved by conjugate gradients with the Hessian's diagonal as preconditioner, as in ALPS (Meng
et al. 2024, arXiv 2406.07831, section 3.3); rows run side by side, and none needs a Hessian of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 20  # more change nothing on held-out prompts
ROWS = 256  # at a time: what is in memory beside the weight is five times as much


@torch.no_grad()
def refit(
    weight: Tensor, keep: Tensor, target: Tensor, hessian: Tensor, damp_frac: float, *, steps: int = STEPS
) -> Tensor:
    """The weight of the least output error with these zeros, float32 [out, in].

    Arguments:
        weight: float32 [out, in], where the search starts; 0 where `keep` is False.
        keep: bool [out, in].
        target: float32 [out, in], T, whose output is to be kept.
        hessian: float32 [in, in], X' X''.
        damp_frac: lambda, as a share of the Hessian's mean diagonal.
        steps: of conjugate gradients.
    """
    ridge = damp_frac * float(hessian.diagonal().mean())
    refitted = torch.empty_like(weight)
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        refitted[rows] = _refit_rows(weight[rows], keep[rows], target[rows], hessian, ridge, steps)
    return refitted


def _refit_rows(
    weight: Tensor, keep: Tensor, target: Tensor, hessian: Tensor, ridge: float, steps: int
) -> Tensor:
    def product(change: Tensor) -> Tensor:
        """What a change does to the gradient at the weights that stay."""
        return (change @ hessian).add_(change, alpha=ridge).mul_(keep)

    tiny = torch.finfo(weight.dtype).tiny
    weight, scale = weight.clone(), keep / (hessian.diagonal() + ridge).clamp_min(tiny)
    residual = product(target - weight)
    direction = residual * scale
    squares = (residual * direction).sum(dim=1, keepdim=True)
    for _ in range(steps):
        moved = product(direction)
        step = squares / (direction * moved).sum(dim=1, keepdim=True).clamp_min(tiny)
        weight += step * direction
        residual -= step * moved
        scaled = residual * scale
        following = (residual * scaled).sum(dim=1, keepdim=True)
        direction.mul_(following / squares.clamp_min(tiny)).add_(scaled)
        squares = following
    return weight
