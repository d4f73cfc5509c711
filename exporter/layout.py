"""A loaded model as the table describes it, and the tensors that its checkpoint holds instead."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from holdfast.exporter.architectures import (
    Row,
    block_linear_modules,
    block_paths,
    refuse_settings,
    row_of,
)
from holdfast.exporter.conv1d import checkpoint_state, replace_conv1d
from holdfast.exporter.flattened import replace_flattened


def settle_layout(model: Any) -> None:
    """Give a model just loaded the plain linears that the table promises; its logits stay as they are.

    Raises:
        ModelSourceError: a module is not what the architecture has there, or the config asks for
            what the row refuses.
    """
    row = row_of(model)
    refuse_settings(row, model.config)
    replace_conv1d(model, conv1d_paths(model, row))
    flattened = {f"{block}.{name}" for block in block_paths(model) for name in row.flattened}
    linears = block_linear_modules(model)
    replace_flattened(model, {path: linear for path, linear in linears.items() if path in flattened})


def stored_state(model: Any) -> dict[str, Tensor] | None:
    """The model's tensors as transformers reads them, where that is not how it holds them now."""
    paths = conv1d_paths(model, row_of(model))
    return checkpoint_state(model, paths) if paths else None


def conv1d_paths(model: Any, row: Row) -> list[str]:
    """Module paths of the linears that the checkpoint holds as `Conv1D`."""
    names = row.linears if row.conv1d else ()
    return [f"{block}.{name}" for block in block_paths(model) for name in names]
