"""Contrastive calibration: learn ranges, clips, scales and rounding, and choose alpha on held-out prompts.

The model is quantized in the loop exactly as the artifact will be. The references are the aligned
model (pulled towards) and its unaligned parent (pushed away from, never further than the aligned model
itself is; see `losses`). One run per alpha; which is kept, `candidates` says.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from holdfast.exporter.architectures import linear_modules
from holdfast.exporter.source import SourceModel
from holdfast.exporter.torch_model import TorchLanguageModel
from holdfast.quantize.fakequant import round_weight
from holdfast.quantize.folding import fold
from holdfast.quantize.formats import Format
from holdfast.quantize.learning.blockwise import warm_start
from holdfast.quantize.learning.candidates import Course, Trials, contrastive_trials, learn_and_choose
from holdfast.quantize.learning.held_out import HeldOut
from holdfast.quantize.learning.learnable import Learnables
from holdfast.quantize.learning.losses import LossMode, References, contrastive_loss
from holdfast.quantize.learning.reference_cache import cache_references, forward_logits
from holdfast.quantize.learning.rounding_start import start_at_gptq
from holdfast.quantize.learning.start import nearest_start, optimizer_of, parameter_groups, watched_inputs
from holdfast.quantize.prompts.draw import CalibrationPrompt, Kind
from holdfast.quantize.prompts.sequences import (
    Batch,
    chat_prompts,
    make_batch,
    shuffled_rows,
    with_stop,
)
from holdfast.quantize.record import Candidate
from holdfast.quantize.weights.codes import WeightCodes
from holdfast.recipe import CalibrateConfig, Mixture

OnStep = Callable[[int], None]
"""Called with the number of optimizer steps just done; drives progress bars."""


@dataclass(frozen=True)
class Learned:
    """What learning ended in.

    Attributes:
        source: the model with the channel scales folded into its weights.
        ranges: module path -> (low, high) of its static input range.
        codes: module path -> integer codes of its weight.
        candidates: everything that was tried, and where learning started (steps 0).
        chosen: the candidate that was kept.
        smooth_frac: SmoothQuant strength that learning started from.
        kept_frac: module path -> share of the absmax that the clips keep.
        rounded_away_frac: module path -> share of the weights that are not rounded to the nearest code.
    """

    source: SourceModel = field(repr=False)
    ranges: dict[str, tuple[float, float]]
    codes: dict[str, WeightCodes] = field(repr=False)
    candidates: tuple[Candidate, ...]
    chosen: Candidate
    smooth_frac: float
    kept_frac: dict[str, float]
    rounded_away_frac: dict[str, float]


@dataclass(frozen=True)
class Lesson:
    """What one training run reads: sequences, their references and the settings."""

    batch: Batch
    references: References
    kinds: tuple[Kind, ...]
    config: CalibrateConfig
    seed: int
    on_step: OnStep

    def batches(self, mixture: Mixture | None, count: int) -> list[Tensor]:
        """Seeded batches of row indices, int64, drawn by the mixture where there is one."""
        shares = None if mixture is None else torch.tensor([getattr(mixture, kind) for kind in self.kinds])
        generator = torch.Generator().manual_seed(self.seed)
        drawn = shuffled_rows(len(self.batch.ids), self.config.batch_size, generator, shares)
        return list(islice(drawn, count))


def total_steps(config: CalibrateConfig, blocks: int) -> int:
    """Optimizer steps of a whole calibration, for progress bars."""
    return trials_of(config).total_steps + config.block_steps * blocks


def trials_of(config: CalibrateConfig) -> Trials:
    """What is tried; squared errors alone are learned block by block."""
    return contrastive_trials(config, 0 if config.loss == "mse" else config.steps)


def learn(
    source: SourceModel,
    negative: Any,
    config: CalibrateConfig,
    chosen: dict[str, Format],
    *,
    learn_from: Sequence[CalibrationPrompt],
    held_out: Sequence[CalibrationPrompt],
    seed: int,
    aligned: SourceModel,
    on_step: OnStep,
) -> Learned:
    """Learn what the formats allow, once for each candidate, and keep the best on the held-out prompts.

    Arguments:
        source: the model to quantize, possibly pruned; it is not changed.
        negative: transformers model of the unaligned parent or twin. It is read once, before learning,
            and not kept.
        chosen: module path -> format of the linears that are quantized.
        aligned: reference of the loss and of the flips.
        seed: decides the order of the batches.

    Raises:
        CalibrationError: the loss stopped being a number, or nothing is left to learn.
        VocabularyMismatchError: `negative` gives logits of another width.
    """
    lesson_batch, _ = sequences(aligned, learn_from, config)
    references = references_of(aligned, negative, lesson_batch, config)
    exam = make_exam(aligned, negative, held_out, config)
    del negative
    working = replace(source, model=copy.deepcopy(source.model))
    inputs = watched_inputs(working.model, lesson_batch, config.batch_size)
    learned, smooth_frac = nearest_start(inputs, lesson_batch, references, config, chosen, Learnables)
    if config.rounding_start == "gptq":
        start_at_gptq(learned, lesson_batch, config.batch_size)
    kinds = tuple(prompt.kind for prompt in learn_from)
    lesson = Lesson(lesson_batch, references, kinds, config, seed, on_step)
    if config.block_steps:
        warm_start(working.model, learned, lesson_batch, config, seed=seed, on_step=on_step)

    def course_of(mixture: Mixture | None) -> Course:
        groups = parameter_groups(working.model, learned, config)
        return Course(learned, optimizer_of(groups), lesson.batches(mixture, config.steps), update)

    def update(rows: Tensor, alpha: float) -> float:
        loss = loss_on(working.model, lesson, rows, alpha)
        loss.backward()  # type: ignore[no-untyped-call]
        on_step(1)
        return float(loss.detach())

    candidates, best = learn_and_choose(working, learned, exam, trials_of(config), course_of)
    return finish(working, learned, candidates, best, smooth_frac)


def finish(
    working: SourceModel,
    learned: Learnables,
    candidates: Sequence[Candidate],
    best: Candidate,
    smooth_frac: float,
) -> Learned:
    """Fold what was learned into the model, and round its weights once."""
    chosen, ranges = learned.formats, learned.ranges()
    kept = {path: float(learned.linears[path].clip_frac.detach().mean()) for path in chosen}
    fold(learned)
    codes = learned.folded_codes()
    linears = linear_modules(working.model)
    nearest = {path: round_weight(linears[path].weight, form).codes for path, form in chosen.items()}
    return Learned(
        source=working,
        ranges=ranges,
        codes=codes,
        candidates=tuple(candidates),
        chosen=best,
        smooth_frac=smooth_frac,
        kept_frac=kept,
        rounded_away_frac={
            path: float((codes[path].codes != nearest[path]).float().mean()) for path in chosen
        },
    )


def sequences(
    reference: SourceModel, prompts: Sequence[CalibrationPrompt], config: CalibrateConfig
) -> tuple[Batch, list[list[int]]]:
    """The prompts with the aligned model's answers, and the answers."""
    tokenizer = reference.tokenizer
    ids = chat_prompts(tokenizer, [prompt.prompt for prompt in prompts])
    model = TorchLanguageModel(reference.model, tokenizer, "aligned", config.batch_size)
    answers = model.generate(ids, max_new_tokens=config.response_tokens)
    limit = config.response_tokens
    batch = make_batch(
        ids,
        [with_stop(answer, limit, tokenizer.eos_ids[0]) for answer in answers],
        pad_id=tokenizer.pad_id,
        response_tokens=limit,
        first_weight=config.first_response_weight,
    )
    return batch, answers


