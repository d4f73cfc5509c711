"""Calibration: what a method decides about a model before it is exported, as a folder.

    contrastive, qat        learned against the aligned model and its unaligned parent
    gptq, awq, hqq          integer codes of the weights, from the activations or the weights alone
    smoothquant             channel scales; ranges are a calibrator's, on the graph
    rtn                     nothing here: ranges are a calibrator's, weights are rounded to nearest

With the backend `inc`, the methods that know nothing of alignment are neural-compressor's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from holdfast.exporter.architectures import block_paths, linear_modules
from holdfast.exporter.source import SourceModel, save_source
from holdfast.quantize.artifact.possible import INC_METHODS
from holdfast.quantize.decisions import Decisions, layout
from holdfast.quantize.folding import fold
from holdfast.quantize.formats import Format, formats
from holdfast.quantize.learning import contrastive, qat
from holdfast.quantize.learning.learnable import Learnables
from holdfast.quantize.learning.lesson import Assignment, sequences
from holdfast.quantize.learning.start import watched_inputs
from holdfast.quantize.prompts.draw import CalibrationPrompt, count_kinds, hold_out
from holdfast.quantize.prompts.sequences import Batch, even_rows
from holdfast.quantize.record import CalibrationRecord, activation_range, write_record
from holdfast.quantize.walk import WholeModel
from holdfast.quantize.weights.codes import WeightCodes, save_codes
from holdfast.quantize.weights.hqq import hqq
from holdfast.quantize.weights.weight_only import awq_codes, gptq_codes, rounded_codes
from holdfast.recipe import CalibrateConfig, QuantizeConfig

OnStep = Callable[[int], None]
"""Called with the number of steps just done; drives progress bars."""


@dataclass(frozen=True)
class Calibration:
    """A calibrated model.

    Attributes:
        source: the model with scales folded; the one to export.
        record: ranges, candidates and settings; calibration.json.
        codes: module path -> integer codes of its weight; codes.safetensors.
    """

    source: SourceModel = field(repr=False)
    record: CalibrationRecord
    codes: dict[str, WeightCodes] = field(default_factory=dict, repr=False)

    def save(self, out: Path) -> None:
        """Write the model folder, calibration.json and the codes into `out`."""
        save_source(self.source, out)
        write_record(self.record, out)
        if self.codes:
            save_codes(self.codes, out)

    def decisions(self, config: QuantizeConfig) -> Decisions:
        """The same as `decisions.read_decisions` gives of the folder."""
        chosen = formats(list(linear_modules(self.source.model)), config)
        return Decisions(chosen, self.record.activation_ranges, self.codes, self.record.method)


@dataclass(frozen=True)
class Task:
    """What a method is given.

    Attributes:
        source: the model to quantize; it is not changed.
        aligned, negative: references; only the learned methods read the second.
        chosen: module path -> format of the linears that are quantized.
    """

    source: SourceModel
    aligned: SourceModel
    negative: Any
    config: CalibrateConfig
    quantize: QuantizeConfig
    chosen: dict[str, Format]
    prompts: Sequence[CalibrationPrompt]
    seed: int
    on_step: OnStep

    def record(self, **decided: Any) -> CalibrationRecord:
        return record_of(self.config, self.quantize, self.seed, self.chosen, **decided)

    def copy(self) -> SourceModel:
        """The model, to be changed."""
        return replace(self.source, model=copy.deepcopy(self.source.model))

    def batch(self) -> Batch:
        """The prompts that are learned from, with the aligned model's answers."""
        learn_from, _ = hold_out(self.prompts, self.config.held_out_frac, self.seed)
        return sequences(self.aligned, learn_from, self.config)[0]

    def assignment(
        self, learn_from: Sequence[CalibrationPrompt], held_out: Sequence[CalibrationPrompt]
    ) -> Assignment:
        """What the learned methods are given."""
        return Assignment(
            self.source,
            self.aligned,
            self.negative,
            self.config,
            self.chosen,
            learn_from,
            held_out,
            self.seed,
            self.on_step,
        )

    def batches(self) -> list[Batch]:
        batch = self.batch()
        return [batch.rows(rows) for rows in even_rows(len(batch.ids), self.config.batch_size)]


