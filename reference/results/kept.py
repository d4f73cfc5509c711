"""Measurements that are kept one by one: one that fails costs no other, and any can be made again."""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

from holdfast.errors import ExecutionError, HoldfastError
from holdfast.progress import say

T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """Why something could not be measured.

    Attributes:
        reason: a sentence.
        expected: one of Holdfast's own errors, not a defect.
    """

    reason: str
    expected: bool


def attempt(name: str, work: Callable[[], T]) -> T | Problem:
    """What `work` returns, or what was in its way; `name` is for the line that says so."""
    try:
        return work()
    except HoldfastError as error:
        problem = Problem(str(error), expected=True)
    except Exception as error:  # a defect in one row must not cost the hours of the others
        traceback.print_exc()
        problem = Problem(f"{type(error).__name__}: {error}", expected=False)
    say(f"      {name} failed: {problem.reason}")
    return problem


def refuse_defects(names: Sequence[str]) -> None:
    """End with an error where measurements had defects.

    Raises:
        ExecutionError: there are such.
    """
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
