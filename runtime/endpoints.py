"""The endpoints of the chat server; `server.py` puts them together and listens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from holdfast.errors import HoldfastError, InputError, TokenizerError
from holdfast.progress import say
from holdfast.runtime.generate import Finish, stream_answer
from holdfast.runtime.openai_api import (
    DONE,
    ApiError,
    ChatRequest,
    Responder,
    event,
    parse_request,
    usage,
)
from holdfast.runtime.session import OnnxLanguageModel
from holdfast.runtime.worker import Job, QueueFullError, Worker

CLIENT_GONE = 499  # nginx's status for it; nobody is left to read it


@dataclass(frozen=True)
class ServerLimits:
    """What clients can ask of the server.

    Attributes:
        max_new_tokens: longest answer, and the length where a request names none.
        queue_size: requests that may wait while one is answered; further ones get 429.
        max_body_bytes: largest request body; larger ones get 413.
        body_timeout_s: time for a body to arrive; slower ones get 408.
        retry_after_s: `Retry-After` of a 429.
    """

    max_new_tokens: int = 512
    queue_size: int = 8
    max_body_bytes: int = 1 << 20
    body_timeout_s: float = 10.0
    retry_after_s: int = 1


@dataclass(frozen=True)
class Answer:
    """A finished answer and its length."""

    text: str
    new_tokens: int
    finish: Finish


class AnswerStream(StreamingResponse):
    """Server-sent events; gives the place back however the response ends, even before it began."""

    def __init__(self, events: AsyncIterator[str], job: Job, headers: dict[str, str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.cancel()


class ChatApi:
    """The endpoints of one model; see `server.create_app` for the arguments."""

    def __init__(
        self,
        language_model: OnnxLanguageModel,
        model_id: str,
        verdict: dict[str, Any],
        limits: ServerLimits,
    ) -> None:
        self.language_model = language_model
        self.model_id = model_id
        self.verdict = verdict
        self.limits = limits
        self.worker = Worker(limits.queue_size)
        self.started = int(time.time())
        self.headers = {"holdfast-verdict": str(verdict["outcome"])}

    @asynccontextmanager
    async def lifespan(self, _app: object) -> AsyncIterator[None]:
        """Ends the running generation when the server stops."""
        yield
        await asyncio.to_thread(self.worker.close)

    async def health(self, _request: Request) -> Response:
        open_jobs = self.worker.open_jobs
        return self._json(
            {
                "status": "ok",
                "model": self.model_id,
                "verdict": self.verdict,
                "answering": min(open_jobs, 1),
                "waiting": max(open_jobs - 1, 0),
            }
        )

    async def models(self, _request: Request) -> Response:
        return self._json({"object": "list", "data": [self._entry()]})

    async def model(self, request: Request) -> Response:
        self._require_model(request.path_params["model_id"])
        return self._json(self._entry())

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        chat = parse_request(await self._body(request))
        self._require_model(chat.model)
        # Off the event loop: tokenizing a megabyte takes long enough to delay a health check.
        prompt = await asyncio.to_thread(self._prompt, chat)
        job = self._submit(prompt, chat)
        responder = Responder(self.model_id)
        if chat.stream:
            events = _events(job, responder, chat, len(prompt))
            return AnswerStream(events, job, self.headers | {"cache-control": "no-store"})
        answer = await _whole_answer(request, job)
        if answer is None:
            return Response(status_code=CLIENT_GONE)
        counts = usage(len(prompt), answer.new_tokens)
        return self._json(responder.completion(answer.text, answer.finish, counts))

    async def refused(self, _request: Request, error: Exception) -> Response:
        """Handler of `ApiError`."""
        if not isinstance(error, ApiError):
            raise error
        return self._json(error.body(), error.status, error.headers)

    async def not_routed(self, _request: Request, error: Exception) -> Response:
        """Handler of Starlette's own 404 and 405."""
        if not isinstance(error, HTTPException):
            raise error
        refusal = ApiError(error.status_code, f"{error.detail}.", "invalid_url")
        return self._json(refusal.body(), refusal.status, dict(error.headers or {}))

    async def broken(self, _request: Request, error: Exception) -> Response:
        """Handler of `HoldfastError`: the model failed on a valid request."""
        return self._json(_model_failed(error).body(), 500)

    async def left(self, _request: Request, _error: Exception) -> Response:
        """Handler of `ClientDisconnect` while the body was read."""
        return Response(status_code=CLIENT_GONE)

    async def failed(self, _request: Request, _error: Exception) -> Response:
        """Handler of everything unforeseen; the ASGI server logs the traceback."""
        return self._json(ApiError(500, "Internal error.", "internal_error").body(), 500)

    def _json(
        self, content: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None
    ) -> Response:
        return JSONResponse(content, status, self.headers | (headers or {}))

    def _entry(self) -> dict[str, Any]:
        return {
            "id": self.model_id,
            "object": "model",
            "created": self.started,
            "owned_by": "holdfast",
            "holdfast": self.verdict,
        }

    def _require_model(self, name: str) -> None:
        if name != self.model_id:
            raise ApiError(
                404,
                f"Model {name!r} is not served here: this server has {self.model_id!r}.",
                "model_not_found",
                "model",
            )

    async def _body(self, request: Request) -> bytes:
        """The request's body, bounded in size and time.

        JSON is required by its media type as well: web pages of other origins can post anything
        else to a local server without asking it first.
        """
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            raise ApiError(415, "Expected content-type application/json.", "unsupported_media_type")
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_timeout_s):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > self.limits.max_body_bytes:
                        raise self._too_large()
        except TimeoutError:
            raise ApiError(408, "The request body did not arrive in time.", "timeout") from None
        return bytes(body)

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"The request body is larger than {self.limits.max_body_bytes} bytes.",
            "request_too_large",
            headers={"connection": "close"},
        )

    def _prompt(self, chat: ChatRequest) -> list[int]:
        """Token ids of the conversation; never truncated."""
        try:
            prompt = self.language_model.tokenizer.encode_chat(chat.conversation())
            self.language_model.require_room([len(prompt)], 1)
        except TokenizerError as error:
            raise ApiError(400, str(error), "invalid_conversation", "messages") from None
        except InputError as error:
            raise ApiError(400, str(error), "context_length_exceeded", "messages") from None
        return prompt

    def _submit(self, prompt: list[int], chat: ChatRequest) -> Job:
        settings = chat.settings(self.limits.max_new_tokens)
        try:
            return self.worker.submit(stream_answer(self.language_model, prompt, settings))
        except QueueFullError:
            raise ApiError(
                429,
                f"{self.limits.queue_size} requests are waiting already: try again later.",
                "queue_full",
                headers={"retry-after": str(self.limits.retry_after_s)},
            ) from None


