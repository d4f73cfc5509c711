"""What flows into the linear layers: norms and second moments of their inputs, block by block.

Wanda scores a block on the output of the blocks before it as they are after pruning (section 3 of
the paper), so the calibration batches are carried from block to block instead of being run through
the whole model once for each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.exporter.batching import length_batches, pad_left, positions
from holdfast.exporter.walk import BlockBatch, first_inputs, run_block
from holdfast.prune.dense_target import moment_update
from holdfast.quantize.weights.gptq import hessian_update

BATCH_BYTES = 1 << 23
"""Activations of an FFN four times as wide as the hidden state, for the rows that run through a block
together: with wide models they are fewer, so that activations stay small beside the weights."""
CHUNK_TOKENS = 128
"""Tokens that are float64 at a time."""

Add = Callable[[Tensor], None]
"""Takes tokens, float32 [tokens, in]."""


def first_block_batches(
    model: nn.Module, token_ids: Sequence[Sequence[int]], *, pad_id: int, batch_size: int
) -> list[BlockBatch]:
    """What enters the first block, in batches of rows of similar length.

    Arguments:
        batch_size: rows in a batch, fewer where they would take more than `BATCH_BYTES`.
    """
    lengths = [len(row) for row in token_ids]
    config: Any = model.config
    most = BATCH_BYTES // (16 * config.hidden_size * max(lengths, default=1))
    batches = []
    for indices in length_batches(lengths, max(1, min(batch_size, most))):
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
    _run_watched(block, [(linear, partial(_add_products, total))], batches, index)
    return total


@dataclass(frozen=True)
class Watched:
    """A linear, decoder block `index` around it, and what enters the block."""

    linear: nn.Linear
    block: nn.Module
    batches: Sequence[BlockBatch]
    index: int

    def inputs(self, number: int) -> Tensor:
        """The linear's inputs at the shown positions of one batch, float32 [tokens, in]."""
        found: list[Tensor] = []
        _run_watched(self.block, [(self.linear, found.append)], [self.batches[number]], self.index)
        return found[0]


@torch.no_grad()
def input_moments(pruned: Watched, unpruned: Watched) -> tuple[Tensor, Tensor]:
    """`X' X''` and `W X X''` of one linear, float32 [in, in] and [out, in]; see `dense_target`.

    Arguments:
        pruned: in the pruned model, with weights of the block that may be pruned already or not yet.
        unpruned: the same linear and the same rows in the unpruned one.
    """
    weight = unpruned.linear.weight
    hessian, moment = torch.zeros(weight.shape[1], weight.shape[1]), torch.zeros_like(weight)
    for number in range(len(pruned.batches)):
        inputs = pruned.inputs(number)
        hessian_update(hessian, inputs)
        moment_update(moment, weight, unpruned.inputs(number), inputs)
    return hessian, moment


def _add_squares(total: Tensor, tokens: Tensor) -> None:
    for part in torch.split(tokens, CHUNK_TOKENS):
        total += part.double().square().sum(dim=0)


def _add_products(total: Tensor, tokens: Tensor) -> None:
    for part in torch.split(tokens, CHUNK_TOKENS):  # float64 twice as large as they are
        hessian_update(total, part)


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
