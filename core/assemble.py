"""The finished bundle, put together from what the steps of a run left in their folders."""

from __future__ import annotations

import shutil
from pathlib import Path

from holdfast import __version__
from holdfast.alignment import Assessment, assess, load_answers, load_runs
from holdfast.bundle import (
    ALIGNED,
    ANSWERS,
    ARTIFACT,
    FP32_ONNX,
    PRUNED,
    RECIPE,
    REPORT_HTML,
    REPORT_JSON,
    STEPS,
    SUITES,
    TWIN,
)
from holdfast.evals.report import Details, render_html
from holdfast.files import write_json, write_text
from holdfast.job import Job
from holdfast.manifest import SCHEMA_VERSION, Manifest, ModelEntry, StepEntry, seal
from holdfast.prune.recovery.record import RECOVERY_FILE
from holdfast.pruning import Pruned
from holdfast.recipe import Recipe, recipe_yaml
from holdfast.runtime.environment import environment_rows
from holdfast.steps import StepRunner
from holdfast.versions import installed_versions

# record of a step -> where the step left it
RECORDS = {
    "calibration.json": ("calibrate", "model/calibration.json"),
    "export.json": ("quantize", "onnx/export.json"),
    "quantize.json": ("quantize", "onnx/quantize.json"),
}


def write_bundle(fresh: Path, job: Job, runner: StepRunner, pruned: Pruned) -> Assessment:
    """Fill an empty folder with artifact, records, prompts, answers and report, and seal it."""
    shutil.copytree(
        runner.folder("quantize") / "onnx",
        fresh,
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("export.json", "quantize.json"),
    )
    _copy_records(fresh / STEPS, runner, pruned)
    _copy_answers(fresh, runner, pruned)
    candidate = load_answers(fresh / ANSWERS / ARTIFACT, job.suites)
    assessment = assess(
        job.suites,
        load_runs(fresh / ANSWERS, job.suites, candidate),
        job.recipe.evaluate,
        seed=job.recipe.seed,
        details=_details(job, runner, pruned),
    )
    write_text(fresh / RECIPE, recipe_yaml(job.recipe))
    write_json(fresh / REPORT_JSON, assessment.report)
    write_text(fresh / REPORT_HTML, render_html(assessment.report))
    seal(fresh, _manifest(job, runner, assessment))
    return assessment


def _copy_records(target: Path, runner: StepRunner, pruned: Pruned) -> None:
    """The steps' own JSON records, gathered in one folder."""
    target.mkdir()
    found = {name: runner.folder(step) / path for name, (step, path) in RECORDS.items()}
    found["prune.json"] = pruned.record.folder / "prune.json"
    if pruned.recovery is not None:
        found[RECOVERY_FILE] = pruned.recovery.folder / RECOVERY_FILE
    if pruned.gate is not None:
        found["gate-pruned.json"] = pruned.gate.folder / "verdict.json"
    for name, record in found.items():
        if record.is_file():
            shutil.copyfile(record, target / name)


def _copy_answers(fresh: Path, runner: StepRunner, pruned: Pruned) -> None:
    shutil.copytree(runner.folder("baseline") / "suites", fresh / SUITES)
    found = {
        ALIGNED: runner.folder("baseline") / ALIGNED,
        TWIN: runner.folder("baseline") / TWIN,
        FP32_ONNX: runner.folder("reference-export") / "answers",
        ARTIFACT: runner.folder("evaluate") / "answers",
    }
    if pruned.gate is not None:
        found[PRUNED] = pruned.gate.folder / "answers"
    for name, folder in found.items():
        shutil.copytree(folder, fresh / ANSWERS / name)


def title(recipe: Recipe) -> str:
    """What was compressed, and how, in a few words."""
    parts = [Path(recipe.model).name]
    if recipe.prune.structured is not None:
        gone = recipe.prune.structured
        parts.append(f"{gone.sparsity_frac:.0%} of {' and '.join(gone.kinds)} removed")
    if recipe.prune.method != "none":
        parts.append(f"{recipe.prune.method} {recipe.prune.sparsity_frac:.0%}")
    if recipe.recover is not None:
        parts.append(f"recovered ({recipe.recover.objective})")
    parts.append(recipe.quantize.scheme + (" mixed" if recipe.quantize.mixed else ""))
    parts.append(recipe.quantize.backend)
    return ", ".join(parts)


def _details(job: Job, runner: StepRunner, pruned: Pruned) -> Details:
    """Environment, steps and digests for the report. No time of day: a rerun gives the same bytes."""
    steps = {
        step.name: ", ".join(f"{k} {v}" for k, v in step.result.items() if isinstance(v, str | int | float))
        for step in runner.done
    }
    machine = environment_rows(threads=job.recipe.threads)
    digests = {
        f"{role}: {name}": digest for role, files in job.digests.items() for name, digest in files.items()
    }
    gate = {} if pruned.gate is None else {"After pruning": pruned.gate.result}
    return Details(
        title=title(job.recipe),
        created=None,
        sections={**gate, "Steps": steps, "Environment": machine, "Sources (SHA-256)": digests},
    )


def _manifest(job: Job, runner: StepRunner, assessment: Assessment) -> Manifest:
    return Manifest(
        schema_version=SCHEMA_VERSION,
        holdfast_version=__version__,
        verdict=assessment.verdict.outcome,
        seed=job.recipe.seed,
        model=ModelEntry(kind="checkpoint", name=job.name, files=job.digests["model"]),
        base=ModelEntry(kind=job.base_kind, name=job.base_name, files=job.digests["base"]),
        chat_digest=job.aligned.tokenizer.digest(),
        versions=installed_versions(),
        steps=tuple(
            StepEntry(name=step.name, settings=step.settings, result=step.result) for step in runner.done
        ),
        files={},
    )
