"""`OnnxLanguageModel`: an exported folder as the suites' `LanguageModel`, without torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holdfast.chat import ChatTokenizer
from holdfast.errors import ExecutionError, InputError, ModelSourceError
from holdfast.language_model import OnDone
from holdfast.runtime.graph import DecoderGraph
from holdfast.runtime.padding import batches, left_pad

LOGITS_BYTES = 512 << 20  # largest block of logits that one run may return
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")


@dataclass(frozen=True)
class OnnxLanguageModel:
    """A `holdfast.language_model.LanguageModel` on a decoder graph; greedy and deterministic.

    Attributes:
        name: what reports call it.
        context_tokens: longest sequence, prompt and answer together.
        batch_size: most sequences in one run of the graph.
    """

    name: str
    tokenizer: ChatTokenizer
    graph: DecoderGraph
    context_tokens: int
    batch_size: int

    @classmethod
    def open(
        cls, folder: Path, *, threads: int = 0, name: str = "artifact (ONNX)", batch_size: int = 32
    ) -> OnnxLanguageModel:
        """Load graph, tokenizer and config.json of an exported folder or a bundle.

        Arguments:
            threads: intra-op threads; 0 leaves the choice to ONNX Runtime.

        Raises:
            ModelSourceError: no such folder, or config.json states no context length.
            TokenizerError: tokenizer or chat template are missing or malformed.
            ExecutionError: `model.onnx` cannot be loaded.
        """
        if not folder.is_dir():
            raise ModelSourceError(f"Expected a folder with model.onnx at {folder}, found none.")
        return cls(
            name=name,
            tokenizer=ChatTokenizer.from_folder(folder),
            graph=DecoderGraph.open(folder, threads=threads),
            context_tokens=context_tokens(folder),
            batch_size=batch_size,
        )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        on_done: OnDone | None = None,
    ) -> list[list[int]]:
        """Greedy answers: new ids only, ended before the first stop id or at `max_new_tokens`.

        An answer also ends where the context does.

        Raises:
            InputError: a prompt is empty or longer than the context.
            ExecutionError: ONNX Runtime failed, or the logits are not numbers.
        """
        self.require_room([len(prompt) for prompt in prompts], 0)
        answers: list[list[int]] = [[] for _ in prompts]
        for batch in self._batches(prompts):
            new = self._answer([prompts[index] for index in batch], max_new_tokens, on_done)
            for index, answer in zip(batch, new, strict=True):
                answers[index] = answer
        return answers

    def token_logprobs(
        self,
        prompts: Sequence[Sequence[int]],
        continuations: Sequence[Sequence[int]],
        *,
        on_done: OnDone | None = None,
    ) -> list[NDArray[np.float32]]:
        """Natural-log probability of each continuation token, one array [its tokens] a prompt.

        Raises:
            InputError: a prompt or a continuation is empty, or both together exceed the context.
            ExecutionError: ONNX Runtime failed, or the logits are not numbers.
        """
        if not all(continuations):
            raise InputError("Expected continuations of at least one token, found an empty one.")
        pairs = [[*p, *c] for p, c in zip(prompts, continuations, strict=True)]
        self.require_room([len(prompt) for prompt in prompts], 1)
        self.require_room([len(pair) for pair in pairs], 0)
        result: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(pairs)
        inputs = [pair[:-1] for pair in pairs]  # the last token is predicted, never read
        for index, logits in self._last_logits(inputs, [len(c) for c in continuations], on_done):
            result[index] = logprobs_of(logits, continuations[index])
        return result

    def next_token_logits(
        self, prompts: Sequence[Sequence[int]], *, on_done: OnDone | None = None
    ) -> NDArray[np.float32]:
        """Logits after the last prompt token, float32 [prompt, vocabulary].

        Raises:
            InputError: a prompt is empty or longer than the context.
            ExecutionError: ONNX Runtime failed, or the logits are not numbers.
        """
        self.require_room([len(prompt) for prompt in prompts], 0)
        result = np.empty((len(prompts), self.graph.vocabulary_size), np.float32)
        for index, logits in self._last_logits(prompts, [1] * len(prompts), on_done):
            result[index] = logits[0]
        return result

    def require_room(self, prompt_tokens: Sequence[int], new_tokens: int) -> None:
        """Raise InputError unless every prompt holds a token and fits with `new_tokens` more."""
        for index, tokens in enumerate(prompt_tokens):
            if tokens == 0:
                raise InputError(f"Prompt {index} is empty: expected at least one token.")
            if tokens + new_tokens > self.context_tokens:
                raise InputError(
                    f"Prompt {index} has {tokens} tokens and needs room for {new_tokens} more; the "
                    f"context of {self.name} holds {self.context_tokens}: shorten the prompt."
                )

    def _batches(self, sequences: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        return batches(
            [len(sequence) for sequence in sequences],
            batch_size=self.batch_size,
            vocabulary_size=self.graph.vocabulary_size,
            logits_bytes=LOGITS_BYTES,
        )

    def _last_logits(
        self, sequences: Sequence[Sequence[int]], counts: Sequence[int], on_done: OnDone | None
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(index, logits of the last `counts[index]` positions) of every sequence."""
        for batch in self._batches(sequences):
            ids, mask = left_pad([sequences[index] for index in batch], self.tokenizer.pad_id)
            logits, _ = self.graph.forward(ids, mask, self.graph.empty_cache(len(batch)))
            for row, index in enumerate(batch):
                yield index, require_numbers(logits[row, -counts[index] :], self.name)
            _tell(on_done, len(batch))

    def _answer(
        self, prompts: list[Sequence[int]], max_new_tokens: int, on_done: OnDone | None
    ) -> list[list[int]]:
        """Decode one batch; a finished row leaves it, and its part of the cache is dropped."""
        answers: list[list[int]] = [[] for _ in prompts]
        room = np.minimum(max_new_tokens, [self.context_tokens - len(p) for p in prompts])
        rows = np.arange(len(prompts))
        ids, mask = left_pad(prompts, self.tokenizer.pad_id)
        cache = self.graph.empty_cache(len(prompts))
        for step in range(room.max()):
            logits, cache = self.graph.forward(ids, mask, cache)
            tokens = require_numbers(logits[:, -1], self.name).argmax(axis=-1)
            answering = ~np.isin(tokens, self.tokenizer.eos_ids) & (room[rows] > step)
            for row, token in zip(rows[answering], tokens[answering], strict=True):
                answers[row].append(int(token))
            going = answering & (room[rows] > step + 1)
            if not going.all():
                _tell(on_done, int((~going).sum()))
                cache = [array[going] for array in cache]
                rows, tokens, mask = rows[going], tokens[going], mask[going]
            if not rows.size:
                return answers
            ids = tokens[:, None]
            mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
        _tell(on_done, rows.size)
        return answers


