"""One run's inputs: read, checked against each other, and refused before any work starts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import msgspec

from holdfast.config import encode
from holdfast.errors import RecipeError
from holdfast.evals.suites import Suite, load_suites
from holdfast.exporter.hub import resolve_source
from holdfast.exporter.source import (
    SourceModel,
    check_same_vocabulary,
    load_base,
    load_source,
    source_digests,
)
from holdfast.exporter.streamed import StreamedModel
from holdfast.exporter.torch_model import TorchLanguageModel
from holdfast.files import sha256_text, to_json
from holdfast.progress import bar, say
from holdfast.prune.recovery.recover import Recovered, recover
from holdfast.prune.recovery.recover import total_steps as recovery_steps
from holdfast.quantize.calibrate import Calibration, calibrate, total_steps
from holdfast.quantize.learning.ablate import AblatedTwin, make_twin
from holdfast.quantize.learning.blockwise import calibrate_folder
from holdfast.quantize.learning.dpo import WrittenPair, read_pairs
from holdfast.quantize.prompts.coverage import coverage, refuse_gaps
from holdfast.quantize.prompts.draw import (
    CalibrationPrompt,
    load_calibration,
    refuse_leakage,
    required_kinds,
)
from holdfast.quantize.record import CalibrationRecord
from holdfast.recipe import Recipe
from holdfast.versions import installed_versions

ABLATE = "ablate"


@dataclass(frozen=True)
class Job:
    """Recipe, suites, calibration prompts and models of a run; models are loaded when first needed.

    Attributes:
        covered: "suite/category" -> calibration prompts of that category.
        digests: "model" and "base" -> file name -> SHA-256.
    """

    recipe: Recipe
    suites: list[Suite]
    prompts: list[CalibrationPrompt]
    covered: dict[str, int]
    digests: dict[str, dict[str, str]] = field(default_factory=dict)

    @cached_property
    def aligned(self) -> SourceModel:
        found = resolve_source(self.recipe.model, self.recipe.revision, role="aligned model")
        return load_source(found, role="aligned model")

    @cached_property
    def base(self) -> SourceModel | None:
        """The base checkpoint, or None where a twin is to be ablated."""
        if self.recipe.base == ABLATE:
            return None
        return load_base(
            resolve_source(self.recipe.base, self.recipe.base_revision, role="base model"), self.aligned
        )

    @cached_property
    def twin(self) -> AblatedTwin:
        """The aligned model without its refusal direction; only ever in memory."""
        say("      ablating the refusal direction")
        return make_twin(self.aligned, self.prompts)

    @property
    def negative(self) -> Any:
        """The transformers model to push away from."""
        return self.base.model if self.base else self.twin.model

    @property
    def base_kind(self) -> Literal["checkpoint", "ablated"]:
        return "checkpoint" if self.base else "ablated"

    @property
    def name(self) -> str:
        """Name of the aligned model's folder."""
        return Path(self.recipe.model).resolve().name

    @property
    def base_name(self) -> str:
        if self.base is None:
            return f"{self.name} without its refusal direction"
        return Path(self.recipe.base).resolve().name

    @property
    def twin_name(self) -> str:
        """What reports call the unaligned model."""
        return "base (torch fp32)" if self.base else "ablated twin (torch fp32)"

    def twin_record(self) -> dict[str, Any]:
        """What the manifest says about the unaligned model."""
        return {"base": self.base_kind} if self.base else {"base": "ablated", **self.twin.record()}

    def revisions(self) -> dict[str, str]:
        """Commits of the models that came from the hub, for the manifest."""
        sources = {"model_revision": self.aligned, "base_revision": self.base}
        return {
            key: source.origins[0].revision
            for key, source in sources.items()
            if source is not None and source.origins and source.origins[0].revision is not None
        }

    @cached_property
    def model_keys(self) -> list[str]:
        """What stands for both models and the packages in the keys of steps that read the models."""
        return [sha256_text(to_json(self.digests)), sha256_text(to_json(installed_versions()))]

    @cached_property
    def prompts_key(self) -> str:
        prompts, pairs = map(encode, self.prompts), map(encode, written_pairs(self.recipe))
        return sha256_text(to_json([*prompts, *pairs]))

    def calibrate(self, source: SourceModel) -> Calibration:
        """Contrastive calibration of `source`, a possibly pruned form of the aligned model."""
        config = self.recipe.calibrate
        with bar("calibrating", total_steps(config, source), unit="step") as on_step:
            calibration = calibrate(
                source,
                self.negative,
                config,
                self.recipe.quantize,
                prompts=self.prompts,
                seed=self.recipe.seed,
                aligned=self.aligned,
                on_step=on_step,
            )
        record = msgspec.structs.replace(calibration.record, coverage=self.covered)
        return dataclasses.replace(calibration, record=record)

    def recover(self, source: SourceModel) -> Recovered:
        """Repair of `source`, a pruned form of the aligned model; the recipe says how."""
        config, calibrate = self.recipe.recover, self.recipe.calibrate
        assert config is not None
        with bar("recovering", recovery_steps(config, calibrate), unit="step") as on_step:
            return recover(
                source,
                self.aligned,
                self.negative,
                config,
                calibrate,
                prompts=self.prompts,
                seed=self.recipe.seed,
                on_step=on_step,
            )

    def calibrate_blocks(self, model: Path, out: Path) -> CalibrationRecord:
        """Calibration block by block, from folder to folder, for models that do not fit."""
        return calibrate_blocks(self.recipe, self.prompts, model, out)

    def load(self, folder: Path) -> SourceModel:
        """A compressed form of the aligned model, with the same vocabulary."""
        source = load_source(folder)
        check_same_vocabulary(self.aligned.tokenizer, source.tokenizer)
        return source

    def torch_model(self, model: Any, name: str) -> TorchLanguageModel:
        """A torch model as a LanguageModel with the aligned model's tokenizer."""
        return TorchLanguageModel(model, self.aligned.tokenizer, name, self.recipe.evaluate.batch_size)


