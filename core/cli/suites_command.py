"""`holdfast suites`: which alignment suites there are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from holdfast.cli.options import emit, json_option

if TYPE_CHECKING:
    from holdfast.evals.suites import Listing


@click.command("suites")
@json_option
def command(as_json: bool) -> None:
    """List the alignment suites: built in, and readable from published files."""
    from holdfast.evals.suites import list_suites

    rows = [_row(listing) for listing in list_suites()]
    lines = [
        f"{row['name']:<14}{row['items'] or '-':>6}  "
        f"{row['about']}{' (--suite ' + row['name'] + '=PATH)' if row['needs_path'] else ''}"
        for row in rows
    ]
    emit({"suites": rows}, [f"{'name':<14}{'items':>6}  what it holds", *lines], as_json=as_json)


def _row(listing: Listing) -> dict[str, Any]:
    """One listing as JSON types; only built-in suites can be counted."""
    from holdfast.evals.suites import load_builtin

    suite = None if listing.needs_path else load_builtin(listing.name)
    return {
        "name": listing.name,
        "kinds": [kind for _, kind in listing.suites],
        "items": len(suite.items) if suite else None,
        "digest": suite.digest if suite else None,
        "needs_path": listing.needs_path,
        "columns": list(listing.columns),
        "source": listing.source,
        "licence": listing.licence,
        "about": listing.about,
    }
