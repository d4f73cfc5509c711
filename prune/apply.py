"""Pruning a loaded model in place, block by block, and the record of what was reached.

A block's masks come from its inputs as the pruned blocks before it give them (Wanda, section 3) and from
gradients of the unpruned model (see `gradients`); so the calibration rows and the answers walk through the
model side by side, and no more than one block's scores are in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from msgspec import structs
from torch import Tensor, nn

from holdfast.exporter.architectures import block_linear_modules, block_paths
from holdfast.exporter.source import SourceModel
from holdfast.exporter.walk import advance
from holdfast.prune.activations import Watched, first_block_batches, input_hessian, input_moments
from holdfast.prune.block_scores import (
    Evidence,
    block_protected,
    block_scores,
    choose,
    dropped_by,
    row_weights,
    updates,
)
from holdfast.prune.checks import (
    check_config,
    check_finite,
    check_heads,
    check_rows,
    check_sets,
    check_weights,
)
from holdfast.prune.dense_target import dense_target
from holdfast.prune.gradients import answer_batches, own_answers
from holdfast.prune.heads import head_scores, query_heads
from holdfast.prune.masks import UNSTRUCTURED, parse_pattern
from holdfast.prune.refit import refit
from holdfast.prune.report import PruneReport, make_report
from holdfast.prune.scores.ships import Head, strongest_heads
from holdfast.prune.sensitivity import importances, sensitivity_fracs
from holdfast.prune.sparsegpt import DAMP_FRAC, sparsegpt, sparsegpt_
from holdfast.recipe import PruneConfig

BATCH_SIZE = 16

OnDone = Callable[[int], None]
"""Called with the number of decoder blocks just pruned; drives progress bars."""

Rows = Sequence[Sequence[int]]


def prune_model(
    source: SourceModel,
    token_ids: Rows,
    config: PruneConfig,
    *,
    harmful: Sequence[bool] = (),
    negative: Any = None,
    on_done: OnDone | None = None,
) -> PruneReport:
    """Set weights of the linear layers inside the decoder blocks to zero, in place.

    Embedding, norms, biases and head are left alone. Only the two kinds of SparseGPT change weights that
    stay.

    Arguments:
        token_ids: calibration rows (chat-templated prompts); not read by `magnitude`, as long as nothing
            but the weights is asked for.
        harmful: which rows are the safety set; the others are the utility set. By default none is.
        negative: unaligned transformers model, read with `safety_loss: contrastive` only.

    Raises:
        PruneError: a sparsity or pattern that cannot be, weights or activations that are not finite, a
            model that is sparse already, no calibration rows or none of a kind where they are needed.
    """
    config = structs.replace(config, allocation=_allocation(config))
    linears = {} if config.method == "none" else block_linear_modules(source.model)
    check_config(config, linears)
    check_weights(linears, allow_zeros=config.allow_zeros)
    if not linears:
        return make_report(config, {}, {})
    harmful = harmful or [False] * len(token_ids)
    safety = [row for row, kind in zip(token_ids, harmful, strict=True) if kind]
    utility = [row for row, kind in zip(token_ids, harmful, strict=True) if not kind]
    if _reads_inputs(config) or _reads_answers(config) or config.safety_heads:
        check_rows(config, token_ids)
        check_sets(config, len(safety), len(utility))
    heads = _safety_heads(source, safety, config)
    rows, evidence = _gather(source, token_ids, safety, utility, config, negative)
    evidence.heads = heads
    if config.allocation == "sensitivity" or dropped_by(config) == "aligned-sparsegpt":
        evidence.importances = importances(config, source.model, linears, evidence)
    fracs = dict.fromkeys(linears, config.sparsity_frac)
    if config.allocation == "sensitivity":
        fracs = sensitivity_fracs(config, source.model, linears, evidence.unpruned())
    protected = _prune(source.model, linears, config, fracs, evidence, on_done)
    sets = (len(safety), len(utility)) if _reads_answers(config) else (0, 0)
    return make_report(
        config, linears, protected, safety_heads=heads, rows=rows, safety_rows=sets[0], utility_rows=sets[1]
    )


def _allocation(config: PruneConfig) -> Literal["uniform", "sensitivity"]:
    if config.allocation != "auto":
        return config.allocation
    alike = config.pattern != UNSTRUCTURED or dropped_by(config) != "aligned-sparsegpt"
    return "uniform" if alike else "sensitivity"


def _reads_inputs(config: PruneConfig) -> bool:
    return dropped_by(config) in ("wanda", "sparsegpt", "aligned-sparsegpt")


def _reads_answers(config: PruneConfig) -> bool:
    by_answers = ("snip", "combined", "set-difference", "aligned-sparsegpt")
    return config.method in by_answers or config.allocation == "sensitivity"


def _safety_heads(source: SourceModel, prompts: Rows, config: PruneConfig) -> list[Head]:
    """The heads to protect, strongest first."""
    if not config.safety_heads:
        return []
    check_heads(config.safety_heads, query_heads(source.model) * len(block_paths(source.model)))
    scores = head_scores(source.model, prompts, pad_id=source.tokenizer.pad_id, batch_size=BATCH_SIZE)
    return strongest_heads(scores, config.safety_heads)


def _gather(
    source: SourceModel, token_ids: Rows, safety: Rows, utility: Rows, config: PruneConfig, negative: Any
) -> tuple[Rows, Evidence]:
    """Calibration rows and what enters the first block.

    Where the model's own answers are known, they are part of the rows: refusals happen there.
    """
    evidence, rows = Evidence(), token_ids if _reads_inputs(config) else ()
    if _reads_answers(config):
        answers = [
            own_answers(source, prompts, config.response_tokens, BATCH_SIZE)
            for prompts in (safety, utility)
        ]
        push = negative if config.safety_loss == "contrastive" else None
        evidence.safety = answer_batches(source, safety, answers[0], push)
        evidence.utility = answer_batches(source, utility, answers[1])
        if _reads_inputs(config):
            pairs = zip((*safety, *utility), (*answers[0], *answers[1]), strict=True)
            rows = [[*prompt, *answer] for prompt, answer in pairs]
    if dropped_by(config) == "aligned-sparsegpt":  # the same rows pruned and unpruned, token by token
        evidence.stream = evidence.unpruned().stream
    elif rows:
        pad_id = source.tokenizer.pad_id
        evidence.stream = first_block_batches(source.model, rows, pad_id=pad_id, batch_size=BATCH_SIZE)
    return rows, evidence


def _prune(
    model: nn.Module,
    linears: dict[str, nn.Linear],
    config: PruneConfig,
    fracs: dict[str, float],
    evidence: Evidence,
    on_done: OnDone | None,
) -> dict[str, tuple[int, int]]:
    """Module path -> (protected weights, those of them that were dropped)."""
    counts: dict[str, tuple[int, int]] = {}
    for index, path in enumerate(block_paths(model)):
        counts |= _prune_block(model, _inside(path, linears), index, config, fracs, evidence)
        advance(model.get_submodule(path), evidence.stream, index)
        if on_done is not None:
            on_done(1)
    return counts


def _prune_block(
    model: nn.Module,
    inside: dict[str, nn.Linear],
    index: int,
    config: PruneConfig,
    fracs: dict[str, float],
    evidence: Evidence,
) -> dict[str, tuple[int, int]]:
    """As `_prune`, of one block; the answers move on, the calibration rows do not."""
    block = model.get_submodule(block_paths(model)[index])
    protected = block_protected(config, model, inside, index, evidence)
    if dropped_by(config) == "aligned-sparsegpt":
        unpruned = copy.deepcopy(block)
        aims = _Aims(block, unpruned, index, evidence)
        _drop_with_update(inside, config, fracs, protected, aims)
        evidence.advance_answers(unpruned, index)
    elif updates(config):
        evidence.advance_answers(block, index)
        _drop_with_update(inside, config, fracs, protected, _Aims(block, None, index, evidence))
    else:
        scores = block_scores(config, model, inside, index, evidence)
        evidence.advance_answers(block, index)
        for name, module in inside.items():
            _drop(module, choose(config, scores.pop(name), fracs[name], protected.get(name)))
    return {name: _count(inside[name].weight, mask) for name, mask in protected.items()}


@dataclass(frozen=True)
class _Aims:
    """What SparseGPT is to keep of the linears of one block.

    Attributes:
        block: number `index`, being pruned.
        unpruned: a copy from before, for its outputs on the unpruned model's inputs; None for each linear's
            own outputs on the inputs that it has now.
    """

    block: nn.Module
    unpruned: nn.Module | None
    index: int
    evidence: Evidence

    def of(self, name: str, linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
        """Hessian of the inputs, [in, in], float64 without and float32 with what to start from instead."""
        if self.unpruned is None:
            hessian = input_hessian(self.block, linear, self.evidence.stream, self.index)
            check_finite(name, hessian)
            return hessian, None
        pairs = zip(self.block.modules(), self.unpruned.modules(), strict=True)
        (dense,) = (twin for module, twin in pairs if module is linear and isinstance(twin, nn.Linear))
        states = [batch.state for batch in (*self.evidence.safety, *self.evidence.utility)]
        hessian, moment = input_moments(
            Watched(linear, self.block, self.evidence.stream, self.index),
            Watched(dense, self.unpruned, states, self.index),
        )
        check_finite(name, hessian)
        return hessian, dense_target(linear.weight, moment, hessian, DAMP_FRAC)


@torch.no_grad()
def _drop_with_update(
    inside: dict[str, nn.Linear],
    config: PruneConfig,
    fracs: dict[str, float],
    protected: dict[str, Tensor],
    aims: _Aims,
) -> None:
    """One linear after the other, each on what the pruned ones before it in the block let through."""
    for name, module in inside.items():
        hessian, target = aims.of(name, module)
        how: dict[str, Any] = {"pattern": parse_pattern(config.pattern), "protected": protected.get(name)}
        if target is None:
            sparsegpt_(module.weight, hessian, fracs[name], **how)
        else:
            how["row_weights"] = row_weights(config, name, aims.evidence)
            pruned, keep = sparsegpt(module.weight, hessian, fracs[name], target=target, **how)
            module.weight.copy_(refit(pruned, keep, target, hessian, DAMP_FRAC))
        del hessian, target  # before there are the next ones


@torch.no_grad()
def _drop(module: nn.Linear, keep: Tensor) -> None:
    module.weight.masked_fill_(~keep, 0.0)


def _inside(block: str, linears: dict[str, nn.Linear]) -> dict[str, nn.Linear]:
    return {path: module for path, module in linears.items() if path.startswith(f"{block}.")}


def _count(weight: Tensor, protected: Tensor) -> tuple[int, int]:
    return int(protected.sum()), int((protected & (weight == 0)).sum())
