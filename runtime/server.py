"""An OpenAI-compatible chat server for one model, on the local machine unless told otherwise.

    POST /v1/chat/completions   answers, whole or as server-sent events
    GET  /v1/models             the one model, with its alignment verdict
    GET  /healthz               alive, verdict, and how busy

Every response carries the verdict in a `holdfast-verdict` header. Bounded: request size and time,
answer length, waiting requests, connections. Prompts and answers are never logged.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import ASGIApp

from holdfast.chat import user
from holdfast.errors import HoldfastError, UsageError
from holdfast.progress import say
from holdfast.runtime.endpoints import ChatApi, ServerLimits
from holdfast.runtime.openai_api import ApiError
from holdfast.runtime.session import OnnxLanguageModel

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SHUTDOWN_GRACE_S = 5
MAX_CONNECTIONS = 128
DEFAULT_LIMITS = ServerLimits()


def create_app(
    model: OnnxLanguageModel,
    *,
    model_id: str,
    verdict: dict[str, Any],
    limits: ServerLimits = DEFAULT_LIMITS,
) -> Starlette:
    """The ASGI application.

    Arguments:
        model_id: name under which clients ask for the model.
        verdict: shown as it is in /healthz and /v1/models; its `outcome` is the response header.

    Raises:
        TokenizerError: the chat template cannot even render one user turn.
    """
    model.tokenizer.encode_chat(user("Hello"))
    api = ChatApi(model, model_id, verdict, limits)
    return Starlette(
        routes=[
            Route("/v1/chat/completions", api.chat, methods=["POST"]),
            Route("/v1/models", api.models),
            Route("/v1/models/{model_id:path}", api.model),
            Route("/healthz", api.health),
        ],
        exception_handlers={
            ApiError: api.refused,
            HTTPException: api.not_routed,
            HoldfastError: api.broken,
            ClientDisconnect: api.left,
            Exception: api.failed,
        },
        lifespan=api.lifespan,
    )


def serve(app: ASGIApp, host: str, port: int) -> None:
    """Listen until Ctrl-C or SIGTERM; open answers then have a few seconds to finish.

    Raises:
        UsageError: the address cannot be used.
    """
    with listen(host, port) as listener:
        shown = f"[{host}]" if ":" in host else host
        say(f"Serving at http://{shown}:{listener.getsockname()[1]}/v1 - Ctrl-C stops.")
        if host not in LOOPBACK:
            say("Anyone who reaches this address can use the model: there is no authentication.")
        with suppress(KeyboardInterrupt):  # how a server is meant to end
            make_server(app, host).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 picks a free one.

    Raises:
        UsageError: the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]  # create_server repeats the address
        raise UsageError(
            f"Cannot listen on {host} port {port} ({reason}): choose another --host or --port."
        ) from error


def make_server(app: ASGIApp, host: str, *, grace_s: int = SHUTDOWN_GRACE_S) -> uvicorn.Server:
    """A uvicorn server without access log.

    On a loopback address only loopback names are accepted as Host, so that a web page cannot reach
    the server under a name of its own (DNS rebinding).

    Arguments:
        grace_s: how long open answers may go on once the server is told to stop.
    """
    if host in LOOPBACK:
        app = TrustedHostMiddleware(app, allowed_hosts=[*LOOPBACK, "[::1]"], www_redirect=False)
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=grace_s,
    )
    return uvicorn.Server(config)