def prepare(recipe: Recipe) -> Job:
    """Everything that can be refused before the first step: models, vocabulary, suites, leakage.

    Raises:
        InputError: a model, the base, a suite or the calibration data cannot be used.
    """
    suites, prompts, covered = prepare_data(recipe)
    job = Job(recipe, suites, prompts, covered)
    job.digests["model"] = source_digests(job.aligned)
    job.digests["base"] = source_digests(job.base) if job.base else job.digests["model"]
    return job


def prepare_data(recipe: Recipe) -> tuple[list[Suite], list[CalibrationPrompt], dict[str, int]]:
    """Suites, calibration prompts and how many of these cover each category of those; no model is read.

    Raises:
        SuiteError: unreadable data, a calibration prompt that is in a suite, or a gap where none may be.
    """
    suites = load_suites(recipe.evaluate.suites, recipe.evaluate.limit)
    prompts = _calibration_prompts(recipe)
    learned = [CalibrationPrompt(prompt=pair.prompt, kind="harmful") for pair in written_pairs(recipe)]
    refuse_leakage([*prompts, *learned], [item.prompt for suite in suites for item in suite.items])
    covered = coverage(prompts, suites)
    if recipe.calibrate.require_coverage:
        refuse_gaps(covered)
    return suites, prompts, covered


def calibrate_blocks(
    recipe: Recipe, prompts: list[CalibrationPrompt], model: Path, out: Path
) -> CalibrationRecord:
    """Block-wise calibration of a model folder into the new folder `out`."""
    config = recipe.calibrate
    if config.method != "contrastive" or config.loss in ("kl", "apc"):
        raise RecipeError(
            "`calibrate.scope: blocks` learns with `method: contrastive` and `loss: bounded` or `mse`: "
            f"`method: {config.method}` and `loss: {config.loss}` need the logits of whole models."
        )
    total = config.block_steps * len(StreamedModel(model).blocks)
    out.mkdir(exist_ok=True)
    with bar("calibrating", total, unit="step") as on_step:
        return calibrate_folder(
            model, out, config, recipe.quantize, prompts, seed=recipe.seed, on_step=on_step
        )


def written_pairs(recipe: Recipe) -> list[WrittenPair]:
    """The preference pairs that training learns from, where they come from files."""
    files = [recipe.calibrate.qat.pairs] if recipe.calibrate.method == "qat" else []
    if recipe.recover is not None and recipe.recover.objective == "dpo":
        files.append(recipe.recover.pairs)
    return [pair for file in files if file is not None for pair in read_pairs(Path(file))]


def _calibration_prompts(recipe: Recipe) -> list[CalibrationPrompt]:
    config, twin = recipe.calibrate, recipe.base == ABLATE
    required = set(required_kinds(config.method, config.loss, ablated_twin=twin))
    if recipe.recover is not None:  # it learns, whatever the calibration does
        required |= set(required_kinds("contrastive", recipe.recover.loss, ablated_twin=twin))
    mixture = encode(config.mixture)
    return load_calibration(config.data, config.samples, recipe.seed, mixture, required=required)
