"""Attention heads, with groups of query heads on a key-value head kept equal.

transformers repeats each key-value head for `heads / kv_heads` query heads, in order. So a block may lose
whole key-value heads with all their query heads, the same number of query heads from every group, or both;
nothing else has a config. Scores of single heads choose: Michel et al. 2019, arXiv 1905.10650.
"""

from __future__ import annotations

from torch import Tensor

from holdfast.errors import PruneError
from holdfast.prune.structured.layouts import LAYOUTS, Shape
from holdfast.prune.structured.scores import highest


def legal_heads(heads: int, kv_heads: int) -> list[tuple[int, int]]:
    """Every (heads, key-value heads) that a block may have left, ascending; the last is as it is."""
    each = heads // kv_heads
    pairs = [(groups * size, groups) for groups in range(1, kv_heads + 1) for size in range(1, each + 1)]
    return sorted(pairs)


def keep_heads(scores: Tensor, kv_heads: int, left: tuple[int, int]) -> tuple[int, ...]:
    """The query heads of one block that stay, ascending: those with the highest sum that is legal.

    Arguments:
        scores: [head].
        kv_heads: key-value heads that they are on now.
        left: (heads, key-value heads) afterwards, one of `legal_heads`.
    """
    grouped = scores.reshape(kv_heads, -1)  # [group, head of the group]
    size, each = grouped.shape[1], left[0] // left[1]
    best = [highest(group, each) for group in grouped]
    worth = grouped.new_tensor([float(grouped[i, list(inside)].sum()) for i, inside in enumerate(best)])
    groups = highest(worth, left[1])
    return tuple(group * size + inside for group in groups for inside in best[group])


def kept_kv_heads(kept: tuple[int, ...], shape: Shape) -> tuple[int, ...]:
    """The key-value heads that still have a query head, ascending."""
    return tuple(sorted({head // (shape.heads // shape.kv_heads) for head in kept}))


def groups_are_equal(kept: tuple[int, ...], shape: Shape) -> bool:
    """Whether every key-value head that is left has the same number of query heads."""
    size = shape.heads // shape.kv_heads
    groups = [head // size for head in kept]
    return len({groups.count(group) for group in groups}) == 1


def require_heads(architecture: str, shape: Shape, left: int) -> None:
    """Refuse a number of query heads that a block of this architecture cannot be left with.

    Raises:
        PruneError: the config ties it to the hidden size, or no equal groups give it.
    """
    if left == shape.heads:
        return
    if not LAYOUTS[architecture].head_readers:
        raise PruneError(
            f"{architecture} makes a head hidden size / heads wide, so that its config cannot say "
            f"{left} of {shape.heads} heads: all {shape.heads} have to stay, remove channels or blocks."
        )
    possible = sorted({heads for heads, _ in legal_heads(shape.heads, shape.kv_heads)})
    if left not in possible:
        raise PruneError(
            f"This {architecture} has {shape.heads} query heads on {shape.kv_heads} key-value heads and "
            f"cannot keep {left}: each key-value head needs the same number, so keep "
            f"{', '.join(map(str, possible))}."
        )
