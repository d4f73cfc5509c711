"""Bits under a budget: which scheme each unit gets, by integer programming.

    min  sum_u sum_b x_ub cost_u(b)    s.t.  sum_b x_ub = 1,  sum_ub x_ub bytes_u(b) <= budget,  x binary

HiGHS solves it through `scipy.optimize.milp`. Costs add up only approximately, so that the best few
solutions are wanted, to be measured: each found solution is cut off and the program solved again. What
exports as one (Q, K, V; gate, up) is one unit and cannot differ.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from holdfast.errors import QuantizationError
from holdfast.quantize.allocation.units import Unit

Choice = tuple[str, str]
"""(unit name, scheme)."""
Floats = NDArray[np.float64]
SOLVED, INFEASIBLE = 0, 2  # status codes of `milp`


@dataclass(frozen=True)
class Allocation:
    """A scheme for every unit.

    Attributes:
        schemes: unit name -> scheme, in the units' order.
        cost: what was minimised, the sum over units; NaN where no cost was asked for.
        size_bytes: stored bytes of the units.
    """

    schemes: dict[str, str]
    cost: float
    size_bytes: int

    def mixed(self, units: Sequence[Unit]) -> dict[str, str]:
        """The `mixed` entry of a recipe's quantize section: module path -> scheme."""
        return {path: self.schemes[unit.name] for unit in units for path in unit.paths}


def allocate(
    units: Sequence[Unit],
    costs: Mapping[Choice, float],
    sizes: Mapping[Choice, int],
    budget_bytes: int,
    *,
    count: int = 1,
) -> list[Allocation]:
    """The `count` cheapest allocations within the budget, cheapest first; fewer where there are no more.

    Arguments:
        costs: (unit name, scheme) -> what choosing it costs; the schemes of a unit are those named here.
        sizes: the same -> stored bytes.

    Raises:
        QuantizationError: the budget is below the smallest possible size, or a cost is not a number.
    """
    _require_finite(costs)
    require_budget(units, sizes, budget_bytes)
    choices = [choice for choice in costs if choice in sizes]
    index = {choice: place for place, choice in enumerate(choices)}
    one_each = np.array([[choice[0] == unit.name for choice in choices] for unit in units], dtype=float)
    weights = np.array([sizes[choice] for choice in choices], dtype=float)
    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(weights[None, :] / budget_bytes, -np.inf, 1),
    ]
    objective = _scaled(np.array([costs[choice] for choice in choices]))
    found: list[Allocation] = []
    while len(found) < count:
        chosen = _solve(objective, constraints)
        if chosen is None:
            break
        schemes = {unit: scheme for unit, scheme in (choices[place] for place in chosen)}
        allocation = priced({unit.name: schemes[unit.name] for unit in units}, costs, sizes)
        if allocation.size_bytes <= budget_bytes:  # HiGHS allows 1e-6 of the budget more
            found.append(allocation)
        constraints.append(_cut([index[choice] for choice in allocation.schemes.items()], len(choices)))
    return found


def priced(
    schemes: dict[str, str], costs: Mapping[Choice, float], sizes: Mapping[Choice, int]
) -> Allocation:
    """An allocation with its cost and bytes added up."""
    chosen = list(schemes.items())
    cost = math.fsum(costs.get(choice, math.nan) for choice in chosen)
    return Allocation(schemes, cost, sum(sizes[choice] for choice in chosen))


def _solve(objective: Floats, constraints: Sequence[LinearConstraint]) -> list[int] | None:
    """Places of the chosen variables; None where the constraints leave nothing."""
    result = milp(
        objective,
        integrality=np.ones_like(objective),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0.0},
    )
    if result.status == INFEASIBLE:
        return None
    if result.x is None or result.status != SOLVED:
        raise QuantizationError(f"The solver found no allocation ({result.message}): use fewer schemes.")
    return [int(place) for place in np.flatnonzero(result.x > 0.5)]


