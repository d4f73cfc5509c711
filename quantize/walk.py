"""Calibration sequences walk through a decoder, one block in memory at a time.

The same walk serves a model in memory and one whose weights are read from disk as they are needed; the
hidden states of all sequences are kept, so that every block is read once for each walk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from holdfast.errors import CalibrationError
from holdfast.exporter import walk
from holdfast.exporter.architectures import block_paths
from holdfast.exporter.batching import length_batches, pad_left
from holdfast.exporter.walk import BlockBatch, advance, last_logits
from holdfast.quantize.prompts.sequences import Batch


class Decoder(Protocol):
    """A decoder whose parts are in memory while they are used; `StreamedModel` is one.

    Attributes:
        model: transformers model; what is not in memory is on the meta device.
        blocks: module paths of the decoder blocks.
    """

    model: Any
    blocks: list[str]

    def block(self, index: int) -> AbstractContextManager[nn.Module]: ...
    def outside(self) -> AbstractContextManager[None]: ...


class WholeModel:
    """A model in memory as a `Decoder`."""

    def __init__(self, model: Any) -> None:
        self.model, self.blocks = model, block_paths(model)

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        yield self.model.get_submodule(self.blocks[index])

    @contextmanager
    def outside(self) -> Iterator[None]:
        yield


def first_inputs(decoder: Decoder, batches: Sequence[Batch]) -> list[BlockBatch]:
    """What enters the first block; everything outside of the blocks has to be in memory."""
    return [walk.first_inputs(decoder.model, batch.inputs()) for batch in batches]


def walk_blocks(decoder: Decoder, batches: Sequence[BlockBatch]) -> Iterator[tuple[int, nn.Module]]:
    """(number, block) in order, each in memory until the next is asked for; then the batches move on.

    The hidden states that a block is shown with are its inputs; whatever is done to the block meanwhile
    decides its output.

    Raises:
        CalibrationError: a block's output holds NaN or infinity; the message names it.
    """
    for index, path in enumerate(decoder.blocks):
        with decoder.block(index) as block:
            yield index, block
            advance(block, batches, index)
        for batch in batches:
            require_finite(path, batch.hidden, batch.shown)


def require_finite(path: str, hidden: Tensor, shown: Tensor) -> None:
    """Raise CalibrationError where a shown position of a block's output is not finite.

    Arguments:
        hidden: float32 [row, token, channel].
        shown: bool [row, token].
    """
    if not hidden[shown].isfinite().all():
        raise CalibrationError(
            f"The output of `{path}` holds NaN or infinity on the calibration prompts: start from an "
            "intact checkpoint, or leave this layer out with `quantize.exclude`."
        )


def walked_logits(decoder: Decoder, batches: Sequence[Batch], keep: int) -> list[Tensor]:
    """Logits at the last `keep` positions, float32 [row, keep, V] for each batch, in one walk."""
    with decoder.outside():
        states = first_inputs(decoder, batches)
    for _ in walk_blocks(decoder, states):
        pass
    with decoder.outside():
        return [
            last_logits(decoder.model, batch.inputs(), state.hidden, keep)
            for batch, state in zip(batches, states, strict=True)
        ]


def greedy_answers(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int,
    batch_size: int,
) -> list[list[int]]:
    """Greedy answers without the stop token, one walk for each token and no cache.

    A cache of keys and values would grow with the number of blocks, which is what streaming avoids.

    Arguments:
        prompts: token ids, none empty.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    going = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        rows = [[*prompts[index], *answers[index]] for index in going]
        chosen = next_tokens(decoder, rows, pad_id=pad_id, batch_size=batch_size)
        going = [index for index, token in zip(going, chosen, strict=True) if token not in eos_ids]
        for index, token in zip(list(going), [t for t in chosen if t not in eos_ids], strict=True):
            answers[index].append(token)
        if not going:
            break
    return answers


def next_tokens(
    decoder: Decoder, rows: Sequence[Sequence[int]], *, pad_id: int, batch_size: int
) -> list[int]:
    """The likeliest next token of every row."""
    parts = length_batches([len(row) for row in rows], batch_size)
    batches = [padded_batch([rows[index] for index in part], pad_id) for part in parts]
    found = [0] * len(rows)
    for part, logits in zip(parts, walked_logits(decoder, batches, keep=1), strict=True):
        for index, token in zip(part, logits[:, -1].argmax(dim=-1).tolist(), strict=True):
            found[index] = token
    return found


def padded_batch(rows: Sequence[Sequence[int]], pad_id: int) -> Batch:
    """Left-padded rows; every position weighs the same."""
    ids, mask = pad_left(rows, pad_id)
    return Batch(ids, mask, torch.ones(len(rows), 1))
