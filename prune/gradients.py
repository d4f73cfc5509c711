"""Gradients of the loss on answers with respect to one decoder block's weights at a time.

A block is scored before anything in it or after it is pruned, on hidden states that no pruning has touched
either: the gradients are those of the unpruned model, as Wei et al. 2024 (arXiv 2402.05162) take them. For
block i the blocks after it are run forward without a graph, keeping what enters each, and then backward one
at a time, each from what entered it; so the graph is never longer than one block, no gradient of a weight
outside block i is formed, and inside it one linear's at a time. The price is about L/2 forward and backward
passes of an L-block model instead of one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.exporter.architectures import block_paths
from holdfast.exporter.source import SourceModel
from holdfast.exporter.torch_model import TorchLanguageModel
from holdfast.exporter.walk import BlockBatch, first_inputs, logits_from, run_block
from holdfast.prune.scores.snip import add_gradients, answer_losses, contrastive_losses
from holdfast.quantize.learning.losses import References, make_references
from holdfast.quantize.learning.reference_cache import position_logits
from holdfast.quantize.prompts.sequences import Batch, make_batch, with_stop

BATCH_SIZE = 8  # sequences in one graph, where so many fit
KEPT_BYTES = 1 << 25
"""What enters the blocks is kept for the way back: sequences in one graph that take more are fewer."""
TOP_K = 500  # size of S_diff, as in calibration


@dataclass
class AnswerBatch:
    """Prompts with the unpruned model's own answers, on their way through its blocks.

    Attributes:
        batch: left-padded sequences; the loss counts the last `positions` columns where weights are 1.
        targets: int64 [row, positions], the token that follows each of those columns; 0 where none counts.
        references: of the same positions, for the contrastive loss; None for the answers' likelihood.
        state: what enters the next block.
    """

    batch: Batch
    targets: Tensor
    references: References | None
    state: BlockBatch

    def losses(self, logits: Tensor) -> Tensor:
        """The loss of each row in nats, float32 [row]; logits float32 [row, positions, V]."""
        if self.references is None:
            return answer_losses(logits, self.targets, self.batch.weights)
        ids, logp = self.references.diff_ids, self.references.diff_logp
        return contrastive_losses(logits, ids, logp, self.batch.weights)


def own_answers(
    source: SourceModel, prompts: Sequence[Sequence[int]], response_tokens: int, batch_size: int
) -> list[list[int]]:
    """Greedy answers of the model, with the stop token where they ended by themselves; none is empty."""
    model = TorchLanguageModel(source.model, source.tokenizer, "aligned", batch_size)
    answers = model.generate(prompts, max_new_tokens=response_tokens)
    return [with_stop(answer, response_tokens, source.tokenizer.eos_ids[0]) for answer in answers]


def answer_batches(
    source: SourceModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    negative: Any = None,
) -> list[AnswerBatch]:
    """The sequences before the first block, in batches of similar length.

    Arguments:
        prompts, answers: token ids, none empty.
        negative: unaligned transformers model for the contrastive loss; None for the answers' likelihood.
    """
    lengths = [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    batches = []
    while order:
        rows = _graph_rows(source.model, lengths[order[0]])
        chosen, order = order[:rows], order[rows:]
        picked = [answers[index] for index in chosen]
        batch = make_batch(
            [prompts[index] for index in chosen],
            picked,
            pad_id=source.tokenizer.pad_id,
            response_tokens=max(map(len, picked)),
            first_weight=1.0,
        )
        references = None if negative is None else _references(source.model, negative, batch)
        state = first_inputs(source.model, batch.inputs())
        batches.append(AnswerBatch(batch, _targets(picked, batch.positions), references, state))
    return batches


def mean_gradients(
    model: nn.Module, linears: Mapping[str, nn.Linear], batches: Sequence[AnswerBatch], index: int
) -> dict[str, Tensor]:
    """E|dL/dW| over sequences of every linear in block `index`, float32 [out, in].

    Arguments:
        linears: name -> linear inside the block.
        batches: as they enter the block; they are left there.
    """
    totals = {name: torch.zeros_like(module.weight) for name, module in linears.items()}
    watched = [(linears[name], partial(add_gradients, total)) for name, total in totals.items()]
    for batch in batches:
        _backward(model, batch, index, watched)
    rows = sum(len(batch.targets) for batch in batches)
    return {name: total.div_(rows) for name, total in totals.items()}


def output_importances(
    model: nn.Module, linears: Mapping[str, nn.Linear], batches: Sequence[AnswerBatch]
) -> dict[str, Tensor]:
    """What an error in a linear's output costs the answers, to second order, of every linear at once.

    The mean of (dL/dy)^2 over tokens, for each output channel. Half of it, times the channel's squared
    error, is the change of the loss by the diagonal of its empirical Fisher matrix.

    Arguments:
        linears: name -> linear inside any block.
        batches: before the first block; they are left there.

    Returns:
        name -> float32 [out], nats^2 per squared unit of output.
    """
    sums = {name: torch.zeros(module.out_features, dtype=torch.float64) for name, module in linears.items()}
    watched = [(linears[name], partial(_add_squared, total)) for name, total in sums.items()]
    for batch in batches:
        _backward(model, batch, 0, watched)
    tokens = sum(int(batch.batch.mask.sum()) for batch in batches)
    return {name: (total / tokens).float() for name, total in sums.items()}


def _add_squared(total: Tensor, values: Tensor, gradients: Tensor) -> None:
    total += gradients.square().sum(dim=(0, 1), dtype=torch.float64)  # 0 at padding


Collect = Callable[[Tensor, Tensor], None]
"""Takes a linear's input and the gradient of its output, float32 [row, token, in] and [row, token, out]."""


