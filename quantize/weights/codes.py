"""Quantized weights as integer codes with their scales: as a file, and as MatMulNBits stores them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from holdfast.errors import CalibrationError, QuantizationError
from holdfast.files import disk_errors

CODES_FILE = "codes.safetensors"
LAYOUT = "holdfast.codes"
LEAST_BLOCK_SIZE = 16


@dataclass(frozen=True)
class WeightCodes:
    """One linear's weight: `weight = (codes - zero_points) * scales`, block by block.

    Attributes:
        codes: int8 [out, in], signed: -8..7 at 4 bits, -127..127 per channel at 8 bits.
        scales: float32 [out, blocks]; one block where a channel has one scale. May be negative, as
            ONNX Runtime's symmetric block quantizer makes them.
        zero_points: float32 or int8 [out, blocks], the code of 0, signed like the codes; None: it is 0.
        bits: 8, 4 or 2.
        block_size: input channels that share a scale, 0 for a whole channel; the last block may be shorter.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None
    bits: int
    block_size: int

    def dequantized(self) -> Tensor:
        """float32 [out, in], computed as the kernels do: integer difference times scale."""
        size = self.block_size or self.codes.shape[1]
        columns = torch.arange(self.codes.shape[1]) // size
        codes = self.codes.float()
        if self.zero_points is not None:
            codes = codes - self.zero_points.float()[:, columns]
        return codes * self.scales[:, columns]


@dataclass(frozen=True)
class PackedWeight:
    """The weight inputs of one com.microsoft MatMulNBits node, with N = out and K = in.

    Attributes:
        packed: uint8 [out, blocks, block_size * bits / 8], input `B`.
        scales: float32 [out * blocks].
        zero_points: uint8 [out * ceil(blocks * bits / 8)], packed row by row like `B`; float32
            [out * blocks]; None where the operator's default is meant, `2^(bits - 1)`.
    """

    packed: Tensor
    scales: Tensor
    zero_points: Tensor | None


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    bits: int
    block_size: int


class _Index(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the file's metadata holds, under the one key LAYOUT: safetensors keeps no order of keys."""

    weights: dict[str, _Entry]
    version: Literal[1] = 1


def pack(weight: WeightCodes) -> PackedWeight:
    """Codes as MatMulNBits reads them: unsigned, the first code in a byte's lowest bits.

    The last block is filled up with zero bits, as ONNX Runtime's own quantizer leaves them.

    Raises:
        QuantizationError: the parts do not fit together, or the weight is not in blocks of a power of two.
    """
    require_sound(weight)
    size, middle = weight.block_size, 2 ** (weight.bits - 1)
    if size < LEAST_BLOCK_SIZE or size & (size - 1):
        raise QuantizationError(
            f"MatMulNBits takes blocks of a power of two, {LEAST_BLOCK_SIZE} or more, and the weights are "
            f"in {_size_in_words(size)}: set `block_size` to 16, 32, 64 or 128."
        )
    unsigned = (weight.codes.to(torch.int16) + middle).to(torch.uint8)
    padded = torch.nn.functional.pad(unsigned, (0, -unsigned.shape[1] % size))
    rows, blocks = weight.scales.shape
    zero_points = weight.zero_points
    if zero_points is not None:
        zero_points = zero_points + float(middle)
        if weight.zero_points is not None and not weight.zero_points.is_floating_point():
            zero_points = _pack_bits(zero_points.to(torch.uint8), weight.bits)
        zero_points = zero_points.flatten()
    packed = _pack_bits(padded, weight.bits).reshape(rows, blocks, -1)
    return PackedWeight(packed, weight.scales.flatten(), zero_points)


def _size_in_words(block_size: int) -> str:
    return f"blocks of {block_size}" if block_size else "whole channels"


def unpack(weight: PackedWeight, *, bits: int, in_features: int) -> WeightCodes:
    """The inverse of `pack`.

    Arguments:
        bits, in_features: the node's attributes `bits` and `K`.
    """
    rows, blocks, blob = weight.packed.shape
    middle = 2 ** (bits - 1)
    unsigned = _unpack_bits(weight.packed.flatten(1), bits)[:, :in_features]
    zero_points = weight.zero_points
    if zero_points is not None and zero_points.is_floating_point():
        zero_points = zero_points.reshape(rows, blocks) - float(middle)
    elif zero_points is not None:
        packed = zero_points.reshape(rows, -1)
        zero_points = _signed(_unpack_bits(packed, bits)[:, :blocks], middle)
    return WeightCodes(
        codes=_signed(unsigned, middle),
        scales=weight.scales.reshape(rows, blocks),
        zero_points=zero_points,
        bits=bits,
        block_size=blob * 8 // bits,
    )


def _pack_bits(values: Tensor, bits: int) -> Tensor:
    """uint8 [rows, n] of `bits` each to uint8 [rows, ceil(n * bits / 8)]."""
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % per_byte))
    groups = padded.reshape(values.shape[0], -1, per_byte)
    packed: Tensor = (groups << _shifts(bits)).sum(dim=2, dtype=torch.uint8)
    return packed


