"""Contrastive calibration: learn ranges, clips, scales and rounding, and choose alpha on held-out prompts.

The model is quantized in the loop exactly as the artifact will be. The references are the aligned
model (pulled towards) and its unaligned parent (pushed away from, never further than the aligned model
itself is; see `losses`). One run per alpha; which is kept, `candidates` says.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Generic

from torch import Tensor

from holdfast.exporter.architectures import linear_modules
from holdfast.exporter.source import SourceModel
from holdfast.quantize.fakequant import round_weight
from holdfast.quantize.folding import fold
from holdfast.quantize.learning.blockwise import warm_start
from holdfast.quantize.learning.candidates import Course, Trials, contrastive_trials, learn_and_choose
from holdfast.quantize.learning.learnable import Learnables
from holdfast.quantize.learning.lesson import Assignment, Lesson, loss_on
from holdfast.quantize.learning.rounding_start import start_at_gptq
from holdfast.quantize.learning.start import (
    L,
    nearest_start,
    optimizer_of,
    parameter_groups,
    watched_inputs,
)
from holdfast.quantize.record import Candidate
from holdfast.quantize.weights.codes import WeightCodes
from holdfast.recipe import CalibrateConfig, Mixture


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


def total_steps(config: CalibrateConfig, blocks: int) -> int:
    """Optimizer steps of a whole calibration, for progress bars."""
    return trials_of(config).total_steps + config.block_steps * blocks


def trials_of(config: CalibrateConfig) -> Trials:
    """What is tried; squared errors alone are learned block by block."""
    return contrastive_trials(config, 0 if config.loss == "mse" else config.steps)


def learn(assignment: Assignment) -> Learned:
    """Learn what the formats allow, once for each candidate, and keep the best on the held-out prompts.

    Raises:
        CalibrationError: the loss stopped being a number, or nothing is left to learn.
        VocabularyMismatchError: the unaligned model gives logits of another width.
    """
    config = assignment.config
    lesson, exam = assignment.lesson(), assignment.exam()
    begun = begin(assignment, lesson, Learnables)
    model, learned = begun.working.model, begun.learned

    def course_of(mixture: Mixture | None) -> Course:
        groups = parameter_groups(model, learned, config)
        return Course(learned, optimizer_of(groups), lesson.batches(mixture, config.steps), update)

    def update(rows: Tensor, alpha: float) -> float:
        loss = loss_on(model, lesson, rows, alpha)
        loss.backward()  # type: ignore[no-untyped-call]
        lesson.on_step(1)
        return float(loss.detach())

    candidates, best = learn_and_choose(begun.working, learned, exam, trials_of(config), course_of)
    return finish(begun, candidates, best)


@dataclass(frozen=True)
class Beginning(Generic[L]):
    """Where learning starts.

    Attributes:
        working: a copy of the model, which the quantizers belong to.
        smooth_frac: SmoothQuant strength of the channel scales.
    """

    working: SourceModel
    learned: L
    smooth_frac: float


def begin(assignment: Assignment, lesson: Lesson, kind: type[L]) -> Beginning[L]:
    """Quantizers of that kind at the nearest start, with GPTQ's roundings, after the block-wise steps."""
    config, batch = assignment.config, lesson.batch
    working = replace(assignment.source, model=copy.deepcopy(assignment.source.model))
    inputs = watched_inputs(working.model, batch, config.batch_size)
    learned, smooth_frac = nearest_start(inputs, batch, lesson.references, config, assignment.chosen, kind)
    if config.rounding_start == "gptq":
        start_at_gptq(learned, batch, config.batch_size)
    if config.block_steps:
        warm_start(working.model, learned, batch, config, seed=lesson.seed, on_step=lesson.on_step)
    return Beginning(working, learned, smooth_frac)


def finish(begun: Beginning[L], candidates: Sequence[Candidate], best: Candidate) -> Learned:
    """Fold what was learned into the model, and round its weights once."""
    working, learned = begun.working, begun.learned
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
        smooth_frac=begun.smooth_frac,
        kept_frac=kept,
        rounded_away_frac={
            path: float((codes[path].codes != nearest[path]).float().mean()) for path in chosen
        },
    )
