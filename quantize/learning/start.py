"""What end-to-end and block-wise learning share: where it starts, what is learned, and the optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from holdfast.errors import CalibrationError
from holdfast.exporter.architectures import linear_modules
from holdfast.quantize.activations.ranges import (
    ActivationStatistics,
    collect_statistics,
    smoothing_scales,
    starting_range,
)
from holdfast.quantize.formats import Format
from holdfast.quantize.learning.held_out import distance
from holdfast.quantize.learning.learnable import Learnables, Start
from holdfast.quantize.learning.losses import References
from holdfast.quantize.plan import InputGroup, input_groups
from holdfast.quantize.prompts.sequences import Batch, even_rows
from holdfast.recipe import CalibrateConfig

L = TypeVar("L", bound=Learnables)

LAST_LR_FRAC = 0.1
STRENGTH_PROMPTS = 96  # that the strengths of the channel scales are compared on
FLOAT_INPUT = Format(weight_bits=8, activation_bits=None, block_size=0)


def starting_point(
    model: Any,
    group: InputGroup,
    seen: ActivationStatistics,
    chosen: dict[str, Format],
    config: CalibrateConfig,
    smooth_frac: float,
) -> Start:
    """Channel scales, at a SmoothQuant strength, and range that one group's learning starts from."""
    static = [chosen[path] for path in group.consumers if path in chosen and chosen[path].activation_bits]
    scales = torch.ones(int(group.channel_map.max()) + 1)
    if static and smooth_frac > 0.0 and group.producer is not None:
        linears = linear_modules(model)
        weights = [linears[path].weight for path in group.consumers]
        scales = smoothing_scales(seen, weights, group, smooth_frac)
    form = static[0] if static else FLOAT_INPUT
    low, high = starting_range(seen, scales[group.channel_map], form, shrink=config.start == "mse")
    return Start(scales, low, high)


@dataclass(frozen=True)
class Inputs:
    """What the linears of a model read.

    Attributes:
        seen: group name -> statistics of its input.
    """

    model: Any
    groups: list[InputGroup]
    seen: dict[str, ActivationStatistics]

    def starts(
        self, chosen: dict[str, Format], config: CalibrateConfig, smooth_frac: float
    ) -> dict[str, Start]:
        """Group name -> where its learning starts."""
        return {
            group.name: starting_point(
                self.model, group, self.seen[group.name], chosen, config, smooth_frac
            )
            for group in self.groups
        }


def watched_inputs(model: Any, batch: Batch, batch_size: int) -> Inputs:
    """What the linears of a whole model read on some sequences."""
    groups = input_groups(model)
    batches = [batch.rows(rows) for rows in even_rows(len(batch.ids), batch_size)]
    return Inputs(model, groups, collect_statistics(model, groups, batches))


def strengths(config: CalibrateConfig, chosen: dict[str, Format]) -> tuple[float, ...]:
    """Strengths of the channel scales to compare; without static inputs there is nothing to scale."""
    static = any(form.activation_bits is not None for form in chosen.values())
    return config.smooth_fracs if static else (0.0,)


def nearest_start(
    inputs: Inputs,
    batch: Batch,
    references: References,
    config: CalibrateConfig,
    chosen: dict[str, Format],
    kind: type[L],
) -> tuple[L, float]:
    """Quantizers at the strength that leaves the model nearest to the aligned one, and that strength.

    Nearest is by the weighted KL on the first STRENGTH_PROMPTS sequences. One set of quantizers is in
    memory at a time.
    """

    def made(frac: float) -> L:
        starts = inputs.starts(chosen, config, frac)
        return kind(inputs.model, inputs.groups, starts, chosen, rounding=config.learn_rounding)

    def away(frac: float) -> float:
        learned = made(frac)
        with learned.attached(), learned.frozen():
            return distance(inputs.model, part, references, config.batch_size)[1]

    part = batch.rows(torch.arange(min(len(batch.ids), STRENGTH_PROMPTS)))
    fracs = strengths(config, chosen)
    best = fracs[0] if len(fracs) == 1 else min(fracs, key=away)
    return made(best), best


def parameter_groups(model: Any, learned: Learnables, config: CalibrateConfig) -> list[dict[str, Any]]:
    """Adam's parameter groups. What could not be folded or written exactly is not learned.

    Nor are channel scales where rounding is: a step of theirs would round every weight anew.
    """
    groups = list(zip(learned.plan, learned.groups.values(), strict=True))
    quantized = [linear for linear in learned.linears.values() if linear.form is not None]
    static = {linear.group for linear in quantized if linear.form and linear.form.activation_bits}
    rounded = {linear.group for linear in quantized if linear.offset is not None}
    scales = [q.log_scale for group, q in groups if group.producer is not None and q not in rounded]
    ends = [end for _, q in groups if q in static for end in (q.log_low, q.log_high)]
    clips = [linear.clip_frac for linear in quantized if linear.form and linear.form.per_channel]
    offsets = [linear.offset for linear in quantized if linear.offset is not None]
    return [
        {"params": params, "lr": rate}
        for params, rate, wanted in (
            (scales, config.scale_lr, config.learn_scales),
            (ends, config.activation_lr, config.learn_activations),
            (clips, config.clip_lr, config.learn_clip),
            (offsets, config.rounding_lr, config.learn_rounding),
        )
        if wanted and params
    ]


def optimizer_of(groups: list[dict[str, Any]]) -> torch.optim.Adam:
    """Adam over some parameter groups.

    Raises:
        CalibrationError: there are none.
    """
    if not groups:
        raise CalibrationError(
            "Nothing is left to learn: set one of `learn_activations`, `learn_clip`, `learn_scales` and "
            "`learn_rounding`, or `steps` to 0."
        )
    return torch.optim.Adam(groups)


@contextmanager
def learning(groups: list[dict[str, Any]]) -> Iterator[torch.optim.Adam]:
    """An optimizer over the groups; nothing keeps a gradient afterwards."""
    optimizer = optimizer_of(groups)
    try:
        yield optimizer
    finally:
        for group in groups:
            for parameter in group["params"]:
                parameter.grad = None
