"""Work in a process of its own, and what each stage of it took: seconds and resident bytes."""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import ParamSpec, TypeVar

from holdfast.errors import ExecutionError
from holdfast.runtime.memory import PROCESS_STATUS, own_memory

P = ParamSpec("P")
T = TypeVar("T")

RESET_PEAK = Path("/proc/self/clear_refs"), "5"  # proc(5): forget the highest resident size


def in_fresh_process(work: Callable[P, T], *arguments: P.args, **keywords: P.kwargs) -> T:
    """Run `work` in a process that nothing ran in before, and return what it returned.

    The process is forked from one that has only imported `PRELOADED`, so that imports are paid once.

    Raises:
        ExecutionError: the process was killed, by the system for memory for example.
        Exception: whatever `work` raised.
    """
    with ProcessPoolExecutor(max_workers=1, mp_context=_context()) as pool:
        try:
            return pool.submit(work, *arguments, **keywords).result()
        except BrokenProcessPool as error:
            raise ExecutionError(
                "The process of this row ended without a word, most likely for want of memory: run the "
                "same command again with less beside it."
            ) from error


PRELOADED = ("reference.results.measure",)


@cache
def _context() -> BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


@dataclass(frozen=True)
class Stage:
    """One part of the work.

    Attributes:
        peak_bytes: largest resident size of this process during the stage, or of a process that it waited
            for, whichever is larger; None where the system does not tell.
    """

    seconds: float
    peak_bytes: int | None


@dataclass
class Stages:
    """Stages in order, by name."""

    done: dict[str, Stage] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what happens inside, and watch its memory."""
        children = _children_bytes()
        tells = _forget_peak()
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self.done[name] = Stage(seconds, _peak_bytes(children) if tells else None)


def _forget_peak() -> bool:
    """Start the peak at the present size; False where the system does not know how."""
    path, value = RESET_PEAK
    try:
        path.write_text(value, encoding="ascii")
    except OSError:
        return False
    return True


def _peak_bytes(children_before: int) -> int:
    own = own_memory(PROCESS_STATUS.read_text(encoding="ascii")).peak_resident_bytes
    children = _children_bytes()
    return max(own, children) if children > children_before else own


def _children_bytes() -> int:
    """Largest resident size of a process that was waited for; the kernel counts in KiB."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def total_seconds(stages: dict[str, Stage], names: Sequence[str]) -> float:
    """Seconds of some stages together."""
    return sum(stages[name].seconds for name in names if name in stages)


def highest_bytes(stages: dict[str, Stage], names: Sequence[str]) -> int | None:
    """The largest peak of some stages; None where none is known."""
    peaks = [stage.peak_bytes for name, stage in stages.items() if name in names]
    return max((peak for peak in peaks if peak is not None), default=None)
