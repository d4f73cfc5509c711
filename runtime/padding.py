"""Sequences of unequal length as rectangular batches: left padding, and which go together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray


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
    lengths: Sequence[int],
    *,
    batch_size: int,
    row_bytes: Callable[[int], int],
    run_bytes: int,
    equal_beyond: int | None = None,
) -> Iterator[list[int]]:
    """Indices of sequences that run together: neighbours in length, the longest first.

    Arguments:
        row_bytes: what a run needs for one sequence padded to a length.
        run_bytes: what a run may need. One sequence always goes through.
        equal_beyond: a batch with a sequence longer than this holds sequences of that one length.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while order:
        longest = lengths[order[0]]
        size = max(1, min(batch_size, run_bytes // max(1, row_bytes(longest))))
        batch = order[:size]
        if equal_beyond is not None and longest > equal_beyond:
            batch = [index for index in batch if lengths[index] == longest]
        yield batch
        order = order[len(batch) :]
