"""`holdfast bench`: speed and memory of an artifact on this machine."""

from __future__ import annotations

from pathlib import Path

import click

from holdfast.cli.options import FOLDER, emit, json_option, threads_option


@click.command("bench")
@click.argument("artifacts", type=FOLDER, nargs=-1, required=True)
@click.option(
    "--prompt-tokens",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Prefill length.",
)
@click.option(
    "--new-tokens", type=click.IntRange(min=2), default=64, show_default=True, help="Decode steps."
)
@click.option(
    "--repeats", type=click.IntRange(min=1), default=7, show_default=True, help="Measured rounds."
)
@threads_option
@json_option
def command(
    artifacts: tuple[Path, ...],
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    threads: int,
    as_json: bool,
) -> None:
    """Measure prefill, decode, time to first token and memory of one or more ARTIFACTS.

    An artifact is a bundle or an exported folder. Several are measured interleaved in one run, and
    ratios to the first are printed: absolute figures of different runs do not compare.
    """
    from holdfast.runtime.bench import bench_folders, bench_lines

    reports = bench_folders(
        artifacts,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        threads=threads,
    )
    emit(
        {"artifacts": [report.to_dict() for report in reports]},
        bench_lines(reports),
        as_json=as_json,
    )
