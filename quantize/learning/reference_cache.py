"""Reference probabilities, computed once and kept: the reference models are not needed afterwards."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from holdfast.errors import VocabularyMismatchError
from holdfast.exporter.batching import keep_logits
from holdfast.quantize.learning.losses import References, make_references
from holdfast.quantize.prompts.sequences import Batch, even_rows


def cache_references(
    aligned: Any, negative: Any, batch: Batch, *, top_k: int, batch_size: int
) -> References:
    """S_top, S_diff and their probabilities at the loss positions of every sequence.

    Arguments:
        aligned, negative: transformers models with the same width of logits.
        batch: all sequences.
        top_k: size of both sets; 2K ids (int32) and 2K log-probabilities (float32) a position.

    Returns:
        References with leading axes [sequences, positions], aligned at the right as `batch` is.

    Raises:
        VocabularyMismatchError: the models' logits differ in width.
    """
    widths = aligned.config.vocab_size, negative.config.vocab_size
    if widths[0] != widths[1]:
        raise VocabularyMismatchError(
            f"The aligned model gives {widths[0]} logits and the unaligned one {widths[1]}: "
            "use the parent that the aligned model was trained from."
        )
    parts = []
    for rows in even_rows(len(batch.ids), batch_size):
        part = Batch(batch.ids[rows], batch.mask[rows], batch.weights[rows])
        references = make_references(position_logits(aligned, part), position_logits(negative, part), top_k)
        parts.append(_narrow(references))
    return References(
        **{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(References)}
    )


@torch.no_grad()
def position_logits(model: Any, batch: Batch) -> Tensor:
    """Logits at the loss positions, float32 [batch, positions, V], without gradients."""
    return forward_logits(model, batch)


def forward_logits(model: Any, batch: Batch) -> Tensor:
    """Logits at the loss positions, float32 [batch, positions, V]."""
    output = model(**batch.inputs(), use_cache=False, **keep_logits(model, batch.positions))
    logits: Tensor = output.logits[:, -batch.positions :]
    return logits


def _narrow(references: References) -> References:
    """Ids as int32: half the memory, and vocabularies are far below 2^31."""
    return References(
        references.top_ids.int(),
        references.top_logp,
        references.diff_ids.int(),
        references.diff_logp,
        references.diff_floor,
    )
