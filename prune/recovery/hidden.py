"""Distillation of hidden states: what every decoder block gives, next to what the aligned model's gives.

A few hundred prompts have few answer tokens; hidden states say for every token of every prompt what the
aligned model makes of it (Romero et al. 2015, arXiv 1412.6550; Jiao et al. 2020, arXiv 1909.10351). Pruned
models keep their hidden size, so that no projection is between the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.exporter.architectures import block_paths
from holdfast.quantize.learning.qat import Objective
from holdfast.quantize.prompts.sequences import Batch


def hidden_loss(wanted: Sequence[Tensor], found: Sequence[Tensor], shown: Tensor) -> Tensor:
    """Mean over blocks of the squared error over the aligned model's mean square, a float32 scalar.

    Arguments:
        wanted, found: of each block, float32 [row, token, hidden]. With blocks removed there are fewer of
            `found`, and the last ones are compared.
        shown: bool [row, token], what is no padding.
    """
    count = len(found)
    pairs = zip(wanted, found, strict=True) if len(wanted) == count else ((wanted[-1], found[-1]),)
    errors = [
        (right[shown] - left[shown]).square().mean() / left[shown].square().mean() for left, right in pairs
    ]
    return torch.stack(errors).mean()


def with_hidden(objective: Objective, model: Any, aligned: Any, batch: Batch, weight: float) -> Objective:
    """An objective with `weight` times the hidden loss added; both read the same sequences.

    Arguments:
        model, aligned: transformers models, trained and reference.
        batch: all sequences. What the objective runs the model on first has to be the given rows of it.
    """

    def combined(rows: Tensor, alpha: float) -> Tensor:
        part = batch.rows(rows)
        with torch.no_grad(), block_outputs(aligned) as wanted:
            aligned.base_model(**part.inputs(), use_cache=False)
        with block_outputs(model) as found:
            loss = objective(rows, alpha)
        first = found[: len(block_paths(model))]
        return loss + weight * hidden_loss(wanted, first, part.mask.bool())

    return combined


@contextmanager
def block_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """What the decoder blocks give, float32 [row, token, hidden], in the order in which they run."""
    found: list[Tensor] = []

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        found.append(output if isinstance(output, Tensor) else output[0])

    with ExitStack() as hooks:
        for path in block_paths(model):
            hooks.callback(model.get_submodule(path).register_forward_hook(hook).remove)
        yield found
