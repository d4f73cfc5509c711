"""What calibration learns, attached to a model: ranges, weight clips and channel scales.

Everything is multiplicative (zero weights stay zero) and expressible in plain ONNX after `folding`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from holdfast.quantize.fakequant import (
    fake_quantize_activation,
    fake_quantize_blocks,
    fake_quantize_channels,
)
from holdfast.quantize.plan import InputGroup
from holdfast.recipe import QuantizeConfig

LEAST_CLIP_FRAC = 0.3


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

    With `quantized` off, only the channel scales act, which cancel.

    Attributes:
        clip_frac: float32 [out] (8 bits) or [out, blocks] (4 bits), share of the absmax kept.
    """

    def __init__(
        self, linear: nn.Linear, group: GroupQuantizer, config: QuantizeConfig, *, quantized: bool
    ) -> None:
        super().__init__()
        self.linear, self.group, self.config, self.quantized = linear, group, config, quantized
        rows, columns = linear.weight.shape
        shape = (rows, -(-columns // config.block_size)) if config.scheme == "w4" else (rows,)
        self.clip_frac = nn.Parameter(torch.ones(shape))
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

    def quantized_weight(self) -> Tensor:
        weight = self.linear.weight * self.group.channel_scales()
        if not self.quantized:
            return weight
        if self.config.scheme == "w4":
            return fake_quantize_blocks(weight, self.config.block_size, self.clip_frac)
        return fake_quantize_channels(weight, self.clip_frac)

    def forward(self, values: Tensor) -> Tensor:
        values = values / self.group.channel_scales()
        if self.quantized and self.config.scheme == "w8a8":
            low, high = self.group.range()
            values = fake_quantize_activation(values, low, high, self.config.activation_bits)
        weight = self.quantized_weight() if self.frozen is None else self.frozen
        return nn.functional.linear(values, weight, self.linear.bias)


@dataclass(frozen=True)
class Start:
    """Where one group's learning starts: channel scales and range."""

    scales: Tensor
    low: Tensor
    high: Tensor


class Learnables:
    """The quantizers attached to one model.

    Attributes:
        groups: group name -> its quantizer.
        linears: module path -> the linear that took its place.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[InputGroup],
        starts: dict[str, Start],
        config: QuantizeConfig,
        quantized: Sequence[str],
    ) -> None:
        self.model, self.plan, self.scheme = model, list(groups), config.scheme
        self.groups: dict[str, GroupQuantizer] = {}
        self.linears: dict[str, QuantLinear] = {}
        for group in groups:
            start = starts[group.name]
            quantizer = GroupQuantizer(group, start.scales, start.low, start.high)
            self.groups[group.name] = quantizer
            for path in group.consumers:
                linear = model.get_submodule(path)
                assert isinstance(linear, nn.Linear)
                self.linears[path] = QuantLinear(linear, quantizer, config, quantized=path in quantized)

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
        return named | {f"{p}.clip_frac": linear.clip_frac for p, linear in self.linears.items()}

    def state(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.parameters().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in self.parameters().items():
                value.copy_(state[name])

    def project(self) -> None:
        """After an optimizer step: clips stay within [LEAST_CLIP_FRAC, 1]."""
        with torch.no_grad():
            for linear in self.linears.values():
                linear.clip_frac.clamp_(LEAST_CLIP_FRAC, 1.0)

    def ranges(self) -> dict[str, tuple[float, float]]:
        """Module path -> static input range of the quantized linears; float32 values."""
        return {
            path: (float((r := linear.group.range())[0].detach()), float(r[1].detach()))
            for path, linear in self.linears.items()
            if linear.quantized
        }
