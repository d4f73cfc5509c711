"""Safety heads of a model: each query head of each block taken out in turn, on harmful prompts.

Blocks before the one in question are not run again: the prompts are carried from block to block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.exporter.architectures import block_paths, row_of
from holdfast.exporter.batching import length_batches, pad_left, positions
from holdfast.exporter.walk import BlockBatch, advance, first_inputs, last_logits, run_block
from holdfast.prune.scores.ships import Head, head_channels, ships_scores


@dataclass
class _Prompts:
    """A batch of prompts on its way, with the unchanged model's next-token logits, float32 [row, V]."""

    inputs: dict[str, Tensor]
    state: BlockBatch
    logits: Tensor


@torch.no_grad()
def head_scores(
    model: nn.Module, token_ids: Sequence[Sequence[int]], *, pad_id: int, batch_size: int
) -> dict[Head, float]:
    """(block, head) -> Ships score in nats, the mean over prompts.

    Arguments:
        token_ids: harmful prompts with the chat template, up to where the answer begins.
    """
    blocks = [model.get_submodule(path) for path in block_paths(model)]
    batches = _first(model, token_ids, pad_id, batch_size)
    found: dict[Head, float] = {}
    for index, block in enumerate(blocks):
        output = attention_output(model, index)
        for head in range(query_heads(model)):
            channels = head_channels(head, query_heads(model), output.in_features)
            scores = [_without(model, blocks, batch, index, output, channels) for batch in batches]
            found[index, head] = float(torch.cat(scores).mean())
        advance(block, [batch.state for batch in batches], index)
    return found


def attention_output(model: nn.Module, index: int) -> nn.Linear:
    """The linear that puts the heads of block `index` back into the residual stream."""
    found: nn.Linear = model.get_submodule(attention_output_path(model, index))  # type: ignore[assignment]
    return found


def attention_output_path(model: nn.Module, index: int) -> str:
    """Its module path; the table names it first among the writers."""
    return f"{block_paths(model)[index]}.{row_of(model).writers[0]}"


def query_heads(model: nn.Module) -> int:
    """Query heads of every block."""
    config: Any = model.config
    return int(config.num_attention_heads)


def _first(
    model: nn.Module, token_ids: Sequence[Sequence[int]], pad_id: int, batch_size: int
) -> list[_Prompts]:
    blocks = [model.get_submodule(path) for path in block_paths(model)]
    batches = []
    for indices in length_batches([len(row) for row in token_ids], batch_size):
        ids, mask = pad_left([token_ids[index] for index in indices], pad_id)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}
        state = first_inputs(model, inputs)
        batches.append(_Prompts(inputs, state, _next_logits(model, blocks, inputs, state, 0)))
    return batches


def _without(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    batch: _Prompts,
    index: int,
    output: nn.Linear,
    channels: slice,
) -> Tensor:
    """Ships score of each prompt of a batch, float32 [row]."""

    def silence(linear: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        values = args[0].clone()
        values[..., channels] = 0.0
        return (values,)

    handle = output.register_forward_pre_hook(silence)
    try:
        return ships_scores(batch.logits, _next_logits(model, blocks, batch.inputs, batch.state, index))
    finally:
        handle.remove()


def _next_logits(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    inputs: dict[str, Tensor],
    state: BlockBatch,
    start: int,
) -> Tensor:
    """Logits after the last token, float32 [row, V], from what enters block `start`."""
    hidden = state.hidden
    for number in range(start, len(blocks)):
        hidden = run_block(blocks[number], hidden, state.arguments[number])
    return last_logits(model, inputs, hidden, keep=1)[:, -1]
