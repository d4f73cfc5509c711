"""A smaller model from a plan: the config says less, the weights are sliced, nothing is masked."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.accelerate import init_empty_weights

from holdfast.errors import PruneError
from holdfast.exporter.architectures import block_paths, row_of
from holdfast.exporter.layout import settle_layout
from holdfast.exporter.quiet import quiet
from holdfast.exporter.source import SourceModel
from holdfast.prune.structured.blocks import block_fields, require_blocks
from holdfast.prune.structured.channels import require_channels
from holdfast.prune.structured.heads import groups_are_equal, kept_kv_heads, require_heads
from holdfast.prune.structured.layouts import Readers, Shape, Unit, head_dim_of, layout_of, shape_of
from holdfast.prune.structured.plan import StructuredPlan
from holdfast.prune.structured.scores import without

Slices = dict[str, tuple[int, Tensor]]
"""Parameter, relative to its block -> (axis, positions that stay, int64)."""


@dataclass(frozen=True)
class ModelSize:
    """What a model has, and what it weighs in float32.

    Attributes:
        parameters: of the whole model, a tied head counted once.
        block_parameters: of the decoder blocks.
        bytes: of all parameters.
    """

    blocks: int
    heads: int
    kv_heads: int
    head_dim: int
    channels: int
    parameters: int
    block_parameters: int
    bytes: int


@dataclass(frozen=True)
class RemovedFromBlock:
    """Positions in the block as it was, ascending."""

    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    channels: tuple[int, ...]


@dataclass(frozen=True)
class StructuredReport:
    """What was removed.

    Attributes:
        asked_frac: share of the decoder blocks' weights that was asked for; None for given counts.
        reached_frac: share of them that is gone.
        removed_blocks: decoder blocks that are gone, as they were counted before.
        removed: number of a block that stayed, as it was counted before -> what it lost.
    """

    asked_frac: float | None
    reached_frac: float
    before: ModelSize
    after: ModelSize
    removed_blocks: tuple[int, ...]
    removed: dict[int, RemovedFromBlock]


def remove(source: SourceModel, plan: StructuredPlan) -> SourceModel:
    """The model that is left; the source stays as it is, and the two share no memory.

    It is an ordinary model of the same class: `save_source` writes it, transformers loads it. Its config
    names the width of a head where heads went, because hidden size / heads no longer gives it.

    Raises:
        PruneError: a plan that this model cannot be left with.
    """
    model = source.model
    left = _shape_after(source, plan)
    state: dict[str, Tensor] = model.state_dict()
    with torch.no_grad():
        kept = _outside(model, state) | _inside(model, state, plan)
    smaller = _empty(model, _config(model, left, plan))
    smaller.load_state_dict(kept, assign=True)
    smaller.tie_weights()
    smaller.generation_config = copy.deepcopy(model.generation_config)
    return replace(source, model=smaller.eval().requires_grad_(False))


def report_removed(source: SourceModel, smaller: SourceModel, plan: StructuredPlan) -> StructuredReport:
    """What `remove(source, plan)` took from `source` to make `smaller`."""
    shape = shape_of(source.model)
    before, after = model_size(source.model), model_size(smaller.model)
    removed = {}
    for index, heads, channels in zip(plan.blocks, plan.heads, plan.channels, strict=True):
        removed[index] = RemovedFromBlock(
            heads=without(heads, shape.heads),
            kv_heads=without(kept_kv_heads(heads, shape), shape.kv_heads),
            channels=without(channels, shape.channels),
        )
    return StructuredReport(
        asked_frac=plan.asked_frac,
        reached_frac=1.0 - after.block_parameters / before.block_parameters,
        before=before,
        after=after,
        removed_blocks=without(plan.blocks, shape.blocks),
        removed=removed,
    )


def model_size(model: nn.Module) -> ModelSize:
    """Structures and parameters of a loaded model."""
    shape = shape_of(model)
    inside = model.get_submodule(row_of(model).blocks)
    return ModelSize(
        blocks=shape.blocks,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=head_dim_of(model),
        channels=shape.channels,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        block_parameters=sum(parameter.numel() for parameter in inside.parameters()),
        bytes=sum(parameter.nbytes for parameter in model.parameters()),
    )


def _shape_after(source: SourceModel, plan: StructuredPlan) -> Shape:
    """The shape that a plan leaves.

    Raises:
        PruneError: no config can say it.
    """
    shape = shape_of(source.model)
    require_blocks(source.model, shape.blocks, len(plan.blocks))
    counts = {
        (len(heads), len(kept_kv_heads(heads, shape)), len(channels))
        for heads, channels in zip(plan.heads, plan.channels, strict=True)
    }
    if len(counts) != 1 or len(plan.heads) != len(plan.blocks):
        raise PruneError(
            f"A plan should leave every block of this {source.architecture} as many heads and channels as "
            f"the others, because its config has one number for all; found {len(counts)} different ones."
        )
    heads, kv_heads, channels = counts.pop()
    require_heads(source.architecture, shape, heads)
    require_channels(source.architecture, shape.channels, channels)
    for number, block in zip(plan.blocks, plan.heads, strict=True):
        if not groups_are_equal(block, shape):
            raise PruneError(
                f"A plan leaves block {number} of this {source.architecture} the query heads "
                f"{', '.join(map(str, block))}, which are not equally many for each of its {kv_heads} "
                "key-value heads: remove whole groups, or the same number from each."
            )
    return Shape(len(plan.blocks), heads, kv_heads, channels)


def _config(model: Any, left: Shape, plan: StructuredPlan) -> Any:
    """The model's config with the smaller numbers, made as `from_pretrained` will make it.

    Raises:
        PruneError: transformers refuses it.
    """
    config, shape, layout = model.config, shape_of(model), layout_of(model)
    changes: dict[str, Any] = {}
    if left.blocks != shape.blocks:
        changes |= {"num_hidden_layers": left.blocks, **block_fields(model, plan.blocks)}
    if left.channels != shape.channels:
        changes[layout.channels_field] = left.channels
    if left.heads != shape.heads:
        changes["num_attention_heads"] = left.heads
        changes["num_key_value_heads"] = left.kv_heads
        changes["head_dim"] = head_dim_of(model)
    names = config.attribute_map
    values = config.to_dict() | {names.get(name, name): value for name, value in changes.items()}
    try:
        smaller = type(config).from_dict(values)
    except ValueError as error:  # a config that checks one of its fields against another
        raise PruneError(
            f"transformers' config of this {type(model).__name__} cannot say what the plan leaves "
            f"({str(error).splitlines()[0]}): remove other structures."
        ) from error
    smaller._attn_implementation = config._attn_implementation
    return smaller


def _empty(model: Any, config: Any) -> Any:
    """A model of the same class without weights, its linears as `load_source` leaves them."""
    with quiet(), init_empty_weights():
        smaller = type(model)(config)
    settle_layout(smaller)
    return smaller


def _outside(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of what is in no decoder block."""
    blocks = f"{row_of(model).blocks}."
    return {name: value.clone() for name, value in state.items() if not name.startswith(blocks)}


