"""Weights in training: all of them or adapters of low rank, with the zeros of a pruned model held.

LoRA: Hu et al. 2021, arXiv 2106.09685. peft's adapters are not used: what they add to a pruned weight
fills its zeros when it is merged, and they know nothing of a weight that is quantized behind them. Here the
adapter is masked where the weight is, in training as well as at the end, and nothing of it is left over.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

LORA_ALPHA = 16.0
"""The adapters' scale is this over their rank."""
WEIGHT_DECAY = 0.01


class Trainee(Protocol):
    """What a training run changes, can go back on, and is judged by."""

    def parameters(self) -> dict[str, nn.Parameter]: ...
    def state(self) -> dict[str, Tensor]: ...
    def load(self, state: dict[str, Tensor]) -> None: ...
    def project(self) -> None:
        """After an optimizer step: back into what may be."""

    def attached(self) -> Any:
        """Context in which the model computes with it."""

    def frozen(self) -> Any:
        """Context without gradients, in which it does not change."""


class TrainedWeight(nn.Module):
    """`W`, or `W + scale * B A`, where it may change; elsewhere what it was, and zeros stay zero.

    Arguments:
        weight: float32 [out, in].
        rank: of the adapter; 0 trains W itself.
        chosen: bool [out, in], what may change beside zeros; None for everything.

    Attributes:
        down: A, float32 [rank, in], uniform in +-1 / sqrt(in).
        up: B, float32 [out, rank], zero at the start.
        free: bool [out, in], what changes; None where everything does.
        start: float32 [out, in], what the rest stays at; None where that is zero.
    """

    def __init__(
        self, weight: Tensor, rank: int, generator: torch.Generator, chosen: Tensor | None = None
    ) -> None:
        super().__init__()
        rows, columns = weight.shape
        free = weight.detach() != 0.0
        if chosen is not None:
            free &= chosen
        self.free: Tensor | None
        self.start: Tensor | None
        self.register_buffer("free", None if bool(free.all()) else free)
        self.register_buffer("start", None if chosen is None else weight.detach().clone())
        self.scale = LORA_ALPHA / rank if rank else 0.0
        bound = 1.0 / math.sqrt(columns)
        start = torch.empty(rank, columns).uniform_(-bound, bound, generator=generator)
        self.down = nn.Parameter(start) if rank else None
        self.up = nn.Parameter(torch.zeros(rows, rank)) if rank else None

    def forward(self, weight: Tensor) -> Tensor:
        if self.down is not None and self.up is not None:
            weight = weight + self.scale * (self.up @ self.down)
        if self.free is None:
            return weight
        return weight * self.free if self.start is None else torch.where(self.free, weight, self.start)


class TrainedWeights:
    """The weights of some linears of a model, in training until `close`.

    Arguments:
        linears: module path -> linear of the model, in the order of computation.
        chosen: module path -> bool [out, in], what may change of it; everything where it is not there.
        rank: of the adapters; 0 trains the weights themselves.
        seed: of the adapters' start.
    """

    def __init__(
        self,
        linears: Mapping[str, nn.Linear],
        rank: int,
        seed: int,
        chosen: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.linears = dict(linears)
        self._parameters: dict[str, nn.Parameter] = {}
        generator = torch.Generator().manual_seed(seed)
        for path, linear in self.linears.items():
            weight = TrainedWeight(linear.weight, rank, generator, (chosen or {}).get(path))
            parametrize.register_parametrization(linear, "weight", weight)
            self._parameters |= _trained_parameters(linear, path, rank)
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)

    def close(self) -> None:
        """The weights are plain weights again, without gradients."""
        for linear in self.linears.values():
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
            linear.weight.requires_grad_(False)

    def parameters(self) -> dict[str, nn.Parameter]:
        """`{path}.weight`, or `{path}.down` and `{path}.up`, in the order of computation."""
        return self._parameters

    def state(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self._parameters.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in self._parameters.items():
                value.copy_(state[name])

    def project(self) -> None:
        """Nothing: zeros cannot leave zero."""

    @contextmanager
    def attached(self) -> Iterator[None]:
        """They are part of the model from the start."""
        yield

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Weights are put together once for everything inside this block; no gradients."""
        with torch.no_grad(), parametrize.cached():
            yield


def _trained_parameters(linear: nn.Linear, path: str, rank: int) -> dict[str, nn.Parameter]:
    parts: Any = linear.parametrizations
    added = parts.weight[0]
    if rank:
        return {f"{path}.down": added.down, f"{path}.up": added.up}
    return {f"{path}.weight": parts.weight.original}


def weight_group(weights: Mapping[str, nn.Parameter], lr: float) -> dict[str, Any]:
    """AdamW's parameter group of trained weights, which decay."""
    return {"params": list(weights.values()), "lr": lr, "weight_decay": WEIGHT_DECAY}