def references_of(
    reference: SourceModel, negative: Any, batch: Batch, config: CalibrateConfig
) -> References:
    """Reference probabilities at the loss positions of some sequences."""
    return cache_references(
        reference.model, negative, batch, top_k=config.top_k, batch_size=config.batch_size
    )


def make_exam(
    reference: SourceModel,
    negative: Any,
    prompts: Sequence[CalibrationPrompt],
    config: CalibrateConfig,
) -> HeldOut:
    """Prompts with the aligned model's answers and reference probabilities."""
    batch, answers = sequences(reference, prompts, config)
    return HeldOut(
        prompts=chat_prompts(reference.tokenizer, [prompt.prompt for prompt in prompts]),
        answers=[reference.tokenizer.decode(answer) for answer in answers],
        batch=batch,
        references=references_of(reference, negative, batch, config),
        max_new_tokens=config.response_tokens,
        batch_size=config.batch_size,
    )


def loss_on(model: Any, lesson: Lesson, rows: Tensor, alpha: float) -> Tensor:
    """The calibration loss on some sequences, a scalar in nats."""
    batch = lesson.batch.rows(rows)
    references = lesson.references.rows(rows, slice(-batch.positions, None))
    mode: LossMode = "kl" if lesson.config.loss == "mse" else lesson.config.loss
    return contrastive_loss(forward_logits(model, batch), references, batch.weights, alpha=alpha, mode=mode)