def _unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """uint8 [rows, bytes] to uint8 [rows, bytes * 8 / bits]."""
    codes: Tensor = (packed[:, :, None] >> _shifts(bits)) & (2**bits - 1)
    return codes.flatten(1)


def _shifts(bits: int) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8)


def _signed(unsigned: Tensor, middle: int) -> Tensor:
    return (unsigned.to(torch.int16) - middle).to(torch.int8)


def require_sound(weight: WeightCodes) -> None:
    """Raise QuantizationError where the parts of a weight contradict each other."""
    problem = _problem(weight)
    if problem is not None:
        raise QuantizationError(
            f"These weight codes cannot be stored: {problem}; quantize the weight again."
        )


def _problem(weight: WeightCodes) -> str | None:
    """What is wrong with a weight, in words; None where nothing is."""
    if weight.bits not in (8, 4, 2):
        return f"{weight.bits} bits, where 8, 4 or 2 are expected"
    if weight.codes.dtype != torch.int8 or weight.codes.dim() != 2:
        return f"codes are {weight.codes.dtype} with {weight.codes.dim()} axes instead of int8 [out, in]"
    rows, columns = weight.codes.shape
    expected = (rows, -(-columns // weight.block_size) if weight.block_size else 1)
    for name, part in (("scales", weight.scales), ("zero points", weight.zero_points)):
        if part is None:
            continue
        if tuple(part.shape) != expected:
            return f"{name} have the shape {tuple(part.shape)} instead of {expected}"
        if part.is_floating_point() and not bool(part.isfinite().all()):
            return f"{name} are not all finite"
    low, high = -(2 ** (weight.bits - 1)), 2 ** (weight.bits - 1) - 1
    integers = [weight.codes, *_integer_zero_points(weight)]
    if any(part.numel() and not low <= int(part.amin()) <= int(part.amax()) <= high for part in integers):
        return f"codes or zero points are outside {low}..{high}"
    return None


def _integer_zero_points(weight: WeightCodes) -> list[Tensor]:
    zero_points = weight.zero_points
    return [] if zero_points is None or zero_points.is_floating_point() else [zero_points]


def save_codes(weights: dict[str, WeightCodes], folder: Path) -> None:
    """Write `codes.safetensors` into a folder: `{path}.codes`, `{path}.scales`, `{path}.zero_points`.

    Bits and block size of each weight are in the file's metadata. The same codes give the same bytes.

    Raises:
        QuantizationError: the parts of a weight contradict each other.
        DiskFullError: no room.
    """
    tensors: dict[str, Tensor] = {}
    entries = {}
    for path, weight in weights.items():
        require_sound(weight)
        parts = {"codes": weight.codes, "scales": weight.scales, "zero_points": weight.zero_points}
        tensors |= {f"{path}.{name}": _own(part) for name, part in parts.items() if part is not None}
        entries[path] = _Entry(weight.bits, weight.block_size)
    index = msgspec.json.encode(_Index(entries), order="sorted").decode()
    target = folder / CODES_FILE
    partial = target.with_suffix(".partial")
    with disk_errors(target):
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, {LAYOUT: index})
        os.replace(partial, target)


def _own(tensor: Tensor) -> Tensor:
    """safetensors refuses tensors that share memory, such as slices of one product's codes."""
    tensor = tensor.detach().contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


def load_codes(folder: Path) -> dict[str, WeightCodes]:
    """Read `codes.safetensors` of a calibration folder: module path -> codes.

    Raises:
        CalibrationError: missing, cut short, or not written by `save_codes`.
    """
    path = folder / CODES_FILE
    if not path.is_file():
        raise CalibrationError(
            f"{folder} holds no {CODES_FILE}: give the folder that `holdfast calibrate` wrote."
        )
    try:
        with safe_open(path, framework="pt") as file:
            index = (file.metadata() or {}).get(LAYOUT, "")
            entries = msgspec.json.decode(index, type=_Index).weights
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, msgspec.DecodeError) as error:
        raise _damaged(path, str(error)) from None
    weights = {name: _assembled(path, name, entry, tensors) for name, entry in entries.items()}
    if tensors:
        raise _damaged(path, f"nothing in its metadata belongs to `{min(tensors)}`")
    return weights


def _assembled(path: Path, name: str, entry: _Entry, tensors: dict[str, Tensor]) -> WeightCodes:
    """One weight; its tensors are taken out of `tensors`."""
    codes, scales, zero_points = (
        tensors.pop(f"{name}.{part}", None) for part in ("codes", "scales", "zero_points")
    )
    if codes is None or scales is None:
        raise _damaged(path, f"codes or scales of `{name}` are missing")
    weight = WeightCodes(codes, scales, zero_points, entry.bits, entry.block_size)
    problem = _problem(weight)
    if problem is not None:
        raise _damaged(path, f"`{name}`: {problem}")
    return weight


def _damaged(path: Path, why: str) -> CalibrationError:
    return CalibrationError(f"{path} is not what calibration writes ({why}): calibrate again.")
