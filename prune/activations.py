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
from holdfast.prune.dense_target import moment_update
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
    """`X X'` of one linear's inputs over all tokens of all batches, float64 [in, in].

    One linear at a time, since those of a whole block can take more memory than the block; float64, so that
    it can be factored where it is.
    """
    total = torch.zeros(linear.in_features, linear.in_features, dtype=torch.float64)
    _run_watched(block, [(linear, partial(hessian_update, total))], batches, index)
    return total


@torch.no_grad()
def input_moments(
    block: nn.Module,
    linear: nn.Linear,
    batches: Sequence[BlockBatch],
    dense_block: nn.Module,
    dense_linear: nn.Linear,
    dense_batches: Sequence[BlockBatch],
    index: int,
) -> tuple[Tensor, Tensor]:
    """`X' X''` and `W X X''` of one linear, float32 [in, in] and [out, in]; see `dense_target`.

    Arguments:
        block, linear, batches: as in `input_hessian`; some of the block may be pruned already.
        dense_block, dense_linear, dense_batches: the same unpruned; the rows of the batches are the same.
    """
    hessian, moment = torch.zeros(linear.in_features, linear.in_features), torch.zeros_like(linear.weight)
    for batch, dense_batch in zip(batches, dense_batches, strict=True):
        found: list[Tensor] = []
        _run_watched(block, [(linear, found.append)], [batch], index)
        _run_watched(dense_block, [(dense_linear, found.append)], [dense_batch], index)
        hessian_update(hessian, found[0])
        moment_update(moment, dense_linear.weight, found[1], found[0])
    return hessian, moment


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