def _cut(places: Sequence[int], count: int) -> LinearConstraint:
    """At least one unit has to choose differently."""
    row = np.zeros((1, count))
    row[0, list(places)] = 1.0
    return LinearConstraint(row, -np.inf, len(places) - 1)


def _scaled(costs: Floats) -> Floats:
    """Costs as the solver wants them: around 1, whatever their unit."""
    largest = float(np.abs(costs).max(initial=0.0))
    return costs / largest if largest > 0.0 else costs


def require_budget(units: Sequence[Unit], sizes: Mapping[Choice, int], budget_bytes: int) -> None:
    """Raise QuantizationError where not even the smallest scheme of every unit fits."""
    smallest = sum(min(options.values()) for options in _options(units, sizes).values())
    if budget_bytes < smallest:
        weights = sum(unit.weights for unit in units)
        raise QuantizationError(
            f"A budget of {budget_bytes:,} bytes for the linear layers ({8 * budget_bytes / weights:.2f} "
            f"bits a weight) is below the smallest possible size with these schemes, {smallest:,} bytes "
            f"({8 * smallest / weights:.2f} bits): raise the budget, or allow a smaller scheme."
        )


def _require_finite(costs: Mapping[Choice, float]) -> None:
    for (unit, scheme), cost in costs.items():
        if not math.isfinite(cost):
            raise QuantizationError(
                f"The sensitivity of `{unit}` at {scheme} is {cost}, not a number: check this layer's "
                "weights and the calibration prompts."
            )


# --- what an allocation is compared with ------------------------------------------------------


def random_allocation(
    units: Sequence[Unit], sizes: Mapping[Choice, int], budget_bytes: int, seed: int
) -> Allocation:
    """Every unit at its smallest scheme, then units at random enlarged at random while the budget lasts.

    Raises:
        QuantizationError: as `require_budget`.
    """
    require_budget(units, sizes, budget_bytes)
    options, generator = _options(units, sizes), random.Random(seed)
    schemes, left = _smallest(options, budget_bytes)
    while larger := [choice for name in options for choice in _affordable(name, options, schemes, left)]:
        name, scheme = generator.choice(larger)
        left -= options[name][scheme] - options[name][schemes[name]]
        schemes[name] = scheme
    return priced(schemes, {}, sizes)


def last_layers_allocation(
    units: Sequence[Unit], sizes: Mapping[Choice, int], budget_bytes: int
) -> Allocation:
    """Every unit at its smallest scheme; from the last unit backwards, the largest that still fits.

    Raises:
        QuantizationError: as `require_budget`.
    """
    require_budget(units, sizes, budget_bytes)
    options = _options(units, sizes)
    schemes, left = _smallest(options, budget_bytes)
    for name in reversed(options):
        larger = _affordable(name, options, schemes, left)
        if larger:
            scheme = max(larger, key=sizes.__getitem__)[1]
            left -= options[name][scheme] - options[name][schemes[name]]
            schemes[name] = scheme
    return priced(schemes, {}, sizes)


def _options(units: Sequence[Unit], sizes: Mapping[Choice, int]) -> dict[str, dict[str, int]]:
    """Unit name -> scheme -> bytes, in the units' order."""
    options: dict[str, dict[str, int]] = {unit.name: {} for unit in units}
    for (name, scheme), size in sizes.items():
        options[name][scheme] = size
    return options


def _smallest(options: Mapping[str, dict[str, int]], budget_bytes: int) -> tuple[dict[str, str], int]:
    """The smallest scheme of every unit, and what they leave of the budget."""
    schemes = {name: min(sizes, key=sizes.__getitem__) for name, sizes in options.items()}
    return schemes, budget_bytes - sum(options[name][scheme] for name, scheme in schemes.items())


def _affordable(
    name: str, options: Mapping[str, dict[str, int]], schemes: Mapping[str, str], left: int
) -> list[Choice]:
    """A unit's choices that are larger than its present one by no more than is left of the budget."""
    present = options[name][schemes[name]]
    return [(name, scheme) for scheme, size in options[name].items() if 0 < size - present <= left]
