"""Suites: the prompts a verdict is about, built in or read from published files.

A suite is data with a digest. Built-in suites are JSONL files inside the package; published sets
are read from the file the user names and never copied into the project, but the prompts that were
run are written into the bundle, so that the verdict can be checked where the bundle arrives.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from holdfast.config import nearest
from holdfast.errors import SuiteError
from holdfast.evals.tables import Row, field, optional_field, read_csv, read_jsonl, require_columns
from holdfast.files import sha256_text, to_json, write_text
from holdfast.recipe import SuiteChoice

SuiteKind = Literal["refusal", "over-refusal", "pairs"]
KINDS: tuple[SuiteKind, ...] = ("refusal", "over-refusal", "pairs")
SUITE_SCHEMA = 1
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")


@dataclass(frozen=True)
class SuiteItem:
    """One prompt.

    Attributes:
        id: unique within its suite.
        subject: what tables and plots group by: a hazard class, a kind of look-alike, a principle.
        twin: id of the matched prompt of the opposite kind, in another suite.
        chosen, rejected: the two continuations of a preference pair; both or none.
    """

    id: str
    prompt: str
    subject: str
    twin: str | None = None
    chosen: str | None = None
    rejected: str | None = None


@dataclass(frozen=True)
class Suite:
    """Prompts of one kind.

    Attributes:
        kind: `refusal` (safe = refused), `over-refusal` (safe = complied) or `pairs` (safe = the
            chosen continuation is the likelier one).
    """

    name: str
    kind: SuiteKind
    items: tuple[SuiteItem, ...]
    source: str
    licence: str

    @cached_property
    def digest(self) -> str:
        """Digest of everything that is asked: name, kind and items."""
        items = [asdict(item) for item in self.items]
        return sha256_text(to_json({"name": self.name, "kind": self.kind, "items": items}))

    def limited(self, limit: int) -> Suite:
        """At most `limit` items, taken evenly over the suite; 0 keeps all."""
        if limit == 0 or limit >= len(self.items):
            return self
        picked = tuple(self.items[i * len(self.items) // limit] for i in range(limit))
        return Suite(self.name, self.kind, picked, self.source, self.licence)


def make_suite(
    name: str, kind: SuiteKind, items: Iterable[SuiteItem], *, source: str, licence: str
) -> Suite:
    """A checked suite.

    Raises:
        SuiteError: no items, a repeated id, an empty prompt, a pair without both continuations, a
            name that cannot be a file name.
    """
    if not _NAME.fullmatch(name):
        raise SuiteError(
            f"A suite cannot be called {name!r}: use lower-case letters, digits, dots and hyphens."
        )
    suite = Suite(name, kind, tuple(items), source, licence)
    if not suite.items:
        raise SuiteError(f"The suite {name} from {source} holds no prompts: no data is not a score.")
    seen: set[str] = set()
    for item in suite.items:
        if item.id in seen:
            raise SuiteError(f"The suite {name} uses the id {item.id!r} twice: make ids unique.")
        seen.add(item.id)
        _check_item(item, suite)
    return suite


def _check_item(item: SuiteItem, suite: Suite) -> None:
    if not item.prompt.strip():
        raise SuiteError(f"The prompt {item.id!r} of the suite {suite.name} is empty: fill it in.")
    if suite.kind != "pairs":
        return
    for name, text in (("chosen", item.chosen), ("rejected", item.rejected)):
        if not (text or "").strip():
            raise SuiteError(
                f"The pair {item.id!r} of the suite {suite.name} has no `{name}` text: fill it in."
            )


# --- the registry -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Listing:
    """One name that a recipe's `suites` may give.

    Attributes:
        suites: the suites that the name stands for, each with its kind.
        columns: columns that the file has to have.
    """

    name: str
    suites: tuple[tuple[str, SuiteKind], ...]
    needs_path: bool
    columns: tuple[str, ...]
    source: str
    licence: str
    about: str


OURS = "written for Holdfast"
LISTINGS: tuple[Listing, ...] = (
    Listing(
        "refusal",
        (("refusal", "refusal"),),
        False,
        ("id", "prompt", "hazard"),
        OURS,
        "Apache-2.0",
        "harmful requests over the MLCommons hazard classes",
    ),
    Listing(
        "over-refusal",
        (("over-refusal", "over-refusal"),),
        False,
        ("id", "prompt", "kind"),
        OURS,
        "Apache-2.0",
        "harmless requests that sound harmful",
    ),
    Listing(
        "constitution",
        (("constitution", "pairs"),),
        False,
        ("id", "principle", "prompt", "chosen", "rejected"),
        OURS,
        "Apache-2.0",
        "preference pairs on the principles of a short constitution",
    ),
    Listing(
        "xstest",
        (("xstest-safe", "over-refusal"), ("xstest-unsafe", "refusal")),
        True,
        ("id", "prompt", "type", "label"),
        "XSTest v2 (Röttger et al. 2024, arXiv 2308.01263)",
        "CC-BY-4.0",
        "look-alike prompts and their unsafe contrasts",
    ),
    Listing(
        "harmbench",
        (("harmbench", "refusal"),),
        True,
        ("Behavior", "FunctionalCategory", "SemanticCategory", "BehaviorID"),
        "HarmBench (Mazeika et al. 2024, arXiv 2402.04249)",
        "MIT",
        "harmful behaviours; the `standard` rows",
    ),
    Listing(
        "ailuminate",
        (("ailuminate", "refusal"),),
        True,
        ("release_prompt_id", "prompt_text", "hazard"),
        "AILuminate demo prompts (MLCommons, arXiv 2503.05731)",
        "CC-BY-4.0",
        "harmful requests by hazard class",
    ),
    Listing(
        "file",
        (),
        True,
        ("id", "prompt", "subject"),
        "the user's file",
        "the user's",
        "a suite of your own, in the JSONL form that bundles carry",
    ),
)
_BY_NAME = {listing.name: listing for listing in LISTINGS}
_BUILTIN_FILES = {
    "refusal": "refusal.jsonl",
    "over-refusal": "over_refusal.jsonl",
    "constitution": "constitution_pairs.jsonl",
}


def list_suites() -> tuple[Listing, ...]:
    """Everything a recipe may name."""
    return LISTINGS


def load_suites(choices: Sequence[SuiteChoice], limit: int) -> list[Suite]:
    """Load the chosen suites, in order; XSTest becomes two.

    Arguments:
        limit: at most this many prompts a suite, taken evenly over it; 0 for all.

    Raises:
        SuiteError: an unknown name, a missing path, unreadable or empty data, the same suite twice.
    """
    if not choices:
        raise SuiteError("No suite was chosen: name at least one under `evaluate.suites`.")
    suites = [suite for choice in choices for suite in _load(choice)]
    names = [suite.name for suite in suites]
    for name in names:
        if names.count(name) > 1:
            raise SuiteError(f"The suite {name} was chosen twice: name it once.")
    return [suite.limited(limit) for suite in suites]


def _load(choice: SuiteChoice) -> list[Suite]:
    listing = _BY_NAME.get(choice.name)
    if listing is None:
        raise SuiteError(f"Unknown suite `{choice.name}`; {nearest(choice.name, list(_BY_NAME))}")
    if not listing.needs_path:
        if choice.path is not None:
            raise SuiteError(
                f"The suite {choice.name} is built in and takes no path; use the name `file` "
                f"for a suite of your own at {choice.path}."
            )
        return [load_builtin(choice.name)]
    if choice.path is None:
        raise SuiteError(f"The suite {choice.name} is read from a file: give its `path` beside the name.")
    if choice.name == "file":
        return [read_suite(Path(choice.path))]
    return _read_published(listing, Path(choice.path))


def load_builtin(name: str) -> Suite:
    """A built-in suite by the name that `list_suites` gives."""
    listing = _BY_NAME[name]
    ((suite_name, kind),) = listing.suites
    where = f"built-in suite {name}"
    data = resources.files("holdfast.evals.data").joinpath(_BUILTIN_FILES[name])
    if not data.is_file():
        raise SuiteError(f"The data of the {where} is missing: install Holdfast again.")
    rows = read_jsonl(data.read_text(encoding="utf-8"), where)
    require_columns(rows, listing.columns, where)
    if kind == "pairs":
        principles = read_principles()
        rows = [{**row, "principle": principles[field(row, "principle", where)]} for row in rows]
    subject = {"refusal": "hazard", "over-refusal": "kind", "pairs": "principle"}[kind]
    items = (_item(row, where, subject=subject) for row in rows)
    return make_suite(suite_name, kind, items, source=listing.source, licence=listing.licence)


def read_principles() -> dict[str, str]:
    """Number of each principle of the built-in constitution (as text) to its short name."""
    data = resources.files("holdfast.evals.data").joinpath("constitution.yaml")
    constitution = yaml.safe_load(data.read_text(encoding="utf-8"))
    return {str(principle["id"]): principle["name"] for principle in constitution["principles"]}


def _item(row: Row, where: str, *, subject: str) -> SuiteItem:
    return SuiteItem(
        id=field(row, "id", where),
        prompt=field(row, "prompt", where),
        subject=field(row, subject, where),
        twin=optional_field(row, "twin", where),
        chosen=optional_field(row, "chosen", where),
        rejected=optional_field(row, "rejected", where),
    )


# --- published sets ---------------------------------------------------------------------------


def _xstest(row: Mapping[str, str]) -> tuple[str, SuiteItem]:
    name = f"xstest-{row['label']}"
    return name, SuiteItem(row["id"], row["prompt"], row["type"])


def _harmbench(row: Mapping[str, str]) -> tuple[str, SuiteItem]:
    name = "harmbench" if row["FunctionalCategory"] == "standard" else ""  # others need a context
    return name, SuiteItem(row["BehaviorID"], row["Behavior"], row["SemanticCategory"])


def _ailuminate(row: Mapping[str, str]) -> tuple[str, SuiteItem]:
    return "ailuminate", SuiteItem(row["release_prompt_id"], row["prompt_text"], row["hazard"])


_READERS: dict[str, Callable[[Mapping[str, str]], tuple[str, SuiteItem]]] = {
    "xstest": _xstest,
    "harmbench": _harmbench,
    "ailuminate": _ailuminate,
}


def _read_published(listing: Listing, path: Path) -> list[Suite]:
    """The suites of one published CSV file; rows that belong to none of them are left out."""
    rows = read_csv(path, listing.columns, what=f"the {listing.name} file {path}")
    sorted_rows = [_READERS[listing.name](row) for row in rows]
    return [
        make_suite(
            name,
            kind,
            (item for belongs_to, item in sorted_rows if belongs_to == name),
            source=listing.source,
            licence=listing.licence,
        )
        for name, kind in listing.suites
    ]


# --- suites as files --------------------------------------------------------------------------


def write_suite(suite: Suite, path: Path) -> None:
    """Write a suite as JSONL: a header line, then one item a line."""
    header = {
        "schema": SUITE_SCHEMA,
        "suite": suite.name,
        "kind": suite.kind,
        "source": suite.source,
        "licence": suite.licence,
    }
    rows = [{k: v for k, v in asdict(item).items() if v is not None} for item in suite.items]
    write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in [header, *rows]))


def read_suite(path: Path) -> Suite:
    """Read what `write_suite` wrote, or a file of the user's own in that form.

    Raises:
        SuiteError: unreadable, no header line, another schema, missing columns, no items.
    """
    where = f"the suite file {path}"
    try:
        rows = read_jsonl(path.read_text(encoding="utf-8"), where)
    except (OSError, UnicodeDecodeError) as error:
        raise SuiteError(f"{path} is not a readable suite ({error}): check the path.") from error
    if not rows:
        raise SuiteError(f"{path} holds no suite: the file is empty.")
    header, *items = rows
    kind = _check_header(header, path)
    return make_suite(
        field(header, "suite", where),
        kind,
        (_item(row, where, subject="subject") for row in items),
        source=str(header.get("source", path)),
        licence=str(header.get("licence", "not stated")),
    )


def _check_header(header: dict[str, Any], path: Path) -> SuiteKind:
    if header.get("schema") != SUITE_SCHEMA or header.get("kind") not in KINDS:
        raise SuiteError(
            f'{path} should begin with a line {{"schema": {SUITE_SCHEMA}, "suite": name, '
            f'"kind": one of {", ".join(KINDS)}}}; found {json.dumps(header)[:120]}.'
        )
    kind: SuiteKind = header["kind"]
    return kind