def calibrate(
    source: SourceModel,
    negative: Any,
    config: CalibrateConfig,
    quantize: QuantizeConfig,
    *,
    prompts: Sequence[CalibrationPrompt],
    seed: int,
    aligned: SourceModel | None = None,
    on_step: OnStep | None = None,
) -> Calibration:
    """Calibrate a model for the formats that `quantize` gives its linears.

    Arguments:
        source: the model to quantize, possibly pruned; it is not changed.
        negative: transformers model of the unaligned parent or twin; only the learned methods read it.
        prompts: calibration prompts, see `prompts.draw.load_calibration`.
        aligned: reference of the loss and of the flips; by default `source`.
        seed: decides the held-out prompts and the order of the batches.

    Raises:
        CalibrationError: too few prompts, or the loss stopped being a number.
        VocabularyMismatchError: `negative` gives logits of another width.
    """
    chosen = formats(list(linear_modules(source.model)), quantize)
    if not chosen:
        return Calibration(source, record_of(config, quantize, seed, {}, method="none"))
    if quantize.backend == "inc" and config.method in INC_METHODS:
        return Calibration(source, record_of(config, quantize, seed, chosen))
    say = on_step or (lambda _: None)
    task = Task(source, aligned or source, negative, config, quantize, chosen, prompts, seed, say)
    return _METHODS[config.method](task)


def total_steps(config: CalibrateConfig, source: SourceModel) -> int:
    """How often `on_step` counts over a whole calibration."""
    if config.method in ("contrastive", "qat"):
        count = qat.total_steps if config.method == "qat" else contrastive.total_steps
        return count(config, len(block_paths(source.model)))
    return len(linear_modules(source.model))


def record_of(
    config: CalibrateConfig,
    quantize: QuantizeConfig,
    seed: int,
    chosen: dict[str, Format],
    *,
    method: str | None = None,
    **decided: Any,
) -> CalibrationRecord:
    """calibration.json of one calibration."""
    return CalibrationRecord(
        method=method or config.method,
        formats={path: form.name for path, form in chosen.items()},
        layout=layout(quantize),
        seed=seed,
        settings=msgspec.json.decode(msgspec.json.encode(config)),  # as it reads back
        **decided,
    )


def _qat(task: Task) -> Calibration:
    return _contrastive(task, learn=qat.learn)


def _contrastive(
    task: Task, learn: Callable[[Assignment], contrastive.Learned] = contrastive.learn
) -> Calibration:
    learn_from, held_out = hold_out(task.prompts, task.config.held_out_frac, task.seed)
    learned = learn(task.assignment(learn_from, held_out))
    ranges = {path: activation_range(*ends, task.chosen[path]) for path, ends in learned.ranges.items()}
    record = task.record(
        coded=True,
        activation_ranges=ranges,
        candidates=learned.candidates,
        chosen_alpha=learned.chosen.alpha,
        chosen_steps=learned.chosen.steps,
        smooth_frac=learned.smooth_frac,
        kept_frac=learned.kept_frac,
        rounded_away_frac=learned.rounded_away_frac,
        prompts=count_kinds(learn_from, held_out),
        held_out=len(held_out),
    )
    return Calibration(learned.source, record, learned.codes)


def _rtn(task: Task) -> Calibration:
    """Nothing is decided here: weights are rounded and ranges found where the graph is written."""
    return Calibration(task.source, task.record())


def _smoothquant(task: Task) -> Calibration:
    """Channel scales at `smooth_frac`, folded; nothing else."""
    working = task.copy()
    inputs = watched_inputs(working.model, task.batch(), task.config.batch_size)
    starts = inputs.starts(task.chosen, task.config, task.config.smooth_frac)
    fold(Learnables(working.model, inputs.groups, starts, task.chosen, rounding=False))
    return Calibration(working, task.record())


def _hqq(task: Task) -> Calibration:
    codes = rounded_codes(WholeModel(task.source.model), task.chosen, hqq, on_done=task.on_step)
    return Calibration(task.source, task.record(coded=True), codes)


def _gptq(task: Task) -> Calibration:
    codes = gptq_codes(WholeModel(task.source.model), task.batches(), task.chosen, on_done=task.on_step)
    return Calibration(task.source, task.record(coded=True), codes)


def _awq(task: Task) -> Calibration:
    working = task.copy()
    codes = awq_codes(working.model, task.batches(), task.chosen, on_done=task.on_step)
    return Calibration(working, task.record(coded=True), codes)


_METHODS: dict[str, Callable[[Task], Calibration]] = {
    "contrastive": _contrastive,
    "qat": _qat,
    "rtn": _rtn,
    "smoothquant": _smoothquant,
    "hqq": _hqq,
    "gptq": _gptq,
    "awq": _awq,
}
