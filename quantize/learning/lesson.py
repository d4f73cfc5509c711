"""What learning is given and what it reads: sequences with references, and the held-out exam.

Shared by calibration, quantization-aware training and recovery after pruning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from holdfast.exporter.source import SourceModel
from holdfast.exporter.torch_model import TorchLanguageModel
from holdfast.quantize.formats import Format
from holdfast.quantize.learning.held_out import HeldOut
from holdfast.quantize.learning.losses import LossMode, References, contrastive_loss
from holdfast.quantize.learning.reference_cache import cache_references, forward_logits
from holdfast.quantize.prompts.draw import CalibrationPrompt, Kind
from holdfast.quantize.prompts.sequences import Batch, chat_prompts, make_batch, shuffled_rows, with_stop
from holdfast.recipe import CalibrateConfig, Mixture

OnStep = Callable[[int], None]
"""Called with the number of optimizer steps just done; drives progress bars."""


@dataclass(frozen=True)
class Assignment:
    """What learning is given.

    Attributes:
        source: the model to learn on, possibly pruned; it is not changed.
        aligned: reference of the loss and of the flips.
        negative: transformers model of the unaligned parent or twin. It is read before learning alone.
        chosen: module path -> format of the linears that are quantized; none of them, for recovery.
        seed: decides the order of the batches, and where adapters start.
    """

    source: SourceModel
    aligned: SourceModel
    negative: Any
    config: CalibrateConfig
    chosen: dict[str, Format]
    learn_from: Sequence[CalibrationPrompt]
    held_out: Sequence[CalibrationPrompt]
    seed: int
    on_step: OnStep

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Of the prompts that are learned from."""
        return tuple(prompt.kind for prompt in self.learn_from)

    def lesson(self) -> Lesson:
        """The prompts that are learned from."""
        return self.lesson_on(sequences(self.aligned, self.learn_from, self.config)[0], self.kinds)

    def lesson_on(self, batch: Batch, kinds: tuple[Kind, ...]) -> Lesson:
        """Sequences with the references of both models."""
        references = references_of(self.aligned, self.negative, batch, self.config)
        return Lesson(batch, references, kinds, self.config, self.seed, self.on_step)

    def exam(self) -> HeldOut:
        """The prompts that candidates are judged on."""
        return make_exam(self.aligned, self.negative, self.held_out, self.config)


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
