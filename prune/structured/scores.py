"""How much heads, FFN channels and decoder blocks matter, in one unit, so that they can be compared.

The unit is that of ShortGPT's block influence (Men et al. 2024, arXiv 2403.03853), the mean of
`1 - cos(x_t, y_t)` between what enters a block and what leaves it. A small part `d` of `y`, perpendicular
to the rest, turns it by `1 - cos = |d|^2 / 2|y|^2`; this is what a head or a channel is charged for what it
writes. Column `j` of the writer (`o_proj`, `down_proj`) writes `|W_:j| |x_j|`: Wanda's product
(Sun et al. 2023, arXiv 2306.11695), of a whole column instead of a single weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from holdfast.errors import PruneError


@dataclass(frozen=True)
class StructureScores:
    """What every structure of a model does on some prompts; more is more important.

    Attributes:
        heads: per block and query head, float64 [block, head].
        channels: per block and FFN channel, float64 [block, channel].
        blocks: float64 [block].
    """

    heads: Tensor
    channels: Tensor
    blocks: Tensor


NAMES = tuple(field.name for field in fields(StructureScores))


def column_scores(weight: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
    """Mean over the tokens of `|W_:j|^2 x_jt^2 / 2|y_t|^2`, float64 [in].

    Arguments:
        weight: of the linear that writes into the residual stream, [hidden, in].
        inputs: what flows into it, [token, in].
        outputs: the residual stream when the block is done, [token, hidden].
    """
    energy = outputs.double().square().sum(dim=1, keepdim=True)  # [token, 1]
    share = (inputs.double().square() / energy).mean(dim=0)  # [in]
    return weight.double().square().sum(dim=0) * share / 2.0


def head_scores(columns: Tensor, heads: int) -> Tensor:
    """Sum of any column score over the columns of each head, [heads].

    Arguments:
        columns: [heads * width], head after head; of Wanda's, SNIP's or another score of single weights
            it is the sum over the rows of `o_proj`.
    """
    return columns.reshape(heads, -1).sum(dim=1)


def block_score(inputs: Tensor, outputs: Tensor) -> Tensor:
    """ShortGPT's block influence: mean of `1 - cos` over the tokens, float64 scalar.

    Arguments:
        inputs, outputs: of a decoder block, [token, hidden].
    """
    return (1.0 - torch.cosine_similarity(inputs.double(), outputs.double(), dim=1)).mean()


def from_weight_scores(attention: Tensor, ffn: Tensor, heads: int) -> StructureScores:
    """Scores of one block as sums of a score of single weights, such as SNIP's.

    A sum of absolute first-order effects bounds that of the structure as a whole, by which Michel et al.
    2019 (arXiv 1905.10650) score heads. The block's own score is what its two writers sum to.

    Arguments:
        attention: of the attention's writer, [hidden, heads * width], not negative.
        ffn: of the FFN's writer, [hidden, channel], not negative.
    """
    columns, channels = attention.double().sum(dim=0), ffn.double().sum(dim=0)
    whole = columns.sum() + channels.sum()
    return StructureScores(head_scores(columns, heads)[None], channels[None], whole[None])


def join_blocks(scores: Sequence[StructureScores]) -> StructureScores:
    """The scores of single blocks, in order, as those of a model."""
    return StructureScores(*(torch.cat([getattr(one, name) for one in scores]) for name in NAMES))


def protect(utility: StructureScores, safety: StructureScores, weight: float) -> StructureScores:
    """`utility + weight * safety`, so that what harmful prompts need stays longer.

    Heads, channels and blocks of `safety` are each scaled to the mean of `utility` first: the two may have
    different units, and the result has that of `utility`.

    Arguments:
        utility: on prompts as they come.
        safety: on harmful prompts with the aligned model's answers, not negative.
        weight: lambda; 0 for utility alone.

    Raises:
        PruneError: a weight that is negative or not finite.
    """
    if not 0.0 <= weight < float("inf"):
        raise PruneError(
            f"The weight of the safety score should be at least 0 and finite, found {weight}: "
            "leave it at 0 for utility alone."
        )
    pairs = [(getattr(utility, name), getattr(safety, name)) for name in NAMES]
    return StructureScores(*(ours + weight * _scaled(theirs, ours) for ours, theirs in pairs))


def _scaled(values: Tensor, other: Tensor) -> Tensor:
    """Values with the mean of others; unchanged where all of them are 0."""
    mean = values.mean()
    return values * (other.mean() / mean) if mean > 0 else values


def require_finite(scores: StructureScores) -> None:
    """Raise PruneError where a score is NaN or infinite: it ranks nothing."""
    for name, value in vars(scores).items():
        if not torch.isfinite(value).all():
            raise PruneError(
                f"The scores of the {name} hold NaN or infinity and cannot be ranked: "
                "start from an intact checkpoint."
            )


def highest(scores: Tensor, count: int) -> tuple[int, ...]:
    """Positions of the `count` highest, ascending; of equal ones the one further left goes first.

    Arguments:
        scores: finite, [structure].
    """
    order: list[int] = scores.argsort(stable=True).tolist()
    return tuple(sorted(order[len(order) - count :]))


def without(kept: Sequence[int], count: int) -> tuple[int, ...]:
    """The others of `range(count)`, ascending."""
    return tuple(sorted(set(range(count)) - set(kept)))
