"""Measurements that are kept one by one: one that fails costs no other, and any can be made again."""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from holdfast.errors import ExecutionError, HoldfastError
from holdfast.progress import say

T = TypeVar("T")


class Named(Protocol):
    """Something to be measured."""

    @property
    def slug(self) -> str:
        """Its name in paths and messages."""


K = TypeVar("K", bound=Named)


@dataclass(frozen=True)
class Failed(Generic[K]):
    """A measurement that could not be made.

    Attributes:
        reason: a sentence.
        expected: one of Holdfast's own errors, not a defect.
    """

    task: K
    reason: str
    expected: bool = True


def attempt(task: K, work: Callable[[], T]) -> T | Failed[K]:
    """What `work` returns, or what was in its way, which is said as well."""
    try:
        return work()
    except HoldfastError as error:
        failed = Failed(task, str(error))
    except Exception as error:  # a defect in one row must not cost the hours of the others
        traceback.print_exc()
        failed = Failed(task, f"{type(error).__name__}: {error}", expected=False)
    say(f"      {task.slug} failed: {failed.reason}")
    return failed


def refuse_defects(failed: Iterable[Failed[K]]) -> None:
    """End with an error where measurements had defects.

    Raises:
        ExecutionError: there are such.
    """
    names = [one.task.slug for one in failed if not one.expected]
    if names:
        raise ExecutionError(
            f"{len(names)} rows ended in an error that nobody foresaw: {', '.join(names)}."
        )


def forget(work: Path, pattern: str, places: Sequence[str] = ("rows",)) -> None:
    """Remove finished measurements whose folder is named like `pattern`, to make them again.

    Arguments:
        work: holds a folder for each pair.
        places: of a pair's folder, where measurements are.
    """
    for place in places:
        for folder in sorted(work.glob(f"*/{place}/*")):
            if fnmatchcase(folder.name, pattern):
                shutil.rmtree(folder)
