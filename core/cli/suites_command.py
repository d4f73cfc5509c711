"""`holdfast suites`: which alignment suites there are."""

from __future__ import annotations

import click

from holdfast.cli.options import emit, json_option
from holdfast.evals.suites import list_suites


@click.command("suites")
@json_option
def command(as_json: bool) -> None:
    """List the alignment suites: built in, and readable from published files."""
    rows = list_suites()
    lines = [
        f"{row['name']:<16}{row['kind']:<14}{row['items'] or '-':>6}  {row['description']}" for row in rows
    ]
    header = f"{'name':<16}{'kind':<14}{'items':>6}  description"
    emit({"suites": rows}, [header, *lines], as_json=as_json)
