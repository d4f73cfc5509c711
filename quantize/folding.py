"""Writing what was learned into the weights, so that the exported graph needs no extra operator."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from holdfast.errors import CalibrationError
from holdfast.exporter.architectures import row_of
from holdfast.quantize.learning.learnable import Learnables
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


def fold(learned: Learnables) -> None:
    """Fold the channel scales into the model that `learned` belongs to (detached).

    The weights stay as they were otherwise: clips and roundings are in the integer codes.
    """
    for group in learned.plan:
        if group.producer is not None:
            fold_scales(learned.model, group, learned.groups[group.name].log_scale.detach().exp())


def _weight(model: nn.Module, path: str) -> Tensor:
    weight = model.get_submodule(path).weight
    assert isinstance(weight, Tensor)
    return weight
