"""Whole decoder blocks, least influence first (ShortGPT, Men et al. 2024, arXiv 2403.03853)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from holdfast.errors import PruneError
from holdfast.exporter.architectures import Settings
from holdfast.prune.structured.layouts import layout_of
from holdfast.prune.structured.scores import highest


def keep_blocks(scores: Tensor, count: int) -> tuple[int, ...]:
    """The `count` blocks that stay, ascending.

    Arguments:
        scores: [block], all measured on the whole model, as the paper does.
    """
    return highest(scores, count)


def require_blocks(model: nn.Module, blocks: int, left: int) -> None:
    """Raise PruneError unless a model with `blocks` decoder blocks can keep `left` of them."""
    name = type(model).__name__
    if not 1 <= left <= blocks:
        raise PruneError(
            f"This {name} has {blocks} decoder blocks and cannot keep {left}: keep 1 to {blocks}."
        )
    for settings in layout_of(model).by_index if left < blocks else ():
        if all(getattr(model.config, key, None) == value for key, value in settings):
            raise PruneError(
                f"This {name} has {_said(settings)}, so that a block computes something else at another "
                f"index and {left} of {blocks} blocks cannot be kept: remove channels instead."
            )


def block_fields(model: nn.Module, kept: tuple[int, ...]) -> dict[str, Any]:
    """Fields of the config that have an entry for each block, with those of the blocks that stay."""
    config: Any = model.config
    layout = layout_of(model)
    lists = {name: getattr(config, name, None) for name in layout.per_block}
    fields = {name: [value[i] for i in kept] for name, value in lists.items() if value is not None}
    return fields | {name: [[fields[of], 1]] for name, of in layout.repeated}


def _said(settings: Settings) -> str:
    return " and ".join(f"`{key}` set to {value}" for key, value in settings)
