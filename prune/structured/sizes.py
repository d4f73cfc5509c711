"""What a structure weighs, and what a model does."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from holdfast.exporter.architectures import block_paths
from holdfast.prune.structured.layouts import (
    Readers,
    Shape,
    Unit,
    head_dim_of,
    layout_of,
    linear_in,
    shape_of,
)


@dataclass(frozen=True)
class BlockWeights:
    """Parameters of one decoder block, norms and biases among them.

    Attributes:
        shape: what the block has.
        total: all of them.
        head, kv_head, channel: what goes with one query head, one key-value head, one FFN channel.
    """

    shape: Shape
    total: int
    head: int
    kv_head: int
    channel: int

    def of(self, left: Shape) -> int:
        """Parameters of a block that is left with the heads and channels of `left`."""
        return (
            self.total
            - (self.shape.heads - left.heads) * self.head
            - (self.shape.kv_heads - left.kv_heads) * self.kv_head
            - (self.shape.channels - left.channels) * self.channel
        )


def block_weights(model: nn.Module) -> BlockWeights:
    """Counted in the first block; the others have the same shapes."""
    layout, width = layout_of(model), head_dim_of(model)
    block = model.get_submodule(block_paths(model)[0])
    head_columns = linear_in(model, 0, layout.head_writer).out_features
    channel_column = linear_in(model, 0, layout.channel_writer).out_features
    return BlockWeights(
        shape=shape_of(model),
        total=sum(parameter.numel() for parameter in block.parameters()),
        head=width * (_read(model, layout.head_readers, "query") + head_columns),
        kv_head=width * _read(model, layout.head_readers, "key_value"),
        channel=_read(model, layout.channel_readers, "channel") + channel_column,
    )


def _read(model: nn.Module, readers: Readers, unit: Unit) -> int:
    """Parameters of one output row of this unit, over all linears that have such rows."""
    modules = [(linear_in(model, 0, name), segments.count(unit)) for name, segments in readers]
    return sum(runs * (module.in_features + (module.bias is not None)) for module, runs in modules)
