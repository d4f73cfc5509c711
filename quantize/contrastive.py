"""Contrastive calibration: learn ranges, clips, scales and rounding, and choose alpha on held-out prompts.

The model is quantized in the loop exactly as the artifact will be. The references are the aligned
model (pulled towards) and its unaligned parent (pushed away from, never further than the aligned model
itself is; see `losses`). One run per alpha; the one with the fewest label flips on held-out prompts,
in both directions, is kept.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from holdfast.errors import CalibrationError
from holdfast.exporter.architectures import linear_modules
from holdfast.exporter.source import SourceModel
from holdfast.exporter.torch_model import TorchLanguageModel
from holdfast.quantize.blockwise import warm_start
from holdfast.quantize.codes import WeightCodes
from holdfast.quantize.fakequant import round_weight
from holdfast.quantize.folding import fold
from holdfast.quantize.formats import Format
from holdfast.quantize.held_out import HeldOut
from holdfast.quantize.learnable import Learnables, Start
from holdfast.quantize.learning import LAST_LR_FRAC, learning, parameter_groups, starting_point
from holdfast.quantize.losses import LossMode, References, contrastive_loss
from holdfast.quantize.plan import InputGroup, input_groups
from holdfast.quantize.prompts import CalibrationPrompt, Kind
from holdfast.quantize.ranges import collect_statistics
from holdfast.quantize.record import Candidate
from holdfast.quantize.reference_cache import cache_references, forward_logits
from holdfast.quantize.sequences import (
    Batch,
    chat_prompts,
    even_rows,
    make_batch,
    shuffled_rows,
    with_stop,
)
from holdfast.recipe import CalibrateConfig, Mixture

OnStep = Callable[[int], None]
"""Called with the number of optimizer steps just done; drives progress bars."""

Trial = tuple[float, Mixture | None]
"""Alpha, and the mixture of the batches (None: as drawn)."""


@dataclass(frozen=True)
class Learned:
    """What learning ended in.

    Attributes:
        source: the model with the channel scales folded into its weights.
        ranges: module path -> (low, high) of its static input range.
        codes: module path -> integer codes of its weight.
        candidates: everything that was tried, and where learning started (steps 0).
        chosen: the candidate that was kept.
        kept_frac: module path -> share of the absmax that the clips keep.
        rounded_away_frac: module path -> share of the weights that are not rounded to the nearest code.
    """

    source: SourceModel = field(repr=False)
    ranges: dict[str, tuple[float, float]]
    codes: dict[str, WeightCodes] = field(repr=False)
    candidates: tuple[Candidate, ...]
    chosen: Candidate
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

    def rows(self, mixture: Mixture | None) -> Iterator[Tensor]:
        """Endless seeded batches of row indices, int64, drawn by the mixture where there is one."""
        shares = None if mixture is None else torch.tensor([getattr(mixture, kind) for kind in self.kinds])
        generator = torch.Generator().manual_seed(self.seed)
        return shuffled_rows(len(self.batch.ids), self.config.batch_size, generator, shares)


def total_steps(config: CalibrateConfig, blocks: int) -> int:
    """Optimizer steps of a whole calibration, for progress bars."""
    return config.steps * len(_trials(config)) + config.block_steps * blocks


def candidate_alphas(config: CalibrateConfig) -> list[float]:
    """Alphas to try, ascending; 0 (no push) is always among them, and alone under `kl`."""
    return [0.0] if config.loss == "kl" else sorted({0.0, *config.alphas})


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
    learned = attach(working.model, lesson_batch, config, chosen)
    kinds = tuple(prompt.kind for prompt in learn_from)
    lesson = Lesson(lesson_batch, references, kinds, config, seed, on_step)
    if config.block_steps:
        warm_start(working.model, learned, lesson_batch, config, seed=seed, on_step=on_step)

    def train(trial: Trial) -> tuple[float, ...]:
        return _train(working.model, learned, lesson, *trial)

    candidates, best = learn_and_choose(working, learned, exam, _trials(config), train)
    return finish(working, learned, candidates, best)


def finish(
    working: SourceModel, learned: Learnables, candidates: Sequence[Candidate], best: Candidate
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


def attach(model: Any, batch: Batch, config: CalibrateConfig, chosen: dict[str, Format]) -> Learnables:
    """Quantizers that start from SmoothQuant scales and the sampled activations' ranges."""
    groups, starts = starting_points(model, batch, config, chosen)
    return Learnables(model, groups, starts, chosen, rounding=config.learn_rounding)


