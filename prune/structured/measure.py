"""Scores of all structures from one walk through the blocks, one block's values at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from holdfast.errors import PruneError
from holdfast.exporter.architectures import block_paths
from holdfast.exporter.source import SourceModel
from holdfast.exporter.walk import BlockBatch, advance, run_block
from holdfast.prune.activations import first_block_batches
from holdfast.prune.gradients import AnswerBatch, mean_gradients
from holdfast.prune.scores.snip import snip_scores
from holdfast.prune.structured.layouts import layout_of, linear_in, shape_of
from holdfast.prune.structured.scores import (
    NAMES,
    StructureScores,
    block_score,
    column_scores,
    from_weight_scores,
    head_scores,
    join_blocks,
    require_finite,
)

BATCH_SIZE = 16


def measure_structures(
    source: SourceModel, token_ids: Sequence[Sequence[int]], *, batch_size: int = BATCH_SIZE
) -> StructureScores:
    """Scores on some prompts, every token counted once.

    Arguments:
        token_ids: chat-templated prompts, with or without their answers.

    Raises:
        PruneError: no prompts, an empty one, or activations that are not finite.
    """
    if not token_ids or not all(token_ids):
        raise PruneError(
            f"Structures are ranked by what they do on prompts, found {len(token_ids)} of which "
            f"{sum(not row for row in token_ids)} are empty: give prompts."
        )
    model = source.model
    batches = first_block_batches(model, token_ids, pad_id=source.tokenizer.pad_id, batch_size=batch_size)
    scores = join_blocks([measure_block(model, i, batches) for i in range(len(block_paths(model)))])
    require_finite(scores)
    return scores


@torch.no_grad()
def measure_block(model: nn.Module, index: int, batches: Sequence[BlockBatch]) -> StructureScores:
    """Scores of decoder block number `index` alone, and the batches moved on to the next block.

    Only this block has to be in memory.

    Arguments:
        batches: what enters the block; replaced by what leaves it.
    """
    layout, heads = layout_of(model), shape_of(model).heads
    block = model.get_submodule(block_paths(model)[index])
    attention = linear_in(model, index, layout.head_writer)
    ffn = linear_in(model, index, layout.channel_writer)
    parts: list[tuple[StructureScores, int]] = []
    for batch in batches:
        with _inputs(attention) as attended, _inputs(ffn) as activated:
            hidden = run_block(block, batch.hidden, batch.arguments[index])
        before, after = batch.hidden[batch.shown], hidden[batch.shown]  # [token, hidden]
        columns = column_scores(attention.weight, _shown(attended, batch), after)
        channels = column_scores(ffn.weight, _shown(activated, batch), after)
        whole = block_score(before, after)
        scores = StructureScores(head_scores(columns, heads)[None], channels[None], whole[None])
        parts.append((scores, len(after)))
        batch.hidden = hidden
    return _mean(parts)


def measure_first_order(source: SourceModel, answers: Sequence[AnswerBatch]) -> StructureScores:
    """SNIP's scores of the weights that write into the residual stream, summed over each structure.

    On harmful prompts with the aligned model's answers it is a score of safety; see `protect`.

    Arguments:
        answers: see `holdfast.prune.gradients.answer_batches`; left as they are.

    Raises:
        PruneError: gradients that are not finite.
    """
    model, layout = source.model, layout_of(source.model)
    moving = [replace(batch, state=replace(batch.state)) for batch in answers]
    parts = []
    for index, path in enumerate(block_paths(model)):
        names = (layout.head_writer, layout.channel_writer)
        linears = {name: linear_in(model, index, name) for name in names}
        gradients = mean_gradients(model, linears, moving, index)
        attention, ffn = (snip_scores(linears[name].weight, gradients[name]) for name in names)
        parts.append(from_weight_scores(attention, ffn, shape_of(model).heads))
        advance(model.get_submodule(path), [batch.state for batch in moving], index)
    scores = join_blocks(parts)
    require_finite(scores)
    return scores


def _mean(parts: Sequence[tuple[StructureScores, int]]) -> StructureScores:
    """Mean of scores, each weighted by its number of tokens."""
    counts = torch.tensor([count for _, count in parts], dtype=torch.float64)
    stacked = [torch.stack([getattr(scores, name) for scores, _ in parts]) for name in NAMES]
    return StructureScores(*(torch.tensordot(counts / counts.sum(), value, dims=1) for value in stacked))


def _shown(seen: list[Tensor], batch: BlockBatch) -> Tensor:
    """[token, in] of the positions that are no padding; a flattened linear sees [row * token, in]."""
    return seen[0].reshape(*batch.shown.shape, -1)[batch.shown]


@contextmanager
def _inputs(module: nn.Linear) -> Iterator[list[Tensor]]:
    """What flows into the module inside this context."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()
