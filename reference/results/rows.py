"""What is measured: one row a quantizer, grouped by scheme, as sections of a recipe."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from holdfast.errors import UsageError

Maker = Literal["recipe", "nncf", "allocation"]
Goal = Literal["gate", "line"]
Allocated = Literal["none", "sensitivity", "random", "last layers"]

OURS = "ours"
KL_ONLY = "KL only"
PAPER = "the paper's loss"
SMOOTHQUANT = "SmoothQuant"
MINMAX = "min-max"
RTN = "RTN"
ALLOCATED = "ours, bits allocated"
OUR_ROWS = (OURS, ALLOCATED)
REPEATED = (SMOOTHQUANT, KL_ONLY, OURS)


@dataclass(frozen=True)
class Row:
    """One quantizer.

    Attributes:
        name: unique in its group.
        quantize, calibrate: sections of the recipe; what is missing has its default.
        maker: `recipe`: Holdfast; `nncf`: NNCF's accuracy control; `allocation`: Holdfast, with the bits of
            each linear chosen within the bytes that `quantize` takes.
        allocation: which allocation a row of that maker takes.
        schemes: what it chooses among.
    """

    name: str
    quantize: dict[str, Any]
    calibrate: dict[str, Any]
    maker: Maker = "recipe"
    allocation: Allocated = "none"
    schemes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """Rows of one scheme; all of them store the same number of bytes but for what their row says.

    Attributes:
        key: short name, used in folders and on the command line.
        goal: `gate`: the gate has to pass at the margin; `line`: ours has to stay near full precision where
            min-max and SmoothQuant no longer do.
        repeated: whether `REPEATED` rows are measured with several seeds.
    """

    key: str
    title: str
    goal: Goal
    rows: tuple[Row, ...]
    repeated: bool = False

    def row(self, name: str) -> Row | None:
        """The row of that name, where the group has it."""
        return next((row for row in self.rows if row.name == name), None)


@dataclass(frozen=True)
class Task:
    """One measurement: a row of a group with a seed."""

    group: Group
    row: Row
    seed: int

    @property
    def slug(self) -> str:
        """Name of its folder."""
        name = re.sub(r"[^a-z0-9]+", "-", self.row.name.lower()).strip("-")
        return f"{self.group.key}--{name}" + (f"--seed-{self.seed}" if self.seed else "")


LEARNED: dict[str, dict[str, Any]] = {
    KL_ONLY: {"loss": "kl"},
    PAPER: {"loss": "apc", "alphas": [0.75]},
    OURS: {},
}
"""Rows that learn end to end: calibrate sections."""


def learned(quantize: dict[str, Any], names: Sequence[str] = tuple(LEARNED)) -> tuple[Row, ...]:
    """Plain KL, the paper's loss and ours, alike but for the loss."""
    return tuple(Row(name, quantize, LEARNED[name]) for name in names)


def calibrated(quantize: dict[str, Any], names: Sequence[str]) -> tuple[Row, ...]:
    """ONNX Runtime's calibrators: static ranges from the activations seen, weights rounded to nearest."""
    return tuple(
        Row(name, quantize | {"ranges": name.replace("-", "")}, {"method": "rtn"}) for name in names
    )


def smoothquant(quantize: dict[str, Any]) -> Row:
    """Folded channel scales, min-max ranges: one strength for all layers."""
    return Row(SMOOTHQUANT, quantize, {"method": "smoothquant"})


def static(
    scheme: str,
    calibrators: Sequence[str] = (MINMAX,),
    names: Sequence[str] = tuple(LEARNED),
    mixed: dict[str, str] | None = None,
) -> tuple[Row, ...]:
    """The rows that every static scheme has."""
    quantize: dict[str, Any] = {"scheme": scheme} | ({"mixed": mixed} if mixed else {})
    return (*calibrated(quantize, calibrators), smoothquant(quantize), *learned(quantize, names))


def weight_only(quantize: dict[str, Any], names: Sequence[str] = tuple(LEARNED)) -> tuple[Row, ...]:
    """The rows that every weight-only scheme has."""
    peers = tuple(Row(name, quantize, {"method": name.lower()}) for name in (RTN, "HQQ", "GPTQ", "AWQ"))
    return (*peers, *learned(quantize, names))


