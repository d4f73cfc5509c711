"""Resumable steps: each writes one folder, appears whole or not at all, and is reused by content.

A step's key is everything its result depends on: its settings, the versions that do the work and
the keys of the steps before it. The finished folder carries the key; the same key is the same work.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.errors import InterruptedRun
from holdfast.files import atomic_folder, sha256_text, to_json, write_json
from holdfast.progress import say

STEP_FILE = "step.json"

Work = Callable[[Path], dict[str, Any]]
"""Fills a fresh folder and returns what the manifest says about the result (JSON types)."""


@dataclass(frozen=True)
class StepResult:
    """A finished step: where it lies, what it says, and the key that later steps build on."""

    name: str
    folder: Path
    key: str
    settings: dict[str, Any]
    result: dict[str, Any]
    resumed: bool
    wall_s: float


@dataclass
class StepRunner:
    """Runs steps below one work folder, in order, keeping what is already there.

    Attributes:
        work: folder that holds one folder a step.
        total: number of steps, for the progress lines.
    """

    work: Path
    total: int
    done: list[StepResult] = field(default_factory=list)

    def run(self, name: str, settings: dict[str, Any], inputs: list[str], work: Work) -> StepResult:
        """Do the step, or take its finished folder when the key is the same.

        Arguments:
            name: name of the step and of its folder.
            settings: what decides the result beside the inputs; goes into the manifest.
            inputs: keys of what the step reads.
            work: fills the step's folder.

        Raises:
            InterruptedRun: on Ctrl-C; finished steps stay.
        """
        key = sha256_text(to_json({"name": name, "settings": settings, "inputs": inputs}))
        folder = self.work / name
        label = f"[{len(self.done) + 1}/{self.total}] {name}"
        record = _finished(folder, key)
        started = time.perf_counter()
        resumed = record is not None
        if record is None:
            say(label)
            record = self._work(name, folder, key, work)
        wall_s = time.perf_counter() - started
        say(f"{label}: " + ("kept from an earlier run" if resumed else f"done in {wall_s:.1f} s"))
        step = StepResult(name, folder, key, settings, record, resumed, wall_s)
        self.done.append(step)
        return step

    def _work(self, name: str, folder: Path, key: str, work: Work) -> dict[str, Any]:
        try:
            with atomic_folder(folder, overwrite=True) as fresh:
                result = work(fresh)
                write_json(fresh / STEP_FILE, {"key": key, "result": result})
        except KeyboardInterrupt:
            raise InterruptedRun(
                f"Interrupted in step {name}: finished steps are kept in {self.work}; run the same "
                "command again to go on from there."
            ) from None
        return result

    def folder(self, name: str) -> Path:
        """Folder of a step that is done."""
        return self._step(name).folder

    def key(self, name: str) -> str:
        """Key of a step that is done."""
        return self._step(name).key

    def _step(self, name: str) -> StepResult:
        return next(step for step in self.done if step.name == name)

    def clean(self) -> None:
        """Remove the work folder."""
        shutil.rmtree(self.work, ignore_errors=True)


def _finished(folder: Path, key: str) -> dict[str, Any] | None:
    """The record of a finished step with this key, if there is one."""
    try:
        record = json.loads((folder / STEP_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record["result"] if record.get("key") == key else None
