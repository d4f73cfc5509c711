"""Requests as clients send them: what passes, what is refused, and how the refusal reads."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.runtime.generate import AnswerSettings
from holdfast.runtime.openai_api import ApiError, ChatRequest, event, parse_request
from holdfast.runtime.sampling import GREEDY, Sampling

BASE: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


def parse(**changes: Any) -> ChatRequest:
    return parse_request(json.dumps(BASE | changes).encode())


def refusal(**changes: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(**changes)
    assert caught.value.status == 400
    return caught.value


def test_the_smallest_request_is_greedy_and_as_long_as_the_server_allows() -> None:
    request = parse()
    assert request.conversation() == [{"role": "user", "content": "Hi"}]
    assert request.settings(77) == AnswerSettings(max_new_tokens=77, sampling=GREEDY, stop=())
    assert not request.stream


def test_every_parameter_reaches_the_settings() -> None:
    request = parse(
        max_completion_tokens=9,
        temperature=0.5,
        top_p=0.8,
        top_k=40,
        seed=-1,
        stop=["a", "b"],
        stream=True,
        stream_options={"include_usage": True},
    )
    assert request.settings(77) == AnswerSettings(
        max_new_tokens=9,
        sampling=Sampling(temperature=0.5, top_k=40, top_p=0.8, seed=2**64 - 1),
        stop=("a", "b"),
    )
    assert request.stream_options is not None
    assert request.stream_options.include_usage


def test_the_servers_limit_cuts_max_tokens() -> None:
    assert parse(max_tokens=500).settings(77).max_new_tokens == 77
    assert parse(max_tokens=5).settings(77).max_new_tokens == 5


def test_text_parts_are_joined_and_a_stop_may_be_one_string() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = parse(messages=[{"role": "user", "content": parts}], stop="end")
    assert request.conversation()[0]["content"] == "ab"
    assert request.settings(5).stop == ("end",)


def test_what_changes_nothing_is_accepted() -> None:
    assert parse(
        n=1,
        presence_penalty=0,
        frequency_penalty=0.0,
        logprobs=False,
        response_format={"type": "text"},
        tools=[],
        user="u-1",
        metadata={"a": "b"},
        seed=None,
        max_tokens=None,
        logit_bias=None,
    ).settings(5) == parse().settings(5)
    returned = {"role": "assistant", "content": "Yes.", "refusal": None, "tool_calls": None}
    assert len(parse(messages=[*BASE["messages"], returned, *BASE["messages"]]).messages) == 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2),
        ("presence_penalty", 0.5),
        ("logprobs", True),
        ("tools", [{"type": "function"}]),
        ("response_format", {"type": "json_object"}),
        ("logit_bias", {"50": 1}),
    ],
)
def test_what_the_server_cannot_do_is_refused_by_name(name: str, value: Any) -> None:
    error = refusal(**{name: value})
    assert (error.code, error.param) == ("unsupported_parameter", name)
    assert error.message == f"This server does not support {name}: leave it out."


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"temperature": 2.5}, "temperature", "Expected `float` <= 2.0"),
        ({"temperature": "hot"}, "temperature", "Expected `float`, got `str`"),
        ({"top_p": 0}, "top_p", "Expected `float` > 0.0"),
        ({"max_tokens": 0}, "max_tokens", "Expected `int` >= 1"),
        ({"max_tokens": 1.5}, "max_tokens", "Expected `int | null`, got `float`"),
        ({"stop": ""}, "stop", "length >= 1"),
        ({"stop": ["a"] * 5}, "stop", "length <= 4"),
        ({"messages": []}, "messages", "length >= 1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "'tool'"),
        ({"messages": [{"role": "user"}]}, "messages[0]", "missing required field `content`"),
        ({"model": 5}, "model", "Expected `str`, got `int`"),
    ],
)
def test_wrong_values_name_their_parameter(changes: dict[str, Any], param: str, message: str) -> None:
    error = refusal(**changes)
    assert (error.code, error.param) == ("invalid_value", param)
    assert message in error.message


def test_unknown_parameters_are_named_with_the_nearest_known_one() -> None:
    error = refusal(temprature=1)
    assert (error.code, error.param) == ("unknown_parameter", "temprature")
    assert error.message == "Unknown parameter temprature; did you mean `temperature`?"
    inner = refusal(messages=[{"role": "user", "content": "Hi", "name": "Ann"}])
    assert inner.param == "messages[0].name"


def test_contradictions_are_refused() -> None:
    assert refusal(max_tokens=5, max_completion_tokens=5).param == "max_tokens"
    assert refusal(stream_options={"include_usage": True}).param == "stream_options"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"\xff\xfe", b'{"model": "\\ud800"}', b'{"a":' * 100_000, b"NaN"],
)
def test_a_body_that_is_not_a_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_request(body)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@given(name=st.sampled_from([*ChatRequest.__struct_fields__, "n", "tools"]), value=json_values)
def test_any_value_is_a_request_or_a_refusal_in_openais_form(name: str, value: Any) -> None:
    try:
        parse(**{name: value})
    except ApiError as error:
        body = error.body()["error"]
    else:
        return
    assert set(body) == {"message", "type", "param", "code"}
    assert body["type"] == "invalid_request_error"


def test_an_event_is_one_line_of_json() -> None:
    assert event({"text": "a\nb"}) == 'data: {"text":"a\\nb"}\n\n'
