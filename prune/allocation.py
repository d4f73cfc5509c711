"""How sparse each layer becomes at the same total, by integer programming.

    min  sum_l sum_s x_ls cost_l(s)
    s.t. sum_s x_ls = 1,  least <= sum_ls x_ls zeros_l(s) <= most,  x binary

`cost_l(s)` is what pruning layer l alone to sparsity s costs the loss on answers, to second order: the
squared error of its output times how much such an error matters there (`output_importances`). It is
measured at `ANCHOR_FRACS` and a power of s between them. HiGHS solves it through `scipy.optimize.milp`.
The costs of layers are taken to add up, which is an approximation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from holdfast.errors import PruneError

STEP_FRAC = 0.05
ANCHOR_FRACS = (0.05, 0.25, 0.5, 0.75, 0.95)
SLACK_FRAC = 1e-3  # of all weights, that the integer program may leave for `topped_up`

Choice = tuple[str, float]
"""(module path, sparsity)."""


def anchors(sparsity_frac: float) -> list[float]:
    """Sparsities at which a layer's cost is measured, ascending; the one that was asked for among them."""
    return sorted({*ANCHOR_FRACS, sparsity_frac} - {0.0})


def sparsity_grid(sparsity_frac: float) -> list[float]:
    """Sparsities that a layer may get, ascending; the one that was asked for is always among them."""
    steps = round(ANCHOR_FRACS[-1] / STEP_FRAC)
    return sorted({*(round(step * STEP_FRAC, 9) for step in range(steps + 1)), sparsity_frac})


def interpolated(costs: Mapping[float, float], sparsity_frac: float) -> float:
    """Cost at a sparsity between those where it is known: a power of the sparsity there; 0 at 0.

    Arguments:
        costs: sparsity above 0 -> cost, ascending.
    """
    if sparsity_frac == 0.0:
        return 0.0
    known = np.maximum(list(costs.values()), np.finfo(float).tiny)
    return float(np.exp(np.interp(math.log(sparsity_frac), np.log(list(costs)), np.log(known))))


def topped_up(
    chosen: Mapping[str, float], sizes: Mapping[str, int], sparsity_frac: float
) -> dict[str, float]:
    """The same with as much more in every layer as is missing from the sparsity that was asked for.

    Arguments:
        chosen: module path -> sparsity, in all at most what was asked. sizes: module path -> weights.
    """
    dropped = sum(sizes[path] * frac for path, frac in chosen.items())
    missing = sparsity_frac - dropped / sum(sizes.values())
    return {path: frac + missing for path, frac in chosen.items()}


def allocate(
    costs: Mapping[Choice, float], zeros: Mapping[Choice, int], *, least: int, most: int
) -> dict[str, float]:
    """Module path -> sparsity, of the least total cost.

    Arguments:
        costs: (module path, sparsity) -> cost in nats. zeros: the same -> weights that are dropped.
        least, most: bounds of all zeros together. Without a lower one, dropping nothing is cheapest.

    Raises:
        PruneError: a cost is not a number, or no choice lies within the bounds.
    """
    _require_finite(costs)
    choices = list(costs)
    paths = list(dict.fromkeys(path for path, _ in choices))
    one_each = np.array([[choice[0] == path for choice in choices] for path in paths], dtype=float)
    dropped = np.array([zeros[choice] for choice in choices], dtype=float)
    objective = np.array([costs[choice] for choice in choices])
    unit = max(most, 1)
    result = milp(
        objective / max(float(objective.max()), np.finfo(float).tiny),
        integrality=np.ones_like(objective),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(dropped[None, :] / unit, least / unit, most / unit),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        raise PruneError(
            f"No choice of sparsities drops between {least:,} and {most:,} weights ({result.message}): use "
            "`allocation: uniform`."
        )
    chosen = dict(choices[place] for place in np.flatnonzero(result.x > 0.5))
    excess = sum(zeros[choice] for choice in chosen.items()) - most
    if excess > 0:  # HiGHS allows 1e-6 of the bound more
        return allocate(costs, zeros, least=least - excess, most=most - excess)
    return chosen


def _require_finite(costs: Mapping[Choice, float]) -> None:
    for (path, frac), cost in costs.items():
        if not math.isfinite(cost):
            raise PruneError(
                f"The loss by pruning `{path}` to {frac:.0%} is {cost}, not a number: start from an intact "
                "checkpoint."
            )
