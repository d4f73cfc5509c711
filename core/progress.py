"""Progress on stderr: one line a step, one bar where it takes longer, no bars without a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

OnDone = Callable[[int], None]
"""Told how many units of work were just finished."""


def say(line: str) -> None:
    """A line for the person who waits; stdout stays free for results."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def bar(label: str, total: int, unit: str = "prompt") -> Iterator[OnDone]:
    """A progress bar on stderr, drawn only on a terminal and removed when done."""
    with tqdm(
        total=total, desc=f"      {label}", unit=unit, leave=False, disable=not sys.stderr.isatty()
    ) as progress:
        yield lambda done: _update(progress, done)


def _update(progress: tqdm[Any], done: int) -> None:
    progress.update(done)
