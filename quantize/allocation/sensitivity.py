"""How much each unit's quantization hurts alignment and utility, from one backward pass a batch.

The divergence KL(p || p_Q) has no gradient at the aligned model p, where it is zero: the first-order term
sum |dL/dW (Q(W) - W)| vanishes, and at a slightly quantized point it depends on that point. What is left is
the second order, with the Fisher information F in place of the Hessian (Martens 2020, arXiv 1412.1193):

    S_u(b) = 1/2 d' F d = 1/2 E_prompt E_{y ~ p} [ (dlog p(y) / dW : (Q_b(W) - W))^2 ]      for weights
                          1/2 E_prompt E_{y ~ p} [ (dlog p(y) / dx : (Q_b(x) - x))^2 ]      for activations

in nats. The gradient is that of each prompt's sum over positions of log p(y), with one token y drawn at
every position; drawn independently, their products vanish on average. The change is projected on the
gradient before it is squared, so that errors that cancel within a unit do cancel. No gradient of a weight
is ever formed: dlog p / dW : D is the output's gradient times (x D').

Safety is measured on harmful prompts, utility on all others. The calibration loss adds its push term where
p_Q moves towards the unaligned model; on the reference pair it made the ranking worse and is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.errors import CalibrationError
from holdfast.exporter.architectures import linear_modules, row_of
from holdfast.quantize.activations.ranges import collect_statistics, starting_range
from holdfast.quantize.allocation.units import Unit
from holdfast.quantize.formats import Format
from holdfast.quantize.learning.held_out import HeldOut
from holdfast.quantize.learning.losses import References, renormalised_logp
from holdfast.quantize.learning.reference_cache import forward_logits
from holdfast.quantize.plan import input_groups
from holdfast.quantize.prompts.sequences import Batch, even_rows
from holdfast.quantize.record import ActivationRange, activation_range
from holdfast.quantize.simulate import SimulatedLinear
from holdfast.recipe import QuantizeConfig

Schemes = Mapping[str, Format | None]
"""Scheme's name -> format; None is float32."""
Ranges = Mapping[tuple[str, str], ActivationRange]
"""(unit name, scheme) -> range of the unit's input, where the scheme has a static one."""
OnStep = Callable[[int], None]


@dataclass(frozen=True)
class Plan:
    """What is quantized, and how.

    Attributes:
        model: the full-precision transformers model; it is not changed.
        schemes: candidates. ranges: static input ranges; see `static_ranges`.
        config: at `accuracy_level: 4` MatMulNBits rounds its input to int8, which counts among activations.
    """

    model: Any
    units: Sequence[Unit]
    schemes: Schemes
    ranges: Ranges
    config: QuantizeConfig

    def simulated(self, linear: nn.Linear, unit: str, scheme: str) -> SimulatedLinear | None:
        """A unit's linear as the artifact would compute it; None where it stays float32."""
        form = self.schemes[scheme]
        if form is None:
            return None
        return SimulatedLinear(linear, form, self.ranges.get((unit, scheme)), None, self.config)


@dataclass(frozen=True)
class Harm:
    """What one scheme does to one unit on one set of prompts, nats; weights and activations apart."""

    weights: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.activations


@dataclass(frozen=True)
class Sensitivity:
    """What one scheme does to one unit.

    Attributes:
        safety: on harmful prompts. utility: on harmless ones.
    """

    unit: str
    scheme: str
    safety: Harm
    utility: Harm

    def cost(self, safety_weight: float) -> float:
        """What allocation minimises: `utility + safety_weight * safety`."""
        return self.utility.total + safety_weight * self.safety.total


def costs(found: Sequence[Sensitivity], safety_weight: float) -> dict[tuple[str, str], float]:
    """(unit name, scheme) -> cost, for `solve.allocate`."""
    return {(entry.unit, entry.scheme): entry.cost(safety_weight) for entry in found}


def measure_sensitivity(
    plan: Plan,
    harmful: HeldOut,
    harmless: HeldOut,
    *,
    seed: int,
    draws: int = 1,
    on_step: OnStep | None = None,
) -> list[Sensitivity]:
    """Every unit under every scheme, in the order of units and schemes.

    Arguments:
        seed: of the drawn tokens.
        draws: backward passes a batch, each with tokens of its own; the estimate is their mean.
        on_step: counts backward passes; there are `steps` of them.

    Raises:
        CalibrationError: a figure is not a number; the message names the unit.
    """
    generator = torch.Generator().manual_seed(seed)
    say = on_step or (lambda _: None)
    safety = _harms(plan, harmful, draws, generator, say)
    utility = _harms(plan, harmless, draws, generator, say)
    found = [
        Sensitivity(unit.name, scheme, safety[unit.name, scheme], utility[unit.name, scheme])
        for unit in plan.units
        for scheme in plan.schemes
    ]
    for entry in found:
        _require_finite(entry)
    return found


