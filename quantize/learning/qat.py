"""Quantization-aware training: calibration that trains the weights as well.

It starts where contrastive calibration does, with the same fake quantization, and learns the same ranges,
clips, scales and roundings; beside them it trains the weights of the quantized linears, all of them or
adapters of low rank (LoRA, Hu et al. 2021, arXiv 2106.09685). The objective is the calibration loss, or
direct preference optimization (see `dpo`). Where learning started is always among the candidates that are
judged on held-out prompts.

An adapter is added to the weight before it is quantized, `FQ(W + scale * B A)`. peft's layers compute
`FQ(W) x + scale * B (A x)` instead: what they learn is lost when it is merged into a weight that is then
rounded, or stays in the graph as two more products in float32. Here nothing of it is left but the codes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from holdfast.errors import CalibrationError
from holdfast.exporter.architectures import head_is_tied, row_of
from holdfast.exporter.source import SourceModel
from holdfast.quantize.formats import Format
from holdfast.quantize.learning import contrastive
from holdfast.quantize.learning.blockwise import warm_start
from holdfast.quantize.learning.candidates import (
    Course,
    Trials,
    Update,
    contrastive_trials,
    learn_and_choose,
)
from holdfast.quantize.learning.contrastive import Learned, Lesson, OnStep
from holdfast.quantize.learning.dpo import Pairs, make_pairs, preference_loss, read_pairs, written_pairs
from holdfast.quantize.learning.learnable import Learnables
from holdfast.quantize.learning.reference_cache import forward_logits
from holdfast.quantize.learning.rounding_start import start_at_gptq
from holdfast.quantize.learning.start import nearest_start, parameter_groups, watched_inputs
from holdfast.quantize.prompts.draw import CalibrationPrompt, Kind
from holdfast.quantize.prompts.sequences import Batch
from holdfast.recipe import CalibrateConfig, Mixture

LORA_ALPHA = 16.0
"""The adapters' scale is this over their rank."""
WEIGHT_DECAY = 0.01

Objective = Callable[[Tensor, float], Tensor]
"""(rows of the batch, alpha) to a scalar loss."""


class TrainedWeight(nn.Module):
    """What a weight is before it is scaled and quantized: `W`, or `W + scale * B A`; zeros of W stay zero.

    Arguments:
        weight: float32 [out, in].
        rank: of the adapter; 0 trains W itself.

    Attributes:
        down: A, float32 [rank, in], uniform in +-1 / sqrt(in).
        up: B, float32 [out, rank], zero at the start.
        kept: bool [out, in], what is not pruned; None where nothing is.
    """

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        kept = weight.detach() != 0.0
        self.kept: Tensor | None
        self.register_buffer("kept", None if bool(kept.all()) else kept)
        self.scale = LORA_ALPHA / rank if rank else 0.0
        bound = 1.0 / math.sqrt(columns)
        start = torch.empty(rank, columns).uniform_(-bound, bound, generator=generator)
        self.down = nn.Parameter(start) if rank else None
        self.up = nn.Parameter(torch.zeros(rows, rank)) if rank else None

    def forward(self, weight: Tensor) -> Tensor:
        if self.down is not None and self.up is not None:
            weight = weight + self.scale * (self.up @ self.down)
        return weight if self.kept is None else weight * self.kept


class TrainedLearnables(Learnables):
    """Learnables whose weights can be trained too, between `open` and `close`."""

    _weights: dict[str, nn.Parameter] = {}

    def open(self, paths: Iterable[str], rank: int, seed: int) -> None:
        """Start training the weights of some linears; `parameters` and `state` hold them from now on."""
        generator = torch.Generator().manual_seed(seed)
        self._weights = {}
        for path in paths:
            linear = self.linears[path].linear
            parametrize.register_parametrization(
                linear, "weight", TrainedWeight(linear.weight, rank, generator)
            )
            self._weights |= _trained_parameters(linear, path, rank)
        for parameter in self._weights.values():
            parameter.requires_grad_(True)

    def close(self) -> None:
        """The trained weights are plain weights again, without gradients."""
        for linear in (quantized.linear for quantized in self.linears.values()):
            if parametrize.is_parametrized(linear, "weight"):
                parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
                linear.weight.requires_grad_(False)
        self._weights = {}

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """`{path}.weight`, or `{path}.down` and `{path}.up`, in the order of computation."""
        return self._weights

    def parameters(self) -> dict[str, nn.Parameter]:
        return super().parameters() | self._weights


def _trained_parameters(linear: nn.Linear, path: str, rank: int) -> dict[str, nn.Parameter]:
    parts: Any = linear.parametrizations
    added = parts.weight[0]
    if rank:
        return {f"{path}.down": added.down, f"{path}.up": added.up}
    return {f"{path}.weight": parts.weight.original}


def trained_paths(model: Any, chosen: dict[str, Format]) -> list[str]:
    """The quantized linears, but a head that is the embedding as well: that stays as it is."""
    tied = row_of(model).head if head_is_tied(model) else None
    return [path for path in chosen if path != tied]


