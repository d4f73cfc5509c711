"""The OpenAI chat-completions wire format: strict requests in, responses and errors out.

Reference: OpenAI's published API description (`CreateChatCompletionRequest`, `Error`). What this
server cannot do is refused by name, never ignored; a parameter set to the value that means "not
used" passes, because many clients send it.
"""

from __future__ import annotations

import re
import time
import uuid
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from holdfast.chat import Message
from holdfast.config import Config, nearest
from holdfast.runtime.generate import AnswerSettings, Finish
from holdfast.runtime.sampling import Sampling

SEEDS = 1 << 64  # OpenAI's seeds are signed 64-bit integers, numpy's are not negative
DONE = "data: [DONE]\n\n"

# Parameters this server does not have, and the values at which they change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),  # without tools there are no calls
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
# Labels for the provider's own books; they have no part in the answer.
_LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key")


@dataclass
class ApiError(Exception):
    """A refused request, as OpenAI's clients expect it.

    Attributes:
        status: HTTP status.
        message: one sentence.
        code: machine-readable reason.
        param: the parameter it is about.
        headers: further response headers.
    """

    status: int
    message: str
    code: str
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """The JSON body: `{"error": {"message", "type", "param", "code"}}`."""
        return {
            "error": {
                "message": self.message,
                "type": "server_error" if self.status >= 500 else "invalid_request_error",
                "param": self.param,
                "code": self.code,
            }
        }


class TextPart(Config, frozen=True):
    type: Literal["text"]
    text: str


class ChatTurn(Config, frozen=True):
    """A message; its content is a string or a list of text parts."""

    role: Literal["system", "user", "assistant"]
    content: str | tuple[TextPart, ...]

    def message(self) -> Message:
        if isinstance(self.content, str):
            return {"role": self.role, "content": self.content}
        return {"role": self.role, "content": "".join(part.text for part in self.content)}


class StreamOptions(Config, frozen=True):
    include_usage: bool = False
    include_obfuscation: bool = False  # padding against traffic analysis; accepted, not done


Stop = Annotated[str, Meta(min_length=1, max_length=256)]


class ChatRequest(Config, frozen=True):
    """The parameters of `POST /v1/chat/completions` that have an effect here.

    `temperature` is 0 unless set: the verdict is about greedy answers. `top_k` is an extension.
    """

    model: str
    messages: Annotated[tuple[ChatTurn, ...], Meta(min_length=1)]
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] = 0.0
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Meta(ge=0)] = 0
    seed: int | None = None
    stop: Stop | Annotated[tuple[Stop, ...], Meta(max_length=4)] = ()
    stream: bool = False
    stream_options: StreamOptions | None = None

    def conversation(self) -> list[Message]:
        return [turn.message() for turn in self.messages]

    def settings(self, max_new_tokens: int) -> AnswerSettings:
        """How to answer; `max_new_tokens` is the server's own limit and the default."""
        asked = self.max_completion_tokens or self.max_tokens or max_new_tokens
        return AnswerSettings(
            max_new_tokens=min(asked, max_new_tokens),
            sampling=Sampling(
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                seed=None if self.seed is None else self.seed % SEEDS,
            ),
            stop=(self.stop,) if isinstance(self.stop, str) else self.stop,
        )


def parse_request(body: bytes) -> ChatRequest:
    """A strict request from JSON.

    Raises:
        ApiError: 400 with the parameter's name: not JSON, unknown, unsupported, of the wrong type,
            out of range, or contradicting another one.
    """
    try:
        data = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ApiError(400, f"The body is not JSON: {error}.", "invalid_json") from None
    if not isinstance(data, dict):
        raise ApiError(400, "The body should be one JSON object.", "invalid_json")
    given = _without_nulls(_supported(data))
    try:
        request = msgspec.convert(given, ChatRequest)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None
    _refuse_contradictions(request)
    return request


def _supported(data: dict[str, Any]) -> dict[str, Any]:
    """`data` without labels and neutral parameters; refuses what this server does not have."""
    kept = {}
    for name, value in data.items():
        if name not in _NEUTRAL:
            kept[name] = value
        elif value is not None and value not in _NEUTRAL[name]:
            raise ApiError(
                400, f"This server does not support {name}: leave it out.", "unsupported_parameter", name
            )
    return {name: value for name, value in kept.items() if name not in _LABELS}


def _without_nulls(value: Any) -> Any:
    """Without members that are null: in this API null means "not given"."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _invalid(message: str) -> ApiError:
    """An ApiError from msgspec's message, which ends in a path such as "`$.messages[0].role`"."""
    text, _, path = message.partition(" - at `$")
    param = path.strip("`.") or None
    unknown = re.match(r"Object contains unknown field `(.+?)`$", text)
    if not unknown:
        return ApiError(400, f"{param or 'The body'}: {text}.", "invalid_value", param)
    name = f"{param}.{unknown.group(1)}" if param else unknown.group(1)
    known = [info.encode_name for info in msgspec.structs.fields(ChatRequest)]
    hint = "" if param else f"; {nearest(name, known)}"
    return ApiError(400, f"Unknown parameter {name}{hint}", "unknown_parameter", name)


def _refuse_contradictions(request: ChatRequest) -> None:
    if None not in (request.max_tokens, request.max_completion_tokens):
        raise ApiError(
            400,
            "Give max_completion_tokens or max_tokens, not both.",
            "invalid_value",
            "max_tokens",
        )
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options needs stream: true.", "invalid_value", "stream_options")


@dataclass(frozen=True)
class Responder:
    """Builds the JSON of one response; all its chunks share id, time and model."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(self, text: str, finish: Finish, usage: dict[str, int]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        return self._head("chat.completion") | {"choices": [choice], "usage": usage}

    def chunk(self, delta: dict[str, str], finish: Finish | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return self._head("chat.completion.chunk") | {"choices": [choice]}

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """The extra chunk that `stream_options.include_usage` asks for."""
        return self._head("chat.completion.chunk") | {"choices": [], "usage": usage}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def usage(prompt_tokens: int, new_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
    }


def event(data: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {msgspec.json.encode(data).decode()}\n\n"
