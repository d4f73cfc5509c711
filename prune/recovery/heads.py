"""Where the weights of single attention heads lie in a model's linears."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from holdfast.exporter.architectures import block_paths
from holdfast.prune.scores.ships import Head, head_channels
from holdfast.prune.structured.layouts import Unit, head_dim_of, layout_of, linear_in, shape_of


def head_weights(model: nn.Module, heads: Sequence[Head]) -> dict[str, Tensor]:
    """Module path -> which weights belong to the heads, bool [out, in]; only of linears that hold some.

    These are the columns of the attention's output that a head writes through, and the rows of queries,
    keys and values that make it. Keys and values are their group's, where query heads share them. Where an
    architecture's heads cannot be told apart in its rows (see `structured.layouts`), the columns are all.

    Arguments:
        heads: (block, query head).
    """
    found: dict[str, Tensor] = {}
    for block, head in heads:
        for name, axis, part in _parts(model, block, head):
            path = f"{block_paths(model)[block]}.{name}"
            weight = linear_in(model, block, name).weight
            mask = found.setdefault(path, torch.zeros_like(weight, dtype=torch.bool))
            mask.index_fill_(axis, torch.arange(part.start, part.stop), True)
    return found


def _parts(model: nn.Module, block: int, head: int) -> Iterator[tuple[str, int, slice]]:
    """(linear, axis of its weight, positions) of one head."""
    layout, shape = layout_of(model), shape_of(model)
    columns = linear_in(model, block, layout.head_writer).in_features
    yield layout.head_writer, 1, head_channels(head, shape.heads, columns)
    width = head_dim_of(model)
    counts: dict[Unit, int] = {"query": shape.heads, "key_value": shape.kv_heads}
    places: dict[Unit, int] = {"query": head, "key_value": head * shape.kv_heads // shape.heads}
    for name, segments in layout.head_readers:
        start = 0
        for unit in segments:
            first = start + places[unit] * width
            yield name, 0, slice(first, first + width)
            start += counts[unit] * width
