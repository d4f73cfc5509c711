"""Weights that safety needs and utility does not: `Top-q(safety) \\ Top-p(utility)`.

Wei et al. 2024, arXiv 2402.05162, section 3.2. There the set is pruned, to show that about 3 % of the
weights carry the refusals; here it is what no pruning may touch. Weights that utility needs as well are
left to the utility score, which keeps them anyway.
"""

from __future__ import annotations

from torch import Tensor

from holdfast.prune.masks import keep_highest


def safety_critical(safety: Tensor, utility: Tensor, safety_frac: float, utility_frac: float) -> Tensor:
    """What is to be protected of one layer, bool [out, in].

    Arguments:
        safety, utility: not negative, float32 [out, in].
        safety_frac: q, share of the layer's weights that are the top of safety.
        utility_frac: p, the same of utility.
    """
    return top(safety, safety_frac) & ~top(utility, utility_frac)


def top(scores: Tensor, frac: float) -> Tensor:
    """The highest `frac` of a layer, rounded up, bool [out, in]; a score of 0 is never among them."""
    return keep_highest(scores.reshape(1, -1), 1.0 - frac).reshape(scores.shape) & (scores > 0)
