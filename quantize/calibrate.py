"""Contrastive calibration: learn ranges, clips and scales, and choose alpha on held-out prompts.

The model is quantized in the loop exactly as the artifact will be. The references are the aligned
model (pulled towards) and its unaligned parent (pushed away from, never further than the aligned model
itself is; see `losses`). One run per alpha; the one with the fewest label flips on held-out prompts,
in both directions, is kept.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from holdfast.errors import CalibrationError
from holdfast.exporter.architectures import head_is_tied, linear_modules, row_of
from holdfast.exporter.source import SourceModel, save_source
from holdfast.exporter.torch_model import TorchLanguageModel
from holdfast.quantize.folding import fold
from holdfast.quantize.held_out import HeldOut
from holdfast.quantize.learnable import Learnables, Start
from holdfast.quantize.losses import LossMode, References, contrastive_loss
from holdfast.quantize.plan import input_groups, quantized_paths
from holdfast.quantize.prompts import CalibrationPrompt, count_kinds, hold_out
from holdfast.quantize.ranges import collect_statistics, smoothing_scales, starting_range
from holdfast.quantize.record import (
    CalibrationRecord,
    Candidate,
    activation_range,
    write_record,
)
from holdfast.quantize.reference_cache import cache_references, forward_logits
from holdfast.quantize.sequences import (
    Batch,
    chat_prompts,
    even_rows,
    make_batch,
    shuffled_rows,
    with_stop,
)
from holdfast.recipe import CalibrateConfig, QuantizeConfig

OnStep = Callable[[int], None]
"""Called with the number of optimizer steps just done; drives progress bars."""

LAST_LR_FRAC = 0.1


@dataclass(frozen=True)
class Calibration:
    """A calibrated model.

    Attributes:
        source: the model with scales folded and clips baked; the one to export.
        record: ranges, candidates and settings; calibration.json.
    """

    source: SourceModel = field(repr=False)
    record: CalibrationRecord

    def save(self, out: Path) -> None:
        """Write the model folder and calibration.json into `out`."""
        save_source(self.source, out)
        write_record(self.record, out)


@dataclass(frozen=True)
class _Lesson:
    """What one training run reads: sequences, their references and the settings."""

    batch: Batch
    references: References
    config: CalibrateConfig
    seed: int
    on_step: OnStep


def total_steps(config: CalibrateConfig) -> int:
    """Optimizer steps of a whole calibration, for progress bars."""
    return config.steps * len(candidate_alphas(config))


def candidate_alphas(config: CalibrateConfig) -> list[float]:
    """Alphas to try, ascending; 0 (no push) is always among them, and alone under `kl`."""
    return [0.0] if config.loss == "kl" else sorted({0.0, *config.alphas})


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
    """Calibrate a model for static or weight-only quantization.

    Arguments:
        source: the model to quantize, possibly pruned; it is not changed.
        negative: transformers model of the unaligned parent or twin. It is read once, before learning,
            and not kept.
        prompts: calibration prompts, see `prompts.load_calibration`.
        aligned: reference of the loss and of the flips; by default `source`.
        seed: decides the held-out prompts and the order of the batches.

    Raises:
        CalibrationError: too few prompts, or the loss stopped being a number.
        VocabularyMismatchError: `negative` gives logits of another width.
    """
    quantized = quantized_paths(list(linear_modules(source.model)), quantize.exclude)
    if quantize.scheme == "none":
        return Calibration(source, _record(config, quantize, seed, method="none"))
    reference = aligned or source
    learn_from, held_out = hold_out(prompts, config.held_out_frac, seed)
    lesson_batch, _ = _sequences(reference, learn_from, config)
    references = _cache(reference, negative, lesson_batch, config)
    exam = _exam(reference, negative, held_out, config)
    del negative
    working = replace(source, model=copy.deepcopy(source.model))
    learned = _attach(working.model, lesson_batch, config, quantize, quantized)
    lesson = _Lesson(lesson_batch, references, config, seed, on_step or (lambda _: None))
    candidates, chosen = _learn_and_choose(working, learned, lesson, exam)
    ranges = learned.ranges() if quantize.scheme == "w8a8" else {}
    bits = quantize.activation_bits
    record = _record(
        config,
        quantize,
        seed,
        activation_ranges={p: activation_range(*ends, bits) for p, ends in ranges.items()},
        candidates=tuple(candidates),
        chosen_alpha=chosen.alpha,
        chosen_steps=chosen.steps,
        kept_frac={p: float(learned.linears[p].clip_frac.detach().mean()) for p in quantized},
        prompts=count_kinds(learn_from, held_out),
        held_out=len(held_out),
    )
    fold(learned)
    return Calibration(working, record)


def _sequences(
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


def _cache(reference: SourceModel, negative: Any, batch: Batch, config: CalibrateConfig) -> References:
    return cache_references(
        reference.model, negative, batch, top_k=config.top_k, batch_size=config.batch_size
    )


def _exam(
    reference: SourceModel,
    negative: Any,
    prompts: Sequence[CalibrationPrompt],
    config: CalibrateConfig,
) -> HeldOut:
    batch, answers = _sequences(reference, prompts, config)
    return HeldOut(
        prompts=chat_prompts(reference.tokenizer, [prompt.prompt for prompt in prompts]),
        answers=[reference.tokenizer.decode(answer) for answer in answers],
        batch=batch,
        references=_cache(reference, negative, batch, config),
        max_new_tokens=config.response_tokens,
        batch_size=config.batch_size,
    )


def _attach(
    model: Any,
    batch: Batch,
    config: CalibrateConfig,
    quantize: QuantizeConfig,
    quantized: Sequence[str],
) -> Learnables:
    """Quantizers that start from SmoothQuant scales and the sampled activations' ranges."""
    groups = input_groups(model)
    batches = [batch.rows(rows) for rows in even_rows(len(batch.ids), config.batch_size)]
    statistics = collect_statistics(model, groups, batches)
    linears = linear_modules(model)
    smooth = quantize.scheme == "w8a8" and config.smooth_frac > 0.0
    starts = {}
    for group in groups:
        seen = statistics[group.name]
        scales = torch.ones(int(group.channel_map.max()) + 1)
        if smooth and group.producer is not None:
            weights = [linears[path].weight for path in group.consumers]
            scales = smoothing_scales(seen, weights, group, config.smooth_frac)
        low, high = starting_range(
            seen,
            scales[group.channel_map],
            quantize.activation_bits,
            shrink=config.start == "mse",
        )
        starts[group.name] = Start(scales, low, high)
    return Learnables(model, groups, starts, quantize, quantized)


