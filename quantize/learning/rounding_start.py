"""Learned rounding starts where GPTQ rounds, which is nearer to the aligned model than the nearest code."""

from __future__ import annotations

import torch

from holdfast.exporter.architectures import head_is_tied, row_of
from holdfast.quantize.folding import fold
from holdfast.quantize.learning.learnable import Learnables
from holdfast.quantize.prompts.sequences import Batch, even_rows
from holdfast.quantize.weights.weight_only import gptq_starts


def start_at_gptq(learned: Learnables, batch: Batch, batch_size: int) -> None:
    """Let all roundings that are learned start at GPTQ's, at the channel scales that there are.

    The scales are folded into the model. A weight takes the value that GPTQ makes of it before its own
    errors are carried on, but for a head that is the embedding as well: that has to stay as it is.

    Arguments:
        learned: not attached.
        batch: sequences that the Hessians are made of.

    Raises:
        QuantizationError, CalibrationError: see `weight_only.gptq_codes`.
    """
    wanted = {
        path: linear.form
        for path, linear in learned.linears.items()
        if linear.form is not None and linear.offset is not None
    }
    if not wanted:
        return
    fold(learned)
    learned.scales_are_folded()
    model = learned.model
    tied = {row_of(model).head} if head_is_tied(model) else set()
    batches = [batch.rows(rows) for rows in even_rows(len(batch.ids), batch_size)]
    with torch.no_grad():
        for path, start in gptq_starts(model, batches, wanted, tied).items():
            learned.linears[path].weight.copy_(start.weight)
            learned.linears[path].start_rounding(start.shift)
