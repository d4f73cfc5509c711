"""What pruning refuses before it starts, one sentence each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from holdfast.errors import PruneError
from holdfast.prune.masks import UNSTRUCTURED, parse_pattern
from holdfast.recipe import PruneConfig

NEED_BOTH = ("combined", "set-difference", "aligned-sparsegpt")
"""Methods that read harmful and harmless prompts."""

ZEROS_FRAC = 1e-3
"""Share of zeros from which a model counts as pruned; single ones are found in ordinary checkpoints."""


def check_config(config: PruneConfig, linears: Mapping[str, nn.Linear]) -> None:
    """Refuse a sparsity or a pattern that cannot be, or that contradict each other."""
    if not 0.0 <= config.sparsity_frac < 1.0:
        raise PruneError(
            f"Expected a sparsity from 0 to below 1, got {config.sparsity_frac:g}: 0.5 sets half of the "
            "weights to zero."
        )
    pattern = parse_pattern(config.pattern)
    if pattern is None:
        return
    if pattern.kept >= pattern.group:
        raise PruneError(
            f"The pattern {config.pattern} drops nothing: give n:m with n below m, for example 2:4."
        )
    if abs(pattern.sparsity_frac - config.sparsity_frac) > 1e-6:
        raise PruneError(
            f"The pattern {config.pattern} sets {pattern.sparsity_frac:.1%} of the weights to zero and the "
            f"sparsity says {config.sparsity_frac:.1%}: make them agree."
        )
    if config.allocation == "sensitivity":
        raise PruneError(
            f"The pattern {config.pattern} is as sparse in every layer, so that `allocation: sensitivity` "
            f"has nothing to decide: use `uniform`, or the pattern `{UNSTRUCTURED}`."
        )
    for path, module in linears.items():
        if module.in_features % pattern.group:
            raise PruneError(
                f"The pattern {config.pattern} needs input channels in whole groups of {pattern.group}, "
                f"and `{path}` has {module.in_features}: use another pattern."
            )


def check_weights(linears: Mapping[str, nn.Linear], *, allow_zeros: bool) -> None:
    """Refuse weights that cannot be ranked, and a model that is pruned already unless that is wanted."""
    for path, module in linears.items():
        if not _finite(module.weight):
            raise PruneError(
                f"The weights of `{path}` hold NaN or infinity and cannot be ranked: "
                "start from an intact checkpoint."
            )
    weights = sum(module.weight.numel() for module in linears.values())
    zeros = sum(int((module.weight == 0).sum()) for module in linears.values())
    if zeros > ZEROS_FRAC * weights and not allow_zeros:
        raise PruneError(
            f"Of the {weights:,} weights in the decoder blocks {zeros:,} are zero already: start from the "
            "unpruned model, or set `allow_zeros` to count them as pruned."
        )


def check_rows(config: PruneConfig, rows: Sequence[Sequence[int]]) -> None:
    """Refuse to score by inputs or gradients without prompts."""
    if not rows or not all(rows):
        raise PruneError(
            f"`{config.method}` ranks weights on calibration prompts, found {len(rows)} of which "
            f"{sum(not row for row in rows)} are empty: give prompts, or use `magnitude`."
        )


def check_sets(config: PruneConfig, safety: int, utility: int) -> None:
    """Refuse to tell safety from utility with prompts of one kind.

    Arguments:
        safety, utility: number of harmful prompts and of the others.
    """
    needed: dict[str, tuple[int, str]]
    if config.method in NEED_BOTH or config.allocation == "sensitivity":
        why = f"`{config.method}`" if config.method in NEED_BOTH else "`allocation: sensitivity`"
        needed = {"safety": (safety, "harmful"), "utility": (utility, "harmless")}
    else:
        why, needed = "`safety_heads`", {"safety": (safety, "harmful")} if config.safety_heads else {}
    for name, (count, kind) in needed.items():
        if count == 0:
            raise PruneError(
                f"The {name} set is empty: {why} needs {kind} calibration prompts, and none of the "
                f"{safety + utility} is: add some, or use `wanda` with uniform allocation."
            )


def check_heads(asked: int, heads: int) -> None:
    """Refuse more safety heads than there are heads."""
    if asked > heads:
        raise PruneError(
            f"Expected at most {heads} safety heads, the attention heads of the model, got {asked}: lower "
            "`safety_heads`."
        )


def check_finite(path: str, values: Tensor, *, what: str = "inputs") -> None:
    """Refuse inputs or gradients that are NaN or infinite, by the statistics made of them."""
    if not _finite(values):
        raise PruneError(
            f"The {what} of `{path}` are NaN or infinite on the calibration prompts: "
            "start from an intact checkpoint."
        )


def _finite(values: Tensor) -> bool:
    """Whether all values are finite; the ends show it without a mask as large as the values."""
    return all(math.isfinite(float(end)) for end in values.aminmax())
