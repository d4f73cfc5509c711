"""Reading rows: JSONL and CSV with named columns, every complaint with its file and line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from holdfast.errors import SuiteError

Row = dict[str, Any]


def read_jsonl(text: str, where: str) -> list[Row]:
    """One JSON object a line; blank lines are skipped.

    Raises:
        SuiteError: a line that is no JSON object, with its number.
    """
    rows: list[Row] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise SuiteError(f"Line {number} of {where} is not JSON ({error}): correct it.") from error
        if not isinstance(row, dict):
            raise SuiteError(
                f"Line {number} of {where} should hold one JSON object, found {type(row).__name__}."
            )
        rows.append(row)
    return rows


def read_csv(path: Path, columns: Sequence[str], *, what: str) -> list[dict[str, str]]:
    """Rows of a UTF-8 CSV file that has at least `columns`.

    Raises:
        SuiteError: unreadable, or a column is missing.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        found = reader.fieldnames or []
        missing = [name for name in columns if name not in found]
        if missing:
            raise SuiteError(
                f"Expected the columns {', '.join(columns)} in {what}, missing "
                f"{', '.join(missing)}: check that this is the published file."
            )
        return [{key: value or "" for key, value in row.items() if key} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SuiteError(f"{path} is not a readable CSV file ({error}): check the path.") from error


def require_columns(rows: Sequence[Row], columns: Sequence[str], where: str) -> None:
    """Raise SuiteError naming the first row that lacks one of `columns`."""
    for number, row in enumerate(rows, start=1):
        for name in columns:
            field(row, name, f"row {number} of {where}")


def field(row: Row, name: str, where: str) -> str:
    """The text under `name`; ids may be written as integers."""
    value = row.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise SuiteError(
            f"Expected a text `{name}` in {where}, found "
            f"{'nothing' if value is None else type(value).__name__}: add it."
        )
    return value


def optional_field(row: Row, name: str, where: str) -> str | None:
    return None if row.get(name) in (None, "") else field(row, name, where)
