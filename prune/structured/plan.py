"""What goes: a shape that takes the asked share of the weights, and the structures with the least score."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from holdfast.errors import PruneError
from holdfast.exporter.source import SourceModel
from holdfast.prune.structured.blocks import keep_blocks, require_blocks
from holdfast.prune.structured.channels import channels_left, keep_channels, require_channels
from holdfast.prune.structured.heads import keep_heads, legal_heads, require_heads
from holdfast.prune.structured.layouts import Shape, layout_of, shape_of
from holdfast.prune.structured.scores import StructureScores
from holdfast.prune.structured.sizes import BlockWeights, block_weights

Kind: TypeAlias = Literal["heads", "channels", "blocks"]
KINDS: tuple[Kind, ...] = ("heads", "channels", "blocks")
CHANNEL_MULTIPLE = 32  # the block of 4-bit weights
# Shapes that take almost the same share are judged by what they cost. Steps are coarse: a head group of a
# small model is several per cent.
SLACK_FRAC = 0.02


@dataclass(frozen=True)
class StructuredPlan:
    """What stays of a model, all positions counted in the model as it is and ascending.

    Attributes:
        blocks: decoder blocks that stay.
        heads: for each of them, the query heads that stay; a key-value head stays while it has one.
        channels: for each of them, the FFN channels that stay.
        asked_frac: the share of the decoder blocks' weights that was asked for; None for given counts.
    """

    blocks: tuple[int, ...]
    heads: tuple[tuple[int, ...], ...]
    channels: tuple[tuple[int, ...], ...]
    asked_frac: float | None = None


def plan_structured(
    source: SourceModel,
    scores: StructureScores,
    *,
    sparsity_frac: float,
    kinds: Collection[Kind],
    channel_multiple: int = CHANNEL_MULTIPLE,
) -> StructuredPlan:
    """The cheapest plan that takes a share of the decoder blocks' weights.

    Never more than asked; of the shapes that come within 0.02 of the nearest one, that with the least sum
    of lost scores for each weight removed. Every block loses as many heads and channels as the others, and
    each its own least important ones.

    Arguments:
        scores: of this model; see `measure_structures` and `protect`.
        sparsity_frac: in [0, 1).
        kinds: what may be removed.
        channel_multiple: what the number of FFN channels is a multiple of afterwards, where any go.

    Raises:
        PruneError: a share outside [0, 1), more than these kinds hold, or less than the smallest step;
            heads of an architecture whose config cannot say it; no kind.
    """
    shapes = possible_shapes(source, sparsity_frac, kinds, channel_multiple)
    if sparsity_frac == 0.0:
        return replace(plan_counts(source, scores), asked_frac=0.0)
    shape, weights = shape_of(source.model), block_weights(source.model)
    nearest = max(_removed(shape, other, weights) for other in shapes)
    losses = _Losses(scores, shape)
    near = [s for s in shapes if _removed(shape, s, weights) >= nearest - SLACK_FRAC]
    best = min((s for s in near if s != shape), key=lambda s: losses.of(s) / _removed(shape, s, weights))
    return replace(_choose(scores, shape, best), asked_frac=sparsity_frac)


def possible_shapes(
    source: SourceModel, sparsity_frac: float, kinds: Collection[Kind], channel_multiple: int
) -> list[Shape]:
    """What `plan_structured` chooses among; needs no scores, so that a request can be refused before them.

    Raises:
        PruneError: as `plan_structured`.
    """
    _check_request(source, sparsity_frac, kinds, channel_multiple)
    shape, weights = shape_of(source.model), block_weights(source.model)
    shapes = list(_shapes(shape, weights, sparsity_frac, kinds, channel_multiple))
    most = _removed(shape, _smallest(shape, kinds, channel_multiple), weights)
    nearest = max((_removed(shape, other, weights) for other in shapes), default=0.0)
    if sparsity_frac > 0.0:
        _check_reach(source, sparsity_frac, kinds, most, nearest)
    return shapes


def plan_counts(
    source: SourceModel,
    scores: StructureScores,
    *,
    heads: int | None = None,
    channels: int | None = None,
    blocks: int | None = None,
) -> StructuredPlan:
    """The plan that leaves given numbers of structures; None leaves them as they are.

    Where several numbers of key-value heads give `heads` query heads, the scores choose.

    Raises:
        PruneError: a number that the architecture cannot be left with.
    """
    shape = shape_of(source.model)
    wanted = replace(
        shape,
        heads=shape.heads if heads is None else heads,
        channels=shape.channels if channels is None else channels,
        blocks=shape.blocks if blocks is None else blocks,
    )
    require_heads(source.architecture, shape, wanted.heads)
    require_channels(source.architecture, shape.channels, wanted.channels)
    require_blocks(source.model, shape.blocks, wanted.blocks)
    losses = _Losses(scores, shape)
    pairs = [pair for pair in legal_heads(shape.heads, shape.kv_heads) if pair[0] == wanted.heads]
    shapes = [replace(wanted, kv_heads=kv_heads) for _, kv_heads in pairs]
    return _choose(scores, shape, min(shapes, key=losses.of))


def _choose(scores: StructureScores, shape: Shape, left: Shape) -> StructuredPlan:
    blocks = keep_blocks(scores.blocks, left.blocks)
    pair = (left.heads, left.kv_heads)
    return StructuredPlan(
        blocks=blocks,
        heads=tuple(keep_heads(scores.heads[i], shape.kv_heads, pair) for i in blocks),
        channels=tuple(keep_channels(scores.channels[i], left.channels) for i in blocks),
    )


class _Losses:
    """Sum of the scores of what a shape does not keep; what was computed for a shape before is kept.

    Scores of structures in blocks that go are not counted: the block's own score stands for them.
    """

    def __init__(self, scores: StructureScores, shape: Shape) -> None:
        self._scores, self._shape = scores, shape
        ordered = scores.channels.sort(dim=1).values.cumsum(dim=1)
        self._channels = torch.cat([torch.zeros_like(ordered[:, :1]), ordered], dim=1)  # [block, removed]
        self._heads: dict[tuple[int, int], Tensor] = {}

    def of(self, left: Shape) -> float:
        kept = list(keep_blocks(self._scores.blocks, left.blocks))
        blocks = self._scores.blocks.sum() - self._scores.blocks[kept].sum()
        channels = self._channels[kept, self._shape.channels - left.channels].sum()
        return float(blocks + channels + self._of_heads((left.heads, left.kv_heads))[kept].sum())

    def _of_heads(self, pair: tuple[int, int]) -> Tensor:
        """[block]"""
        if pair not in self._heads:
            rows = self._scores.heads
            kept = [keep_heads(row, self._shape.kv_heads, pair) for row in rows]
            self._heads[pair] = torch.stack(
                [row.sum() - row[list(heads)].sum() for row, heads in zip(rows, kept, strict=True)]
            )
        return self._heads[pair]


def _shapes(
    shape: Shape, weights: BlockWeights, frac: float, kinds: Collection[Kind], multiple: int
) -> Iterator[Shape]:
    """For every number of blocks and heads, the fewest channels that take no more than `frac`."""
    spare = frac * shape.blocks * weights.total
    for blocks in range(1 if "blocks" in kinds else shape.blocks, shape.blocks + 1):
        for heads, kv_heads in _head_counts(shape, kinds):
            left = Shape(blocks, heads, kv_heads, shape.channels)
            rest = spare - _removed(shape, left, weights) * shape.blocks * weights.total
            if rest < -1e-6:  # weights; rounding
                continue
            if "channels" in kinds:
                removable = math.floor((rest + 1e-6) / (blocks * weights.channel))
                left = replace(left, channels=channels_left(shape.channels, removable, multiple))
            yield left


def _smallest(shape: Shape, kinds: Collection[Kind], multiple: int) -> Shape:
    """What is left when as much goes as these kinds hold."""
    heads, kv_heads = _head_counts(shape, kinds)[0]
    channels = shape.channels
    if "channels" in kinds:
        channels = channels_left(shape.channels, shape.channels, multiple)
    return Shape(1 if "blocks" in kinds else shape.blocks, heads, kv_heads, channels)


def _head_counts(shape: Shape, kinds: Collection[Kind]) -> list[tuple[int, int]]:
    legal = legal_heads(shape.heads, shape.kv_heads)
    return legal if "heads" in kinds else legal[-1:]


def _removed(shape: Shape, left: Shape, weights: BlockWeights) -> float:
    """Share of the decoder blocks' weights that a shape lacks."""
    return 1.0 - left.blocks * weights.of(left) / (shape.blocks * weights.total)