def _backward(
    model: nn.Module, answers: AnswerBatch, index: int, watched: Sequence[tuple[nn.Linear, Collect]]
) -> None:
    """One batch forward from block `index` and back to it, past the watched linears of these blocks."""
    blocks = [model.get_submodule(path) for path in block_paths(model)]
    entering = [answers.state.hidden]
    with torch.no_grad():
        for number in range(index, len(blocks)):
            entering.append(run_block(blocks[number], entering[-1], answers.state.arguments[number]))
    last = entering.pop().requires_grad_()
    logits = logits_from(model, answers.batch.inputs(), last, answers.batch.positions)
    (gradient,) = torch.autograd.grad(answers.losses(logits).sum(), last)
    with ExitStack() as hooks:
        for linear, collect in watched:
            handle = linear.register_forward_hook(partial(_watch, collect, last.shape[:2]))
            hooks.callback(handle.remove)
        for number in reversed(range(index, len(blocks))):
            hidden = entering.pop().detach().requires_grad_()
            output = run_block(blocks[number], hidden, answers.state.arguments[number])
            (gradient,) = torch.autograd.grad(output, hidden, gradient)


def _watch(
    collect: Collect, shape: torch.Size, linear: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor
) -> None:
    """Hand the linear's input and its output's gradient over as soon as that is known."""
    values = inputs[0].detach().reshape(*shape, -1)
    output.register_hook(lambda gradient: collect(values, gradient.reshape(*shape, -1)))  # type: ignore[no-untyped-call]


def _graph_rows(model: Any, tokens: int) -> int:
    """Sequences of so many tokens in one graph."""
    kept = 4 * tokens * int(model.config.hidden_size) * len(block_paths(model))
    return max(1, min(BATCH_SIZE, KEPT_BYTES // kept))


def _references(model: Any, negative: Any, batch: Batch) -> References:
    return make_references(position_logits(model, batch), position_logits(negative, batch), TOP_K)


def _targets(answers: Sequence[Sequence[int]], positions: int) -> Tensor:
    """int64 [row, positions], aligned at the right."""
    targets = torch.zeros(len(answers), positions, dtype=torch.int64)
    for row, answer in enumerate(answers):
        targets[row, -len(answer) :] = torch.tensor(answer)
    return targets