def starting_points(
    model: Any, batch: Batch, config: CalibrateConfig, chosen: dict[str, Format]
) -> tuple[list[InputGroup], dict[str, Start]]:
    """The model's input groups, and by name where each one's learning starts."""
    groups = input_groups(model)
    batches = [batch.rows(rows) for rows in even_rows(len(batch.ids), config.batch_size)]
    statistics = collect_statistics(model, groups, batches)
    starts = {
        group.name: starting_point(model, group, statistics[group.name], chosen, config) for group in groups
    }
    return groups, starts


def learn_and_choose(
    working: SourceModel,
    learned: Learnables,
    exam: HeldOut,
    trials: Sequence[Trial],
    train: Callable[[Trial], tuple[float, ...]],
) -> tuple[list[Candidate], Candidate]:
    """One run per alpha and mixture from the same start; `learned` is left in the chosen state.

    Kept is the candidate with the fewest flips in both directions; among equals, the nearest to the aligned
    model. Where learning started is always a candidate.

    Arguments:
        train: moves `learned`, which is attached, and gives the loss of every step.
    """
    start_state = learned.state()
    states, candidates = [], []
    with learned.attached():
        for trial in trials:
            learned.load(start_state)
            losses = train(trial)
            states.append(learned.state())
            alpha, mixture = trial
            candidates.append(exam.judge(working, learned, alpha=alpha, mixture=mixture, losses=losses))
        learned.load(start_state)
        states.append(start_state)
        candidates.append(exam.judge(working, learned, alpha=0.0, mixture=None, losses=()))
    best = min(range(len(candidates)), key=lambda i: (candidates[i].flips, candidates[i].divergence))
    learned.load(states[best])
    return candidates, candidates[best]


def _trials(config: CalibrateConfig) -> list[Trial]:
    """(alpha, mixture of the batches) of every run."""
    if not config.steps or config.loss == "mse":
        return []
    return [
        (alpha, mixture) for mixture in config.mixtures or (None,) for alpha in candidate_alphas(config)
    ]


def _train(
    model: Any, learned: Learnables, lesson: Lesson, alpha: float, mixture: Mixture | None
) -> tuple[float, ...]:
    """Adam on what the settings allow; the loss of every step, nats."""
    config = lesson.config
    rows = lesson.rows(mixture)
    parameters = parameter_groups(model, learned, config)
    losses = []
    with learning(parameters) as optimizer:
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, LAST_LR_FRAC, total_iters=config.steps)
        for _ in range(config.steps):
            optimizer.zero_grad(set_to_none=True)
            loss = loss_on(model, lesson, next(rows), alpha)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            decay.step()
            learned.project()
            losses.append(_finite(float(loss.detach())))
            lesson.on_step(1)
    return tuple(losses)


def loss_on(model: Any, lesson: Lesson, rows: Tensor, alpha: float) -> Tensor:
    """The calibration loss on some sequences, a scalar in nats."""
    batch = lesson.batch.rows(rows)
    references = lesson.references.rows(rows, slice(-batch.positions, None))
    mode: LossMode = "kl" if lesson.config.loss == "mse" else lesson.config.loss
    return contrastive_loss(forward_logits(model, batch), references, batch.weights, alpha=alpha, mode=mode)


def _finite(loss: float) -> float:
    if loss != loss or loss in (float("inf"), float("-inf")):
        raise CalibrationError(
            "The calibration loss is no longer a number: lower the learning rates, or use `loss: bounded`."
        )
    return loss