def _inside(model: nn.Module, state: dict[str, Tensor], plan: StructuredPlan) -> dict[str, Tensor]:
    """What stays of the decoder blocks, copied, under the names that it has from now on."""
    paths, kept = block_paths(model), {}
    for number, (index, heads, channels) in enumerate(
        zip(plan.blocks, plan.heads, plan.channels, strict=True)
    ):
        slices = _slices(model, heads, channels)
        old, new = f"{paths[index]}.", f"{paths[number]}."
        for name, value in state.items():
            if name.startswith(old):
                inner = name.removeprefix(old)
                kept[new + inner] = _sliced(value, slices.get(inner))
    return kept


def _slices(model: nn.Module, heads: tuple[int, ...], channels: tuple[int, ...]) -> Slices:
    """What to take of the parameters of one block."""
    shape, layout, width = shape_of(model), layout_of(model), head_dim_of(model)
    rows: dict[Unit, Tensor] = {
        "query": _runs(heads, width),
        "key_value": _runs(kept_kv_heads(heads, shape), width),
        "channel": torch.tensor(channels),
    }
    sizes: dict[Unit, int] = {
        "query": shape.heads * width,
        "key_value": shape.kv_heads * width,
        "channel": shape.channels,
    }
    return _reader_slices((*layout.head_readers, *layout.channel_readers), rows, sizes) | {
        f"{layout.head_writer}.weight": (1, rows["query"]),
        f"{layout.channel_writer}.weight": (1, rows["channel"]),
    }


def _reader_slices(readers: Readers, rows: dict[Unit, Tensor], sizes: dict[Unit, int]) -> Slices:
    """Rows of weights and biases of linears that are one or more runs of units."""
    slices: Slices = {}
    for name, segments in readers:
        starts = [sum(sizes[unit] for unit in segments[:i]) for i in range(len(segments))]
        index = torch.cat([start + rows[unit] for start, unit in zip(starts, segments, strict=True)])
        slices |= {f"{name}.weight": (0, index), f"{name}.bias": (0, index)}
    return slices


def _runs(kept: Sequence[int], width: int) -> Tensor:
    """Positions of the channels of some heads, int64 [len(kept) * width]."""
    return (torch.tensor(kept)[:, None] * width + torch.arange(width)).flatten()


def _sliced(value: Tensor, taken: tuple[int, Tensor] | None) -> Tensor:
    return value.clone() if taken is None else value.index_select(*taken)
