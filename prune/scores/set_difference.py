"""The top of a layer's scores; safety's without utility's is `Top-q(safety) \\ Top-p(utility)`.

Wei et al. 2024, arXiv 2402.05162, section 3.2: weights that safety needs and utility does not. There the
set is pruned, to show that about 3 % of the weights carry the refusals; here it is what no pruning may
touch. Weights that utility needs as well are left to the utility score, which keeps them anyway. The
difference is taken in `block_scores`, where the scores of both are never in memory together.
"""

from __future__ import annotations

from torch import Tensor

from holdfast.prune.masks import keep_highest


def top(scores: Tensor, frac: float) -> Tensor:
    """The highest `frac` of a layer, rounded up, bool [out, in]; a score of 0 is never among them.

    Arguments:
        scores: not negative, float32 [out, in].
        frac: share of the layer's weights: q for safety, p for utility.
    """
    return keep_highest(scores.reshape(1, -1), 1.0 - frac).reshape(scores.shape) & (scores > 0)
