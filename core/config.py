"""Frozen configuration: strict decoding of plain data, one sentence for what does not fit."""

from __future__ import annotations

import difflib
import re
from typing import Any, TypeVar

import msgspec

from holdfast.errors import RecipeError


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every configuration record: immutable, keyword-only, unknown keys refused."""


T = TypeVar("T", bound=Config)


def decode(data: Any, kind: type[T], *, what: str) -> T:
    """Plain data to a `Config`.

    Arguments:
        data: mappings, lists and scalars, as YAML or JSON give them.
        kind: the record to build.
        what: names the source in the message, for example the recipe's path.

    Raises:
        RecipeError: an unknown key (with the nearest known one), a wrong type, a value out of range.
    """
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise RecipeError(f"{what}: {_explain(str(error), kind)}.") from None


def encode(value: Config) -> dict[str, Any]:
    """A `Config` as plain data, defaults included, so that a written recipe says everything."""
    plain: dict[str, Any] = msgspec.to_builtins(value)
    return plain


def nearest(name: str, known: list[str]) -> str:
    """`; did you mean 'x'?` or the list of what is known."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean `{match[0]}`?" if match else f"known here: {', '.join(sorted(known))}"


def _explain(message: str, kind: type[Config]) -> str:
    unknown = re.match(r"Object contains unknown field `(.+?)`(?: - at `\$\.?(.*)`)?$", message)
    if unknown:
        name, where = unknown.group(1), unknown.group(2) or ""
        path = f"{where}.{name}" if where else name
        return f"unknown key `{path}`; {nearest(name, _fields_at(kind, where))}"
    return message.replace("`$.", "`")


def _fields_at(kind: type[Config], where: str) -> list[str]:
    """Field names of the record at a dotted path below `kind`."""
    current: Any = kind
    for part in filter(None, re.sub(r"\[.*?\]", "", where).split(".")):
        current = next(field.type for field in msgspec.structs.fields(current) if field.name == part)
        current = _record_in(current)
    return [field.encode_name for field in msgspec.structs.fields(current)]


def _record_in(annotation: Any) -> Any:
    """The record type inside an annotation such as `tuple[SuiteChoice, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _record_in(argument)
        if found is not None:
            return found
    return None