def logprobs_of(logits: NDArray[np.float32], tokens: Sequence[int]) -> NDArray[np.float32]:
    """Natural-log softmax of logits [token, vocabulary] at one token each, float32 [token]."""
    wide = logits.astype(np.float64)
    highest = wide.max(axis=-1)
    normaliser = highest + np.log(np.exp(wide - highest[:, None]).sum(axis=-1))
    chosen = wide[np.arange(len(tokens)), np.asarray(tokens)]
    return np.asarray(chosen - normaliser, np.float32)


def require_numbers(logits: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    """`logits` as they are; ExecutionError where one is NaN or infinite: arg-max would hide it."""
    if not np.isfinite(logits).all():
        raise ExecutionError(
            f"{name} gave logits that are not finite numbers: its graph is damaged, make it again."
        )
    return logits


def context_tokens(folder: Path) -> int:
    """Context length that config.json states, in tokens.

    Raises:
        ModelSourceError: unreadable, or without any of `CONTEXT_KEYS`.
    """
    path = folder / "config.json"
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelSourceError(f"{path} is not readable JSON ({error}): copy it again.") from error
    scopes = [config, config.get("text_config")] if isinstance(config, dict) else []
    stated = (scope.get(key) for scope in scopes if isinstance(scope, dict) for key in CONTEXT_KEYS)
    for tokens in stated:
        if isinstance(tokens, int):
            return tokens
    raise ModelSourceError(f"{path} states no context length: expected one of {', '.join(CONTEXT_KEYS)}.")


def _tell(on_done: Callable[[int], None] | None, count: int) -> None:
    if on_done is not None and count:
        on_done(count)