async def _events(
    job: Job, responder: Responder, chat: ChatRequest, prompt_tokens: int
) -> AsyncIterator[str]:
    """The answer as server-sent events, ended by `[DONE]`, or by an error where the model failed."""
    new_tokens = 0
    yield event(responder.chunk({"role": "assistant", "content": ""}))
    try:
        async for piece in job:
            new_tokens = piece.new_tokens
            if piece.text:
                yield event(responder.chunk({"content": piece.text}))
            if piece.finish:
                yield event(responder.chunk({}, piece.finish))
    except HoldfastError as error:
        yield event(_model_failed(error).body())
        return
    if chat.stream_options is not None and chat.stream_options.include_usage:
        yield event(responder.usage_chunk(usage(prompt_tokens, new_tokens)))
    yield DONE


async def _whole_answer(request: Request, job: Job) -> Answer | None:
    """The finished answer, or None when the client went away before."""
    collecting = asyncio.ensure_future(_collect(job))
    leaving = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return await collecting if collecting.done() else None
    finally:
        job.cancel()
        collecting.cancel()
        leaving.cancel()


async def _collect(job: Job) -> Answer:
    texts: list[str] = []
    async for piece in job:
        texts.append(piece.text)
        if piece.finish is not None:
            return Answer("".join(texts), piece.new_tokens, piece.finish)
    raise AssertionError("a job's last piece says why it ended")


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _model_failed(error: Exception) -> ApiError:
    """Tells the operator what happened, and the client only that: messages name local files."""
    say(f"holdfast: {error}")
    return ApiError(500, "The model failed; the server's log says why.", "model_failed")
