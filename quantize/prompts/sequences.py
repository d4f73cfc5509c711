"""Calibration sequences: a chat prompt followed by the aligned model's own greedy answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.chat import ChatTokenizer, user


@dataclass(frozen=True)
class Batch:
    """Left-padded sequences; the answers end in the last column.

    Attributes:
        ids: int64 [batch, tokens].
        mask: int64 [batch, tokens], 0 at padding.
        weights: float32 [batch, positions], loss weights of the last `positions` columns.
    """

    ids: Tensor
    mask: Tensor
    weights: Tensor

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the model's forward."""
        positions = (self.mask.cumsum(dim=1) - 1).clamp(min=0)
        return {"input_ids": self.ids, "attention_mask": self.mask, "position_ids": positions}

    @property
    def positions(self) -> int:
        return int(self.weights.shape[1])

    def rows(self, index: Tensor) -> Batch:
        """Some sequences, without columns that are padding in all of them."""
        mask = self.mask[index]
        columns = int(mask.sum(dim=1).amax())
        positions = int((self.weights[index] > 0).sum(dim=1).amax())
        return Batch(self.ids[index, -columns:], mask[:, -columns:], self.weights[index, -positions:])


def chat_prompts(tokenizer: ChatTokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of one-turn conversations, up to where the answer begins."""
    return [tokenizer.encode_chat(user(prompt)) for prompt in prompts]


def with_stop(answer: Sequence[int], limit: int, stop_id: int) -> list[int]:
    """An answer that ended before the limit is followed by the stop token, which is learned too."""
    return [*answer, stop_id] if len(answer) < limit else list(answer)


def response_weights(count: int, response_tokens: int, first: float) -> list[float]:
    """Loss weight of each response position: `first`, then falling linearly to 1."""
    last = max(1, response_tokens - 1)
    return [max(1.0, first - (first - 1.0) * index / last) for index in range(count)]


def make_batch(
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    pad_id: int,
    response_tokens: int,
    first_weight: float,
) -> Batch:
    """Sequences as one right-aligned batch.

    The last token of an answer is only predicted, never read. The loss counts the last prompt
    position and every answer position but the last.

    Arguments:
        prompts, answers: token ids; no answer is empty.
    """
    full = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]
    columns, positions = max(map(len, full)), max(map(len, answers))
    ids = torch.full((len(full), columns), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    weights = torch.zeros(len(full), positions)
    for row, (tokens, answer) in enumerate(zip(full, answers, strict=True)):
        ids[row, -len(tokens) :] = torch.tensor(tokens)
        mask[row, -len(tokens) :] = 1
        values = response_weights(len(answer), response_tokens, first_weight)
        weights[row, -len(answer) :] = torch.tensor(values)
    return Batch(ids, mask, weights)


def shuffled_rows(
    count: int, size: int, generator: torch.Generator, shares: Tensor | None = None
) -> Iterator[Tensor]:
    """Endless batches of row indices, int64 [at most size].

    Seeded permutations, one after another; with `shares`, float32 [count], rows are drawn in proportion to
    them instead, without a repetition in a batch.
    """
    while shares is not None:
        yield torch.multinomial(shares, min(size, int((shares > 0).sum())), generator=generator)
    while True:
        yield from torch.split(torch.randperm(count, generator=generator), size)


def even_rows(count: int, size: int) -> Iterator[Tensor]:
    """All row indices once, in order."""
    yield from torch.split(torch.arange(count), size)
