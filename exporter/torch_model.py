"""The torch reference as a LanguageModel: what the full-precision baseline and the base run on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from holdfast.chat import ChatTokenizer
from holdfast.errors import InputError
from holdfast.exporter.batching import keep_logits, length_batches, pad_left, positions
from holdfast.language_model import OnDone


class TorchLanguageModel:
    """A transformers causal language model behind `holdfast.language_model.LanguageModel`.

    Batches are left-padded and cached; decoding is greedy whatever generation_config.json says.

    Arguments:
        model: transformers model in eval mode; `SourceModel.model`.
        name: what reports call it.
        batch_size: prompts a forward pass.
    """

    def __init__(self, model: Any, tokenizer: ChatTokenizer, name: str, batch_size: int = 32) -> None:
        self.model = model
        self._tokenizer = tokenizer
        self._name = name
        self._batch_size = batch_size

    @property
    def name(self) -> str:
        return self._name

    @property
    def tokenizer(self) -> ChatTokenizer:
        return self._tokenizer

    @property
    def context_tokens(self) -> int:
        """Longest sequence of prompt and answer."""
        length: int = self.model.config.max_position_embeddings
        return length

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        on_done: OnDone | None = None,
    ) -> list[list[int]]:
        """Greedy answers without the stop id; an answer also ends where the context does.

        Raises:
            InputError: an empty prompt, or one longer than the context.
        """
        answers: list[list[int]] = [[] for _ in prompts]
        for batch in self._batches(prompts, on_done):
            rows = [prompts[index] for index in batch]
            limits = [min(max_new_tokens, self.context_tokens - len(row)) for row in rows]
            for index, answer in zip(batch, self._answer(rows, limits), strict=True):
                answers[index] = answer
        return answers

    def token_logprobs(
        self,
        prompts: Sequence[Sequence[int]],
        continuations: Sequence[Sequence[int]],
        *,
        on_done: OnDone | None = None,
    ) -> list[NDArray[np.float32]]:
        """Natural-log probabilities of the continuation tokens, float32 [continuation_tokens] each.

        Raises:
            InputError: an empty prompt, or prompt and continuation longer than the context.
        """
        whole = [[*prompt, *rest] for prompt, rest in zip(prompts, continuations, strict=True)]
        if not all(prompts):
            raise InputError("Expected at least one token in every prompt, found an empty prompt.")
        result: list[NDArray[np.float32]] = [np.empty(0, np.float32) for _ in whole]
        for batch in self._batches(whole, on_done):
            keep = max(len(continuations[index]) for index in batch) + 1
            logits = self._forward([whole[index] for index in batch], keep)
            for index, row in zip(batch, logits.log_softmax(dim=-1), strict=True):
                result[index] = _pick(row, continuations[index])
        return result

    def next_token_logits(
        self, prompts: Sequence[Sequence[int]], *, on_done: OnDone | None = None
    ) -> NDArray[np.float32]:
        """Logits after the last prompt token, float32 [prompt, vocabulary].

        Raises:
            InputError: an empty prompt, or one longer than the context.
        """
        logits = np.empty((len(prompts), self.model.config.vocab_size), dtype=np.float32)
        for batch in self._batches(prompts, on_done):
            logits[batch] = self._forward([prompts[index] for index in batch], 1)[:, -1].numpy()
        return logits

    def _batches(self, rows: Sequence[Sequence[int]], on_done: OnDone | None) -> Iterator[list[int]]:
        """Index batches; reports each one as done when the next is asked for."""
        lengths = [len(row) for row in rows]
        _check_lengths(lengths, self.context_tokens)
        for batch in length_batches(lengths, self._batch_size):
            yield batch
            if on_done is not None:
                on_done(len(batch))

    @torch.inference_mode()
    def _forward(self, rows: Sequence[Sequence[int]], keep: int) -> Tensor:
        """Logits float32 [row, min(keep, longest), vocabulary] of the last `keep` positions."""
        ids, mask = pad_left(rows, self._tokenizer.pad_id)
        logits: Tensor = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions(mask),
            use_cache=False,
            **keep_logits(self.model, keep),
        ).logits
        return logits[:, -keep:].float()

    @torch.inference_mode()
    def _answer(self, rows: Sequence[Sequence[int]], limits: Sequence[int]) -> list[list[int]]:
        """Greedy decoding of one batch: a prefill, then one cached step a token."""
        ids, mask = pad_left(rows, self._tokenizer.pad_id)
        cache = DynamicCache(config=self.model.config)
        answers: list[list[int]] = [[] for _ in rows]
        going = {index for index, limit in enumerate(limits) if limit > 0}
        while going:
            logits = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions(mask)[:, -ids.shape[1] :],
                past_key_values=cache,
                use_cache=True,
                **keep_logits(self.model, 1),
            ).logits
            ids = logits[:, -1].argmax(dim=-1, keepdim=True)
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            going = _append(answers, ids[:, 0].tolist(), going, limits, self._tokenizer.eos_ids)
        return answers


def _append(
    answers: list[list[int]],
    chosen: Sequence[int],
    going: set[int],
    limits: Sequence[int],
    eos_ids: Sequence[int],
) -> set[int]:
    """Add one token to each answer that is still going; returns those that go on."""
    still = set()
    for index in going:
        if chosen[index] in eos_ids:
            continue
        answers[index].append(chosen[index])
        if len(answers[index]) < limits[index]:
            still.add(index)
    return still


def _pick(logprobs: Tensor, continuation: Sequence[int]) -> NDArray[np.float32]:
    """What the last rows of [token, vocabulary] give the tokens of `continuation`."""
    count = len(continuation)
    rows = logprobs[-count - 1 : -1] if count else logprobs[:0]
    picked: NDArray[np.float32] = (
        rows.gather(1, torch.tensor(continuation, dtype=torch.int64)[:, None])[:, 0].numpy().copy()
    )
    return picked


def _check_lengths(lengths: Sequence[int], context_tokens: int) -> None:
    if min(lengths, default=1) == 0:
        raise InputError("Expected at least one token in every prompt, found an empty prompt.")
    if max(lengths, default=0) > context_tokens:
        raise InputError(
            f"A prompt has {max(lengths)} tokens and the model's context holds {context_tokens}: "
            "shorten the prompt."
        )
