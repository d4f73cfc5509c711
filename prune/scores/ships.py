"""Ships: how much an attention head carries of safety (Zhou et al. 2024, arXiv 2410.13708, section 3).

    Ships(h) = E_{harmful prompts} KL(p || p without head h)

with p the distribution of the first answer token. The head is taken out by setting its contribution to the
attention's output to zero, which is the paper's ablation of the contribution at scaling factor 0.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from holdfast.quantize.learning.losses import kl_divergence

Head = tuple[int, int]
"""(number of the decoder block, number of the query head)."""


def ships_scores(logits: Tensor, without_head: Tensor) -> Tensor:
    """KL(p || p without the head) of every prompt in nats, float32 [prompts].

    Arguments:
        logits: float32 [prompts, V], at the last position of each prompt.
        without_head: the same with one head's contribution at zero.
    """
    return kl_divergence(logits.log_softmax(dim=-1), without_head.log_softmax(dim=-1))


def head_channels(head: int, heads: int, width: int) -> slice:
    """Input channels of the attention's output projection that a query head writes.

    Arguments:
        heads: query heads of the layer. width: input channels of the projection, `heads * head_dim`.
    """
    size = width // heads
    return slice(head * size, (head + 1) * size)


def strongest_heads(scores: Mapping[Head, float], count: int) -> list[Head]:
    """The `count` heads with the highest scores, strongest first; of equal ones the earlier head."""
    return sorted(scores, key=lambda head: (-scores[head], head))[:count]