def steps(*probes: HeldOut, draws: int = 1) -> int:
    """Backward passes of `measure_sensitivity`."""
    return draws * sum(-(-len(probe.prompts) // probe.batch_size) for probe in probes)


def static_ranges(
    model: Any, units: Sequence[Unit], schemes: Schemes, batches: Sequence[Batch]
) -> dict[tuple[str, str], ActivationRange]:
    """Ranges of least squared error on the prompts, as calibration starts from, without channel scales."""
    forms = {name: form for name, form in schemes.items() if form and form.activation_bits}
    if not forms:
        return {}
    groups = {group.name: group for group in input_groups(model)}
    seen = collect_statistics(model, list(groups.values()), batches)
    found = {}
    for unit in units:
        plain = torch.ones(len(groups[unit.name].channel_map))
        for name, form in forms.items():
            ends = starting_range(seen[unit.name], plain, form, shrink=True)
            found[unit.name, name] = activation_range(float(ends[0]), float(ends[1]), form)
    return found


# --- the pure part ----------------------------------------------------------------------------


def drawn_score(
    logits: Tensor, references: References, weights: Tensor, generator: torch.Generator
) -> Tensor:
    """Log-probability of one drawn token a position, summed over each sequence; float32 [batch].

    Arguments:
        logits: float32 [batch, positions, V].
        references: tokens are drawn from p_FT on S_top.
        weights: float32 [batch, positions], loss weights. Each position counts with its square root, since
            the result is squared.
    """
    places = torch.multinomial(references.top_logp.exp().flatten(0, 1), 1, generator=generator)
    logp = renormalised_logp(logits, references.top_ids)
    drawn = logp.gather(-1, places.reshape(*logp.shape[:2], 1))[..., 0]
    return (drawn * weights.sqrt()).sum(dim=1)


def projected_weights(gradient: Tensor, values: Tensor, change: Tensor, rows: int) -> Tensor:
    """Change of each sequence's score by a change of a linear's weight, to first order; float32 [rows].

    Arguments:
        gradient: float32 [..., out], of the score with respect to the linear's output.
        values: float32 [..., in], its input. change: float32 [out, in].
    """
    return (gradient * (values @ change.T)).reshape(rows, -1).sum(dim=1)


def projected_values(gradient: Tensor, weight: Tensor, change: Tensor, rows: int) -> Tensor:
    """The same by a change of its input, float32 [..., in]; [rows]."""
    return ((gradient @ weight) * change).reshape(rows, -1).sum(dim=1)


def divergence(projections: Tensor, total_weight: float) -> float:
    """Second-order KL in nats, from the projection of every sequence, [sequences].

    Arguments:
        total_weight: sum of the loss weights, which the loss is a mean over.
    """
    return float(projections.square().sum()) / (2.0 * total_weight)


# --- hooks ------------------------------------------------------------------------------------


_Sums = dict[tuple[str, str, str], Tensor]
"""(unit, scheme, `weights` or `activations`) -> projections of one batch, [batch]."""


def _harms(
    plan: Plan, probe: HeldOut, draws: int, generator: torch.Generator, on_step: OnStep
) -> dict[tuple[str, str], Harm]:
    batches = []
    for rows in draws * list(even_rows(len(probe.prompts), probe.batch_size)):
        batch = probe.batch.rows(rows)
        references = probe.references.rows(rows, slice(-batch.positions, None))
        with _watching(plan, len(rows)) as sums:
            score = drawn_score(forward_logits(plan.model, batch), references, batch.weights, generator)
            score.sum().backward()  # type: ignore[no-untyped-call]
        batches.append(sums)
        on_step(1)
    total = draws * float(probe.batch.weights.sum())

    def harm(unit: str, scheme: str, part: str) -> float:
        parts = [sums[unit, scheme, part] for sums in batches if (unit, scheme, part) in sums]
        return divergence(torch.cat(parts), total) if parts else 0.0

    return {
        (unit.name, scheme): Harm(
            harm(unit.name, scheme, "weights"), harm(unit.name, scheme, "activations")
        )
        for unit in plan.units
        for scheme in plan.schemes
    }


@contextmanager
def _watching(plan: Plan, rows: int) -> Iterator[_Sums]:
    """Collects projections while a backward pass runs inside this block.

    Nothing but the embedding's output asks for gradients, so that none is formed for a weight.
    """
    sums: _Sums = {}
    linears = linear_modules(plan.model)
    embedding = plan.model.get_submodule(row_of(plan.model).embedding)
    handles = [embedding.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_())]
    for unit in plan.units:
        for path in unit.paths:
            handles.append(linears[path].register_forward_hook(_hook(plan, unit.name, rows, sums)))
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def _hook(plan: Plan, unit: str, rows: int, sums: _Sums) -> Callable[[nn.Linear, Any, Tensor], None]:
    def watch(linear: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        values = inputs[0].detach()
        output.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: _note(plan, unit, linear, values, gradient, rows, sums)
        )

    return watch


@torch.no_grad()
def _note(
    plan: Plan, unit: str, linear: nn.Linear, values: Tensor, gradient: Tensor, rows: int, sums: _Sums
) -> None:
    """Add one linear's projections to its unit's. Quantized weights live only here, one at a time."""
    for scheme in plan.schemes:
        simulated = plan.simulated(linear, unit, scheme)
        if simulated is None:
            continue
        change = simulated.weight - linear.weight
        _add(sums, (unit, scheme, "weights"), projected_weights(gradient, values, change, rows))
        moved = simulated.quantized_input(values) - values
        _add(sums, (unit, scheme, "activations"), projected_values(gradient, linear.weight, moved, rows))


def _add(sums: _Sums, key: tuple[str, str, str], projections: Tensor) -> None:
    sums[key] = sums[key] + projections if key in sums else projections


def _require_finite(entry: Sensitivity) -> None:
    total = entry.safety.total + entry.utility.total
    if not total < float("inf"):
        raise CalibrationError(
            f"The sensitivity of `{entry.unit}` at {entry.scheme} is {total}, not a number: the model is "
            "damaged there or after."
        )
