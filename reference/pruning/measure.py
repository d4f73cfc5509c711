"""One row, in a process of its own: prune, recover and answer as `holdfast run` does it."""

from __future__ import annotations

import json
import shutil
import tempfile
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from holdfast.alignment import answer_suites, save_answers
from holdfast.bundle import ALIGNED
from holdfast.exporter.export import graph_bytes
from holdfast.files import write_json
from holdfast.job import Job, prepare
from holdfast.language_model import LanguageModel
from holdfast.pruning import Pruned, check_pruning, prune_steps, step_count
from holdfast.runtime.external_data import graph_files
from holdfast.runtime.session import OnnxLanguageModel
from holdfast.steps import StepResult, StepRunner
from reference.pruning.rows import Task
from reference.results.closeness import perplexity, read_passages
from reference.results.measure import by_recipe
from reference.results.process import Stages
from reference.results.setup import Setup, use_threads

ANSWERS = "answers"
PRUNE_STEP = "prune"
SECONDS = "seconds.json"
ZLIB_LEVEL = 6  # zlib's own default: what a download or a flash image takes


def measure(setup: Setup, task: Task, models: Path, out: Path) -> dict[str, Any]:
    """Measure a row and leave its answers and records in `out`.

    Arguments:
        models: keeps pruned and recovered models, which rows share.

    Returns:
        JSON types: zeros, perplexity, seconds; of an artifact also its bytes.
    """
    job, pruned, facts = make_model(setup, task, models)
    for step, record in ((pruned.record, "prune.json"), (pruned.recovery, "recover.json")):
        if step is not None:
            shutil.copyfile(step.folder / record, out / record)
    if task.row.quantized:
        return facts | _artifact(setup, job, pruned, out)
    answered = pruned.gate.folder / ANSWERS if pruned.gate else setup.answers[ALIGNED]
    shutil.copytree(answered, out / ANSWERS)
    model = job.torch_model(job.load(pruned.folder).model, "pruned (torch fp32)")
    return facts | {"perplexity": _perplexity(setup, model)}


def make_model(setup: Setup, task: Task, models: Path) -> tuple[Job, Pruned, dict[str, Any]]:
    """The pruned, maybe recovered model of a task, and what is to be said about it.

    Raises:
        PruneError, RecipeError: one that cannot be made.
    """
    recipe = setup.pair.recipe_of(task.sections(), seed=task.seed, what=f"the row {task.slug}")
    check_pruning(recipe)
    job = prepare(recipe)
    use_threads(recipe.threads)
    _borrow(models, task)
    runner = StepRunner(models / task.model, total=step_count(recipe) + 1, done=[_baseline(setup)])
    pruned = prune_steps(job, runner)
    taken = {step.name: seconds(step) for step in runner.done[1:]}
    return (
        job,
        pruned,
        {
            "zeros_frac": (pruned.recovery or pruned.record).result["sparsity_frac"],
            "removed_frac": pruned.record.result["removed_frac"],
            "seconds": {kind: _total(taken, kind) for kind in ("prune", "recover")},
            "stopped": pruned.stopped.result["summary"] if pruned.stopped else None,
        },
    )


def _borrow(models: Path, task: Task) -> None:
    """Start from the pruned model of another row, where there is one; its key says whether it will do."""
    origin, own = models / task.pruned_as / PRUNE_STEP, models / task.model / PRUNE_STEP
    if task.pruned_as and origin.is_dir() and not own.exists():
        shutil.copytree(origin, own)


def seconds(step: StepResult) -> float | None:
    """What a step took when it was done, which a later run remembers; None where that was lost."""
    path = step.folder / SECONDS
    if not step.resumed:
        write_json(path, step.wall_s)
    return float(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def _total(taken: dict[str, float | None], kind: str) -> float | None:
    """Seconds of all rounds of pruning or recovery; None where there were none, or one is not known."""
    found = [value for name, value in taken.items() if name.split("-")[0] == kind]
    known = [value for value in found if value is not None]
    return sum(known) if found and len(known) == len(found) else None


def _baseline(setup: Setup) -> StepResult:
    """What the gate after pruning compares with, as a step that is done."""
    return StepResult("baseline", setup.answers[ALIGNED].parent, setup.key, {}, {}, True, 0.0)


def _artifact(setup: Setup, job: Job, pruned: Pruned, out: Path) -> dict[str, Any]:
    """Calibrate, export and quantize a pruned model; its answers go to `out`."""
    stages = Stages()
    with tempfile.TemporaryDirectory(dir=out) as name:
        artifact, facts = by_recipe(setup, job, Path(name), stages, job.load(pruned.folder))
        model = OnnxLanguageModel.open(
            artifact,
            threads=job.recipe.threads,
            name="artifact (ONNX)",
            batch_size=job.recipe.evaluate.batch_size,
        )
        save_answers(answer_suites(model, job.suites, job.recipe.evaluate), out / ANSWERS)
        return facts | {
            "bytes": graph_bytes(artifact),
            "zlib_bytes": zlib_bytes(artifact),
            "perplexity": _perplexity(setup, model),
            "stages": {name: asdict(stage) for name, stage in stages.done.items()},
        }


def _perplexity(setup: Setup, model: LanguageModel) -> float:
    return perplexity(model, read_passages(setup.passages))


def zlib_bytes(folder: Path) -> int:
    """Size of a graph with its external data after compression."""
    return sum(len(zlib.compress(path.read_bytes(), ZLIB_LEVEL)) for path in graph_files(folder))
