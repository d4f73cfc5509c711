"""Left-padded batches: the convention that the torch reference and the graph are compared under."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def length_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices grouped by length, longest first, `batch_size` a group, for little padding."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Rows of token ids to (ids, mask), both int64 [row, longest]; mask is 0 on the padding."""
    width = max(len(row) for row in rows)
    ids = [[pad_id] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def keep_logits(model: Any, count: int) -> dict[str, int]:
    """`logits_to_keep` for a forward that knows it; OPT and GPT-Neo give all logits: slice the result."""
    known = "logits_to_keep" in inspect.signature(type(model).forward).parameters
    return {"logits_to_keep": count} if known else {}


def positions(mask: Tensor) -> Tensor:
    """Position ids int64 [row, token] counted from the first token that is not padding."""
    return (mask.cumsum(dim=-1) - 1).clamp(min=0)
