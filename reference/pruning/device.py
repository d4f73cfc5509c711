"""Bytes and decode latency of pruned graphs: what ONNX Runtime makes of zeros, and of what is gone.

All graphs are measured in turns in one process, because figures of different runs do not compare. Nothing
is recovered: how fast a graph is does not depend on the values of its weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.exporter.export import graph_bytes
from holdfast.job import Job, prepare
from holdfast.prune.structured.remove import model_size
from holdfast.runtime.bench import BenchReport, Spread, bench_folders
from holdfast.steps import StepRunner, Work
from reference.pruning.measure import make_model, zlib_bytes
from reference.pruning.rows import (
    BOTH,
    DEVICE,
    STRUCTURES,
    UNPRUNED,
    WANDA,
    Group,
    Row,
    Task,
    pattern,
    score_of,
    structured,
    zeros,
)
from reference.results.measure import by_recipe
from reference.results.process import Stages, in_fresh_process
from reference.results.setup import Setup

PROMPT_TOKENS, NEW_TOKENS, REPEATS = 128, 64, 21
FORMS = {"fp32": "none", "W8A8": "w8a8"}
"""Form of a graph -> scheme; the ranges are min-max, since only speed and bytes are looked at."""
ZEROS, PATTERN, STRUCTURED, DENSE = "zeros", "2:4", "structures removed", "unpruned"
SCORE = WANDA  # any would do


@dataclass(frozen=True)
class Shape:
    """One pruned model to put on a device.

    Attributes:
        kind: of the line in the plot.
    """

    kind: str
    row: Row


SHAPES = (
    Shape(DENSE, UNPRUNED),
    *(Shape(ZEROS, zeros(score_of(SCORE), frac)) for frac in (0.2, 0.5, 0.7)),
    Shape(PATTERN, pattern(score_of(SCORE), PATTERN)),
    *(Shape(STRUCTURED, structured(BOTH, frac)) for frac in STRUCTURES[BOTH][1]),
)


@dataclass(frozen=True)
class DeviceFigures:
    """One graph.

    Attributes:
        sparsity_frac: share of the decoder blocks' weights that are zero or gone.
        parameters_frac: of the whole unpruned model, how many parameters are left.
        size_bytes: graph with its external data.
        zlib_bytes: the same, compressed.
        decode_tokens_per_s, prefill_tokens_per_s: one conversation at a time.
    """

    name: str
    kind: str
    form: str
    sparsity_frac: float
    parameters_frac: float
    size_bytes: int
    zlib_bytes: int
    decode_tokens_per_s: Spread
    prefill_tokens_per_s: Spread


def measure_device(
    setup: Setup, runner: StepRunner, models: Path, *, recorded_only: bool
) -> list[DeviceFigures]:
    """Every graph, unpruned first of each form; made and measured now, or kept from an earlier run.

    Arguments:
        recorded_only: measure nothing; an empty list where nothing was.
    """
    if recorded_only and not (runner.work / DEVICE / "bench").is_dir():
        return []
    steps = [
        runner.run(
            f"{DEVICE}/{_task(shape).slug}",
            _task(shape).sections() | {"forms": FORMS},
            [setup.key],
            _making(setup, shape, models),
        )
        for shape in SHAPES
    ]
    folders = [step.folder / form for form in FORMS for step in steps]
    settings = {"tokens": [PROMPT_TOKENS, NEW_TOKENS], "repeats": REPEATS, "threads": setup.pair.threads}
    bench = runner.run(
        f"{DEVICE}/bench",
        settings,
        [step.key for step in steps],
        lambda _: in_fresh_process(bench_graphs, folders, setup.pair.threads, REPEATS),
    )
    found = bench.result["graphs"]
    made = [(form, shape, step.result) for form in FORMS for shape, step in zip(SHAPES, steps, strict=True)]
    return [_figures(*one, speed) for one, speed in zip(made, found, strict=True)]


def _making(setup: Setup, shape: Shape, models: Path) -> Work:
    return lambda folder: in_fresh_process(make_graphs, setup, shape, models, folder)


def make_graphs(setup: Setup, shape: Shape, models: Path, out: Path) -> dict[str, Any]:
    """Both forms of a pruned model, a folder each in `out`."""
    job, pruned, facts = make_model(setup, _task(shape), models)
    source = job.load(pruned.folder)
    facts["parameters_frac"] = (
        model_size(source.model).parameters / model_size(job.aligned.model).parameters
    )
    for form, scheme in FORMS.items():
        scratch = out / f"{form}.work"
        scratch.mkdir()
        made = by_recipe(setup, _quantized(setup, scheme), scratch, Stages(), source)[0]
        shutil.move(made, out / form)
        shutil.rmtree(scratch)
        facts[form] = {"bytes": graph_bytes(out / form), "zlib_bytes": zlib_bytes(out / form)}
    return facts


def bench_graphs(folders: Sequence[Path], threads: int, repeats: int) -> dict[str, Any]:
    """Speed of all graphs, in turns."""
    reports = bench_folders(
        folders, prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS, repeats=repeats, threads=threads
    )
    return {"graphs": [_speed(report) for report in reports]}


def _speed(report: BenchReport) -> dict[str, Any]:
    found = report.to_dict()
    return {name: found[name] for name in ("decode_tokens_per_s", "prefill_tokens_per_s")}


def _task(shape: Shape) -> Task:
    return Task(Group(DEVICE, "", ()), shape.row, 0)


def _quantized(setup: Setup, scheme: str) -> Job:
    """Settings under which a graph of this form is made from any model of the pair."""
    sections = {"calibrate": {"method": "rtn"}, "quantize": {"scheme": scheme}}
    return prepare(setup.pair.recipe_of(sections, what=f"{scheme} graphs"))


def _figures(form: str, shape: Shape, made: dict[str, Any], speed: dict[str, Any]) -> DeviceFigures:
    return DeviceFigures(
        name=shape.row.name,
        kind=shape.kind,
        form=form,
        sparsity_frac=made["removed_frac"] or made["zeros_frac"],
        parameters_frac=made["parameters_frac"],
        size_bytes=made[form]["bytes"],
        zlib_bytes=made[form]["zlib_bytes"],
        decode_tokens_per_s=Spread(**speed["decode_tokens_per_s"]),
        prefill_tokens_per_s=Spread(**speed["prefill_tokens_per_s"]),
    )
