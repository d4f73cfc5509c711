"""The record of a recovery: recover.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from holdfast.config import Config
from holdfast.files import write_text
from holdfast.quantize.record import Candidate

RECOVERY_FILE = "recover.json"


class RecoveryRecord(Config, frozen=True):
    """What a recovery did.

    Attributes:
        objective: of `recover.objective`.
        before, after: the model as it was and as it is now, judged on the held-out prompts.
        candidates: everything that was tried; where it started too, which is kept where nothing is better.
        safety_heads: (block, head) of the heads that were restored or trained alone, strongest first.
        restored: module path -> weights that got their old values back.
        zeros_before, zeros_after: zero weights of the decoder blocks' linear layers.
        weights: all weights of these.
        prompts: kind -> [prompts learned from, prompts held out].
        settings: recover section of the recipe, as it was used.
    """

    objective: str
    before: Candidate
    after: Candidate
    candidates: tuple[Candidate, ...]
    zeros_before: int
    zeros_after: int
    weights: int
    seed: int
    safety_heads: tuple[tuple[int, int], ...] = ()
    restored: dict[str, int] = {}
    prompts: dict[str, tuple[int, int]] = {}
    settings: dict[str, Any] = {}

    @property
    def sparsity_frac(self) -> float:
        return self.zeros_after / self.weights if self.weights else 0.0


def write_recovery(record: RecoveryRecord, folder: Path) -> None:
    """Write recover.json."""
    text = msgspec.json.format(msgspec.json.encode(record, order="sorted"), indent=2)
    write_text(folder / RECOVERY_FILE, text.decode("utf-8") + "\n")
