"""What flows into the linear layers: norms and second moments of their inputs, block by block.

Wanda scores a block on the output of the blocks before it as they are after pruning (section 3 of
the paper), so the calibration batches are carried from block to block instead of being run through
the whole model once for each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from holdfast.exporter.batching import length_batches, pad_left, positions
from holdfast.exporter.walk import BlockBatch, first_inputs, run_block
from holdfast.quantize.weights.gptq import hessian_update

Add = Callable[[Tensor], None]
"""Takes tokens, float32 [tokens, in]."""


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


@torch.no_grad()
def input_norms(
    block: nn.Module, linears: Mapping[str, nn.Linear], batches: Sequence[BlockBatch], index: int
) -> dict[str, Tensor]:
    """||X_j||_2 of each linear's input channels over all tokens of all batches, float32 [in].

    Arguments:
        block: decoder block number `index`; its output is thrown away.
        linears: name -> linear inside the block.
    """
    squares = {
        name: torch.zeros(module.in_features, dtype=torch.float64) for name, module in linears.items()
    }
    watched = [(linears[name], partial(_add_squares, total)) for name, total in squares.items()]
    _run_watched(block, watched, batches, index)
    return {name: total.sqrt().float() for name, total in squares.items()}


@torch.no_grad()
def input_hessian(block: nn.Module, linear: nn.Linear, batches: Sequence[BlockBatch], index: int) -> Tensor:
    """`X X'` of one linear's inputs over all tokens of all batches, float32 [in, in].

    One linear at a time, since those of a whole block can take more memory than the block.
    """
    total = torch.zeros(linear.in_features, linear.in_features)
    _run_watched(block, [(linear, partial(hessian_update, total))], batches, index)
    return total


def _add_squares(total: Tensor, tokens: Tensor) -> None:
    total += tokens.double().square().sum(dim=0)


def _run_watched(
    block: nn.Module, watched: Sequence[tuple[nn.Linear, Add]], batches: Sequence[BlockBatch], index: int
) -> None:
    """Run the block on all batches; each linear's inputs at shown positions go to its function."""
    for batch in batches:
        with ExitStack() as hooks:
            for linear, add in watched:
                handle = linear.register_forward_pre_hook(partial(_hand_over, add, batch.shown))
                hooks.callback(handle.remove)
            run_block(block, batch.hidden, batch.arguments[index])


def _hand_over(add: Add, shown: Tensor, linear: nn.Module, args: tuple[Tensor, ...]) -> None:
    add(args[0].reshape(*shown.shape, -1)[shown])
