"""Which linears share an input or a product, and where an input scale can be folded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.errors import QuantizationError
from holdfast.exporter.architectures import block_paths, linear_modules, present, row_of
from holdfast.exporter.graph import GraphLinear
from holdfast.quantize.formats import Format


@dataclass(frozen=True)
class InputGroup:
    """Linears that read the same activation tensor, hence share its range and channel scales.

    Attributes:
        consumers: module paths of the linears.
        producer: module path of the norm or linear whose output channels can carry the inverse of
            the channel scales exactly; None where there is none.
        channel_map: int64 [in_features], the producer's output channel that each input channel
            comes from (value heads repeat under grouped-query attention).
    """

    consumers: tuple[str, ...]
    producer: str | None
    channel_map: Tensor

    @property
    def name(self) -> str:
        """The first consumer's path names the group."""
        return self.consumers[0]


def require_whole_products(modules: dict[str, GraphLinear], chosen: dict[str, Format]) -> None:
    """Raise QuantizationError where the linears that share one MatMul are not to have one format."""
    first: dict[str, str] = {}
    for path, linear in modules.items():
        other = first.setdefault(linear.node, path)
        if chosen.get(path) != chosen.get(other):
            raise QuantizationError(
                f"`{other}` and `{path}` share one MatMul in this graph, and `exclude` or `mixed` gives "
                "them different formats: name all that share it, or export with `target: portable`."
            )


def input_groups(model: nn.Module) -> list[InputGroup]:
    """Every linear of the model, grouped by the activation it reads, in order of computation."""
    linears, row = linear_modules(model), row_of(model)
    inner = [group for block in block_paths(model) for group in _block_groups(model, block, linears)]
    before = [_alone(path, linears) for path in present(model, row.before)]
    after = [_alone(path, linears) for path in (*present(model, row.after), row.head)]
    return [*before, *inner, *after]


def _alone(path: str, linears: dict[str, nn.Linear]) -> InputGroup:
    return InputGroup((path,), None, torch.arange(linears[path].in_features))


def _block_groups(model: nn.Module, block: str, linears: dict[str, nn.Linear]) -> list[InputGroup]:
    row = row_of(model)
    groups: list[InputGroup] = []
    grouped: set[str] = set()
    for norm, consumers in row.norm_groups:
        paths = tuple(f"{block}.{name}" for name in consumers)
        width = linears[paths[0]].in_features
        producer = None if norm is None else f"{block}.{norm}"
        groups.append(InputGroup(paths, producer, torch.arange(width)))
        grouped.update(consumers)
    producers = {consumer: producer for producer, consumer in row.up_down}
    for name in row.linears:
        if name not in grouped:
            source = producers.get(name)
            path = None if source is None else f"{block}.{source}"
            groups.append(_pair_group(model, f"{block}.{name}", path, linears))
    return groups


def _pair_group(
    model: nn.Module, consumer: str, producer: str | None, linears: dict[str, nn.Linear]
) -> InputGroup:
    width = linears[consumer].in_features
    if producer is None:
        return _alone(consumer, linears)
    channel_map = shared_channels(linears[producer].out_features, width, _head_size(model))
    return InputGroup((consumer,), producer, channel_map)


def shared_channels(produced: int, consumed: int, head_size: int) -> Tensor:
    """Producer channel of every consumer channel, int64 [consumed].

    Equal widths map one to one. Otherwise the producer's heads of `head_size` channels are repeated,
    each for the same number of consecutive consumer heads, as transformers' `repeat_kv` does.
    """
    if produced == consumed:
        return torch.arange(consumed)
    heads = torch.arange(produced).reshape(-1, head_size)
    return heads.repeat_interleave(consumed // produced, dim=0).reshape(-1)


def _head_size(model: nn.Module) -> int:
    config: Any = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(size)
