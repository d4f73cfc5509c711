"""What calibration learns, attached to a model: ranges, weight clips, channel scales and rounding.

Everything is expressible in plain ONNX: scales are folded, clips and roundings end in integer codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from holdfast.quantize.fakequant import fake_quantize_activation, fake_quantize_weight, round_weight
from holdfast.quantize.formats import Format
from holdfast.quantize.plan import InputGroup
from holdfast.quantize.weights.codes import WeightCodes

LEAST_CLIP_FRAC = 0.3
LARGEST_OFFSET = 0.5
ROUNDED_BITS = 4
"""Widths up to which the direction of rounding is learned."""


class GroupQuantizer(nn.Module):
    """Channel scales and static range of one input group.

    Attributes:
        log_scale: float32 [producer channels]; the input is divided by its exponential.
        log_low, log_high: float32 scalars; natural log of the range's ends relative to where they
            started.
    """

    def __init__(self, group: InputGroup, scales: Tensor, low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.channel_map: Tensor
        self.start_low: Tensor
        self.start_high: Tensor
        self.register_buffer("channel_map", group.channel_map)
        self.register_buffer("start_low", low.clone())
        self.register_buffer("start_high", high.clone())
        self.log_scale = nn.Parameter(scales.log())
        self.log_low = nn.Parameter(torch.zeros(()))
        self.log_high = nn.Parameter(torch.zeros(()))

    def channel_scales(self) -> Tensor:
        """float32 [in_features]."""
        return self.log_scale.exp()[self.channel_map]

    def range(self) -> tuple[Tensor, Tensor]:
        return self.start_low * self.log_low.exp(), self.start_high * self.log_high.exp()


class QuantLinear(nn.Module):
    """A linear with fake-quantized input and weight: `FQ(x / s) @ FQ(W * s).T + b`.

    Without a format, only the channel scales act, which cancel.

    Attributes:
        clip_frac: float32 [out] (one scale a channel) or [out, blocks], share of the absmax kept.
        offset: float32 [out, in] added to the quotients before they are rounded; None where rounding is to
            nearest.
        offset_start: float32 [out, in], where it started; it stays within half a step of that.
    """

    def __init__(
        self, linear: nn.Linear, group: GroupQuantizer, form: Format | None, *, rounding: bool
    ) -> None:
        super().__init__()
        self.linear, self.group, self.form = linear, group, form
        rows, columns = linear.weight.shape
        in_blocks = form is not None and form.in_blocks
        shape = (rows, -(-columns // form.block_size)) if form is not None and in_blocks else (rows,)
        self.clip_frac = nn.Parameter(torch.ones(shape))
        learned = rounding and form is not None and form.weight_bits <= ROUNDED_BITS
        self.offset = nn.Parameter(torch.zeros(rows, columns)) if learned else None
        self.offset_start: Tensor | None = None
        self.frozen: Tensor | None = None

    @property
    def in_features(self) -> int:
        return self.linear.in_features

    @property
    def out_features(self) -> int:
        return self.linear.out_features

    @property
    def weight(self) -> Tensor:
        return self.linear.weight

    def start_rounding(self, offset: Tensor) -> None:
        """Let the rounding that is learned start elsewhere than at the nearest code."""
        assert self.offset is not None
        self.offset_start = offset
        with torch.no_grad():
            self.offset.copy_(offset)

    def project(self) -> None:
        """After an optimizer step: the clip within [LEAST_CLIP_FRAC, 1], offsets near their start."""
        with torch.no_grad():
            self.clip_frac.clamp_(LEAST_CLIP_FRAC, 1.0)
            if self.offset is None:
                return
            if self.offset_start is None:
                self.offset.clamp_(-LARGEST_OFFSET, LARGEST_OFFSET)
            else:
                start = self.offset_start
                torch.clamp(
                    self.offset, start - LARGEST_OFFSET, start + LARGEST_OFFSET, out=self.offset.data
                )

    def scaled_weight(self) -> Tensor:
        return self.linear.weight * self.group.channel_scales()

    def quantized_weight(self) -> Tensor:
        weight = self.scaled_weight()
        if self.form is None:
            return weight
        return fake_quantize_weight(weight, self.form, self.clip_frac, self._offset(weight))

    def folded_codes(self) -> WeightCodes:
        """The integer codes, once the channel scales are folded into the weight; needs a format."""
        assert self.form is not None
        weight = self.linear.weight
        return round_weight(weight, self.form, self.clip_frac, self._offset(weight))

    def forward(self, values: Tensor) -> Tensor:
        values = values / self.group.channel_scales()
        if self.form is not None and self.form.activation_bits is not None:
            low, high = self.group.range()
            values = fake_quantize_activation(
                values,
                low,
                high,
                self.form.activation_bits,
                symmetric=self.form.symmetric_activations,
                signed=self.form.signed_activations,
            )
        weight = self.quantized_weight() if self.frozen is None else self.frozen
        return nn.functional.linear(values, weight, self.linear.bias)

    def _offset(self, weight: Tensor) -> Tensor | None:
        """Pruned weights stay zero: they are not rounded away from it."""
        return None if self.offset is None else self.offset * (weight != 0.0)


@dataclass(frozen=True)
class Start:
    """Where one group's learning starts: channel scales and range."""

    scales: Tensor
    low: Tensor
    high: Tensor


