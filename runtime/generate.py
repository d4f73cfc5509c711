"""One conversation, token by token: the answer as a stream of pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from holdfast.runtime.sampling import GREEDY, Sampling, choose
from holdfast.runtime.session import OnnxLanguageModel, require_numbers
from holdfast.runtime.text import StopWatch, TextStream

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class AnswerSettings:
    """How an answer is made.

    Attributes:
        max_new_tokens: most tokens of the answer; the context may end it earlier.
        stop: strings that end the answer and are not part of it.
    """

    max_new_tokens: int
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """A part of an answer.

    Attributes:
        text: text that is certain now; may be empty.
        new_tokens: tokens generated so far, without the stop token.
        finish: None until the last piece; `stop` for a stop token or string, `length` when
            `max_new_tokens` or the context was used up.
    """

    text: str
    new_tokens: int
    finish: Finish | None


def stream_answer(
    model: OnnxLanguageModel, prompt: Sequence[int], settings: AnswerSettings
) -> Iterator[Piece]:
    """Pieces of the answer to one prompt, one a token and a last one that says why it ended.

    Whoever stops iterating cancels the answer before its next token.

    Raises:
        InputError: the prompt is empty or leaves no room for a token in the context.
        ExecutionError: ONNX Runtime failed, or the logits are not numbers.
    """
    model.require_room([len(prompt)], 1)
    limit = min(settings.max_new_tokens, model.context_tokens - len(prompt))
    text, watch = TextStream(model.tokenizer.decode), StopWatch(settings.stop)
    count, ended = 0, False
    for token in _tokens(model, prompt, settings.sampling, limit):
        if token in model.tokenizer.eos_ids:
            ended = True
            break
        count += 1
        shown = watch.push(text.push(token))
        if watch.stopped:
            yield Piece(shown, count, "stop")
            return
        yield Piece(shown, count, None)
    rest = watch.push(text.flush())
    finish: Finish = "stop" if ended or watch.stopped else "length"
    yield Piece(rest + watch.flush(), count, finish)


def _tokens(
    model: OnnxLanguageModel, prompt: Sequence[int], sampling: Sampling, limit: int
) -> Iterator[int]:
    """Up to `limit` new token ids, stop ids included."""
    graph = model.graph
    generator = sampling.generator()
    ids = np.asarray([prompt], np.int64)
    cache = graph.empty_cache(1, len(prompt) + limit)
    for past_tokens in range(len(prompt), len(prompt) + limit):
        mask = np.ones((1, past_tokens), np.int64)
        logits, cache = graph.forward(ids, mask, cache, keep=1)
        token = choose(require_numbers(logits[0, -1], model.name), sampling, generator)
        yield token
        ids = np.asarray([[token]], np.int64)
