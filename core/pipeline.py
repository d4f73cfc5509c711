"""The run: from an aligned model to a verified bundle, in resumable steps.

    baseline -> reference-export -> prune -> calibrate -> export -> quantize -> evaluate -> bundle

Pruning has steps of its own, see `pruning`.

Wiring only: each step's algorithm lives in its own package. This module is on the workshop's side
(it imports torch through them); the device never loads it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from holdfast.alignment import Assessment, answer_suites, save_answers, save_suites
from holdfast.assemble import write_bundle
from holdfast.bundle import ALIGNED, REPORT_HTML, TWIN
from holdfast.config import encode
from holdfast.exporter.architectures import linear_modules
from holdfast.exporter.export import ExportReport, export_model, export_source
from holdfast.files import atomic_folder, refuse_existing
from holdfast.job import Job, prepare
from holdfast.progress import say
from holdfast.pruning import Pruned, check_pruning, prune_steps, step_count
from holdfast.quantize.artifact.finish import finish_artifact
from holdfast.quantize.artifact.possible import INC_METHODS
from holdfast.quantize.artifact.write import QuantizeReport, quantize_bundle, ranges_of
from holdfast.quantize.decisions import LAYOUT, read_decisions
from holdfast.quantize.prompts.coverage import describe
from holdfast.quantize.prompts.sequences import chat_prompts
from holdfast.quantize.record import Candidate
from holdfast.quantize.simulate import check_simulation
from holdfast.recipe import Recipe
from holdfast.runtime.session import OnnxLanguageModel
from holdfast.steps import StepResult, StepRunner

SIMULATED_PROMPTS = 48  # calibration prompts on which simulation and artifact are compared


@dataclass(frozen=True)
class RunOutcome:
    """What `run` did: the finished bundle, the verdict, and the steps in order."""

    bundle: Path
    assessment: Assessment
    pruned: Pruned
    steps: tuple[StepResult, ...]

    @property
    def verdict(self) -> str:
        return self.assessment.verdict.outcome

    def to_dict(self) -> dict[str, Any]:
        """The outcome as JSON types; times are of this machine."""
        return {
            "bundle": str(self.bundle),
            "report": str(self.bundle / REPORT_HTML),
            "verdict": self.assessment.verdict.to_dict(),
            "step_at_fault": self.pruned.step_at_fault(self.verdict),
            "steps": [
                {"name": s.name, "wall_s": s.wall_s, "resumed": s.resumed, "result": s.result}
                for s in self.steps
            ],
        }

    def lines(self) -> list[str]:
        """The outcome for a person."""
        report = self.bundle / REPORT_HTML
        fault = self.pruned.step_at_fault(self.verdict)
        found = [f"  at fault: {fault}"] if fault else []
        return [
            *self.pruned.lines(),
            *self.assessment.lines(),
            *found,
            f"bundle  {self.bundle}",
            f"report  {report}",
        ]


def run(recipe: Recipe, out: Path, *, work: Path | None, overwrite: bool) -> RunOutcome:
    """Do a whole run and write the bundle.

    Arguments:
        out: the bundle's folder; it appears whole, after the last step.
        work: folder of the steps. None puts them beside `out` and removes them at the end; a folder
            that was given is kept, and its steps are reused by later runs.
        overwrite: replace an existing `out`.

    Raises:
        HoldfastError: see `holdfast.errors`; finished steps stay in the work folder.
    """
    refuse_existing(out, overwrite=overwrite)
    check_pruning(recipe)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    job = prepare(recipe)
    total = len(BEFORE_PRUNING) + step_count(recipe) + 1 + len(AFTER_CALIBRATION) + 1
    runner = StepRunner(work or out.with_name(f"{out.name}.work"), total=total)
    for step in BEFORE_PRUNING:
        step(job, runner)
    pruned = prune_steps(job, runner)
    _calibrate(job, runner, pruned)
    for step in AFTER_CALIBRATION:
        step(job, runner)
    say(f"[{runner.total}/{runner.total}] bundle")
    with atomic_folder(out, overwrite=overwrite) as fresh:
        assessment = write_bundle(fresh, job, runner, pruned)
    if work is None:
        runner.clean()
    return RunOutcome(out, assessment, pruned, tuple(runner.done))


# --- the steps --------------------------------------------------------------------------------


def _baseline(job: Job, runner: StepRunner) -> None:
    """Answers of the aligned model and of its twin, in torch."""

    def work(folder: Path) -> dict[str, Any]:
        save_suites(job.suites, folder / "suites")
        models = {
            ALIGNED: job.torch_model(job.aligned.model, "aligned (torch fp32)"),
            TWIN: job.torch_model(job.negative, job.twin_name),
        }
        for name, model in models.items():
            save_answers(answer_suites(model, job.suites, job.recipe.evaluate), folder / name)
        return job.twin_record() | job.revisions()

    settings = {
        "evaluate": encode(job.recipe.evaluate),
        "suites": [{"name": suite.name, "digest": suite.digest} for suite in job.suites],
        "base": job.base_kind,
        "seed": job.recipe.seed,
    }
    runner.run("baseline", settings, [*job.model_keys, job.prompts_key], work)


def _reference_export(job: Job, runner: StepRunner) -> None:
    """The aligned model as an fp32 graph, and its answers: the noise floor of the comparison."""

    def work(folder: Path) -> dict[str, Any]:
        report = export_source(job.aligned, _made(folder / "onnx"), job.recipe.export, seed=job.recipe.seed)
        model = _artifact(job, folder / "onnx", "aligned (ONNX fp32)")
        save_answers(answer_suites(model, job.suites, job.recipe.evaluate), folder / "answers")
        return _export_result(report)

    runner.run("reference-export", _export_settings(job), [runner.key("baseline")], work)


def _calibrate(job: Job, runner: StepRunner, pruned: Pruned) -> None:
    recipe = job.recipe

    def work(folder: Path) -> dict[str, Any]:
        if recipe.calibrate.scope == "blocks":
            record = job.calibrate_blocks(pruned.folder, folder / "model")
        else:
            calibration = job.calibrate(job.load(pruned.folder))
            calibration.save(folder / "model")
            record = calibration.record
        chosen = {"alpha": record.chosen_alpha, "steps": record.chosen_steps, "held_out": record.held_out}
        candidates = [_without_losses(c) for c in record.candidates]
        return {**chosen, "coverage": describe(job.covered), "candidates": candidates}

    # the backend does not change what is learned, so that both share one calibration
    quantize = encode(recipe.quantize)
    own = recipe.quantize.backend == "inc" and recipe.calibrate.method in INC_METHODS
    settings = {
        "calibrate": encode(recipe.calibrate),
        "scheme": {k: quantize[k] for k in ("scheme", "mixed", "exclude", *LAYOUT)} | {"inc": own},
        "seed": recipe.seed,
    }
    keys = [pruned.model.key, job.prompts_key, *job.model_keys]
    runner.run("calibrate", settings, keys, work)


def _export(job: Job, runner: StepRunner) -> None:
    def work(folder: Path) -> dict[str, Any]:
        model = runner.folder("calibrate") / "model"
        return _export_result(_export_to(job, model, folder / "onnx"))

    runner.run("export", _export_settings(job), [runner.key("calibrate")], work)


def _quantize(job: Job, runner: StepRunner) -> None:
    """Quantize the graph, and compare the artifact with its simulation in torch."""
    config = job.recipe.quantize

    def work(folder: Path) -> dict[str, Any]:
        calibrated, artifact = runner.folder("calibrate") / "model", _made(folder / "onnx")
        exported = runner.folder("export") / "onnx"
        report = quantize_bundle(exported, artifact, calibrated, config)
        simulation = _simulation(job, calibrated, artifact, report)
        report = finish_artifact(exported, artifact, report, config)
        return {
            "scheme": report.scheme,
            "backend": report.backend,
            "ranges_from": report.ranges_from,
            "kv_cache": report.kv_cache,
            "bytes_before": report.bytes_before,
            "bytes_after": report.bytes_after,
            **simulation,
        }

    runner.run("quantize", encode(config), [runner.key("export")], work)


def _simulation(job: Job, calibrated: Path, artifact: Path, report: QuantizeReport) -> dict[str, Any]:
    """How closely the artifact follows the simulation, while its KV cache is still fp32."""
    if report.backend == "none":
        return {}
    if report.backend == "inc" and report.method in INC_METHODS:
        return {"simulation": "none: neural-compressor decided scales and codes"}
    ids = chat_prompts(job.aligned.tokenizer, [p.prompt for p in job.prompts[:SIMULATED_PROMPTS]])
    source, config = job.load(calibrated), job.recipe.quantize
    decided = read_decisions(calibrated, list(linear_modules(source.model)), config)
    decided = dataclasses.replace(decided, ranges=ranges_of(report, signed=config.signed_activations))
    agreement = check_simulation(source, decided, artifact, config, ids)
    return {
        "simulation_max_abs": agreement.max_abs,
        "simulation_within_frac": agreement.within_frac,
        "simulation_same_top_frac": agreement.same_top_frac,
        "simulation_positions": agreement.positions,
    }


def _evaluate(job: Job, runner: StepRunner) -> None:
    """The same suites on the artifact itself, in the runtime."""

    def work(folder: Path) -> dict[str, Any]:
        model = _artifact(job, runner.folder("quantize") / "onnx", "artifact (ONNX)")
        save_answers(answer_suites(model, job.suites, job.recipe.evaluate), folder / "answers")
        return {}

    keys = [runner.key("quantize"), runner.key("baseline")]
    runner.run("evaluate", encode(job.recipe.evaluate), keys, work)


BEFORE_PRUNING = (_baseline, _reference_export)
AFTER_CALIBRATION = (_export, _quantize, _evaluate)


# --- helpers ----------------------------------------------------------------------------------


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _artifact(job: Job, folder: Path, name: str) -> OnnxLanguageModel:
    """An ONNX folder in the runtime, as the device would open it."""
    batch_size = job.recipe.evaluate.batch_size
    return OnnxLanguageModel.open(folder, threads=job.recipe.threads, name=name, batch_size=batch_size)


def _export_settings(job: Job) -> dict[str, Any]:
    return encode(job.recipe.export) | {"seed": job.recipe.seed}


def _export_to(job: Job, model: Path, folder: Path) -> ExportReport:
    return export_model(model, _made(folder), job.recipe.export, seed=job.recipe.seed)


def _export_result(report: ExportReport) -> dict[str, Any]:
    return {
        "target": report.target,
        "graph": report.graph.form,
        "why_plain": report.graph.why_plain,
        "opset": report.opset,
        "graph_bytes": report.graph_bytes,
        "parity_max_abs": report.parity.max_abs,
        "parity_same_top_frac": report.parity.same_top_frac,
    }


def _without_losses(candidate: Candidate) -> dict[str, Any]:
    return {name: value for name, value in encode(candidate).items() if name != "losses"}
