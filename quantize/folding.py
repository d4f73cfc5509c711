"""Writing what was learned into the weights, so that the exported graph needs no extra operator."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from holdfast.errors import CalibrationError
from holdfast.exporter.architectures import row_of
from holdfast.quantize.fakequant import block_limit, channel_limit, to_blocks
from holdfast.quantize.learnable import Learnables, QuantLinear
from holdfast.quantize.plan import InputGroup


def fold_scales(model: nn.Module, group: InputGroup, scales: Tensor) -> None:
    """Multiply the consumers' columns by `scales` and divide the producer's output channels by them.

    The function of the model stays as it is, up to float32 rounding.

    Arguments:
        scales: float32 [producer channels], positive.
    """
    if group.producer is None:
        raise CalibrationError(f"Channel scales of `{group.name}` have no producer to be folded into.")
    with torch.no_grad():
        for path in group.consumers:
            _weight(model, path).mul_(scales[group.channel_map])
        producer = model.get_submodule(group.producer)
        weight = _weight(model, group.producer)
        if weight.dim() == 1:
            offset = row_of(model).norm_offset
            weight.add_(offset).div_(scales).sub_(offset)
        else:
            weight.div_(scales[:, None])
        bias = getattr(producer, "bias", None)
        if bias is not None:
            bias.div_(scales)


def clip_channels(weight: Tensor, clip_frac: Tensor) -> Tensor:
    """Weights clipped so that each output channel's absmax is its learned clip; [out, in]."""
    limit = channel_limit(weight, clip_frac)
    return torch.minimum(torch.maximum(weight, -limit), limit)


def clip_blocks(weight: Tensor, clip_frac: Tensor, block_size: int) -> Tensor:
    """Weights clipped so that each block's absmax is its learned clip; [out, in]."""
    blocks = to_blocks(weight, block_size)
    limit = block_limit(blocks, clip_frac)
    clipped = torch.minimum(torch.maximum(blocks, -limit), limit)
    return clipped.flatten(1)[:, : weight.shape[1]]


def fold(learned: Learnables) -> None:
    """Fold scales first, then bake the clips, in the model that `learned` belongs to (detached)."""
    model = learned.model
    for group in learned.plan:
        scales = learned.groups[group.name].log_scale.detach().exp()
        if group.producer is not None:
            fold_scales(model, group, scales)
    with torch.no_grad():
        for linear in learned.linears.values():
            if linear.quantized and bool((linear.clip_frac < 1.0).any()):
                linear.linear.weight.copy_(_clipped(linear))


def _clipped(linear: QuantLinear) -> Tensor:
    weight, clip_frac = linear.linear.weight, linear.clip_frac
    if linear.config.scheme == "w4":
        return clip_blocks(weight, clip_frac, linear.config.block_size)
    return clip_channels(weight, clip_frac)


def _weight(model: nn.Module, path: str) -> Tensor:
    weight = model.get_submodule(path).weight
    assert isinstance(weight, Tensor)
    return weight
