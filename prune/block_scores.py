"""Scores and protected weights of one decoder block, by the recipe's method.

What is in memory at once, beside the model: the gradients of one set of prompts as float32, the size of the
block, and the finished score of the other as float16, half of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from holdfast.exporter.architectures import block_paths
from holdfast.exporter.walk import BlockBatch, advance
from holdfast.prune.activations import input_norms
from holdfast.prune.checks import check_finite
from holdfast.prune.gradients import AnswerBatch, mean_gradients
from holdfast.prune.heads import attention_output, attention_output_path, query_heads
from holdfast.prune.masks import keep_highest, keep_pattern, parse_pattern
from holdfast.prune.scores.combined import combined_scores, normalised
from holdfast.prune.scores.magnitude import magnitude_scores
from holdfast.prune.scores.set_difference import top
from holdfast.prune.scores.ships import Head, head_channels
from holdfast.prune.scores.snip import snip_scores
from holdfast.prune.scores.wanda import wanda_scores
from holdfast.recipe import PruneConfig

ROW_WISE = ("wanda", "set-difference")  # by inputs: rows do not compare with each other

Linears = Mapping[str, nn.Linear]


@dataclass
class Evidence:
    """What the next block is scored on.

    Attributes:
        stream: calibration rows as they come out of the pruned blocks before; empty where no method asks.
        safety, utility: answers to harmful prompts and to the others, as they come out of the same blocks
            before these were pruned; empty where no method asks.
        heads: attention heads whose part of the attention's output is protected.
        importances: module path -> what errors of its output channels cost the answers, float32 [out]; see
            `output_importances`. Empty where nothing asks.
    """

    stream: list[BlockBatch] = field(default_factory=list)
    safety: list[AnswerBatch] = field(default_factory=list)
    utility: list[AnswerBatch] = field(default_factory=list)
    heads: Sequence[Head] = ()
    importances: dict[str, Tensor] = field(default_factory=dict)

    def unpruned(self) -> Evidence:
        """A walk of its own through the unpruned model, with the answers as calibration rows."""
        safety, utility = (
            [replace(batch, state=replace(batch.state)) for batch in batches]
            for batches in (self.safety, self.utility)
        )
        stream = [batch.state for batch in (*safety, *utility)]
        return Evidence(stream, safety, utility, self.heads, self.importances)

    def advance_answers(self, block: nn.Module, index: int) -> None:
        """Past `block`, which is number `index` and not pruned yet."""
        advance(block, [batch.state for batch in (*self.safety, *self.utility)], index)


def block_scores(
    config: PruneConfig, model: nn.Module, linears: Linears, index: int, evidence: Evidence
) -> dict[str, Tensor]:
    """The score of every weight by the method, float32 [out, in]; SparseGPT's by Wanda.

    Arguments:
        linears: module path -> linear inside block `index`.

    Raises:
        PruneError: inputs that are not finite.
    """
    if config.method == "magnitude":
        return {path: magnitude_scores(module.weight) for path, module in linears.items()}
    if config.method == "snip":
        return snip_of(model, linears, index, [*evidence.safety, *evidence.utility])
    if config.method == "combined":
        return _combined(config, model, linears, index, evidence)
    block = model.get_submodule(block_paths(model)[index])
    norms = input_norms(block, linears, evidence.stream, index)
    for path, values in norms.items():
        check_finite(path, values)
    return {path: wanda_scores(module.weight, norms[path]) for path, module in linears.items()}


def block_protected(
    config: PruneConfig, model: nn.Module, linears: Linears, index: int, evidence: Evidence
) -> dict[str, Tensor]:
    """Module path -> what is to be dropped last, bool [out, in], where there is any."""
    found: dict[str, Tensor] = {}
    if config.method == "set-difference":
        found = _critical(config, model, linears, index, evidence)
    heads = [head for block, head in evidence.heads if block == index]
    if heads:
        path, output = attention_output_path(model, index), attention_output(model, index)
        shielded = found.get(path, torch.zeros_like(output.weight, dtype=torch.bool))
        for head in heads:
            shielded[:, head_channels(head, query_heads(model), output.in_features)] = True
        found[path] = shielded
    return found


def dropped_by(config: PruneConfig) -> str:
    """The method that decides on weights that nothing protects."""
    return config.rest if config.method == "set-difference" else config.method


def updates(config: PruneConfig) -> bool:
    """Whether SparseGPT drops the weights, and changes those that stay."""
    return dropped_by(config) in ("sparsegpt", "aligned-sparsegpt")


def row_weights(config: PruneConfig, path: str, evidence: Evidence) -> Tensor | None:
    """What a layer's rows count in the choice of its mask, float32 [out]; None where all count the same.

    Half by the answers and half alike: the importances are estimates from a few hundred answers.
    """
    if dropped_by(config) != "aligned-sparsegpt":
        return None
    values = evidence.importances[path]
    return 1.0 + values / values.mean().clamp_min(torch.finfo(values.dtype).tiny)


def choose(config: PruneConfig, scores: Tensor, sparsity_frac: float, protected: Tensor | None) -> Tensor:
    """Mask of what stays of one linear, bool [out, in]."""
    pattern = parse_pattern(config.pattern)
    if pattern is not None:
        return keep_pattern(scores, pattern, protected)
    if config.method in ROW_WISE:
        return keep_highest(scores, sparsity_frac, protected)
    flat = None if protected is None else protected.reshape(1, -1)
    return keep_highest(scores.reshape(1, -1), sparsity_frac, flat).reshape(scores.shape)


def snip_of(
    model: nn.Module, linears: Linears, index: int, batches: Sequence[AnswerBatch]
) -> dict[str, Tensor]:
    """SNIP scores of a block's linears, float32 [out, in]."""
    found = mean_gradients(model, linears, batches, index)
    for path, module in linears.items():  # one by one in place, so that one block's size is enough
        check_finite(path, found[path], what="gradients")
        found[path] = snip_scores(module.weight, found[path])
    return found


def _combined(
    config: PruneConfig, model: nn.Module, linears: Linears, index: int, evidence: Evidence
) -> dict[str, Tensor]:
    safety = _halved(snip_of(model, linears, index, evidence.safety))
    found = snip_of(model, linears, index, evidence.utility)
    for path in found:
        found[path] = combined_scores(found[path], safety.pop(path), config.safety_weight)
    return found


def _critical(
    config: PruneConfig, model: nn.Module, linears: Linears, index: int, evidence: Evidence
) -> dict[str, Tensor]:
    safety = snip_of(model, linears, index, evidence.safety)
    # masks before the second set of gradients, so that the scores of both are never in memory together
    found = {path: top(safety.pop(path), config.safety_top_frac) for path in linears}
    utility = snip_of(model, linears, index, evidence.utility)
    for path, mask in found.items():
        mask &= ~top(utility.pop(path), config.utility_top_frac)
    return found


def _halved(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scores over their layer's mean as float16; what does not fit is at the largest."""
    largest = torch.finfo(torch.float16).max
    return {path: normalised(scores.pop(path)).clamp_(max=largest).half() for path in list(scores)}
