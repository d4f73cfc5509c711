"""What the rows of one pair share: the baseline's answers, the fp32 graph and its noise floor."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from holdfast.alignment import answer_suites, save_answers
from holdfast.bundle import ALIGNED, FP32_ONNX, TWIN
from holdfast.config import encode
from holdfast.exporter.export import export_source
from holdfast.job import Job, prepare
from holdfast.recipe import Recipe, make_recipe
from holdfast.runtime.session import OnnxLanguageModel
from holdfast.steps import StepResult, StepRunner
from reference.results.closeness import compare, read_passages, write_passages
from reference.results.process import Stages, in_fresh_process
from reference.results.rows import Task

ROOT = Path(__file__).resolve().parent.parent
PAIRS = {"reference": ROOT, "second": ROOT / "second"}
REPEATED_PAIR = "reference"  # the other is measured with one seed
MARGIN_FRAC = 0.02
PASSAGES = "passages.json"
GRAPH_FOLDER = "onnx"


@dataclass(frozen=True)
class Pair:
    """An aligned model with its base, and the prompts that both and all rows answer.

    Attributes:
        folder: holds `aligned` and `base`.
        data_dir: holds the published suites.
        limit: at most this many prompts a suite; 0 for all.
        threads: of torch and ONNX Runtime; 0 leaves the choice to them.
        margin_frac: of the gate.
    """

    name: str
    folder: Path
    data_dir: Path
    limit: int = 0
    threads: int = 0
    margin_frac: float = MARGIN_FRAC

    def recipe(self, task: Task | None = None) -> Recipe:
        """The recipe of one measurement; without a task, of full precision."""
        if task is None:
            return self.recipe_of({"quantize": {"scheme": "none"}}, what="the baseline")
        sections = {"calibrate": dict(task.row.calibrate), "quantize": dict(task.row.quantize)}
        return self.recipe_of(sections, seed=task.seed, what=f"the row {task.slug}")

    def recipe_of(self, sections: dict[str, Any], *, seed: int = 0, what: str) -> Recipe:
        """This pair's recipe with these sections.

        Arguments:
            what: is being made, for the error.

        Raises:
            RecipeError: a section that no recipe can have.
        """
        suites = [
            {"name": "refusal"},
            {"name": "over-refusal"},
            {"name": "constitution"},
            {"name": "xstest", "path": str((self.data_dir / "xstest_prompts.csv").resolve())},
            {"name": "harmbench", "path": str((self.data_dir / "harmbench_text.csv").resolve())},
        ]
        data: dict[str, Any] = {
            "model": str(self.folder / "aligned"),
            "base": str(self.folder / "base"),
            "seed": seed,
            "threads": self.threads,
            "evaluate": {"suites": suites, "limit": self.limit, "margin_frac": self.margin_frac},
        }
        return make_recipe(data | sections, {}, what=what)


@dataclass(frozen=True)
class Setup:
    """A pair that rows can be measured on.

    Attributes:
        graph: the aligned model as an fp32 ONNX folder.
        answers: of `aligned`, `twin` (both torch) and `fp32-onnx`, a folder each.
        passages: text for KL and perplexity.
        key: digest of everything above.
        facts: what the steps said: closeness, bytes and seconds of the fp32 graph.
    """

    pair: Pair
    graph: Path
    answers: dict[str, Path]
    passages: Path
    key: str
    facts: dict[str, Any]


def use_threads(threads: int) -> None:
    """Let torch use so many threads; 0 leaves it as it is."""
    if threads:
        torch.set_num_threads(threads)


def make_setup(pair: Pair, runner: StepRunner) -> Setup:
    """The baseline and the fp32 graph of a pair; what is in the runner's folder already is kept.

    Raises:
        HoldfastError: see `holdfast.pipeline.run`.
    """
    job = prepare(pair.recipe())
    use_threads(pair.threads)
    baseline = _baseline(job, runner)
    exported = _full_precision(pair, runner, baseline)
    answers = {ALIGNED: baseline.folder / ALIGNED, TWIN: baseline.folder / TWIN}
    return Setup(
        pair=pair,
        graph=exported.folder / GRAPH_FOLDER,
        answers=answers | {FP32_ONNX: exported.folder / "answers"},
        passages=exported.folder / PASSAGES,
        key=exported.key,
        facts=exported.result,
    )


def _baseline(job: Job, runner: StepRunner) -> StepResult:
    """Answers of the aligned model and its base, in torch."""

    def work(folder: Path) -> dict[str, Any]:
        for name, model in ((ALIGNED, job.aligned.model), (TWIN, job.negative)):
            answers = answer_suites(job.torch_model(model, name), job.suites, job.recipe.evaluate)
            save_answers(answers, folder / name)
        return {}

    settings = {"evaluate": encode(job.recipe.evaluate), "suites": [suite.digest for suite in job.suites]}
    return runner.run("baseline", settings, job.model_keys, work)


def _full_precision(pair: Pair, runner: StepRunner, baseline: StepResult) -> StepResult:
    """The fp32 graph, its answers, and the text that distributions are compared on."""

    def work(folder: Path) -> dict[str, Any]:
        return in_fresh_process(write_full_precision, pair, folder)

    return runner.run("fp32-onnx", encode(pair.recipe().export), [baseline.key], work)


def write_full_precision(pair: Pair, folder: Path) -> dict[str, Any]:
    """Export the aligned model into `folder` and let the graph answer; runs in a process of its own."""
    job, stages = prepare(pair.recipe()), Stages()
    use_threads(pair.threads)
    graph = folder / GRAPH_FOLDER
    graph.mkdir()
    with stages.stage("export"):
        report = export_source(job.aligned, graph, job.recipe.export, seed=job.recipe.seed)
    with stages.stage("answers"):
        model = OnnxLanguageModel.open(
            graph, threads=pair.threads, name=FP32_ONNX, batch_size=job.recipe.evaluate.batch_size
        )
        save_answers(answer_suites(model, job.suites, job.recipe.evaluate), folder / "answers")
    write_passages(model, job.suites, job.recipe.evaluate.max_new_tokens, folder / PASSAGES)
    return {
        "graph": report.graph.form,
        "bytes": report.graph_bytes,
        "tokens": job.recipe.evaluate.max_new_tokens,
        "closeness": asdict(compare(model, model, read_passages(folder / PASSAGES))),
        "stages": {name: asdict(stage) for name, stage in stages.done.items()},
    }


def present_pairs() -> list[str]:
    """Names of the pairs whose models are there."""
    return [name for name, folder in PAIRS.items() if (folder / "aligned").is_dir()]
