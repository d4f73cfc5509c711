"""Measures docs/benchmarks.md: both sizes, graphs and exports, each script a process of its own.

    python -m benchmarks --work build/benchmarks --out docs/benchmarks.md

Idle machine, 24 GB of memory, 30 GB of disk. Checkpoints and the folders of onnxruntime-genai's
builder come from the environment (CHECKPOINT_125M, GENAI_125M, GENAI_INT4_125M, and the same with 1B); see
genai_builder.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from benchmarks.page import write_page

ROUNDS = {"125m": 9, "1b": 5}
REPEATS = {"125m": 5, "1b": 2}
GIVEN = {"--checkpoint": "CHECKPOINT", "--genai": "GENAI", "--genai-int4": "GENAI_INT4"}


def given(size: str, options: Sequence[str]) -> list[str]:
    """Command line options for what the environment names."""
    found = ((option, os.environ.get(f"{GIVEN[option]}_{size.upper()}")) for option in options)
    return [part for option, value in found if value for part in (option, value)]


def commands(size: str, work: Path) -> list[list[str]]:
    """Modules and arguments, in order."""
    common = ["--size", size, "--work", str(work), *given(size, ["--checkpoint"])]
    graphs = [*common, *given(size, ["--genai", "--genai-int4"]), "--rounds", str(ROUNDS[size])]
    return [
        ["benchmarks.graphs", *graphs, "--out", str(work / f"graphs-{size}.json")],
        [
            "benchmarks.exports",
            *common,
            "--repeats",
            str(REPEATS[size]),
            "--out",
            str(work / f"exports-{size}.json"),
        ],
    ]


@click.command()
@click.option(
    "--work", type=click.Path(path_type=Path), required=True, help="Graphs and figures are kept here."
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The page to write.")
@click.option("--size", "sizes", type=click.Choice(list(ROUNDS)), multiple=True, help="This size only.")
@click.option(
    "--render", is_flag=True, help="Measure nothing; write the page from the figures that are there."
)
def main(work: Path, out: Path, sizes: tuple[str, ...], render: bool) -> None:
    """Measure both models and write the page."""
    chosen = sizes or tuple(ROUNDS)
    for size in () if render else chosen:
        for command in commands(size, work):
            subprocess.run([sys.executable, "-m", *command], check=True)
    click.echo(write_page(work, chosen, out))


if __name__ == "__main__":
    main()
