"""GPT-2 holds its linear layers as `Conv1D`, [in, out]: as plain linears here, back again when saved.

Pruning, calibration and the map of the graph then see what they see of every other architecture.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from holdfast.errors import ModelSourceError


def to_linear(conv: Conv1D) -> nn.Linear:
    """The linear that computes what `conv` does; its weight is the transpose, copied."""
    inputs, outputs = conv.weight.shape
    linear = nn.Linear(inputs, outputs, device="meta", dtype=conv.weight.dtype)
    linear.weight = nn.Parameter(conv.weight.detach().T.contiguous(), requires_grad=False)
    linear.bias = nn.Parameter(conv.bias.detach(), requires_grad=False)
    return linear


def replace_conv1d(model: nn.Module, paths: list[str]) -> None:
    """Put a linear in the place of every `Conv1D` at `paths`.

    Raises:
        ModelSourceError: another module is there.
    """
    for path in paths:
        module = model.get_submodule(path)
        if not isinstance(module, Conv1D):
            raise ModelSourceError(
                f"Expected a Conv1D at `{path}` of {type(model).__name__}, found "
                f"{type(module).__name__}: the model does not have the layout of its architecture."
            )
        model.set_submodule(path, to_linear(module))


def checkpoint_state(model: nn.Module, paths: list[str]) -> dict[str, Tensor]:
    """The model's tensors as its checkpoint holds them: the weights at `paths` are [in, out] again."""
    state: dict[str, Tensor] = dict(model.state_dict())
    with torch.no_grad():
        for path in paths:
            state[f"{path}.weight"] = state[f"{path}.weight"].T.contiguous()
    return state
