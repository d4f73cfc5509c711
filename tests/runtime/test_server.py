"""The server through the official openai client and plain HTTP, on a real socket."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from holdfast.chat import user
from holdfast.errors import UsageError
from holdfast.runtime.endpoints import ServerLimits
from holdfast.runtime.server import create_app, listen
from holdfast.runtime.session import OnnxLanguageModel
from tests.runtime.conftest import VERDICT
from tests.runtime.serving import HOST, client_of, running
from tests.runtime.test_session import damaged, without_stop

LIMITS = ServerLimits(max_new_tokens=48, queue_size=4, max_body_bytes=4000, body_timeout_s=0.5)
QUESTION = "What is the capital?"
SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 1}


@pytest.fixture(scope="module")
def free(model: OnnxLanguageModel) -> OnnxLanguageModel:
    """Answers as long as it may."""
    return without_stop(model)


@pytest.fixture(scope="module")
def url(free: OnnxLanguageModel) -> Iterator[str]:
    with running(create_app(free, model_id="tiny", verdict=VERDICT, limits=LIMITS)) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return client_of(url)


def ask(client: openai.OpenAI, question: str = QUESTION, **settings: Any) -> ChatCompletion:
    return client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": question}], **settings
    )


def chunks(client: openai.OpenAI, **settings: Any) -> list[ChatCompletionChunk]:
    stream = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": QUESTION}], stream=True, **settings
    )
    return list(stream)


def body(**changes: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}]} | changes


def text_of(found: list[ChatCompletionChunk]) -> str:
    return "".join(c.choices[0].delta.content or "" for c in found if c.choices)


def test_an_answer_is_the_sessions_greedy_answer(client: openai.OpenAI, free: OnnxLanguageModel) -> None:
    prompt = free.tokenizer.encode_chat(user(QUESTION))
    expected = free.generate([prompt], max_new_tokens=12)[0]
    answer = ask(client, max_tokens=12)
    assert answer.choices[0].message.content == free.tokenizer.decode(expected)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == len(prompt) + 12


def test_a_stream_is_the_same_answer_in_pieces(client: openai.OpenAI) -> None:
    whole = ask(client, max_tokens=30, **SAMPLED)
    found = chunks(client, max_tokens=30, stream_options={"include_usage": True}, **SAMPLED)
    assert text_of(found) == whole.choices[0].message.content
    assert len([c for c in found if c.choices and c.choices[0].delta.content]) > 5
    assert len({c.id for c in found}) == 1
    assert found[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in found if c.choices][-1] == "length"
    assert found[-1].choices == []
    assert found[-1].usage == whole.usage


def test_a_stream_without_usage_ends_with_its_reason_and_done(url: str) -> None:
    answer = httpx.post(f"{url}/v1/chat/completions", json=body(stream=True, max_tokens=3))
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    last = json.loads(events[-3].removeprefix("data: "))
    assert last["choices"][0]["finish_reason"] == "length"
    assert "usage" not in last


def test_a_stop_string_ends_the_answer(client: openai.OpenAI) -> None:
    whole = ask(client, max_tokens=40, **SAMPLED).choices[0].message.content or ""
    stop = whole[12:14]
    answer = ask(client, max_tokens=40, stop=[stop], **SAMPLED)
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_a_stop_token_ends_the_answer(free: OnnxLanguageModel) -> None:
    prompt = free.tokenizer.encode_chat(user(QUESTION))
    first = int(free.next_token_logits([prompt]).argmax())
    app = create_app(without_stop(free, first), model_id="tiny", verdict=VERDICT)
    with running(app) as url:
        answer = ask(client_of(url))
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == ""
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0


@pytest.mark.parametrize("settings", [{"max_tokens": 1000}, {}])
def test_the_servers_limit_is_told_as_length(client: openai.OpenAI, settings: dict[str, Any]) -> None:
    answer = ask(client, **settings)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == LIMITS.max_new_tokens


def test_sampling_follows_its_seed(client: openai.OpenAI) -> None:
    def sampled(seed: int) -> str | None:
        return ask(client, temperature=1.2, seed=seed, max_tokens=20).choices[0].message.content

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_a_prompt_beyond_the_context_is_refused_and_never_cut(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "x y " * 200)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "messages"
    assert "context of tiny holds 128" in caught.value.message


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt", messages=[{"role": "user", "content": "x"}])
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")


def test_unsupported_and_invalid_parameters_are_bad_requests(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, n=2)
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "n")
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="temperature"):
        ask(client, temperature=9)


def test_models_and_health_show_the_verdict(client: openai.OpenAI, url: str) -> None:
    (entry,) = client.models.list().data
    assert entry.id == "tiny"
    assert entry.model_extra == {"holdfast": VERDICT}
    assert client.models.retrieve("tiny").id == "tiny"
    health = httpx.get(f"{url}/healthz")
    assert health.json() == {
        "status": "ok",
        "model": "tiny",
        "verdict": VERDICT,
        "answering": 0,
        "waiting": 0,
    }


@pytest.mark.parametrize(
    ("method", "path", "content", "media_type", "status", "code"),
    [
        ("POST", "/v1/chat/completions", "{", "application/json", 400, "invalid_json"),
        ("POST", "/v1/chat/completions", "{}", "text/plain", 415, "unsupported_media_type"),
        ("POST", "/v1/chat/completions", "x" * 5000, "application/json", 413, "request_too_large"),
        ("GET", "/v1/chat/completions", None, None, 405, "invalid_url"),
        ("GET", "/v1/embeddings", None, None, 404, "invalid_url"),
        ("GET", "/healthz", None, None, 200, None),
        ("GET", "/v1/models", None, None, 200, None),
    ],
)
def test_every_response_carries_the_verdict_and_errors_have_openais_form(
    url: str,
    method: str,
    path: str,
    content: str | None,
    media_type: str | None,
    status: int,
    code: str | None,
) -> None:
    headers = {"content-type": media_type} if media_type else {}
    answer = httpx.request(method, url + path, content=content, headers=headers)
    assert answer.status_code == status
    assert answer.headers["holdfast-verdict"] == "PASS"
    if code is not None:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert answer.json()["error"]["code"] == code


def test_answers_and_streams_carry_the_verdict(url: str) -> None:
    for stream in (False, True):
        request = body(max_tokens=1, stream=stream)
        answer = httpx.post(f"{url}/v1/chat/completions", json=request)
        assert answer.headers["holdfast-verdict"] == "PASS"


def test_a_body_that_does_not_arrive_is_timed_out(url: str) -> None:
    port = int(url.rsplit(":", 1)[1])
    with socket.create_connection((HOST, port), timeout=10) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        assert b" 408 " in connection.recv(4096).splitlines()[0]


def test_a_foreign_host_name_is_refused(url: str) -> None:
    answer = httpx.get(f"{url}/v1/models", headers={"host": "attacker.example"})
    assert answer.status_code == 400


def test_a_template_that_refuses_is_the_clients_error(free: OnnxLanguageModel) -> None:
    strict = "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}x"
    refusing = replace(free, tokenizer=replace(free.tokenizer, template=strict))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with running(create_app(refusing, model_id="tiny", verdict=VERDICT)) as url:
        answer = httpx.post(f"{url}/v1/chat/completions", json=body(messages=turns))
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_conversation"
    assert "one turn only" in answer.json()["error"]["message"]


@pytest.fixture(scope="module")
def broken_url(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = damaged(exported, tmp_path_factory.mktemp("broken") / "m")
    broken = OnnxLanguageModel.open(folder, threads=1, name="broken")
    with running(create_app(broken, model_id="tiny", verdict=VERDICT)) as address:
        yield address


def test_a_model_that_fails_is_a_server_error(broken_url: str) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        ask(client_of(broken_url))
    assert caught.value.code == "model_failed"
    assert "server's log says why" in caught.value.message


def test_a_model_that_fails_ends_a_stream_with_an_error_and_without_done(broken_url: str) -> None:
    with pytest.raises(openai.APIError, match="The model failed"):
        chunks(client_of(broken_url))
    answer = httpx.post(f"{broken_url}/v1/chat/completions", json=body(stream=True))
    assert "[DONE]" not in answer.text
    assert '"error"' in answer.text


def test_nothing_of_a_prompt_or_an_answer_is_logged(
    url: str, broken_url: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    marker = "zebra-crossing-7"
    caplog.set_level(logging.DEBUG, logger="uvicorn")
    caplog.set_level(logging.DEBUG, logger="holdfast")
    for address in (url, broken_url):
        for changes in ({}, {"stream": True}, {"n": 2}, {"temperature": marker}, {"stop": [""]}):
            request = body(messages=[{"role": "user", "content": marker}], max_tokens=4) | changes
            httpx.post(f"{address}/v1/chat/completions", json=request)
    long = body(messages=[{"role": "user", "content": marker * 100}])
    httpx.post(f"{url}/v1/chat/completions", json=long)
    printed = capfd.readouterr()
    assert "not finite numbers" in printed.err  # the failures themselves are told
    assert marker not in printed.out + printed.err + caplog.text


def test_a_taken_port_is_one_sentence() -> None:
    with listen(HOST, 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"Cannot listen on {HOST} port {port} \(.*in use\)"):
            listen(HOST, port)


def test_ctrl_c_ends_the_process_in_good_order(exported: Path) -> None:
    program = (
        "from pathlib import Path\n"
        "from holdfast.runtime.server import create_app, serve\n"
        "from holdfast.runtime.session import OnnxLanguageModel\n"
        f"model = OnnxLanguageModel.open(Path({str(exported)!r}), threads=1)\n"
        "app = create_app(model, model_id='tiny', verdict={'outcome': 'PASS'})\n"
        "serve(app, '127.0.0.1', 0)\n"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith("Serving at http://127.0.0.1:")
        assert httpx.get(line.split()[2].removesuffix("/v1") + "/healthz").status_code == 200
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(timeout=20) == 0
        assert process.stderr.read() == ""
