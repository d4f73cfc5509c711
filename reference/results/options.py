"""Options of the commands that measure and print a part of docs/results.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from reference.results.setup import PAIRS

Command = TypeVar("Command", bound=Callable[..., Any])


def page_options(groups: Sequence[str]) -> Callable[[Command], Command]:
    """What both commands take.

    Arguments:
        groups: keys of what can be measured by itself.
    """

    def decorate(command: Command) -> Command:
        for option in reversed(_options(groups)):
            command = option(command)
        return command

    return decorate


def _options(groups: Sequence[str]) -> list[Callable[[Command], Command]]:
    path = click.Path(path_type=Path)
    return [
        click.option("--data-dir", type=click.Path(path_type=Path, exists=True), required=True),
        click.option("--out", type=path, required=True, help="The page to write this part of."),
        click.option("--work", type=path, required=True, help="Keeps what was measured."),
        click.option(
            "--pair",
            "pairs",
            multiple=True,
            type=click.Choice(list(PAIRS)),
            help="Default: all that are there.",
        ),
        click.option("--group", "groups", multiple=True, help=f"Of {', '.join(groups)}; default: all."),
        click.option("--limit", default=0, help="At most this many prompts a suite; 0 for all."),
        click.option(
            "--threads", default=0, help="Of torch and ONNX Runtime; 0 leaves the choice to them."
        ),
        click.option("--page-only", is_flag=True, help="Measure nothing, write the page of what is there."),
    ]
