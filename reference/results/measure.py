"""One row, in a process of its own: calibrate, export, quantize, then let the artifact answer."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from holdfast.alignment import answer_suites, save_answers
from holdfast.exporter.export import export_model, graph_bytes
from holdfast.exporter.source import SourceModel, load_source
from holdfast.job import Job, prepare
from holdfast.quantize.artifact.write import quantize_bundle
from holdfast.quantize.record import CALIBRATION_FILE, read_record
from holdfast.runtime.session import OnnxLanguageModel
from reference.results.allocated import allocate_row
from reference.results.closeness import compare, read_passages
from reference.results.nncf_peer import by_nncf
from reference.results.process import Stages
from reference.results.rows import Task
from reference.results.setup import Setup, use_threads

ANSWERS = "answers"


def measure(setup: Setup, task: Task, out: Path) -> dict[str, Any]:
    """Measure a row and leave its answers and records in `out`, without models and graphs.

    Returns:
        JSON types: bytes, closeness, stages and what calibration chose.
    """
    job, stages = prepare(setup.pair.recipe(task)), Stages()
    use_threads(job.recipe.threads)
    with tempfile.TemporaryDirectory(dir=out) as name:
        artifact, facts = _make(setup, job, task, Path(name), stages)
        with stages.stage(ANSWERS):
            model = OnnxLanguageModel.open(
                artifact,
                threads=job.recipe.threads,
                name="artifact (ONNX)",
                batch_size=job.recipe.evaluate.batch_size,
            )
            save_answers(answer_suites(model, job.suites, job.recipe.evaluate), out / ANSWERS)
        reference = OnnxLanguageModel.open(setup.graph, threads=job.recipe.threads)
        closeness = compare(reference, model, read_passages(setup.passages))
        for record in (artifact / "quantize.json", Path(name) / "model" / CALIBRATION_FILE):
            if record.is_file():
                shutil.copyfile(record, out / record.name)
        return facts | {
            "bytes": graph_bytes(artifact),
            "closeness": asdict(closeness),
            "stages": {name: asdict(stage) for name, stage in stages.done.items()},
        }


Made = tuple[Path, dict[str, Any]]
"""Folder of the artifact, and what is to be said about it."""


def _make(setup: Setup, job: Job, task: Task, folder: Path, stages: Stages) -> Made:
    """The artifact of a row, in `folder`."""
    if task.row.maker == "nncf":
        return by_nncf(setup, job, folder, stages)
    if task.row.maker == "allocation":
        job, allocation = allocate_row(job, task.row, stages)
        artifact, facts = by_recipe(setup, job, folder, stages)
        return artifact, facts | {"allocation": allocation}
    return by_recipe(setup, job, folder, stages)


def by_recipe(
    setup: Setup, job: Job, folder: Path, stages: Stages, start: SourceModel | None = None
) -> Made:
    """Holdfast's own way, as `holdfast run` goes it.

    Arguments:
        start: what is calibrated, a pruned form of the aligned model; by default that itself.
    """
    calibrated, artifact = folder / "model", folder / "artifact"
    calibrated.mkdir()
    artifact.mkdir()
    with stages.stage("calibrate"):
        job.calibrate(start or job.aligned).save(calibrated)
    with stages.stage("export"):
        exported = _export(setup, job, calibrated, folder / "onnx")
    with stages.stage("quantize"):
        quantize_bundle(exported, artifact, calibrated, job.recipe.quantize)
    record = read_record(calibrated)
    chosen = next(
        (
            candidate
            for candidate in record.candidates
            if (candidate.alpha, candidate.steps) == (record.chosen_alpha, record.chosen_steps)
        ),
        None,
    )
    held_out = {} if chosen is None else {"held_out": record.held_out, "held_out_flips": chosen.flips}
    return artifact, {"alpha": record.chosen_alpha, "steps": record.chosen_steps, **held_out}


def _export(setup: Setup, job: Job, calibrated: Path, out: Path) -> Path:
    """The graph of the calibrated model; where no weight changed it is the fp32 graph that is there."""
    if _same_weights(job, calibrated):
        return setup.graph
    out.mkdir()
    export_model(calibrated, out, job.recipe.export, seed=job.recipe.seed)
    return out


def _same_weights(job: Job, calibrated: Path) -> bool:
    ours, theirs = job.aligned.model.state_dict(), load_source(calibrated).model.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
