"""Sequences of unequal length as rectangular batches: left padding, and which go together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

LOGIT_BYTES = 4  # float32


def left_pad(
    sequences: Sequence[Sequence[int]], pad_id: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids and attention mask, both [sequence, longest]; each ends in the last column."""
    longest = max(len(sequence) for sequence in sequences)
    ids = np.full((len(sequences), longest), pad_id, np.int64)
    mask = np.zeros((len(sequences), longest), np.int64)
    for row, sequence in enumerate(sequences):
        ids[row, longest - len(sequence) :] = sequence
        mask[row, longest - len(sequence) :] = 1
    return ids, mask


def batches(
    lengths: Sequence[int], *, batch_size: int, vocabulary_size: int, logits_bytes: int
) -> Iterator[list[int]]:
    """Indices of sequences that run together: neighbours in length, the longest first.

    A decoder graph returns logits for every position. A batch is cut so that they take at most
    `logits_bytes` (one sequence always goes through).
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while order:
        longest_bytes = lengths[order[0]] * vocabulary_size * LOGIT_BYTES
        size = max(1, min(batch_size, logits_bytes // longest_bytes))
        yield order[:size]
        order = order[size:]
