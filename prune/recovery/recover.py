"""Recovery: a pruned model back towards the aligned one, with its zeros held.

    contrastive     distillation: the calibration loss on the aligned model's answers, and hidden states
    dpo             preference of its answers over the unaligned model's, with KL on the other prompts
    safety-heads    pruned weights of the heads that refusals hang on, restored (see `restore`)

Training is that of quantization-aware training without the quantizers, and its candidates are judged in the
same way: runs with and without a push, on held-out prompts, by flips in both directions.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import torch
from msgspec import structs
from torch import Tensor, nn

from holdfast.errors import PruneError
from holdfast.exporter.architectures import block_linear_modules, block_paths
from holdfast.exporter.source import SourceModel
from holdfast.exporter.walk import advance
from holdfast.prune.block_scores import snip_of
from holdfast.prune.checks import check_heads
from holdfast.prune.gradients import AnswerBatch, answer_batches, own_answers
from holdfast.prune.heads import head_scores, query_heads
from holdfast.prune.recovery.heads import head_weights
from holdfast.prune.recovery.hidden import with_hidden
from holdfast.prune.recovery.record import RecoveryRecord
from holdfast.prune.recovery.restore import restorable
from holdfast.prune.scores.ships import Head, strongest_heads
from holdfast.prune.structured.layouts import shape_of
from holdfast.quantize.learning.candidates import Course, best, learn_and_choose
from holdfast.quantize.learning.held_out import HeldOut
from holdfast.quantize.learning.lesson import Assignment, OnStep
from holdfast.quantize.learning.qat import lesson_of, make_update, objective_of, trials_of
from holdfast.quantize.learning.trained_weights import TrainedWeights, weight_group
from holdfast.quantize.prompts.draw import CalibrationPrompt, count_kinds, hold_out
from holdfast.quantize.prompts.sequences import chat_prompts
from holdfast.quantize.record import Candidate
from holdfast.recipe import CalibrateConfig, Mixture, QATConfig, RecoverConfig

BASE_WIDTH = 256  # hidden size that `recover.lr` is meant for
BATCH_SIZE = 16  # prompts in one pass of the heads' scores


@dataclass(frozen=True)
class Recovered:
    """A repaired model and how it came about."""

    source: SourceModel = field(repr=False)
    record: RecoveryRecord


def recover(
    source: SourceModel,
    aligned: SourceModel,
    negative: Any,
    config: RecoverConfig,
    calibrate: CalibrateConfig,
    *,
    prompts: Sequence[CalibrationPrompt],
    seed: int,
    on_step: OnStep | None = None,
) -> Recovered:
    """Repair a pruned model.

    Arguments:
        source: it is not changed.
        aligned: what it was pruned from; reference of the loss and of the flips.
        negative: transformers model of the unaligned parent or twin.
        calibrate: what is learned from, and how candidates are judged.
        seed: decides the held-out prompts, the order of the batches and where adapters start.
        on_step: called after each optimizer step; `total_steps` says how many there are.

    Raises:
        PruneError: safety heads that are not there, or of a model that lost structures.
        CalibrationError: too few prompts, no pairs to prefer, or the loss stopped being a number.
        VocabularyMismatchError: `negative` gives logits of another width.
    """
    learn_from, held_out = hold_out(prompts, calibrate.held_out_frac, seed)
    working = replace(source, model=copy.deepcopy(source.model))
    say = on_step or (lambda _: None)
    assignment = Assignment(
        working,
        aligned,
        negative,
        lesson_settings(config, calibrate),
        {},
        learn_from,
        held_out,
        seed,
        say,
    )
    heads = _safety_heads(aligned, source, learn_from, config)
    exam = assignment.exam()
    before = exam.judge(working)
    work = _restore if config.objective == "safety-heads" else _train
    done = work(assignment, exam, config, heads)
    record = RecoveryRecord(
        objective=config.objective,
        before=before,
        after=done.kept,
        candidates=tuple(done.candidates),
        zeros_before=_zeros(source.model),
        zeros_after=_zeros(working.model),
        weights=sum(m.weight.numel() for m in block_linear_modules(working.model).values()),
        seed=seed,
        safety_heads=tuple(heads),
        restored=done.restored,
        prompts=count_kinds(learn_from, held_out),
        settings=msgspec.to_builtins(config),
    )
    return Recovered(working, record)


def total_steps(config: RecoverConfig, calibrate: CalibrateConfig) -> int:
    """Optimizer steps of a whole recovery, for progress bars."""
    if config.objective == "safety-heads":
        return 0
    return trials_of(lesson_settings(config, calibrate)).total_steps


def lesson_settings(config: RecoverConfig, calibrate: CalibrateConfig) -> CalibrateConfig:
    """The settings under which calibration would learn what recovery does."""
    return structs.replace(
        calibrate,
        method="qat",
        loss=config.loss,
        alphas=config.alphas,
        mixtures=(),
        batch_size=config.batch_size,
        response_tokens=config.response_tokens,
        qat=QATConfig(
            objective="dpo" if config.objective == "dpo" else "contrastive",
            pairs=config.pairs,
            beta=config.beta,
            lora_rank=config.lora_rank,
            steps=config.steps,
            lr=config.lr,
        ),
    )


def learning_rate(config: RecoverConfig, model: Any) -> float:
    """AdamW's, for a model of this hidden size."""
    return config.lr * BASE_WIDTH / float(model.config.hidden_size)


@dataclass(frozen=True)
class _Done:
    candidates: list[Candidate]
    kept: Candidate
    restored: dict[str, int] = field(default_factory=dict)


