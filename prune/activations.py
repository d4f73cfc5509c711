"""Norms of what flows into the linear layers, block by block.

Wanda scores a block on the output of the blocks before it as they are after pruning (section 3 of
the paper), so the calibration batches are carried from block to block instead of being run through
the whole model once for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from holdfast.exporter.batching import length_batches, pad_left, positions
from holdfast.exporter.walk import BlockBatch, first_inputs


def first_block_batches(
    model: nn.Module, token_ids: Sequence[Sequence[int]], *, pad_id: int, batch_size: int
) -> list[BlockBatch]:
    """What enters the first block, in batches of rows of similar length."""
    lengths = [len(row) for row in token_ids]
    batches = []
    for indices in length_batches(lengths, batch_size):
        ids, mask = pad_left([token_ids[index] for index in indices], pad_id)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}
        batches.append(first_inputs(model, inputs))
    return batches


@torch.inference_mode()
def input_norms(
    block: nn.Module, linears: dict[str, nn.Linear], batches: Sequence[BlockBatch], index: int
) -> dict[str, Tensor]:
    """||X_j||_2 of each linear's input channels over all tokens of all batches, float32 [in].

    Arguments:
        block: decoder block number `index`; its output is thrown away.
        linears: name -> linear inside the block.
    """
    squares = {
        name: torch.zeros(module.in_features, dtype=torch.float64) for name, module in linears.items()
    }
    for batch in batches:
        with ExitStack() as hooks:
            for name, module in linears.items():
                hooks.enter_context(_summed_squares(module, squares[name], batch.shown))
            block(batch.hidden, **batch.arguments[index])
    return {name: total.sqrt().float() for name, total in squares.items()}


@contextmanager
def _summed_squares(module: nn.Linear, total: Tensor, shown: Tensor) -> Iterator[None]:
    """Add the squares of the module's inputs at shown positions to `total`, float64 [in]."""

    def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        tokens = args[0].reshape(*shown.shape, -1)[shown].double()  # [token, in]
        total.add_(tokens.square().sum(dim=0))

    handle = module.register_forward_pre_hook(add)
    try:
        yield
    finally:
        handle.remove()