class Learnables:
    """The quantizers attached to one model.

    Attributes:
        plan: the groups that are learned, of the whole model or of one block.
        groups: group name -> its quantizer.
        linears: module path -> the linear that took its place.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[InputGroup],
        starts: dict[str, Start],
        formats: dict[str, Format],
        *,
        rounding: bool,
    ) -> None:
        self.model, self.plan, self.formats = model, list(groups), formats
        self.groups: dict[str, GroupQuantizer] = {}
        self.linears: dict[str, QuantLinear] = {}
        for group in groups:
            start = starts[group.name]
            quantizer = GroupQuantizer(group, start.scales, start.low, start.high)
            self.groups[group.name] = quantizer
            for path in group.consumers:
                linear = model.get_submodule(path)
                assert isinstance(linear, nn.Linear)
                self.linears[path] = QuantLinear(linear, quantizer, formats.get(path), rounding=rounding)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The model computes with the fake-quantized linears inside this block."""
        for path, linear in self.linears.items():
            self.model.set_submodule(path, linear)
        try:
            yield
        finally:
            for path, linear in self.linears.items():
                self.model.set_submodule(path, linear.linear)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Weights are quantized once for everything inside this block; no gradients."""
        with torch.no_grad():
            for linear in self.linears.values():
                linear.frozen = linear.quantized_weight()
            try:
                yield
            finally:
                for linear in self.linears.values():
                    linear.frozen = None

    def parameters(self) -> dict[str, nn.Parameter]:
        """Everything learnable by name: `{path}.clip_frac`, `{group}.log_scale`, ..."""
        named = {
            f"{name}.{key}": value
            for name, group in self.groups.items()
            for key, value in group.named_parameters()
        }
        named |= {f"{p}.clip_frac": linear.clip_frac for p, linear in self.linears.items()}
        return named | {
            f"{p}.offset": linear.offset for p, linear in self.linears.items() if linear.offset is not None
        }

    def state(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.parameters().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in self.parameters().items():
                value.copy_(state[name])

    def scales_are_folded(self) -> None:
        """The model's weights hold the channel scales now: from here on they are 1."""
        with torch.no_grad():
            for group in self.groups.values():
                group.log_scale.zero_()

    def project(self) -> None:
        """After an optimizer step: back into what the artifact can hold."""
        for linear in self.linears.values():
            linear.project()

    def ranges(self) -> dict[str, tuple[float, float]]:
        """Module path -> static input range, of the linears that have one; float32 values."""
        return {
            path: (float((r := linear.group.range())[0].detach()), float(r[1].detach()))
            for path, linear in self.linears.items()
            if linear.form is not None and linear.form.activation_bits is not None
        }

    def folded_codes(self) -> dict[str, WeightCodes]:
        """Module path -> weight codes of the quantized linears, after `folding.fold`."""
        quantized = {path: linear for path, linear in self.linears.items() if linear.form is not None}
        return {path: linear.folded_codes() for path, linear in quantized.items()}