def _learn_and_choose(
    working: SourceModel, learned: Learnables, lesson: _Lesson, exam: HeldOut
) -> tuple[list[Candidate], Candidate]:
    """One run per alpha from the same start; `learned` is left in the chosen state."""
    start_state = learned.state()
    states, candidates = [], []
    with learned.attached():
        for alpha in candidate_alphas(lesson.config) if lesson.config.steps else []:
            learned.load(start_state)
            losses = _train(working.model, learned, lesson, alpha)
            states.append(learned.state())
            candidates.append(exam.judge(working, learned, alpha=alpha, losses=losses))
        learned.load(start_state)
        states.append(start_state)
        candidates.append(exam.judge(working, learned, alpha=0.0, losses=()))
    # min() keeps the first of equals: the smaller alpha, and what was learned before the start
    best = min(range(len(candidates)), key=lambda index: candidates[index].flips)
    learned.load(states[best])
    return candidates, candidates[best]


def _train(model: Any, learned: Learnables, lesson: _Lesson, alpha: float) -> tuple[float, ...]:
    """Adam on what the settings allow; the loss of every step, nats."""
    config = lesson.config
    generator = torch.Generator().manual_seed(lesson.seed)
    rows = shuffled_rows(len(lesson.batch.ids), config.batch_size, generator)
    parameters = _parameter_groups(model, learned, config)
    losses = []
    with _learning(parameters) as optimizer:
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, LAST_LR_FRAC, total_iters=config.steps)
        for _ in range(config.steps):
            optimizer.zero_grad(set_to_none=True)
            loss = _loss(model, lesson, next(rows), alpha)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            decay.step()
            learned.project()
            losses.append(_finite(float(loss.detach())))
            lesson.on_step(1)
    return tuple(losses)


def _loss(model: Any, lesson: _Lesson, rows: Tensor, alpha: float) -> Tensor:
    batch = lesson.batch.rows(rows)
    references = lesson.references.rows(rows, slice(-batch.positions, None))
    mode: LossMode = lesson.config.loss
    return contrastive_loss(forward_logits(model, batch), references, batch.weights, alpha=alpha, mode=mode)


def _parameter_groups(model: Any, learned: Learnables, config: CalibrateConfig) -> list[dict[str, Any]]:
    """Adam's parameter groups. What could not be folded or baked exactly is not learned."""
    tied = row_of(model).head if head_is_tied(model) else None
    static = learned.scheme == "w8a8"
    groups = list(zip(learned.plan, learned.groups.values(), strict=True))
    scales = [quantizer.log_scale for group, quantizer in groups if group.producer is not None]
    ends = [end for _, quantizer in groups for end in (quantizer.log_low, quantizer.log_high)]
    clips = [
        linear.clip_frac for path, linear in learned.linears.items() if linear.quantized and path != tied
    ]
    return [
        {"params": params, "lr": rate}
        for params, rate, wanted in (
            (scales, config.scale_lr, config.learn_scales),
            (ends, config.activation_lr, config.learn_activations and static),
            (clips, config.clip_lr, config.learn_clip),
        )
        if wanted and params
    ]


@contextmanager
def _learning(groups: list[dict[str, Any]]) -> Iterator[torch.optim.Adam]:
    """An optimizer over the groups; nothing keeps a gradient afterwards."""
    if not groups:
        raise CalibrationError(
            "Nothing is left to learn: set one of `learn_activations`, `learn_clip` and "
            "`learn_scales`, or `steps` to 0."
        )
    try:
        yield torch.optim.Adam(groups)
    finally:
        for group in groups:
            for parameter in group["params"]:
                parameter.grad = None


def _finite(loss: float) -> float:
    if loss != loss or loss in (float("inf"), float("-inf")):
        raise CalibrationError(
            "The calibration loss is no longer a number: lower the learning rates, or use `loss: bounded`."
        )
    return loss


def _record(
    config: CalibrateConfig,
    quantize: QuantizeConfig,
    seed: int,
    *,
    method: str = "contrastive",
    **decided: Any,
) -> CalibrationRecord:
    return CalibrationRecord(
        method=method,
        scheme=quantize.scheme,
        activation_bits=quantize.activation_bits,
        block_size=quantize.block_size,
        exclude=quantize.exclude,
        seed=seed,
        settings=msgspec.json.decode(msgspec.json.encode(config)),  # as it reads back
        **decided,
    )
