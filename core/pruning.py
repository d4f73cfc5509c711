"""The pruning part of a run: one shot or in rounds, each followed by recovery and by a gate of its own.

    prune -> recover -> gate-pruned                            one shot
    prune-1 -> recover-1 -> gate-pruned-1 -> prune-2 -> ...    `prune.rounds` above 1

The gate runs the same suites as the one after quantization, on the pruned model in torch: where the verdict
turns between the two, the step at fault is known. In rounds the sparsity rises cubically to the target (Zhu
& Gupta 2017, arXiv 1710.01878, equation 1); the first round that does not pass is the last, and the one
before it is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec import structs

from holdfast.alignment import answer_suites, load_answers, save_answers
from holdfast.bundle import ALIGNED, TWIN
from holdfast.config import encode
from holdfast.errors import RecipeError
from holdfast.evals.gate import Verdict, decide
from holdfast.exporter.architectures import block_paths
from holdfast.exporter.source import SourceModel, save_source
from holdfast.files import write_json
from holdfast.job import Job
from holdfast.progress import bar, say
from holdfast.prune.apply import prune_model
from holdfast.prune.recovery.record import write_recovery
from holdfast.prune.report import prune_record, runtime_use
from holdfast.prune.structured.prune import prune_structures
from holdfast.prune.structured.remove import StructuredReport
from holdfast.quantize.prompts.sequences import chat_prompts
from holdfast.recipe import PruneConfig, Recipe
from holdfast.steps import StepResult, StepRunner

MODEL = "model"
NOTHING = PruneConfig()


@dataclass(frozen=True)
class Pruned:
    """What pruning left, for the steps after it.

    Attributes:
        record: the step that wrote prune.json.
        model: the step whose folder holds the model.
        recovery: the step that wrote recover.json, where there was one.
        gate: the last gate's step, of the model that is kept; None where nothing was pruned.
        stopped: the gate that ended the rounds before the target.
    """

    record: StepResult
    model: StepResult
    recovery: StepResult | None = None
    gate: StepResult | None = None
    stopped: StepResult | None = None

    @property
    def folder(self) -> Path:
        return self.model.folder / MODEL

    def step_at_fault(self, verdict: str) -> str | None:
        """Which part of a run turned its verdict; None where it is PASS."""
        if verdict == "PASS":
            return None
        if self.gate is not None and self.gate.result["verdict"] != "PASS":
            return "pruning (the pruned model does not pass either)"
        passed = "" if self.gate is None else " (the pruned model passes)"
        return f"calibration and quantization{passed}"

    def lines(self) -> list[str]:
        """The gate after pruning for a person."""
        lines = [f"after pruning: {self.gate.result['summary']}"] if self.gate else []
        if self.stopped:
            kept = self.record.result["sparsity_frac"]
            lines.append(
                f"pruning stopped at {kept:.0%} zeros, because the next round did not pass: "
                f"{self.stopped.result['summary']}"
            )
        return lines


def step_count(recipe: Recipe) -> int:
    """How many steps `prune_steps` takes at most, for progress lines."""
    each = 1 + (recipe.recover is not None) + prunes(recipe.prune)
    return recipe.prune.rounds * each


def prunes(config: PruneConfig) -> bool:
    """Whether anything is pruned at all."""
    return config.method != "none" or config.structured is not None


def prune_steps(job: Job, runner: StepRunner) -> Pruned:
    """Prune the aligned model as the recipe says.

    Raises:
        PruneError: see `prune_model` and `prune_structures`.
    """
    config = job.recipe.prune
    good: Pruned | None = None
    for suffix, wanted in _rounds(config):
        now = _round(job, runner, suffix, wanted, good)
        if config.rounds > 1 and now.gate is not None and now.gate.result["verdict"] != "PASS":
            return _kept(job, runner, good, now.gate)
        good = now
    assert good is not None
    return good


def check_pruning(recipe: Recipe) -> None:
    """Refuse rounds and recovery that have nothing to do, before any work starts.

    Raises:
        RecipeError: see there.
    """
    config = recipe.prune
    if recipe.recover is not None and not prunes(config):
        raise RecipeError(
            "`recover` repairs what pruning broke, and nothing is pruned: set `prune.method` or "
            "`prune.structured`, or leave `recover` out."
        )
    if config.rounds > 1 and not prunes(config):
        raise RecipeError(
            f"`prune.rounds` is {config.rounds} and nothing is pruned: set `prune.method` or "
            "`prune.structured`."
        )
    if config.rounds > 1 and config.pattern != "unstructured" and config.method != "none":
        raise RecipeError(
            f"The pattern {config.pattern} has one sparsity and cannot be reached in {config.rounds} "
            "rounds: use `rounds: 1`, or `pattern: unstructured`."
        )


def sparsity_at(target_frac: float, number: int, rounds: int) -> float:
    """Sparsity after round `number` of `rounds`, counted from 1: `s (1 - (1 - t)^3)`."""
    return target_frac if number == rounds else target_frac * (1.0 - (1.0 - number / rounds) ** 3)


def _rounds(config: PruneConfig) -> Iterator[tuple[str, PruneConfig]]:
    """(suffix of the steps' names, settings) of each round."""
    for number in range(1, config.rounds + 1):
        wanted = structs.replace(
            config,
            sparsity_frac=sparsity_at(config.sparsity_frac, number, config.rounds),
            allow_zeros=config.allow_zeros or number > 1,
        )
        if config.structured is not None:
            target = config.structured.sparsity_frac
            before, after = (sparsity_at(target, at, config.rounds) for at in (number - 1, number))
            share = 1.0 - (1.0 - after) / (1.0 - before)  # of what the rounds before left
            wanted = structs.replace(
                wanted, structured=structs.replace(config.structured, sparsity_frac=share)
            )
        yield f"-{number}" if config.rounds > 1 else "", wanted


def _round(job: Job, runner: StepRunner, suffix: str, config: PruneConfig, before: Pruned | None) -> Pruned:
    record = _prune(job, runner, f"prune{suffix}", config, before)
    if not prunes(config):
        return Pruned(record, record)
    recovery = None if job.recipe.recover is None else _recover(job, runner, f"recover{suffix}", record)
    model = recovery or record
    return Pruned(record, model, recovery, _gate(job, runner, f"gate-pruned{suffix}", model))


def _kept(job: Job, runner: StepRunner, good: Pruned | None, stopped: StepResult) -> Pruned:
    """The last good round, or the model as it was where the first did not pass."""
    if good is None:
        good = _round(job, runner, "-0", NOTHING, None)
    return Pruned(good.record, good.model, good.recovery, good.gate, stopped)


def _prune(
    job: Job, runner: StepRunner, name: str, config: PruneConfig, before: Pruned | None
) -> StepResult:
    def work(folder: Path) -> dict[str, Any]:
        # its own copy: pruning works in place
        source = job.load(job.aligned.folder if before is None else before.folder)
        ids = chat_prompts(source.tokenizer, [prompt.prompt for prompt in job.prompts])
        harmful = [prompt.kind == "harmful" for prompt in job.prompts]
        negative = job.negative if config.safety_loss == "contrastive" else None
        removed: StructuredReport | None = None
        if config.structured is not None:
            say(f"      removing {' and '.join(config.structured.kinds)}")
            source, removed = prune_structures(
                source, ids, config.structured, harmful=harmful, response_tokens=config.response_tokens
            )
        with bar("pruning", len(block_paths(source.model)), unit="block") as on_done:
            report = prune_model(source, ids, config, harmful=harmful, negative=negative, on_done=on_done)
        save_source(source, folder / MODEL)
        write_json(folder / "prune.json", prune_record(report, removed))
        gone = 0.0 if removed is None else removed.reached_frac
        return {
            "method": report.method,
            "sparsity_frac": report.reached_frac,
            "removed_frac": gone,
            **runtime_use(report, removed),
        }

    inputs = [*job.model_keys, job.prompts_key, *([] if before is None else [before.model.key])]
    return runner.run(name, encode(config), inputs, work)


def _recover(job: Job, runner: StepRunner, name: str, pruned: StepResult) -> StepResult:
    config, calibrate = job.recipe.recover, job.recipe.calibrate
    assert config is not None

    def work(folder: Path) -> dict[str, Any]:
        done = job.recover(job.load(pruned.folder / MODEL))
        save_source(done.source, folder / MODEL)
        write_recovery(done.record, folder)
        before, after = done.record.before, done.record.after
        return {
            "objective": config.objective,
            "steps": after.steps,
            "alpha": after.alpha,
            "held_out_flips_before": before.flips,
            "held_out_flips": after.flips,
            "divergence_before": before.divergence,
            "divergence": after.divergence,
            "sparsity_frac": done.record.sparsity_frac,
        }

    data = encode(calibrate)
    read = ("data", "samples", "mixture", "held_out_frac", "first_response_weight", "top_k")
    settings = {
        "recover": encode(config),
        "calibrate": {key: data[key] for key in read},
        "seed": job.recipe.seed,
    }
    return runner.run(name, settings, [pruned.key, job.prompts_key, *job.model_keys], work)


def _gate(job: Job, runner: StepRunner, name: str, model: StepResult) -> StepResult:
    """The suites on the pruned model in torch, and the verdict on it."""

    def work(folder: Path) -> dict[str, Any]:
        source: SourceModel = job.load(model.folder / MODEL)
        answers = answer_suites(
            job.torch_model(source.model, "pruned (torch fp32)"), job.suites, job.recipe.evaluate
        )
        save_answers(answers, folder / "answers")
        baseline, twin = (
            load_answers(runner.folder("baseline") / name, job.suites) for name in (ALIGNED, TWIN)
        )
        verdict = decide(baseline, answers, job.recipe.evaluate, twin=twin, seed=job.recipe.seed)
        write_json(folder / "verdict.json", verdict.to_dict())
        return gate_result(verdict)

    keys = [model.key, runner.key("baseline")]
    settings = encode(job.recipe.evaluate) | {"seed": job.recipe.seed}
    return runner.run(name, settings, keys, work)


def gate_result(verdict: Verdict) -> dict[str, Any]:
    """What the manifest and the report say about the gate after pruning."""
    found: dict[str, Any] = {"verdict": verdict.outcome, "summary": f"{verdict.outcome}: {verdict.summary}"}
    for metric in verdict.metrics:
        found[f"{metric.metric} lost"] = metric.paired.lost
        found[f"{metric.metric} gained"] = metric.paired.gained
    return found
