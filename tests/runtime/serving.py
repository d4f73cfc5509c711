"""A real server in a thread of the test, and clients for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import openai
from starlette.types import ASGIApp

from holdfast.runtime.server import listen, make_server

HOST = "127.0.0.1"
TIMEOUT_S = 20.0
GRACE_S = 1


@contextmanager
def running(app: ASGIApp) -> Iterator[str]:
    """Serve `app` on a free port; gives the base URL without /v1."""
    server = make_server(app, HOST, grace_s=GRACE_S)
    with listen(HOST, 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        eventually(lambda: server.started)
        try:
            yield f"http://{HOST}:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(TIMEOUT_S)
            assert not thread.is_alive()


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=TIMEOUT_S)


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until `condition` holds; fail after `TIMEOUT_S`."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)
