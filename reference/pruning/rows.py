"""What is measured: one row a recipe, in groups that become sections of the page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from holdfast.errors import UsageError

Recovery = Literal["none", "contrastive", "other"]
"""`contrastive`: as `RecoverConfig` has it by default; `other`: any other setting."""


@dataclass(frozen=True)
class Score:
    """One way to choose the weights that go.

    Attributes:
        prune: section of the recipe, without a sparsity.
        repeated: whether it is measured with several calibration draws; magnitude reads none.
    """

    name: str
    prune: dict[str, Any]
    repeated: bool = False


MAGNITUDE, WANDA, SPARSEGPT, SET_DIFFERENCE = "magnitude", "wanda", "sparsegpt", "set-difference"
SCORES = (
    Score(MAGNITUDE, {"method": "magnitude"}),
    Score(WANDA, {"method": "wanda"}, repeated=True),
    Score(SPARSEGPT, {"method": "sparsegpt"}, repeated=True),
    Score("snip", {"method": "snip"}),
    Score("combined", {"method": "combined"}),
    Score(SET_DIFFERENCE, {"method": "set-difference"}, repeated=True),
    Score("aligned-sparsegpt", {"method": "aligned-sparsegpt"}, repeated=True),
)
OURS = "aligned-sparsegpt"
"""The alignment-aware score that the goals are about."""

SPARSITIES = (0.2, 0.4, 0.5, 0.6, 0.7)
RECOVERED = (0.5, 0.6, 0.7)  # ours at all of SPARSITIES
REPEATED = (0.5, 0.7)
HALF = 0.5
QUARTER = 0.25
DEFAULT: dict[str, Any] = {}  # RecoverConfig as it is


@dataclass(frozen=True)
class Row:
    """One pruned model.

    Attributes:
        name: unique in its group.
        kind: what it is compared within and which line of a plot it is on: the score, or the structures.
        sparsity_frac: asked for.
        prune: section of the recipe.
        recover: section of the recipe; None leaves the model as pruning left it.
        quantize: section of the recipe; the scheme `none` leaves the answers to torch.
        calibrate: section of the recipe: which prompts are drawn, and how a quantized model is calibrated.
        repeated: whether it is measured with several seeds.
        second: whether it is measured on the second pair too.
        model: folder of the models; rows that are pruned alike, and recovered alike where at all, share it.
        pruned_as: folder of models whose pruned one this row starts from too, where it is there.
    """

    name: str
    kind: str
    sparsity_frac: float
    prune: dict[str, Any]
    recover: dict[str, Any] | None = None
    quantize: dict[str, Any] = field(default_factory=lambda: {"scheme": "none"})
    calibrate: dict[str, Any] = field(default_factory=dict)
    repeated: bool = False
    second: bool = False
    model: str = ""
    pruned_as: str = ""

    @property
    def recovery(self) -> Recovery:
        if self.recover is None:
            return "none"
        return "contrastive" if self.recover == DEFAULT else "other"

    @property
    def quantized(self) -> bool:
        scheme: str = self.quantize["scheme"]
        return scheme != "none"


@dataclass(frozen=True)
class Group:
    """Rows of one section.

    Attributes:
        key: short name, used in folders and on the command line.
        note: what a reader has to know about it.
    """

    key: str
    title: str
    rows: tuple[Row, ...]
    note: str = ""


@dataclass(frozen=True)
class Task:
    """One measurement: a row of a group with a seed."""

    group: Group
    row: Row
    seed: int

    @property
    def slug(self) -> str:
        """Name of its folder."""
        return _slug(f"{self.group.key}--{slug(self.row.name)}", self.seed)

    @property
    def model(self) -> str:
        """Name of the folder of its models."""
        return _slug(self.row.model or slug(self.row.name), self.seed)

    @property
    def pruned_as(self) -> str:
        """Name of the folder of models to take the pruned one from; empty for none."""
        return self.row.pruned_as and _slug(self.row.pruned_as, self.seed)

    def sections(self) -> dict[str, Any]:
        """Of the recipe."""
        row = self.row
        found = {"prune": row.prune, "calibrate": row.calibrate, "quantize": row.quantize}
        return found if row.recover is None else found | {"recover": row.recover}


def slug(name: str) -> str:
    """A name as part of a path."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _slug(name: str, seed: int) -> str:
    return name + (f"--seed-{seed}" if seed else "")


def percent(frac: float) -> str:
    return f"{100 * frac:g} %"


# --- zeros ------------------------------------------------------------------------------------


def zeros(score: Score, frac: float, recover: dict[str, Any] | None = None) -> Row:
    """A share of the weights set to zero."""
    recovered = recover is not None
    return Row(
        name=f"{score.name} {percent(frac)}",
        kind=score.name,
        sparsity_frac=frac,
        prune={**score.prune, "sparsity_frac": frac},
        recover=recover,
        repeated=frac in REPEATED and (score.name == OURS if recovered else score.repeated),
        second=frac == HALF,
        model=slug(f"{score.name} {percent(frac)}"),
    )


def pattern(score: Score, name: str) -> Row:
    """Half of the weights set to zero, so many of each few neighbours."""
    return Row(
        name=f"{score.name} {name}",
        kind=score.name,
        sparsity_frac=HALF,
        prune={**score.prune, "pattern": name},
    )


def score_of(name: str) -> Score:
    """The score of that name."""
    return next(score for score in SCORES if score.name == name)


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dpo": ({}, {"objective": "dpo"}),
    "safety heads": ({}, {"objective": "safety-heads"}),
    "LoRA of rank 8": ({}, {"lora_rank": 8}),
    "3 rounds": ({"rounds": 3}, DEFAULT),
}
"""Other ways to recover ours: changes of the sections `prune` and `recover`."""


