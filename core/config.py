"""Frozen configuration: strict decoding of plain data, one sentence for what does not fit."""

from __future__ import annotations

import difflib
import re
from typing import Any, Literal, TypeVar, get_origin

import msgspec

from holdfast.errors import RecipeError

BOUNDS = {"<": "below", "<=": "of at most", ">=": "of at least", ">": "above"}


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
        raise RecipeError(f"{what}: {_explain(str(error), kind, data)}") from None


def encode(value: Config) -> dict[str, Any]:
    """A `Config` as plain data, defaults included, so that a written recipe says everything."""
    plain: dict[str, Any] = msgspec.to_builtins(value)
    return plain


def nearest(name: str, known: list[str]) -> str:
    """The end of a sentence about an unknown name: the one that was meant, or what is known."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean `{match[0]}`?" if match else f"known here: {', '.join(sorted(known))}."


def _explain(message: str, kind: type[Config], data: Any) -> str:
    """msgspec's message as the end of a sentence that names the key, what it holds and what it may hold."""
    unknown = re.match(r"Object contains unknown field `(.+?)`(?: - at `\$\.?(.*)`)?$", message)
    if unknown:
        name, where = unknown.group(1), unknown.group(2) or ""
        path = f"{where}.{name}" if where else name
        known = [field.encode_name for field in msgspec.structs.fields(_record_at(kind, where))]
        return f"unknown key `{path}`; {nearest(name, known)}"
    said, found, where = message.partition(" - at `$.")
    if not found:
        return f"{message}."
    where = where.removesuffix("`")
    expected = _expected(said, _annotation_at(kind, where))
    return f"`{where}` is {_value_at(data, where)!r}: {expected}."


def _expected(said: str, annotation: Any) -> str:
    """What may stand at a key, in words, from msgspec's message about it and the key's type."""
    if said.startswith("Invalid enum value"):
        return f"expected {_one_of(_literals(annotation))}"
    descriptions = [meta.description for meta in _metas(annotation) if meta.pattern and meta.description]
    if "matching regex" in said and descriptions:
        return f"expected {descriptions[0]}"
    bound = re.fullmatch(r"Expected `(?:int|float)` (<|<=|>=|>) (.+)", said)
    if bound:
        return f"expected a number {BOUNDS[bound.group(1)]} {bound.group(2)}"
    length = re.fullmatch(r"Expected `array` of length >= (\d+)", said)
    if length:
        return f"expected {length.group(1)} or more entries"
    return said[0].lower() + said[1:]


def _one_of(choices: list[Any]) -> str:
    *rest, last = (f"`{choice}`" for choice in choices)
    return f"{', '.join(rest)} or {last}" if rest else last


def _value_at(data: Any, where: str) -> Any:
    """What is at a path such as `a.b[0]`; of a mapping whose key the path leaves open, the mapping."""
    for part in re.findall(r"[^.\[\]]+|\[\.\.\.\]", where):
        if part == "[...]":
            return data
        data = data[int(part)] if isinstance(data, list | tuple) else data[part]
    return data


def _annotation_at(kind: type[Config], where: str) -> Any:
    """Type of the field at a path such as `a.b[0]`; of entries of a list or mapping, that of the whole."""
    parents, _, last = re.sub(r"\[.*?\]", "", where).rpartition(".")
    fields = msgspec.structs.fields(_record_at(kind, parents))
    return next(field.type for field in fields if field.encode_name == last)


def _record_at(kind: type[Config], where: str) -> Any:
    """The record at a path below `kind`."""
    return _record_in(_annotation_at(kind, where)) if where else kind


def _metas(annotation: Any) -> list[msgspec.Meta]:
    """Constraints anywhere in an annotation."""
    own = [entry for entry in getattr(annotation, "__metadata__", ()) if isinstance(entry, msgspec.Meta)]
    return own + [meta for argument in _arguments(annotation) for meta in _metas(argument)]


def _literals(annotation: Any) -> list[Any]:
    """Choices of the literals anywhere in an annotation."""
    if get_origin(annotation) is Literal:
        return list(annotation.__args__)
    return [choice for argument in _arguments(annotation) for choice in _literals(argument)]


def _arguments(annotation: Any) -> tuple[Any, ...]:
    """What an annotation such as `Annotated[tuple[int, ...], Meta()]` is made of, from outside in."""
    return getattr(annotation, "__args__", ())


def _record_in(annotation: Any) -> Any:
    """The record type inside an annotation such as `tuple[SuiteChoice, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        return annotation
    for argument in _arguments(annotation):
        found = _record_in(argument)
        if found is not None:
            return found
    return None
