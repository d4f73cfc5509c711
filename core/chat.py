"""Text to token ids and back, with the model's own chat template, without transformers.

The template is rendered in jinja2's immutable sandbox with the helpers that transformers defines
(`raise_exception`, `strftime_now`, `tojson`), so that a template gives the same text here, in the
torch reference and on the device. Template, tokenizer and stop tokens are part of what a verdict
is about: `ChatTokenizer.digest` covers them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from holdfast.errors import TokenizerError
from holdfast.files import sha256_text, to_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class Message(TypedDict):
    """One chat turn, as the OpenAI API writes it."""

    role: str
    content: str


def user(content: str) -> list[Message]:
    """The conversation that consists of one user turn."""
    return [{"role": "user", "content": content}]


@dataclass(frozen=True)
class ChatTokenizer:
    """Tokenizer, chat template and stop tokens of one model.

    Attributes:
        template: jinja source of the chat template.
        special: special tokens by their transformers name, for example `{"eos_token": "<|end|>"}`.
        eos_ids: ids that end an answer.
        pad_id: id written into padded positions (their content is masked out).
        source: folder the files were read from; used in messages only.
    """

    tokenizer: Tokenizer
    template: str
    special: dict[str, str]
    eos_ids: tuple[int, ...]
    pad_id: int
    source: Path

    @classmethod
    def from_folder(cls, folder: Path, *, template: str | None = None) -> ChatTokenizer:
        """Read tokenizer.json, tokenizer_config.json and generation_config.json of `folder`.

        Arguments:
            template: used instead of the folder's own; a pre-trained base has none.

        Raises:
            TokenizerError: a file is missing or malformed, or there is no chat template.
        """
        tokenizer = read_tokenizer(folder)
        settings = _read_json(folder / "tokenizer_config.json")
        special = {name: text for name in SPECIAL_TOKENS if (text := _token_text(settings.get(name)))}
        eos_ids = _eos_ids(folder, tokenizer, special)
        pad = tokenizer.token_to_id(special["pad_token"]) if "pad_token" in special else None
        return cls(
            tokenizer=tokenizer,
            template=template if template is not None else _chat_template(folder, settings),
            special=special,
            eos_ids=eos_ids,
            pad_id=pad if pad is not None else eos_ids[0],
            source=folder,
        )

    @cached_property
    def _compiled(self) -> Any:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda fmt: datetime.now().strftime(fmt)
        try:
            return environment.from_string(self.template)
        except TemplateError as error:
            raise TokenizerError(
                f"The chat template in {self.source} is not valid jinja ({error}): correct the template."
            ) from error

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The conversation as text, ready for the model to answer.

        Raises:
            TokenizerError: the template refuses the conversation or leaves the sandbox.
        """
        try:
            text: str = self._compiled.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **self.special
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise TokenizerError(
                f"The chat template in {self.source} refused the conversation: {error}"
            ) from error
        return text

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; special tokens are recognised in the text and never added."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the rendered conversation, up to where the answer begins."""
        return self.encode(self.render(messages))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    @property
    def vocabulary_size(self) -> int:
        size: int = self.tokenizer.get_vocab_size(with_added_tokens=True)
        return size

    def vocabulary_digest(self) -> str:
        """Digest of the map from token text to id: equal when two models share a vocabulary."""
        return sha256_text(to_json(self.tokenizer.get_vocab(with_added_tokens=True)))

    def digest(self) -> str:
        """Digest of everything that turns a conversation into ids and ids into an answer."""
        parts = {
            "tokenizer": json.loads(self.tokenizer.to_str()),
            "template": self.template,
            "special": self.special,
            "eos_ids": self.eos_ids,
            "pad_id": self.pad_id,
        }
        return sha256_text(to_json(parts))


def read_tokenizer(folder: Path) -> Tokenizer:
    """The `tokenizers` object in `folder`/tokenizer.json.

    Raises:
        TokenizerError: missing or malformed.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise TokenizerError(
            f"Expected a tokenizer.json in {folder}, found none: save the model's fast tokenizer there "
            "(`AutoTokenizer.from_pretrained(...).save_pretrained(folder)`)."
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception for every malformed file
        raise TokenizerError(f"{path} is not a readable tokenizer ({error}): save it again.") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise TokenizerError(f"{path} is not readable JSON ({error}): save it again.") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} should hold one JSON object, found {type(value).__name__}.")
    return value


def _token_text(value: Any) -> str:
    return value.get("content", "") if isinstance(value, dict) else value or ""


def _chat_template(folder: Path, settings: dict[str, Any]) -> str:
    """The template's source: its own file first, then the entry in tokenizer_config.json."""
    own_file = folder / "chat_template.jinja"
    if own_file.is_file():
        return own_file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named templates: the default one
        template = next((t["template"] for t in template if t.get("name") == "default"), None)
    if not template or not isinstance(template, str):
        raise TokenizerError(
            f"The tokenizer in {folder} has no chat template, and alignment is only defined for chat: "
            "add `chat_template` to tokenizer_config.json or a chat_template.jinja file."
        )
    return template


def _eos_ids(folder: Path, tokenizer: Tokenizer, special: dict[str, str]) -> tuple[int, ...]:
    """Stop ids: generation_config.json first, then config.json, then the tokenizer's eos token."""
    for name in ("generation_config.json", "config.json"):
        value = _read_json(folder / name).get("eos_token_id")
        if value is not None:
            return tuple(value) if isinstance(value, list) else (int(value),)
    token_id = tokenizer.token_to_id(special.get("eos_token", ""))
    if token_id is None:
        raise TokenizerError(
            f"No end-of-answer token is known for {folder}: set `eos_token_id` in generation_config.json."
        )
    return (token_id,)


def _tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
