"""The token stream of one conversation against the batched session."""

from __future__ import annotations

from dataclasses import replace

import pytest

from holdfast.errors import InputError
from holdfast.runtime.generate import AnswerSettings, Piece, stream_answer
from holdfast.runtime.sampling import Sampling
from holdfast.runtime.session import OnnxLanguageModel
from tests.runtime.conftest import stepped

PROMPT = [20, 31, 5, 90]


def answer(model: OnnxLanguageModel, settings: AnswerSettings) -> tuple[str, Piece]:
    pieces = list(stream_answer(model, PROMPT, settings))
    assert [piece.finish is None for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    return "".join(piece.text for piece in pieces), pieces[-1]


def without_stop(model: OnnxLanguageModel, *stop: int) -> OnnxLanguageModel:
    return replace(model, tokenizer=replace(model.tokenizer, eos_ids=stop))


def test_a_stream_is_the_sessions_greedy_answer(model: OnnxLanguageModel) -> None:
    free = without_stop(model)
    expected = free.generate([PROMPT], max_new_tokens=30)[0]
    text, last = answer(free, AnswerSettings(max_new_tokens=30))
    assert text == free.tokenizer.decode(expected)
    assert (last.new_tokens, last.finish) == (30, "length")


def test_a_stop_token_ends_it_and_is_not_counted(model: OnnxLanguageModel) -> None:
    ids = without_stop(model).generate([PROMPT], max_new_tokens=30)[0]
    at = ids.index(ids[6])
    ending = without_stop(model, ids[6])
    text, last = answer(ending, AnswerSettings(max_new_tokens=30))
    assert text == model.tokenizer.decode(ids[:at])
    assert (last.new_tokens, last.finish) == (at, "stop")


def test_a_stop_string_ends_it_and_is_not_shown(model: OnnxLanguageModel) -> None:
    free = without_stop(model)
    settings = AnswerSettings(max_new_tokens=30, sampling=Sampling(temperature=1.0, seed=1))
    whole, _ = answer(free, settings)
    stop = whole[8:11]
    text, last = answer(free, replace(settings, stop=(stop,)))
    assert text == whole[: whole.index(stop)]
    assert last.finish == "stop"
    assert last.new_tokens < 30


def test_the_context_ends_it_as_length(model: OnnxLanguageModel) -> None:
    free = without_stop(model)
    _, last = answer(free, AnswerSettings(max_new_tokens=10_000))
    assert (last.new_tokens, last.finish) == (128 - len(PROMPT), "length")


def test_no_room_for_a_token_is_refused(model: OnnxLanguageModel) -> None:
    with pytest.raises(InputError, match="Prompt 0 has 128 tokens"):
        next(stream_answer(model, [5] * 128, AnswerSettings(max_new_tokens=1)))


def test_the_seed_decides_a_sampled_answer(model: OnnxLanguageModel) -> None:
    def sampled(seed: int) -> str:
        sampling = Sampling(temperature=1.5, top_p=0.9, seed=seed)
        return answer(model, AnswerSettings(max_new_tokens=20, sampling=sampling))[0]

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_who_stops_reading_stops_the_model(model: OnnxLanguageModel) -> None:
    slow, leave = stepped(without_stop(model))
    leave.release(3)
    pieces = stream_answer(slow, PROMPT, AnswerSettings(max_new_tokens=30))
    assert [next(pieces).new_tokens for _ in range(2)] == [1, 2]
    pieces.close()
    assert leave.acquire(blocking=False)  # the third permit is still there: no third run
