"""Learned rounding at 4 bits and below, as small functions of a weight's positions on its grid.

A position is a weight in units of its scale plus the zero point, so that the codes of a block are the
integers 0 to `most`. Two ways to learn which neighbour it goes to:

- AdaRound (Nagel et al. 2020, arXiv 2004.10568, equations 23 and 24): the position's floor plus
  `h = clip(sigmoid(a) (zeta - gamma) + gamma, 0, 1)`; a regularizer drives every `h` to 0 or 1.
- SignRound (Cheng et al. 2023, arXiv 2309.05516, equations 3 to 5): an offset V in [-0.5, 0.5] is added
  before the rounding, which the gradient passes straight through.

Gradients reach the scale, and so a clip, as in `fakequant.FakeQuantize`. All tensors are float32 of one
shape, [out, blocks, block_size], scales and zero points [out, blocks, 1].
"""

from __future__ import annotations

import torch
from torch import Tensor

ZETA, GAMMA = 1.1, -0.1
INSIDE = 1e-4
"""Fractions are kept this far from ZETA's and GAMMA's ends, where the sigmoid's inverse is infinite."""


def positions(blocks: Tensor, scale: Tensor, zero_point: Tensor | float) -> Tensor:
    """Where weights lie on their grid, in the order of operations of `fakequant.block_codes`.

    Arguments:
        zero_point: unsigned code of 0; `2^(bits - 1)` for symmetric weights.
    """
    return blocks * (1.0 / scale) + zero_point


def on_grid(codes: Tensor, scale: Tensor, zero_point: Tensor | float) -> Tensor:
    """Weights of unsigned codes, whole or soft."""
    return (codes - zero_point) * scale


def start_offsets(position: Tensor) -> Tensor:
    """AdaRound's `a` at which soft codes are the positions themselves, and hard ones the nearest."""
    fraction = (position - position.floor()).clamp(GAMMA + INSIDE, ZETA - INSIDE)
    return -((ZETA - GAMMA) / (fraction - GAMMA) - 1.0).log()


def rectified_sigmoid(a: Tensor) -> Tensor:
    """h, share of a step that is added to the floor, in [0, 1]."""
    return (a.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


def soft_codes(position: Tensor, h: Tensor, most: int) -> Tensor:
    """Floor plus `h`, clamped to the codes 0 to `most`; the gradient passes straight through the floor."""
    floor = position + (position.floor() - position).detach()
    return (floor + h).clamp(0.0, float(most))


def hard_codes(position: Tensor, h: Tensor, most: int) -> Tensor:
    """Unsigned codes once learning is over; from `start_offsets` they are the nearest, ties up."""
    return (position.floor() + (h >= 0.5)).clamp(0.0, float(most))


def rounding_regularizer(h: Tensor, beta: float) -> Tensor:
    """Sum of `1 - |2h - 1|^beta`: 0 where every `h` is 0 or 1. Beta falls from 20 to 2 in the paper."""
    return (1.0 - (2.0 * h - 1.0).abs().pow(beta)).sum()


def shifted_codes(position: Tensor, offset: Tensor, most: int) -> Tensor:
    """SignRound: nearest codes of position plus offset, ties up, clamped to 0 to `most`.

    The gradient passes straight through the rounding to both. With `offset` 0 these are the codes of
    rounding to nearest.
    """
    shifted = position + offset
    floor = shifted.floor()
    rounded = floor + (shifted - floor >= 0.5)
    return (shifted + (rounded - shifted).detach()).clamp(0.0, float(most))


@torch.no_grad()
def sign_step(offset: Tensor, lr: float) -> None:
    """SignRound's optimizer step (equation 5), in place: against the gradient's sign, within +-0.5."""
    if offset.grad is not None:
        offset.sub_(offset.grad.sign(), alpha=lr).clamp_(-0.5, 0.5)
