"""docs/results.md: parts between comment markers, each written by a command of its own."""

from __future__ import annotations

import re
from pathlib import Path

from holdfast.errors import UsageError
from holdfast.files import write_text

QUANTIZATION, PRUNING = "quantization", "pruning"
PARTS = (QUANTIZATION, PRUNING)
"""In the order of the page."""
PICTURES = "results"  # folder beside the page

HEAD = """# Results

`make results` (`python -m reference.results`) prints the part on quantization, `make results-pruning`
(`python -m reference.pruning`) the part on pruning; each leaves the other's as it is.
"""


def write_section(path: Path, name: str, text: str) -> None:
    """Replace one part of the page at `path`, which need not be there yet.

    Raises:
        UsageError: see `with_section`.
    """
    page = path.read_text(encoding="utf-8") if path.is_file() else ""
    write_text(path, with_section(page, name, text))


def with_section(page: str, name: str, text: str) -> str:
    """The page with `text` as its part `name`, the other parts as they are; `page` may be empty.

    Raises:
        UsageError: the page has text and none of the parts.
    """
    found = {part: body for part in PARTS if (body := _section(page, part)) is not None}
    if page.strip() and not found:
        raise UsageError(
            f"Expected a page with parts between markers such as {_markers(name)[0]!r}, found one without: "
            "write to a new file, or remove the old one."
        )
    found[name] = text
    return "\n".join([HEAD, *(_marked(part, found[part]) for part in PARTS if part in found)])


def _section(page: str, name: str) -> str | None:
    """What is between the markers of a part; None where there are none."""
    begin, end = map(re.escape, _markers(name))
    found = re.search(f"{begin}\n(.*?){end}", page, re.DOTALL)
    return found[1] if found else None


def _marked(name: str, text: str) -> str:
    begin, end = _markers(name)
    return f"{begin}\n{text.rstrip()}\n{end}\n"


def _markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
