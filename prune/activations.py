"""Norms of what flows into the linear layers, block by block.

Wanda scores a block on the output of the blocks before it as they are after pruning (section 3 of
the paper), so the calibration batches are carried from block to block instead of being run through
the whole model once for each.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.exporter.architectures import block_paths
from holdfast.exporter.batching import keep_logits, length_batches, pad_left, positions


@dataclass
class BlockBatch:
    """Calibration rows on their way through the decoder blocks.

    Attributes:
        hidden: input of the next block, float32 [row, token, channel].
        shown: which positions are tokens and not padding, bool [row, token].
        arguments: keyword arguments of each block (masks, rotary embeddings), in order.
    """

    hidden: Tensor
    shown: Tensor
    arguments: list[dict[str, Any]]


@torch.inference_mode()
def first_block_batches(
    model: nn.Module, token_ids: Sequence[Sequence[int]], *, pad_id: int, batch_size: int
) -> list[BlockBatch]:
    """Run the model once over the rows and keep what enters its first block."""
    lengths = [len(row) for row in token_ids]
    batches = []
    for indices in length_batches(lengths, batch_size):
        ids, mask = pad_left([token_ids[index] for index in indices], pad_id)
        entered: list[tuple[Tensor, dict[str, Any]]] = []
        with _recorded_inputs(model, entered):
            model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions(mask),
                use_cache=False,
                **keep_logits(model, 1),
            )
        batches.append(BlockBatch(entered[0][0], mask.bool(), [kwargs for _, kwargs in entered]))
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


@torch.inference_mode()
def advance(block: nn.Module, batches: Sequence[BlockBatch], index: int) -> None:
    """Replace each batch's hidden state by the block's output."""
    for batch in batches:
        output = block(batch.hidden, **batch.arguments[index])
        batch.hidden = output[0] if isinstance(output, tuple) else output


@contextmanager
def _recorded_inputs(model: nn.Module, entered: list[tuple[Tensor, dict[str, Any]]]) -> Iterator[None]:
    """Append (hidden state, keyword arguments) of every block, in order."""

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = inspect.signature(module.forward).parameters
        rest = {**dict(zip(names, args, strict=False)), **kwargs}
        entered.append((rest.pop("hidden_states"), rest))

    with ExitStack() as hooks:
        for path in block_paths(model):
            handle = model.get_submodule(path).register_forward_pre_hook(record, with_kwargs=True)
            hooks.callback(handle.remove)
        yield


@contextmanager
def _summed_squares(module: nn.Linear, total: Tensor, shown: Tensor) -> Iterator[None]:
    """Add the squares of the module's inputs at shown positions to `total`, float64 [in]."""

    def add(module: nn.Module, args: tuple[Any, ...]) -> None:
        tokens = args[0].reshape(*shown.shape, -1)[shown].double()  # [token, in]
        total.add_(tokens.square().sum(dim=0))

    handle = module.register_forward_pre_hook(add)
    try:
        yield
    finally:
        handle.remove()
