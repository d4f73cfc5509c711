"""Text that arrives in tokens: whole characters only, and nothing from a stop string on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from holdfast.runtime.text import REPLACEMENT, StopWatch, TextStream
from tests.tiny import tiny_tokenizer

BYTES = tiny_tokenizer(300)


def sentencepiece_like() -> Tokenizer:
    """Words that begin with a metaspace, and bytes for everything else, as Llama 2 has them."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for token in ("▁", "▁the", "▁sea", "s", "▁é"):
        vocabulary[token] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer.decode)
    return [*(stream.push(token) for token in ids), stream.flush()]


@given(text=st.text(max_size=40))
def test_any_text_comes_out_as_it_went_in(text: str) -> None:
    pieces = streamed(BYTES, BYTES.encode(text).ids)
    assert "".join(pieces) == text


@given(ids=st.lists(st.integers(4, 299), max_size=40))
def test_any_tokens_give_the_text_of_all_of_them(ids: list[int]) -> None:
    assert "".join(streamed(BYTES, ids)) == BYTES.decode(ids)


@given(ids=st.lists(st.integers(0, 127) | st.integers(256, 260), max_size=30))
def test_leading_spaces_survive_decoders_that_strip_them(ids: list[int]) -> None:
    tokenizer = sentencepiece_like()
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_character_is_held_until_its_last_byte() -> None:
    ids = BYTES.encode("a€b").ids
    pieces = streamed(BYTES, ids)
    assert len(ids) == 5
    assert pieces == ["a", "", "", "€", "b", ""]


def test_an_unfinished_character_is_shown_as_replacement_at_the_end_only() -> None:
    ids = BYTES.encode("x€").ids[:-1]
    assert streamed(BYTES, ids) == ["x", "", "", REPLACEMENT]


def watched(pieces: list[str], stops: tuple[str, ...]) -> tuple[str, bool]:
    watch, shown = StopWatch(stops), ""
    for piece in pieces:
        shown += watch.push(piece)
        if watch.stopped:
            return shown, True
    return shown + watch.flush(), False


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["hello wor", "ld"], ("world",), ("hello ", True)),
        (["hello wor", "k"], ("world",), ("hello work", False)),
        (["aab", "aac"], ("aac",), ("aab", True)),
        (["no stops"], (), ("no stops", False)),
        (["ends with hal"], ("half",), ("ends with hal", False)),
        (["x", "y", "z"], ("zz", "yz"), ("x", True)),
    ],
)
def test_stop_strings_over_token_borders(
    pieces: list[str], stops: tuple[str, ...], expected: tuple[str, bool]
) -> None:
    assert watched(pieces, stops) == expected


@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=8),
    stop=st.text("ab", min_size=1, max_size=4),
)
def test_one_stop_string_cuts_the_whole_text_where_it_first_occurs(pieces: list[str], stop: str) -> None:
    text = "".join(pieces)
    assert watched(pieces, (stop,)) == (text.split(stop)[0], stop in text)
