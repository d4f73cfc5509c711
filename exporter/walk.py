"""A decoder taken apart: what enters its blocks, one block at a time, and the logits after the last.

Masks, rotary embeddings and position ids are made by the model's own forward, which is run with its blocks
skipped; so every architecture of the table walks the same way, and the blocks need not be in memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.exporter.architectures import block_paths, present, row_of
from holdfast.exporter.batching import keep_logits

Entered = list[tuple[Tensor, dict[str, Any]]]


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


@torch.no_grad()
def first_inputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> BlockBatch:
    """What enters the first block; no block is run, and none needs to be in memory.

    Arguments:
        inputs: keyword arguments of the model's forward; `attention_mask` is among them.
    """
    entered: Entered = []
    with _blocks_skipped(model, entered):
        _forward(model, inputs, keep=1)
    arguments = [kwargs for _, kwargs in entered]
    return BlockBatch(entered[0][0], inputs["attention_mask"].bool(), arguments)


@torch.no_grad()
def last_logits(model: nn.Module, inputs: Mapping[str, Tensor], hidden: Tensor, keep: int) -> Tensor:
    """Logits that follow from the last block's output, float32 [row, keep, V]; no block is run.

    Arguments:
        inputs: as in `first_inputs`.
        hidden: output of the last block, float32 [row, token, channel].
        keep: how many positions at the end.
    """
    return logits_from(model, inputs, hidden, keep)


def logits_from(model: nn.Module, inputs: Mapping[str, Tensor], hidden: Tensor, keep: int) -> Tensor:
    """As `last_logits`, with gradients back to `hidden` where it asks for them."""
    with _blocks_skipped(model, [], hidden):
        return _forward(model, inputs, keep=keep)


def run_block(block: nn.Module, hidden: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """A decoder block's output, float32 [row, token, channel]."""
    output = block(hidden, **arguments)
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


@torch.no_grad()
def advance(block: nn.Module, batches: Sequence[BlockBatch], index: int) -> None:
    """Replace each batch's hidden state by the output of `block`, which is number `index`."""
    for batch in batches:
        batch.hidden = run_block(block, batch.hidden, batch.arguments[index])


def _forward(model: nn.Module, inputs: Mapping[str, Tensor], keep: int) -> Tensor:
    logits: Tensor = model(**inputs, use_cache=False, **keep_logits(model, keep)).logits
    return logits[:, -keep:]


@contextmanager
def _blocks_skipped(model: nn.Module, entered: Entered, hidden: Tensor | None = None) -> Iterator[None]:
    """The blocks do nothing but note what enters them; `hidden` is what comes after them.

    Without `hidden` it is the first block's input.
    """
    blocks = [model.get_submodule(path) for path in block_paths(model)]
    row = row_of(model)
    following = model.get_submodule(present(model, (row.final_norm, *row.after, row.head))[0])
    with ExitStack() as undo:
        for block in blocks:
            vars(block)["forward"] = _skip(block, entered)
            undo.callback(vars(block).pop, "forward")
        handle = following.register_forward_pre_hook(
            lambda _, __: (entered[0][0] if hidden is None else hidden,)
        )
        undo.callback(handle.remove)
        yield


def _skip(block: nn.Module, entered: Entered) -> Callable[..., Tensor]:
    names = list(inspect.signature(block.forward).parameters)

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        hidden: Tensor = named.pop("hidden_states")
        entered.append((hidden, named))
        # Some models take element 0 of what a block returns and some take it whole: one leading axis more
        # gives both of them something to go on with, and what follows the blocks is replaced anyway.
        return entered[0][0][None]

    return forward
