"""Which pruned weights of safety heads get their old values back.

Hierarchical safety realignment, arXiv 2505.16104: in the heads that safety hangs on, weights that matter
for safety and only just missed the cut by utility. Nothing is trained, and the model is a little less
sparse afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from holdfast.prune.scores.set_difference import top


def restorable(
    safety: Tensor,
    utility: Tensor,
    pruned: Tensor,
    inside: Tensor,
    *,
    safety_top_frac: float,
    utility_top_frac: float,
) -> Tensor:
    """Weights to restore, bool [out, in]: pruned, and among the top of both scores of the heads' weights.

    Arguments:
        safety, utility: scores of the unpruned weights, float32 [out, in].
        pruned: bool [out, in], what is zero now and was not.
        inside: bool [out, in], which weights belong to the heads; scores are ranked among these.
        safety_top_frac: how far down in safety, the paper's q.
        utility_top_frac: how far down in utility, the paper's max_p; what is above the cut is not pruned.
    """
    high = torch.zeros_like(inside)
    if bool(inside.any()):
        ranked = [
            top(scores[inside].reshape(1, -1), frac).flatten()
            for scores, frac in ((safety, safety_top_frac), (utility, utility_top_frac))
        ]
        high[inside] = ranked[0] & ranked[1]
    return high & pruned
