"""Options that several commands share, and how a command prints its result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from holdfast.files import to_json

Command = TypeVar("Command", bound=Callable[..., Any])

FOLDER = click.Path(path_type=Path)

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace what --out names.")
seed_option = click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Random seed."
)
threads_option = click.option(
    "--threads",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Intra-op threads; 0 leaves the choice to the runtime.",
)


def out_option(what: str) -> Callable[[Command], Command]:
    """The required `--out` of a command that writes one folder."""
    return click.option("--out", type=FOLDER, required=True, help=f"Folder for {what}.")


def emit(result: dict[str, Any], lines: list[str], *, as_json: bool) -> None:
    """Print a command's result on stdout: JSON for machines, lines for people."""
    click.echo(to_json(result).rstrip("\n") if as_json else "\n".join(lines))