def _check_request(
    source: SourceModel, frac: float, kinds: Collection[Kind], channel_multiple: int
) -> None:
    if not 0.0 <= frac < 1.0:
        raise PruneError(
            f"The share of weights to remove should be at least 0 and below 1, found {frac}: "
            "0.25 removes a quarter of the decoder blocks' weights."
        )
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown or not kinds:
        raise PruneError(
            f"Expected one or more of {', '.join(KINDS)} to remove, found "
            f"{', '.join(unknown) or 'nothing'}."
        )
    if channel_multiple < 1:
        raise PruneError(f"The multiple of FFN channels should be at least 1, found {channel_multiple}.")
    shape = shape_of(source.model)
    if "heads" in kinds and not layout_of(source.model).head_readers:
        require_heads(source.architecture, shape, shape.heads - 1)
    if "blocks" in kinds and shape.blocks > 1:
        require_blocks(source.model, shape.blocks, shape.blocks - 1)


def _check_reach(
    source: SourceModel, frac: float, kinds: Collection[Kind], most: float, nearest: float
) -> None:
    said = ", ".join(kind for kind in KINDS if kind in kinds)
    if frac > most + 1e-9:
        raise PruneError(
            f"Removing {said} takes at most {most:.1%} of the decoder blocks' weights of this "
            f"{source.architecture}, because something of every layer has to stay, and {frac:.1%} was "
            "asked: ask for less, or remove other structures as well."
        )
    if nearest <= 0.0:
        raise PruneError(
            f"{frac:.1%} of the decoder blocks' weights is less than the smallest step in which this "
            f"{source.architecture} can lose {said}: ask for more, or allow smaller structures."
        )
