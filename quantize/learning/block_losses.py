"""Losses of one decoder block: distance to the full-precision output, and the side of a refusal probe.

Q-realign, arXiv 2601.08089. With h the block's hidden state at the last prompt token and (w, b) a logistic
probe between harmful (1) and harmless (0) prompts, fitted on the full-precision block:

    L_block = MSE(h_Q, h_FP)  +  weight * softplus(-(h_Q . w + b))  on harmful prompts

The second term has no end: it goes on pushing past where the full-precision model stands. So it is counted
here from that model's own margin on, and only where that model is above the boundary itself:

    L_align = [m_FP > 0] * relu(softplus(-m_Q) - softplus(-m_FP)),   m = h . w + b

which is zero, with zero gradient, at the full-precision output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

PROBE_RIDGE = 1e-3
PROBE_ITERATIONS = 100


@dataclass(frozen=True)
class Probe:
    """A logistic boundary between hidden states; `h . weight + bias` is above 0 on the harmful side.

    Attributes:
        weight: float32 [channel].
        bias: float32 scalar.
    """

    weight: Tensor
    bias: Tensor

    def margin(self, hidden: Tensor) -> Tensor:
        """Log-odds of "harmful"; [..., channel] to [...]."""
        return hidden @ self.weight + self.bias


def fit_probe(harmful: Tensor, harmless: Tensor) -> Probe:
    """Logistic regression with a small ridge, so that separable data have a finite answer.

    Both kinds weigh the same however many there are. The states are brought to zero mean and unit mean
    square for the fit, so that the ridge means the same in every block.

    Arguments:
        harmful, harmless: float32 [rows, channel], at least one row each.
    """
    states = torch.cat([harmful, harmless])
    labels = torch.cat([torch.ones(len(harmful)), torch.zeros(len(harmless))])
    shares = torch.where(labels > 0, 0.5 / len(harmful), 0.5 / len(harmless))
    centre = states.mean(dim=0)
    size = (states - centre).square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    weight, bias = _logistic((states - centre) / size, labels, shares)
    weight = weight / size
    return Probe(weight, bias - centre @ weight)


def _logistic(states: Tensor, labels: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Minimise sum(shares * cross entropy) + ridge * |w|^2 with L-BFGS."""
    weight = torch.zeros(states.shape[1], requires_grad=True)
    bias = torch.zeros((), requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=PROBE_ITERATIONS, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        solver.zero_grad()
        fit = binary_cross_entropy_with_logits(
            states @ weight + bias, labels, weight=shares, reduction="sum"
        )
        loss = fit + PROBE_RIDGE * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        solver.step(objective)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


def block_error(output: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Weighted squared error relative to the target's own square, a float32 scalar; 0 where they are equal.

    Arguments:
        output, target: float32 [row, token, channel].
        weights: float32 [row, token], 0 at padding; at least one is positive.
    """
    error = (output - target).square().mean(dim=-1)
    power = target.square().mean(dim=-1)
    floor = torch.finfo(torch.float32).tiny
    return (error * weights).sum() / (power * weights).sum().clamp(min=floor)


def alignment_loss(margin: Tensor, reference: Tensor) -> Tensor:
    """Mean of L_align over harmful prompts, a float32 scalar in nats; 0 without any.

    Arguments:
        margin: float32 [rows], margins of the quantized block's states.
        reference: float32 [rows], margins of the full-precision block's states.
    """
    behind = torch.relu(softplus(-margin) - softplus(-reference)) * (reference > 0.0)
    return behind.sum() / max(1, len(margin))