def total_steps(config: CalibrateConfig, blocks: int) -> int:
    """Optimizer steps of the whole training, for progress bars."""
    return trials_of(config).total_steps + config.block_steps * blocks


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
    """Train once for each candidate, and keep the best on the held-out prompts.

    Arguments are those of `contrastive.learn`; the seed decides the adapters' start too. The codes are
    those of the trained weights, which are in the returned model.

    Raises:
        CalibrationError: the loss or a gradient stopped being a number (with the linear where it did), no
            pairs to prefer, or `loss: mse`.
        VocabularyMismatchError: `negative` gives logits of another width.
    """
    if config.loss == "mse":
        raise CalibrationError(
            "`method: qat` learns from the logits, and `loss: mse` is of each block's output: use "
            "`bounded`, `apc` or `kl`."
        )
    batch, answers = contrastive.sequences(aligned, learn_from, config)
    kinds: tuple[Kind, ...] = tuple(prompt.kind for prompt in learn_from)
    pairs = _pairs(aligned, negative, learn_from, batch, answers, config)
    if pairs is not None:  # of a file, they come after the prompts
        batch = pairs.chosen.batch
        harmful: Kind = "harmful"
        kinds += (harmful,) * (len(batch.ids) - len(kinds))
    references = contrastive.references_of(aligned, negative, batch, config)
    exam = contrastive.make_exam(aligned, negative, held_out, config)
    lesson = Lesson(batch, references, kinds, config, seed, on_step)
    working = replace(source, model=copy.deepcopy(source.model))
    objective = _contrastive(working.model, lesson)
    if pairs is not None:
        objective = _dpo(working.model, lesson, pairs)
    del negative
    inputs = watched_inputs(working.model, batch, config.batch_size)
    learned, smooth_frac = nearest_start(inputs, batch, references, config, chosen, TrainedLearnables)
    if config.rounding_start == "gptq":
        start_at_gptq(learned, batch, config.batch_size)
    if config.block_steps:
        warm_start(working.model, learned, batch, config, seed=seed, on_step=on_step)
    learned.open(trained_paths(working.model, chosen), config.qat.lora_rank, seed)

    update = _update(learned, lesson, objective)

    def course_of(mixture: Mixture | None) -> Course:
        batches = lesson.batches(mixture, config.qat.steps)
        return Course(learned, make_optimizer(learned, config), batches, update)

    candidates, best = learn_and_choose(working, learned, exam, trials_of(config), course_of)
    learned.close()
    return contrastive.finish(working, learned, candidates, best, smooth_frac)


def _contrastive(model: Any, lesson: Lesson) -> Objective:
    return lambda rows, alpha: contrastive.loss_on(model, lesson, rows, alpha)


def _dpo(model: Any, lesson: Lesson, pairs: Pairs) -> Objective:
    beta = lesson.config.qat.beta
    return lambda rows, _: preference_loss(model, lesson.references, pairs, rows, beta=beta)


def _pairs(
    aligned: SourceModel,
    negative: Any,
    prompts: Sequence[CalibrationPrompt],
    batch: Batch,
    answers: Sequence[Sequence[int]],
    config: CalibrateConfig,
) -> Pairs | None:
    """Preference pairs of the file that the settings name, or of the calibration prompts."""
    if config.qat.objective != "dpo":
        return None
    if config.qat.pairs is not None:
        written = read_pairs(Path(config.qat.pairs))
        return written_pairs(aligned.model, aligned.tokenizer, prompts, answers, written, config)
    return make_pairs(aligned.model, negative, aligned.tokenizer, prompts, batch, answers, config)


def trials_of(config: CalibrateConfig) -> Trials:
    """What is tried: every alpha under the calibration loss; DPO has none."""
    steps = config.qat.steps
    if config.qat.objective == "dpo" and steps:
        return Trials((0.0,), tuple(config.mixtures) or (None,), steps, nearest=False)
    return contrastive_trials(config, steps)


def _update(learned: TrainedLearnables, lesson: Lesson, objective: Objective) -> Update:
    """Gradients of one step, where all is still in numbers."""

    def update(rows: Tensor, alpha: float) -> float:
        loss = objective(rows, alpha)
        if not bool(loss.isfinite()):
            raise _not_a_number(_first_not_finite(learned, lesson.batch.rows(rows)), "output")
        loss.backward()  # type: ignore[no-untyped-call]
        require_finite_gradients(learned)
        lesson.on_step(1)
        return float(loss.detach())

    return update


def make_optimizer(learned: TrainedLearnables, config: CalibrateConfig) -> torch.optim.AdamW:
    """Weights decay, ranges and scales do not: 0 means nothing to them."""
    weights = {
        "params": list(learned.weights.values()),
        "lr": config.qat.lr,
        "weight_decay": WEIGHT_DECAY,
    }
    groups = parameter_groups(learned.model, learned, config)
    return torch.optim.AdamW([weights, *groups], weight_decay=0.0)


def require_finite_gradients(learned: TrainedLearnables) -> None:
    """Raise CalibrationError at NaN or infinity in the weights' gradients.

    Gradients flow from the head back: the last linear with one is where it arose.
    """
    for name, parameter in reversed(learned.weights.items()):
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
            raise _not_a_number(name.rpartition(".")[0], "gradient")


@torch.no_grad()
def _first_not_finite(learned: Learnables, batch: Batch) -> str | None:
    """The first linear, in the order of computation, whose output holds NaN or infinity."""
    found: list[str] = []

    def watch(path: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            shown = batch.mask[:, -output.shape[1] :].bool()
            if not bool(output[shown].isfinite().all()):
                found.append(path)

        return hook

    handles = [linear.register_forward_hook(watch(path)) for path, linear in learned.linears.items()]
    try:
        forward_logits(learned.model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _not_a_number(path: str | None, what: str) -> CalibrationError:
    place = f"from the {what} of `{path}` on" if path else "in the loss itself"
    return CalibrationError(
        f"Training is no longer in numbers, {place}: lower `calibrate.qat.lr` and the learning rates of "
        "`calibrate`, or use `loss: bounded`."
    )
