"""What end-to-end and block-wise learning share: where it starts, what is learned, and the optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from holdfast.errors import CalibrationError
from holdfast.exporter.architectures import linear_modules
from holdfast.quantize.formats import Format
from holdfast.quantize.learnable import Learnables, Start
from holdfast.quantize.plan import InputGroup
from holdfast.quantize.ranges import ActivationStatistics, smoothing_scales, starting_range
from holdfast.recipe import CalibrateConfig

LAST_LR_FRAC = 0.1
FLOAT_INPUT = Format(weight_bits=8, activation_bits=None, block_size=0)


def starting_point(
    model: Any,
    group: InputGroup,
    seen: ActivationStatistics,
    chosen: dict[str, Format],
    config: CalibrateConfig,
) -> Start:
    """Channel scales and range that one group's learning starts from."""
    static = [chosen[path] for path in group.consumers if path in chosen and chosen[path].activation_bits]
    scales = torch.ones(int(group.channel_map.max()) + 1)
    if static and config.smooth_frac > 0.0 and group.producer is not None:
        linears = linear_modules(model)
        weights = [linears[path].weight for path in group.consumers]
        scales = smoothing_scales(seen, weights, group, config.smooth_frac)
    form = static[0] if static else FLOAT_INPUT
    low, high = starting_range(seen, scales[group.channel_map], form, shrink=config.start == "mse")
    return Start(scales, low, high)


def parameter_groups(model: Any, learned: Learnables, config: CalibrateConfig) -> list[dict[str, Any]]:
    """Adam's parameter groups. What could not be folded or written exactly is not learned."""
    groups = list(zip(learned.plan, learned.groups.values(), strict=True))
    quantized = [linear for linear in learned.linears.values() if linear.form is not None]
    static = {linear.group for linear in quantized if linear.form and linear.form.activation_bits}
    scales = [quantizer.log_scale for group, quantizer in groups if group.producer is not None]
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


@contextmanager
def learning(groups: list[dict[str, Any]]) -> Iterator[torch.optim.Adam]:
    """An optimizer over the groups; nothing keeps a gradient afterwards."""
    if not groups:
        raise CalibrationError(
            "Nothing is left to learn: set one of `learn_activations`, `learn_clip`, `learn_scales` and "
            "`learn_rounding`, or `steps` to 0."
        )
    try:
        yield torch.optim.Adam(groups)
    finally:
        for group in groups:
            for parameter in group["params"]:
                parameter.grad = None
