"""Reading constants of a graph in the checks of the rules."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray


def array_of(value: ir.Value | None) -> NDArray[Any] | None:
    """The constant that a value is, or None where it is computed."""
    found = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if found is None else found.numpy()


def ints_of(value: ir.Value | None) -> list[int] | None:
    """The integers of a small constant tensor, or None."""
    array = array_of(value)
    if array is None or not np.issubdtype(array.dtype, np.integer):
        return None
    return [int(number) for number in array.reshape(-1)]


def slice_of(value: ir.Value) -> tuple[int, int] | None:
    """(start, end) of a Slice of the last axis by steps of 1, both counted from the front.

    None where the node is another one, or its ends are not constant.
    """
    node = value.producer()
    source = node.inputs[0] if node is not None and node.op_type == "Slice" else None
    if node is None or source is None or source.shape is None:
        return None
    size = source.shape[-1]
    starts, ends, axes, steps = ([*map(ints_of, node.inputs[1:]), None, None])[:4]
    last = len(source.shape) - 1
    if (
        not isinstance(size, int)
        or not starts
        or not ends
        or axes not in ([-1], [last])
        or steps not in (None, [1])
    ):
        return None
    first, end, _ = slice(starts[0], ends[0]).indices(size)
    return first, end
