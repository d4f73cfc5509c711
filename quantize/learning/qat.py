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

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.errors import CalibrationError
from holdfast.exporter.architectures import head_is_tied, row_of
from holdfast.quantize.formats import Format
from holdfast.quantize.learning import contrastive
from holdfast.quantize.learning.candidates import (
    Course,
    Trials,
    Update,
    contrastive_trials,
    learn_and_choose,
)
from holdfast.quantize.learning.contrastive import Learned
from holdfast.quantize.learning.dpo import Pairs, make_pairs, preference_loss, read_pairs, written_pairs
from holdfast.quantize.learning.learnable import Learnables
from holdfast.quantize.learning.lesson import Assignment, Lesson, loss_on, sequences
from holdfast.quantize.learning.reference_cache import forward_logits
from holdfast.quantize.learning.start import parameter_groups
from holdfast.quantize.learning.trained_weights import TrainedWeights, Trainee, weight_group
from holdfast.quantize.prompts.draw import Kind
from holdfast.quantize.prompts.sequences import Batch
from holdfast.recipe import CalibrateConfig, Mixture

TRAINED_PARTS = ("weight", "down", "up")  # of a linear; ranges and scales have other names

Objective = Callable[[Tensor, float], Tensor]
"""(rows of the batch, alpha) to a scalar loss."""


class TrainedLearnables(Learnables):
    """Learnables whose weights can be trained too, between `open` and `close`."""

    _trained: TrainedWeights | None = None

    def open(self, paths: Iterable[str], rank: int, seed: int) -> None:
        """Start training the weights of some linears; `parameters` and `state` hold them from now on."""
        linears = {path: self.linears[path].linear for path in paths}
        self._trained = TrainedWeights(linears, rank, seed)

    def close(self) -> None:
        """The trained weights are plain weights again, without gradients."""
        if self._trained is not None:
            self._trained.close()
        self._trained = None

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """`{path}.weight`, or `{path}.down` and `{path}.up`, in the order of computation."""
        return {} if self._trained is None else self._trained.parameters()

    def parameters(self) -> dict[str, nn.Parameter]:
        return super().parameters() | self.weights


def trained_paths(model: Any, chosen: dict[str, Format]) -> list[str]:
    """The quantized linears, but a head that is the embedding as well: that stays as it is."""
    tied = row_of(model).head if head_is_tied(model) else None
    return [path for path in chosen if path != tied]


def total_steps(config: CalibrateConfig, blocks: int) -> int:
    """Optimizer steps of the whole training, for progress bars."""
    return trials_of(config).total_steps + config.block_steps * blocks


def learn(assignment: Assignment) -> Learned:
    """Train once for each candidate, and keep the best on the held-out prompts.

    The codes are those of the trained weights, which are in the returned model.

    Raises:
        CalibrationError: the loss or a gradient stopped being a number (with the linear where it did), no
            pairs to prefer, or `loss: mse`.
        VocabularyMismatchError: the unaligned model gives logits of another width.
    """
    config = assignment.config
    if config.loss == "mse":
        raise CalibrationError(
            "`method: qat` learns from the logits, and `loss: mse` is of each block's output: use "
            "`bounded`, `apc` or `kl`."
        )
    lesson, pairs = lesson_of(assignment)
    exam = assignment.exam()
    begun = contrastive.begin(assignment, lesson, TrainedLearnables)
    model, learned = begun.working.model, begun.learned
    learned.open(trained_paths(model, assignment.chosen), config.qat.lora_rank, assignment.seed)
    update = make_update(model, learned, learned.linears, lesson, objective_of(model, lesson, pairs))

    def course_of(mixture: Mixture | None) -> Course:
        batches = lesson.batches(mixture, config.qat.steps)
        return Course(learned, make_optimizer(learned, config), batches, update)

    candidates, best = learn_and_choose(begun.working, learned, exam, trials_of(config), course_of)
    learned.close()
    return contrastive.finish(begun, candidates, best)


