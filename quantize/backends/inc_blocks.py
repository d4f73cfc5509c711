"""Integer weights of neural-compressor as WeightCodes, and as MatMulNBits nodes in the graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from holdfast.errors import QuantizationError
from holdfast.quantize.formats import Format
from holdfast.quantize.weights.codes import WeightCodes, pack

Array = NDArray[Any]
GRID_ATOL = 2e-2  # in steps; float32 rounding of a multiple of the scale is below 1e-4 of a step


def codes_of(arrays: Mapping[str, Array], width: int, format: Format) -> WeightCodes:
    """One linear's weight as the worker left it: codes, or floats that lie on a grid.

    Arguments:
        arrays: see `inc_weight_only`.
        width: input channels; codes may be padded to whole blocks.
    """
    if "grid" in arrays:
        return codes_on_grid(arrays["grid"], format)
    middle = 2 ** (format.weight_bits - 1)
    zeros = arrays.get("zero_points")
    return WeightCodes(
        codes=_signed(arrays["codes"][:, :width], middle),
        scales=torch.from_numpy(arrays["scales"].astype(np.float32)),
        zero_points=None if zeros is None else _signed(zeros, middle),
        bits=format.weight_bits,
        block_size=format.block_size,
    )


def _signed(codes: Array, middle: int) -> torch.Tensor:
    return torch.from_numpy((codes.astype(np.int16) - middle).astype(np.int8))


def codes_on_grid(weight: Array, format: Format) -> WeightCodes:
    """Codes of a weight that is already rounded: in each block all values are multiples of one scale.

    The scale is not known. The value of greatest magnitude is some whole number of steps, and the
    smallest such number that makes every other value whole gives a scale that is exact.

    Arguments:
        weight: float32 [out, in].

    Raises:
        QuantizationError: some block is on no such grid.
    """
    rows, width = weight.shape
    size, levels = format.block_size, 2**format.weight_bits
    blocks = -(-width // size)
    values = np.zeros((rows, blocks * size), dtype=np.float64)
    values[:, :width] = weight
    values = values.reshape(rows, blocks, size)
    extreme = np.take_along_axis(values, np.abs(values).argmax(-1)[..., None], -1)
    most = levels // 2 if format.symmetric_weights else levels - 1
    scales, worst = _finest_grid(values, np.abs(extreme), most)
    if worst > GRID_ATOL:
        raise QuantizationError(
            f"neural-compressor rounded a weight of shape {weight.T.shape} to no grid of {levels} steps in "
            f"blocks of {size} ({worst:.2g} of a step off): use `backend: ort`."
        )
    steps = np.rint(values / scales).astype(np.int64)
    low, high = -(levels // 2), levels // 2 - 1
    zeros = np.clip(low - steps.min(-1), low, high - np.maximum(steps.max(-1), 0))
    zeros = np.zeros_like(zeros) if format.symmetric_weights else zeros
    codes = np.clip(steps + zeros[..., None], low, high).reshape(rows, -1)[:, :width]
    return WeightCodes(
        codes=torch.from_numpy(codes.astype(np.int8)),
        scales=torch.from_numpy(scales[..., 0].astype(np.float32)),
        zero_points=None if format.symmetric_weights else torch.from_numpy(zeros.astype(np.int8)),
        bits=format.weight_bits,
        block_size=size,
    )


def _finest_grid(values: Array, extreme: Array, most: int) -> tuple[Array, float]:
    """Scales float64 [out, blocks, 1], and the largest distance from a whole number of steps."""
    best = np.full(extreme.shape, np.inf)
    scales = np.ones_like(extreme)
    for count in range(1, most + 1):
        scale = np.where(extreme > 0, extreme / count, 1.0)
        steps = values / scale
        off = np.abs(steps - np.rint(steps)).max(-1, keepdims=True)
        better = (best > GRID_ATOL) & (off < best)
        scales, best = np.where(better, scale, scales), np.where(better, off, best)
    return scales, float(best.max())


def write_blocks(
    model: onnx.ModelProto, weights: Mapping[str, WeightCodes], levels: Mapping[str, int]
) -> None:
    """The product that gives each tensor of `weights` becomes a MatMulNBits.

    Arguments:
        levels: the same tensors -> `accuracy_level`.
    """
    for node in model.graph.node:
        weight = weights.get(node.output[0])
        if weight is not None:
            tensors = nbits_tensors(node.output[0], weight)
            new = helper.make_node(
                "MatMulNBits",
                [node.input[0], *(tensor.name for tensor in tensors)],
                list(node.output),
                name=node.name,
                domain="com.microsoft",
                **_attributes(weight, levels[node.output[0]]),
            )
            node.CopyFrom(new)
            model.graph.initializer.extend(tensors)
    if not weights:
        return
    _drop_unread(model)
    if all(opset.domain != "com.microsoft" for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def _attributes(weight: WeightCodes, accuracy_level: int) -> dict[str, int]:
    rows, width = weight.codes.shape
    sizes = {"K": width, "N": rows, "bits": weight.bits, "block_size": weight.block_size}
    return sizes | ({"accuracy_level": accuracy_level} if accuracy_level else {})


def nbits_tensors(name: str, weight: WeightCodes) -> list[onnx.TensorProto]:
    """MatMulNBits's constant inputs: packed codes, scales and, where there are any, zero points."""
    stored = pack(weight)
    parts = {"packed": stored.packed, "scales": stored.scales, "zero_points": stored.zero_points}
    return [
        numpy_helper.from_array(part.numpy(), f"{name}_{key}")
        for key, part in parts.items()
        if part is not None
    ]


def _drop_unread(model: onnx.ModelProto) -> None:
    """Remove what only the replaced products read: dequantized weights, and constants."""
    read = {name for node in model.graph.node for name in node.input}
    nodes = [n for n in model.graph.node if n.op_type != "DequantizeLinear" or n.output[0] in read]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    read = {name for node in model.graph.node for name in node.input}
    shown = {value.name for value in (*model.graph.input, *model.graph.output)}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read | shown]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
