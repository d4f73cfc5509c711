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

RUN_BYTES = 1 << 30  # logits, attention scores and KV cache of one run together
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
HEAD_KEYS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
FLOAT_BYTES = 4


@dataclass(frozen=True)
class OnnxLanguageModel:
    """A `holdfast.language_model.LanguageModel` on a decoder graph; greedy and deterministic.

    Attributes:
        name: what reports call it.
        context_tokens: longest sequence, prompt and answer together.
        attention_heads: query heads of a layer; bounds what the scores of a run take.
        batch_size: most sequences in one run of the graph.
    """

    name: str
    tokenizer: ChatTokenizer
    graph: DecoderGraph
    context_tokens: int
    attention_heads: int
    batch_size: int

    @classmethod
    def open(
        cls, folder: Path, *, threads: int = 0, name: str = "artifact (ONNX)", batch_size: int = 32
    ) -> OnnxLanguageModel:
        """Load graph, tokenizer and config.json of an exported folder or a bundle.

        Arguments:
            threads: intra-op threads; 0 leaves the choice to ONNX Runtime.

        Raises:
            ModelSourceError: no such folder, or config.json states no context length or no heads.
            TokenizerError: tokenizer or chat template are missing or malformed.
            ExecutionError: the graph cannot be loaded.
        """
        if not folder.is_dir():
            raise ModelSourceError(f"Expected a folder with a graph at {folder}, found none.")
        return cls(
            name=name,
            tokenizer=ChatTokenizer.from_folder(folder),
            graph=DecoderGraph.open(folder, threads=threads),
            context_tokens=context_tokens(folder),
            attention_heads=attention_heads(folder),
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
        for batch in self._batches(prompts, 1, max_new_tokens):
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

    def _batches(
        self, sequences: Sequence[Sequence[int]], keep: int, new_tokens: int
    ) -> Iterator[list[int]]:
        """Which sequences run together, for `keep` positions' logits and `new_tokens` more tokens.

        Where the graph counts positions by itself, it counts the columns of a batch, padding included, and
        knows as many as the context has: rows that could grow past it go with rows of their own length.
        """
        equal_beyond = None if self.graph.takes_positions else self.context_tokens - new_tokens
        return batches(
            [len(sequence) for sequence in sequences],
            batch_size=self.batch_size,
            row_bytes=lambda tokens: self._row_bytes(tokens, keep, new_tokens),
            run_bytes=RUN_BYTES,
            equal_beyond=equal_beyond,
        )

    def _row_bytes(self, tokens: int, keep: int, new_tokens: int) -> int:
        """What one row of a prefill takes: its logits, its attention scores and bias, its KV cache."""
        graph = self.graph
        positions = min(keep, tokens) if graph.takes_keep else tokens
        logits = positions * graph.vocabulary_size
        scores = (self.attention_heads + 1) * tokens * tokens
        copies = 1 if graph.shares_cache else 2  # past and present
        cached = min(tokens + new_tokens, self.context_tokens) * copies
        return FLOAT_BYTES * (logits + scores) + cached * graph.cache_token_bytes

    def _last_logits(
        self, sequences: Sequence[Sequence[int]], counts: Sequence[int], on_done: OnDone | None
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(index, logits of the last `counts[index]` positions) of every sequence."""
        for batch in self._batches(sequences, max(counts, default=1), 0):
            ids, mask = left_pad([sequences[index] for index in batch], self.tokenizer.pad_id)
            logits = self.graph.logits(ids, mask, keep=max(counts[index] for index in batch))
            for row, index in enumerate(batch):
                yield index, require_numbers(logits[row, -counts[index] :], self.name)
            _tell(on_done, len(batch))

    def _answer(
        self, prompts: list[Sequence[int]], max_new_tokens: int, on_done: OnDone | None
    ) -> list[list[int]]:
        """Decode one batch; a finished row leaves it, and its part of the cache is given up."""
        answers: list[list[int]] = [[] for _ in prompts]
        room = np.minimum(max_new_tokens, [self.context_tokens - len(p) for p in prompts])
        rows = np.arange(len(prompts))
        ids, mask = left_pad(prompts, self.tokenizer.pad_id)
        cache = self.graph.empty_cache(len(prompts), ids.shape[1] + int(room.max()))
        for step in range(room.max()):
            logits, cache = self.graph.forward(ids, mask, cache, keep=1)
            tokens = require_numbers(logits[:, -1], self.name).argmax(axis=-1)
            answering = ~np.isin(tokens, self.tokenizer.eos_ids) & (room[rows] > step)
            for row, token in zip(rows[answering], tokens[answering], strict=True):
                answers[row].append(int(token))
            going = answering & (room[rows] > step + 1)
            if not going.all():
                _tell(on_done, int((~going).sum()))
                rows, tokens, mask = rows[going], tokens[going], mask[going]
                if not rows.size:
                    return answers
                cache = cache.select(going)
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
    return _stated(folder, CONTEXT_KEYS, "context length")


def attention_heads(folder: Path) -> int:
    """Query heads of a layer that config.json states.

    Raises:
        ModelSourceError: unreadable, or without any of `HEAD_KEYS`.
    """
    return _stated(folder, HEAD_KEYS, "number of attention heads")


def _stated(folder: Path, keys: tuple[str, ...], what: str) -> int:
    """The first of `keys` that config.json, or its part about the text model, gives as an integer."""
    path = folder / "config.json"
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelSourceError(f"{path} is not readable JSON ({error}): copy it again.") from error
    scopes = [config, config.get("text_config")] if isinstance(config, dict) else []
    found = (scope.get(key) for scope in scopes if isinstance(scope, dict) for key in keys)
    for value in found:
        if isinstance(value, int):
            return value
    raise ModelSourceError(f"{path} states no {what}: expected one of {', '.join(keys)}.")


def _tell(on_done: Callable[[int], None] | None, count: int) -> None:
    if on_done is not None and count:
        on_done(count)