def variants(frac: float) -> tuple[Row, ...]:
    """Ours, recovered in other ways."""
    ours = score_of(OURS)
    return tuple(
        Row(
            name=f"{OURS} {percent(frac)}, {name}",
            kind=f"{OURS}, {name}",
            sparsity_frac=frac,
            prune={**ours.prune, "sparsity_frac": frac, **prune},
            recover=recover,
            pruned_as="" if prune else zeros(ours, frac).model,
        )
        for name, (prune, recover) in VARIANTS.items()
    )


# --- structures -------------------------------------------------------------------------------

BOTH = "heads and channels"
STRUCTURES: dict[str, tuple[list[str], tuple[float, ...]]] = {
    BOTH: (["heads", "channels"], (0.1, QUARTER, 0.4)),
    "channels": (["channels"], (QUARTER,)),
    "heads": (["heads"], (0.067,)),  # a quarter of the heads; a quarter of the weights is more than all
    "blocks": (["blocks"], (0.2,)),  # one of five
}
"""Structures that go -> kinds, and shares of the decoder blocks' weights."""


def structured(kind: str, frac: float, recover: dict[str, Any] | None = None) -> Row:
    """Structures removed for real."""
    kinds = STRUCTURES[kind][0]
    return Row(
        name=f"{kind} {percent(frac)}" + (", recovered" if recover is not None else ""),
        kind=kind,
        sparsity_frac=frac,
        prune={"structured": {"kinds": kinds, "sparsity_frac": frac}},
        recover=recover,
        model=slug(f"{kind} {percent(frac)}"),
    )


# --- composition ------------------------------------------------------------------------------

SCHEMES = {"W8A8": "w8a8", "W4": "w4"}
UNPRUNED = Row("unpruned", "unpruned", 0.0, {})


def composed(before: Row, name: str, scheme: str) -> Row:
    """A recovered model, calibrated and quantized."""
    return Row(
        name=f"{before.name.removesuffix(', recovered')}, {name}",
        kind=before.kind,
        sparsity_frac=before.sparsity_frac,
        prune=before.prune,
        recover=before.recover,
        quantize={"scheme": scheme},
        model=before.model or slug(before.name),
    )


# --- all of them ------------------------------------------------------------------------------

COMPOSED = (UNPRUNED, zeros(score_of(OURS), HALF, DEFAULT), structured(BOTH, QUARTER, DEFAULT))
GROUPS: tuple[Group, ...] = (
    Group(
        "unstructured",
        "Zeros anywhere",
        tuple(zeros(score, frac) for frac in SPARSITIES for score in SCORES),
    ),
    Group(
        "recovered",
        "Zeros anywhere, recovered",
        (
            *(
                zeros(score, frac, DEFAULT)
                for frac in SPARSITIES
                for score in SCORES
                if frac in RECOVERED or score.name == OURS
            ),
            *variants(max(RECOVERED)),
        ),
        "Recovery is `recover: {}`: distillation with the contrastive loss. Where nothing that it tried "
        "was better on the held-out prompts, the model stayed as it was, and so did its figures. The last "
        "rows are ours with another objective, with adapters, and in rounds.",
    ),
    Group(
        "patterns",
        "N:M patterns, half of the weights",
        tuple(
            pattern(score_of(name), shape) for shape in ("2:4", "4:8") for name in (WANDA, SPARSEGPT, OURS)
        ),
        "Not recovered.",
    ),
    Group(
        "structured",
        "Structures removed",
        tuple(
            structured(kind, frac, recover)
            for kind, (_, fracs) in STRUCTURES.items()
            for frac in fracs
            for recover in (None, DEFAULT)
        ),
        "Shares are of the decoder blocks' weights. Heads alone are at most 22 % of them, so that `heads` "
        "is a quarter of the heads; `blocks` is one of five.",
    ),
    Group(
        "composed",
        "Pruned, then quantized",
        tuple(composed(before, name, scheme) for before in COMPOSED for name, scheme in SCHEMES.items()),
        "Recovered models, calibrated with Holdfast's defaults; the answers are the artifact's, in ONNX "
        "Runtime. Flips are against the unpruned model in full precision.",
    ),
)
DEVICE = "device"
"""Group of its own kind: graphs and their speed, see `device`."""


def tasks(
    groups: Sequence[Group], *, seeds: int, rows: Sequence[str] = (), second: bool = False
) -> list[Task]:
    """Every measurement, in order.

    Arguments:
        seeds: how many the repeated rows get: 0, 1, ...
        rows: shell patterns of row names; none of them: all rows.
        second: only the rows of the second pair, once.
    """
    return [
        Task(group, row, seed)
        for group in groups
        for row in group.rows
        if (row.second or not second) and any(fnmatchcase(row.name, one) for one in rows or ("*",))
        for seed in range(seeds if row.repeated and not second else 1)
    ]


def chosen_groups(keys: Sequence[str]) -> tuple[list[Group], bool]:
    """The groups with these keys, and whether `device` is among them; all where none is named.

    Raises:
        UsageError: there is no such group.
    """
    known = {group.key: group for group in GROUPS}
    unknown = [key for key in keys if key not in known and key != DEVICE]
    if unknown:
        raise UsageError(
            f"There is no group {unknown[0]!r}: expected some of {', '.join([*known, DEVICE])}."
        )
    if not keys:
        return list(GROUPS), True
    return [known[key] for key in keys if key != DEVICE], DEVICE in keys
