"""Activation statistics of every input group, and where static ranges and channel scales start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.errors import CalibrationError
from holdfast.quantize.fakequant import fake_quantize_activation
from holdfast.quantize.formats import Format
from holdfast.quantize.plan import InputGroup
from holdfast.quantize.prompts.sequences import Batch

Run = tuple[Tensor, Callable[[], object]]
"""(which positions are shown, bool [row, token]; what runs the model over them)."""

SAMPLED_ROWS = 512
SHRINKS = tuple(1.0 - 0.02 * step for step in range(45))


@dataclass
class ActivationStatistics:
    """What one input group saw.

    Attributes:
        low, high: float32 [channels], smallest and largest value of each input channel.
        rows: float32 [at most SAMPLED_ROWS, channels], a sample of tokens.
    """

    low: Tensor
    high: Tensor
    rows: Tensor

    @property
    def absmax(self) -> Tensor:
        return torch.maximum(self.low.abs(), self.high.abs())


@dataclass
class _Collector:
    """Accumulates the statistics of one group over batches."""

    name: str
    rows_per_batch: int
    low: Tensor | None = None
    high: Tensor | None = None
    rows: list[Tensor] = field(default_factory=list)

    def add(self, tokens: Tensor) -> None:
        """`tokens` is float32 [tokens, channels], without padding."""
        if not bool(tokens.isfinite().all()):
            raise CalibrationError(
                f"`{self.name}` reads values that are not numbers: the model is damaged there or before."
            )
        low, high = tokens.amin(dim=0), tokens.amax(dim=0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        stride = max(1, tokens.shape[0] // self.rows_per_batch)
        self.rows.append(tokens[::stride][: self.rows_per_batch].clone())

    def statistics(self) -> ActivationStatistics:
        assert self.low is not None and self.high is not None  # at least one batch was run
        return ActivationStatistics(self.low, self.high, torch.cat(self.rows))


def collect_statistics(
    model: Any, groups: Sequence[InputGroup], batches: Sequence[Batch]
) -> dict[str, ActivationStatistics]:
    """Run the model over the batches and watch what each group's linears read; padding is left out.

    Returns:
        group name -> statistics.

    Raises:
        CalibrationError: a value that is not a number, with the first linear that reads it.
    """
    runs: list[Run] = [
        (batch.mask.bool(), partial(model, **batch.inputs(), use_cache=False)) for batch in batches
    ]
    return watch_inputs(model, groups, runs)


def watch_inputs(
    model: Any, groups: Sequence[InputGroup], runs: Sequence[Run]
) -> dict[str, ActivationStatistics]:
    """`collect_statistics` over any part of the model that reads the groups' inputs.

    Arguments:
        runs: for each batch, the positions that count and what computes it.
    """
    per_batch = max(1, SAMPLED_ROWS // len(runs))
    collectors = {group.name: _Collector(group.name, per_batch) for group in groups}
    mask = torch.empty(0)

    def watch(collector: _Collector) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            collector.add(inputs[0].detach().reshape(*mask.shape, -1)[mask])

        return hook

    handles = [
        model.get_submodule(name).register_forward_pre_hook(watch(collector))
        for name, collector in collectors.items()
    ]
    try:
        with torch.no_grad():
            for shown, run in runs:
                mask = shown  # what the hooks look at
                run()
    finally:
        for handle in handles:
            handle.remove()
    return {name: collector.statistics() for name, collector in collectors.items()}


def smoothing_scales(
    statistics: ActivationStatistics, weights: Sequence[Tensor], group: InputGroup, strength: float
) -> Tensor:
    """SmoothQuant's channel scales (Xiao et al. 2023, equation 4): absmax(X)^a / absmax(W)^(1 - a).

    Arguments:
        weights: float32 [out, in] of the group's linears.
        strength: a, from 0 (leave the activations) to 1 (flatten them).

    Returns:
        float32 [producer channels]; activations are divided and weights multiplied by them. Channels
        that are silent on either side keep 1.
    """
    size = int(group.channel_map.max()) + 1
    columns = torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0)
    seen = _by_producer(statistics.absmax, group.channel_map, size)
    weighed = _by_producer(columns, group.channel_map, size)
    scales = seen.pow(strength) / weighed.pow(1.0 - strength)
    silent = (seen == 0.0) | (weighed == 0.0)
    scales = torch.where(silent, 1.0, scales)
    return (scales / scales.log().mean().exp()).clamp(1e-3, 1e3)


def starting_range(
    statistics: ActivationStatistics, scales: Tensor, form: Format, *, shrink: bool
) -> tuple[Tensor, Tensor]:
    """Static range of a group whose input is divided by `scales` ([channels]).

    Arguments:
        shrink: search the share of the min-max range with the least squared error on the sampled
            rows; otherwise min-max.
    """
    low = (statistics.low / scales).amin().clamp(max=0.0)
    high = (statistics.high / scales).amax().clamp(min=0.0)
    if not shrink or form.activation_bits is None:
        return low, high
    rows = statistics.rows / scales
    errors = [_squared_error(rows, low * frac, high * frac, form, form.activation_bits) for frac in SHRINKS]
    best = SHRINKS[min(range(len(errors)), key=errors.__getitem__)]
    return low * best, high * best


def _squared_error(rows: Tensor, low: Tensor, high: Tensor, form: Format, bits: int) -> float:
    symmetric, signed = form.symmetric_activations, form.signed_activations
    quantized = fake_quantize_activation(rows, low, high, bits, symmetric=symmetric, signed=signed)
    return float((quantized - rows).square().mean())


def _by_producer(values: Tensor, channel_map: Tensor, size: int) -> Tensor:
    return values.new_zeros(size).scatter_reduce(0, channel_map, values, "amax")
