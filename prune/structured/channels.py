"""FFN channels: rows of gate and up (or fc1), columns of down (or fc2)."""

from __future__ import annotations

import math

from torch import Tensor

from holdfast.errors import PruneError
from holdfast.prune.structured.scores import highest


def channels_left(channels: int, removable: int, multiple: int) -> int:
    """How many channels stay when at most `removable` may go.

    Arguments:
        multiple: what their number is a multiple of afterwards, so that kernels and quantization blocks
            fit. The number is rounded up: nothing goes that was not asked to. At least one multiple stays.
    """
    left = max(1, math.ceil((channels - removable) / multiple)) * multiple
    return min(left, channels)


def keep_channels(scores: Tensor, count: int) -> tuple[int, ...]:
    """The `count` channels of one block that stay, ascending.

    Arguments:
        scores: [channel].
    """
    return highest(scores, count)


def require_channels(architecture: str, channels: int, left: int) -> None:
    """Raise PruneError unless a block with `channels` FFN channels can keep `left` of them."""
    if not 1 <= left <= channels:
        raise PruneError(
            f"A block of this {architecture} has {channels} FFN channels and cannot keep {left}: "
            f"keep 1 to {channels}."
        )
