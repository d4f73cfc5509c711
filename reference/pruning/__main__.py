"""The command: measure what is missing, then write its part of the page.

    python -m reference.pruning --data-dir ../shared/data --work build/pruning --out docs/results.md

Every measurement is a step in the work folder, kept by what decides its result, so that an interrupted
run goes on, and several runs may measure different rows; those that share a pruned model (a score at a
sparsity: pruned, recovered, quantized) should be in the same run. The sources of Holdfast are not part of
that: after a change in them, measure what it concerns `--again`. The group `device` is about speed: run it
alone, on an idle machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from holdfast.config import encode
from holdfast.errors import HoldfastError
from holdfast.evals.suites import load_suites
from holdfast.progress import say
from holdfast.steps import StepRunner
from reference.pruning.device import SHAPES, measure_device
from reference.pruning.figures import (
    MARGIN_FRAC,
    Measured,
    PairFigures,
    pair_figures,
    read_measured,
)
from reference.pruning.measure import measure
from reference.pruning.page import page
from reference.pruning.plots import draw
from reference.pruning.rows import DEVICE, GROUPS, Group, Task, chosen_groups, tasks
from reference.results.figures import References
from reference.results.kept import Failed, attempt, forget, refuse_defects
from reference.results.options import page_options
from reference.results.process import in_fresh_process
from reference.results.sections import PICTURES, PRUNING, write_section
from reference.results.setup import PAIRS, REPEATED_PAIR, Pair, Setup, make_setup, present_pairs

MODELS = "models"
ROWS = "rows"


def measured(
    setup: Setup, runner: StepRunner, wanted: Sequence[Task], references: References, *, recorded_only: bool
) -> Iterator[Measured | Failed[Task]]:
    """Every measurement, made now or kept from an earlier run; one that fails does not stop the others.

    Arguments:
        recorded_only: make nothing, leave out what is not there.
    """
    for task in wanted:
        name = f"{ROWS}/{task.slug}"
        if recorded_only and not (runner.work / name).is_dir():
            continue
        recipe = encode(setup.pair.recipe_of(task.sections(), seed=task.seed, what=task.slug))
        decides = ("prune", "recover", "calibrate", "quantize", "export", "seed", "threads")
        settings = {key: recipe[key] for key in decides}
        work = _work(setup, task, runner.work / MODELS)
        step = attempt(task, partial(runner.run, name, settings, [setup.key], work))
        if isinstance(step, Failed):
            yield step
        else:
            yield read_measured(task, step.folder, step.result, references)


def _work(setup: Setup, task: Task, models: Path) -> Any:
    return lambda folder: in_fresh_process(measure, setup, task, models, folder)


def measure_pair(
    pair: Pair,
    work: Path,
    wanted: Sequence[Task],
    groups: Sequence[Group],
    *,
    device: bool,
    recorded_only: bool,
) -> PairFigures:
    """All of a pair's figures.

    Arguments:
        device: bytes and speed too.
    """
    runner = StepRunner(work / pair.name, total=len(wanted) + 2 + device * (len(SHAPES) + 1))
    setup = make_setup(pair, runner)
    config = pair.recipe().evaluate
    references = References.load(setup.answers, load_suites(config.suites, config.limit), config)
    done = list(measured(setup, runner, wanted, references, recorded_only=recorded_only))
    graphs = (
        measure_device(setup, runner, runner.work / MODELS, recorded_only=recorded_only) if device else []
    )
    return pair_figures(pair.name, references, groups, done, facts=setup.facts, device=graphs)


@click.command()
@page_options([*(group.key for group in GROUPS), DEVICE])
@click.option("--rows", multiple=True, help="Shell pattern of row names; repeatable.")
@click.option("--seeds", default=3, type=click.IntRange(min=1), help="Of repeated rows.")
@click.option(
    "--again", help="Measure rows and make models again whose folder is named like this shell pattern."
)
def main(
    data_dir: Path,
    out: Path,
    work: Path,
    pairs: tuple[str, ...],
    groups: tuple[str, ...],
    rows: tuple[str, ...],
    seeds: int,
    limit: int,
    threads: int,
    again: str | None,
    page_only: bool,
) -> None:
    """Measure every row and write this part of the page with its plots."""
    if again is not None:
        forget(work, again, (ROWS, MODELS, DEVICE))
    chosen, device = chosen_groups(groups)
    found = []
    for name in pairs or present_pairs():
        pair = Pair(name, PAIRS[name], data_dir, limit, threads, MARGIN_FRAC)
        repeated = name == REPEATED_PAIR
        wanted = tasks(chosen, seeds=seeds, rows=rows, second=not repeated)
        found.append(
            measure_pair(pair, work, wanted, chosen, device=device and repeated, recorded_only=page_only)
        )
    pictures = draw(found, out.parent / PICTURES)
    write_section(out, PRUNING, page(found, [Path(PICTURES) / picture.name for picture in pictures]))
    say(f"wrote {out} and {len(pictures)} plots")
    refuse_defects(one for pair in found for group in pair.groups for one in group.failed)


if __name__ == "__main__":
    try:
        main()
    except HoldfastError as error:
        raise SystemExit(str(error)) from error