# --- training ---------------------------------------------------------------------------------


def _train(assignment: Assignment, exam: HeldOut, config: RecoverConfig, heads: Sequence[Head]) -> _Done:
    """Train the model of the assignment in place."""
    model = assignment.source.model
    linears: Mapping[str, nn.Linear] = block_linear_modules(model)
    chosen = head_weights(model, heads) if config.trained == "safety-heads" else None
    if chosen is not None:
        linears = {path: linear for path, linear in linears.items() if path in chosen}
    lesson, pairs = lesson_of(assignment)
    trained = TrainedWeights(linears, config.lora_rank, assignment.seed, chosen)
    objective = objective_of(model, lesson, pairs)
    if config.hidden_weight:
        aligned = assignment.aligned.model
        objective = with_hidden(objective, model, aligned, lesson.batch, config.hidden_weight)
    update = make_update(model, trained, linears, lesson, objective)

    def course_of(mixture: Mixture | None) -> Course:
        optimizer = torch.optim.AdamW([weight_group(trained.parameters(), learning_rate(config, model))])
        return Course(trained, optimizer, lesson.batches(mixture, config.steps), update)

    trials = trials_of(assignment.config)
    candidates, kept = learn_and_choose(assignment.source, trained, exam, trials, course_of)
    trained.close()
    return _Done(candidates, kept)


# --- restoring --------------------------------------------------------------------------------


def _restore(assignment: Assignment, exam: HeldOut, config: RecoverConfig, heads: Sequence[Head]) -> _Done:
    """Restore weights of the safety heads in the model of the assignment, where that is no loss."""
    working = assignment.source
    linears = block_linear_modules(working.model)
    masks = _restorable(assignment, config, heads)
    old = {path: linears[path].weight.clone() for path in masks}
    start = exam.judge(working)
    _copy_where(masks, block_linear_modules(assignment.aligned.model), linears)
    candidates = [exam.judge(working), start]
    if best(candidates) == 0:
        return _Done(candidates, candidates[0], {path: int(mask.sum()) for path, mask in masks.items()})
    for path, weight in old.items():
        linears[path].weight.copy_(weight)
    return _Done(candidates, start)


def _restorable(assignment: Assignment, config: RecoverConfig, heads: Sequence[Head]) -> dict[str, Tensor]:
    """Module path -> weights that get their old values back, bool [out, in]; block by block."""
    aligned = assignment.aligned
    inside = head_weights(aligned.model, heads)
    before, after = block_linear_modules(aligned.model), block_linear_modules(assignment.source.model)
    ids = chat_prompts(aligned.tokenizer, [prompt.prompt for prompt in assignment.learn_from])
    answers = own_answers(aligned, ids, config.response_tokens, BATCH_SIZE)
    safety, utility = (
        _answers(aligned, ids, answers, [(kind == "harmful") == wanted for kind in assignment.kinds])
        for wanted in (True, False)
    )
    found = {}
    for index, block in enumerate(block_paths(aligned.model)):
        linears = {path: before[path] for path in inside if path.startswith(f"{block}.")}
        if linears:
            needed = snip_of(aligned.model, linears, index, safety)
            useful = snip_of(aligned.model, linears, index, utility)
            for path in linears:
                found[path] = restorable(
                    needed[path],
                    useful[path],
                    (after[path].weight == 0) & (before[path].weight != 0),
                    inside[path],
                    safety_top_frac=config.safety_top_frac,
                    utility_top_frac=config.utility_top_frac,
                )
        advance(aligned.model.get_submodule(block), [b.state for b in (*safety, *utility)], index)
    return found


def _answers(
    aligned: SourceModel, ids: list[list[int]], answers: list[list[int]], wanted: Sequence[bool]
) -> list[AnswerBatch]:
    chosen = [place for place, want in enumerate(wanted) if want]
    return answer_batches(aligned, [ids[i] for i in chosen], [answers[i] for i in chosen])


@torch.no_grad()
def _copy_where(
    masks: Mapping[str, Tensor], origin: Mapping[str, nn.Linear], target: Mapping[str, nn.Linear]
) -> None:
    for path, mask in masks.items():
        target[path].weight.copy_(torch.where(mask, origin[path].weight, target[path].weight))


# --- helpers ----------------------------------------------------------------------------------


def _safety_heads(
    aligned: SourceModel, source: SourceModel, prompts: Sequence[CalibrationPrompt], config: RecoverConfig
) -> list[Head]:
    """The heads that refusals of the aligned model hang on, where any are asked for.

    Raises:
        PruneError: more than there are, or the two models do not have the same heads.
    """
    if config.objective != "safety-heads" and config.trained != "safety-heads":
        return []
    if shape_of(aligned.model) != shape_of(source.model):
        raise PruneError(
            "Safety heads are those of the aligned model, and the pruned one lost structures, so that its "
            "heads are others: recover it with `objective: contrastive` or `dpo` and `trained: all`."
        )
    check_heads(config.safety_heads, query_heads(aligned.model) * len(block_paths(aligned.model)))
    harmful = [prompt.prompt for prompt in prompts if prompt.kind == "harmful"]
    ids, pad_id = chat_prompts(aligned.tokenizer, harmful), aligned.tokenizer.pad_id
    scores = head_scores(aligned.model, ids, pad_id=pad_id, batch_size=BATCH_SIZE)
    return strongest_heads(scores, config.safety_heads)


def _zeros(model: nn.Module) -> int:
    return sum(int((linear.weight == 0).sum()) for linear in block_linear_modules(model).values())