def lesson_of(assignment: Assignment) -> tuple[Lesson, Pairs | None]:
    """What is learned from, and the preference pairs in it, where the objective is to prefer."""
    if assignment.config.qat.objective != "dpo":
        return assignment.lesson(), None
    batch, answers = sequences(assignment.aligned, assignment.learn_from, assignment.config)
    pairs = _pairs(assignment, batch, answers)
    harmful: Kind = "harmful"
    added = len(pairs.chosen.batch.ids) - len(assignment.kinds)  # those of a file come after the prompts
    return assignment.lesson_on(pairs.chosen.batch, assignment.kinds + (harmful,) * added), pairs


def objective_of(model: Any, lesson: Lesson, pairs: Pairs | None) -> Objective:
    """The preference where there are pairs, or the calibration loss."""
    if pairs is None:
        return lambda rows, alpha: loss_on(model, lesson, rows, alpha)
    beta = lesson.config.qat.beta
    return lambda rows, _: preference_loss(model, lesson.references, pairs, rows, beta=beta)


def _pairs(assignment: Assignment, batch: Batch, answers: Sequence[Sequence[int]]) -> Pairs:
    """Preference pairs of the file that the settings name, or of the calibration prompts."""
    aligned, config, prompts = assignment.aligned, assignment.config, assignment.learn_from
    if config.qat.pairs is not None:
        written = read_pairs(Path(config.qat.pairs))
        return written_pairs(aligned.model, aligned.tokenizer, prompts, answers, written, config)
    return make_pairs(
        aligned.model, assignment.negative, aligned.tokenizer, prompts, batch, answers, config
    )


def trials_of(config: CalibrateConfig) -> Trials:
    """What is tried: every alpha under the calibration loss; DPO has none."""
    steps = config.qat.steps
    if config.qat.objective == "dpo" and steps:
        return Trials((0.0,), tuple(config.mixtures) or (None,), steps, nearest=False)
    return contrastive_trials(config, steps)


def make_update(
    model: Any, trained: Trainee, watched: Mapping[str, nn.Module], lesson: Lesson, objective: Objective
) -> Update:
    """Gradients of one step, where all is still in numbers.

    Arguments:
        watched: module path -> module to name where it is no longer, in the order of computation.
    """

    def update(rows: Tensor, alpha: float) -> float:
        loss = objective(rows, alpha)
        if not bool(loss.isfinite()):
            raise _not_a_number(_first_not_finite(model, watched, lesson.batch.rows(rows)), "output")
        loss.backward()  # type: ignore[no-untyped-call]
        require_finite_gradients(trained.parameters())
        lesson.on_step(1)
        return float(loss.detach())

    return update


def make_optimizer(learned: TrainedLearnables, config: CalibrateConfig) -> torch.optim.AdamW:
    """Weights decay, ranges and scales do not: 0 means nothing to them."""
    groups = parameter_groups(learned.model, learned, config)
    return torch.optim.AdamW([weight_group(learned.weights, config.qat.lr), *groups], weight_decay=0.0)


def require_finite_gradients(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise CalibrationError at NaN or infinity in the trained weights' gradients.

    Gradients flow from the head back: the last linear with one is where it arose.
    """
    for name, parameter in reversed(list(parameters.items())):
        path, _, part = name.rpartition(".")
        if part not in TRAINED_PARTS or parameter.grad is None:
            continue
        if not bool(parameter.grad.isfinite().all()):
            raise _not_a_number(path, "gradient")


@torch.no_grad()
def _first_not_finite(model: Any, watched: Mapping[str, nn.Module], batch: Batch) -> str | None:
    """The first module, in the order of computation, whose output holds NaN or infinity."""
    found: list[str] = []

    def watch(path: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            shown = batch.mask[:, -output.shape[1] :].bool()
            if not bool(output[shown].isfinite().all()):
                found.append(path)

        return hook

    handles = [module.register_forward_hook(watch(path)) for path, module in watched.items()]
    try:
        forward_logits(model, batch)
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
