"""Queue, disconnects and shutdown: every token comes when the test lets it, so nothing is timed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from threading import Semaphore
from typing import Any

import httpx
import openai
import pytest

from holdfast.runtime.endpoints import ServerLimits
from holdfast.runtime.server import create_app
from holdfast.runtime.session import OnnxLanguageModel
from tests.runtime.conftest import VERDICT, stepped
from tests.runtime.serving import GRACE_S, client_of, eventually, running
from tests.runtime.test_session import without_stop

QUEUE = 1
REQUEST: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Hello"}],
    "max_tokens": 4,
}


@dataclass(frozen=True)
class Slow:
    """A server whose model makes one token for each permit of `leave`."""

    url: str
    leave: Semaphore

    def open_jobs(self) -> tuple[int, int]:
        health = httpx.get(f"{self.url}/healthz", timeout=2).json()
        return health["answering"], health["waiting"]

    def becomes(self, answering: int, waiting: int) -> None:
        eventually(lambda: self.open_jobs() == (answering, waiting))

    def stream(self, stack: ExitStack) -> httpx.Response:
        """An open stream, closed with the stack at the latest."""
        request = REQUEST | {"stream": True}
        return stack.enter_context(
            httpx.stream("POST", f"{self.url}/v1/chat/completions", json=request, timeout=20)
        )


@pytest.fixture
def slow(model: OnnxLanguageModel) -> Iterator[Slow]:
    gated, leave = stepped(without_stop(model))
    limits = ServerLimits(queue_size=QUEUE, retry_after_s=3)
    app = create_app(gated, model_id="tiny", verdict=VERDICT, limits=limits)
    with running(app) as url:
        yield Slow(url, leave)
        leave.release(1000)


def test_health_answers_while_the_model_works(slow: Slow) -> None:
    with ExitStack() as stack:
        slow.stream(stack)
        slow.becomes(1, 0)
        started = time.monotonic()
        assert slow.open_jobs() == (1, 0)
        assert time.monotonic() - started < 1.0


def test_a_full_queue_is_429_and_the_admitted_are_answered(slow: Slow) -> None:
    client = client_of(slow.url)
    with ThreadPoolExecutor(2) as pool:
        admitted = [pool.submit(client.chat.completions.create, **REQUEST) for _ in range(2)]
        slow.becomes(1, QUEUE)
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError) as caught:
                client.chat.completions.create(**REQUEST, stream=stream)
            assert caught.value.response.headers["retry-after"] == "3"
            assert caught.value.code == "queue_full"
        slow.leave.release(8)
        answers = [future.result(timeout=20) for future in admitted]
    assert [answer.choices[0].finish_reason for answer in answers] == ["length", "length"]
    slow.becomes(0, 0)


def test_a_stream_that_is_left_frees_its_place_at_the_next_token(slow: Slow) -> None:
    with ExitStack() as stack:
        slow.stream(stack)
        slow.leave.release(1)
        slow.becomes(1, 0)
    slow.leave.release(2)  # at most the token in the making and the one that notices
    slow.becomes(0, 0)
    slow.leave.release(4)
    assert client_of(slow.url).chat.completions.create(**REQUEST).usage is not None


def test_a_whole_answer_that_nobody_waits_for_frees_its_place(slow: Slow) -> None:
    impatient = client_of(slow.url).with_options(timeout=0.3)
    with pytest.raises(openai.APITimeoutError):
        impatient.chat.completions.create(**REQUEST)
    slow.leave.release(2)
    slow.becomes(0, 0)


def test_who_leaves_the_queue_is_gone_at_once(slow: Slow) -> None:
    with ExitStack() as first:
        slow.stream(first)
        slow.becomes(1, 0)
        with ExitStack() as second:
            slow.stream(second)
            slow.becomes(1, 1)
        slow.becomes(1, 0)  # without a single token


def test_answers_come_in_the_order_of_the_requests(slow: Slow) -> None:
    with ExitStack() as stack:
        first = slow.stream(stack)
        slow.becomes(1, 0)
        second = slow.stream(stack)
        slow.becomes(1, 1)
        slow.leave.release(4)
        assert "[DONE]" in first.read().decode()
        slow.becomes(1, 0)
        slow.leave.release(4)
        assert "[DONE]" in second.read().decode()


def test_a_stopped_server_ends_the_running_answer_at_its_next_token(
    model: OnnxLanguageModel,
) -> None:
    gated, leave = stepped(without_stop(model))
    with ExitStack() as stack:
        with running(create_app(gated, model_id="tiny", verdict=VERDICT)) as url:
            slow = Slow(url, leave)
            answer = slow.stream(stack)
            slow.becomes(1, 0)
            # One token once the grace is over; without a cancelled job it would wait for more.
            threading.Timer(GRACE_S + 0.5, leave.release).start()
            stopped = time.monotonic()
        assert time.monotonic() - stopped < GRACE_S + 5
        with pytest.raises(httpx.HTTPError):
            answer.read()
