"""How sparse each layer becomes at the same total, by integer programming.

    min  sum_l sum_s x_ls cost_l(s)
    s.t. sum_s x_ls = 1,  least <= sum_ls x_ls zeros_l(s) <= most,  x binary

`cost_l(s)` is the first-order change of the loss by the weights that layer l would lose at sparsity s: the
sum of their SNIP scores, utility plus lambda times safety, in nats. HiGHS solves it through
`scipy.optimize.milp`. The costs of layers are taken to add up, which is an approximation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from holdfast.errors import PruneError

STEP_FRAC = 0.05
STEPS = (
    4  # layers differ from the asked sparsity by at most 20 points: further out the first order misleads
)
LARGEST_FRAC = 0.95

Choice = tuple[str, float]
"""(module path, sparsity)."""


def sparsity_grid(sparsity_frac: float) -> list[float]:
    """Sparsities that a layer may get, ascending; the one that was asked for is always among them."""
    fracs = [sparsity_frac + step * STEP_FRAC for step in range(-STEPS, STEPS + 1)]
    largest = max(sparsity_frac, LARGEST_FRAC)
    return [frac for frac in fracs if 0.0 <= frac <= largest]


def first_order_cost(scores: Tensor, keep: Tensor) -> float:
    """Change of the loss by what a mask drops, nats.

    Arguments:
        scores: SNIP scores, float32 [out, in]. keep: bool [out, in].
    """
    return float(scores.masked_fill(keep, 0.0).sum())


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