ALLOCATIONS: dict[str, Allocated] = {
    ALLOCATED: "sensitivity",
    "ours, bits at random": "random",
    "ours, bits to the last layers": "last layers",
}


def allocated(
    quantize: dict[str, Any], schemes: Sequence[str], names: Sequence[str] = (ALLOCATED,)
) -> tuple[Row, ...]:
    """Ours with the bits of each linear chosen among `schemes`, in the bytes that `quantize` takes."""
    return tuple(
        Row(name, quantize, {}, maker="allocation", allocation=ALLOCATIONS[name], schemes=tuple(schemes))
        for name in names
    )


def inc(scheme: str, method: str, name: str) -> Row:
    """A row of Intel Neural Compressor."""
    return Row(name, {"scheme": scheme, "backend": "inc"}, {"method": method})


BRIEF = (KL_ONLY, OURS)
CALIBRATORS = (MINMAX, "percentile", "entropy", "mse")
WEIGHTS = ("w2", "w4", "w8")
STATIC = ("w2a8", "w4a8", "w8a8")
HALF = {"scheme": "w4", "mixed": {"*.mlp.*": "w2"}}  # 4 bits in attention and head, 2 in the MLPs

GROUPS: tuple[Group, ...] = (
    Group(
        "w8a8",
        "W8A8 static",
        "gate",
        (
            *static("w8a8", CALIBRATORS),
            inc("w8a8", "rtn", "INC static"),
            inc("w8a8", "smoothquant", "INC SmoothQuant"),
            Row("NNCF accuracy control", {"scheme": "w8a8"}, {}, maker="nncf"),
        ),
    ),
    Group(
        "w4",
        "W4 in blocks of 32",
        "gate",
        (*weight_only({"scheme": "w4"}), *allocated({"scheme": "w4"}, WEIGHTS)),
    ),
    Group("w8a4", "W8A4 static", "line", static("w8a4", CALIBRATORS)),
    Group("w8a3", "W8A3 static", "line", static("w8a3"), repeated=True),
    Group(
        "w8a3-down-a2",
        "W8A3 static, 2 bits into the MLPs' second linear",
        "line",
        static("w8a3", names=BRIEF, mixed={"*.down_proj": "w8a2"}),
        repeated=True,
    ),
    Group("w8a2", "W8A2 static", "line", static("w8a2", names=BRIEF), repeated=True),
    Group(
        "w4a8",
        "W4A8 static",
        "line",
        (*static("w4a8", CALIBRATORS), *allocated({"scheme": "w4a8"}, STATIC)),
    ),
    Group("w4a4", "W4A4 static", "line", static("w4a4", names=BRIEF)),
    Group(
        "w3",
        "W3: 4 bits, and 2 in the MLPs",
        "line",
        (*weight_only(HALF), *allocated(HALF, WEIGHTS, tuple(ALLOCATIONS))),
    ),
    Group("w2", "W2 in blocks of 32", "line", weight_only({"scheme": "w2"}, BRIEF), repeated=True),
)


def tasks(groups: Sequence[Group], *, seeds: int, rows: str = "*") -> list[Task]:
    """Every measurement, in order.

    Arguments:
        seeds: how many the `REPEATED` rows of repeated groups get: 0, 1, ...
        rows: shell pattern of row names.

    Raises:
        UsageError: no row is left.
    """
    found = [
        Task(group, row, seed)
        for group in groups
        for row in group.rows
        if fnmatchcase(row.name, rows)
        for seed in range(seeds if group.repeated and row.name in REPEATED else 1)
    ]
    if not found:
        raise UsageError(f"No row is named like {rows!r}: the names are in reference/results/rows.py.")
    return found


def chosen_groups(keys: Sequence[str]) -> list[Group]:
    """The groups with these keys, all of them where none is named.

    Raises:
        UsageError: there is no such group.
    """
    known = {group.key: group for group in GROUPS}
    unknown = [key for key in keys if key not in known]
    if unknown:
        raise UsageError(f"There is no group {unknown[0]!r}: expected some of {', '.join(known)}.")
    return [known[key] for key in keys] if keys else list(GROUPS)
