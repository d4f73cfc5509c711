"""The command: measure what is missing, then write its part of the page.

    python -m reference.results --data-dir ../shared/data --work build/results --out docs/results.md

Every measurement is a step in the work folder, kept by what decides its result (recipe, seed, models,
prompts, installed packages), so that an interrupted run goes on, and several runs may measure different
groups. The sources of Holdfast are not part of that: after a change in them, measure what it concerns
`--again`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from holdfast.config import encode
from holdfast.errors import HoldfastError
from holdfast.evals.suites import load_suites
from holdfast.exporter.export import read_export
from holdfast.progress import say
from holdfast.steps import StepRunner
from reference.results.figures import Measured, PairFigures, References, pair_figures, read_measured
from reference.results.kept import Failed, attempt, forget, refuse_defects
from reference.results.measure import measure
from reference.results.options import page_options
from reference.results.page import page
from reference.results.plots import draw
from reference.results.process import in_fresh_process
from reference.results.rows import GROUPS, Group, Task, chosen_groups, tasks
from reference.results.sections import PICTURES, QUANTIZATION, write_section
from reference.results.setup import PAIRS, REPEATED_PAIR, Pair, Setup, make_setup, present_pairs


def measured(
    setup: Setup, runner: StepRunner, wanted: Sequence[Task], references: References, *, recorded_only: bool
) -> Iterator[Measured | Failed[Task]]:
    """Every measurement, made now or kept from an earlier run; one that fails does not stop the others.

    Arguments:
        recorded_only: make nothing, leave out what is not there.
    """
    for task in wanted:
        name = f"rows/{task.slug}"
        if recorded_only and not (runner.work / name).is_dir():
            continue
        recipe = encode(setup.pair.recipe(task))
        settings = {key: recipe[key] for key in ("calibrate", "quantize", "export", "seed", "threads")}
        settings |= {key: getattr(task.row, key) for key in ("maker", "allocation", "schemes")}
        step = attempt(task, partial(runner.run, name, settings, [setup.key], _work(setup, task)))
        if isinstance(step, Failed):
            yield step
        else:
            yield read_measured(task, step.folder, step.result, references)


def _work(setup: Setup, task: Task) -> Any:
    return lambda folder: in_fresh_process(measure, setup, task, folder)


def measure_pair(
    pair: Pair, work: Path, wanted: Sequence[Task], groups: Sequence[Group], *, recorded_only: bool
) -> PairFigures:
    """All of a pair's figures."""
    runner = StepRunner(work / pair.name, total=len(wanted) + 2)
    setup = make_setup(pair, runner)
    config = pair.recipe().evaluate
    references = References.load(setup.answers, load_suites(config.suites, config.limit), config)
    done = list(measured(setup, runner, wanted, references, recorded_only=recorded_only))
    facts = setup.facts | {"parameters": linear_parameters(setup.graph)}
    return pair_figures(pair.name, references, groups, done, facts=facts)


def linear_parameters(graph: Path) -> int:
    """Weights of all linear layers of an exported model, packed ones counted once."""
    shapes = {linear.weight: linear.shape for linear in read_export(graph).modules.values()}
    return int(sum(np.prod(shape) for shape in shapes.values()))


@click.command()
@page_options([group.key for group in GROUPS])
@click.option("--rows", default="*", help="Shell pattern of row names.")
@click.option(
    "--seeds", default=3, type=click.IntRange(min=1), help="In hard schemes, on the reference pair."
)
@click.option("--again", help="Measure rows again whose folder is named like this shell pattern.")
def main(
    data_dir: Path,
    out: Path,
    work: Path,
    pairs: tuple[str, ...],
    groups: tuple[str, ...],
    rows: str,
    seeds: int,
    limit: int,
    threads: int,
    again: str | None,
    page_only: bool,
) -> None:
    """Measure every row and write this part of the page with its plots."""
    if again is not None:
        forget(work, again)
    chosen = chosen_groups(groups)
    found = []
    for name in pairs or present_pairs():
        pair = Pair(name, PAIRS[name], data_dir, limit, threads)
        wanted = tasks(chosen, seeds=seeds if name == REPEATED_PAIR else 1, rows=rows)
        found.append(measure_pair(pair, work, wanted, chosen, recorded_only=page_only))
    pictures = draw(found, out.parent / PICTURES)
    text = page(found, [Path(PICTURES) / picture.name for picture in pictures], seeds=seeds)
    write_section(out, QUANTIZATION, text)
    say(f"wrote {out} and {len(pictures)} plots")
    refuse_defects(one for pair in found for group in pair.groups for one in group.failed)


if __name__ == "__main__":
    try:
        main()
    except HoldfastError as error:
        raise SystemExit(str(error)) from error
