"""HQQ: zero points found by half-quadratic splitting, without calibration data.

Badri and Shaji 2023, as ONNX Runtime implements it: the zero points minimise the p-norm of the weights'
error, p = 0.7, which counts outliers less than rounding to nearest does.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from holdfast.errors import QuantizationError
from holdfast.quantize.formats import Format
from holdfast.quantize.weights.codes import WeightCodes
from holdfast.quantize.weights.rtn import require_finite, rtn

FINEST = 2.0**-16
"""Zero points are multiples of it, so that adding or taking away the middle code loses nothing."""


@torch.no_grad()
def hqq(weight: Tensor, form: Format) -> WeightCodes:
    """Codes by ONNX Runtime's `HQQWeightOnlyQuantizer`; there are zero points even in a symmetric format.

    At 4 and 2 bits the zero points stay float32, as HQQ finds them; ONNX Runtime's CPU kernel then unpacks
    the weight for every product and computes in float32, whatever `accuracy_level` says. At 8 bits it
    refuses them: they are rounded to codes, which leaves little that rounding to nearest does not give.

    Arguments:
        weight: float32 [out, in].

    Raises:
        QuantizationError: the weight is not finite, or the format is not in blocks.
    """
    require_finite(weight, "weight")
    if not form.in_blocks:
        raise QuantizationError("HQQ quantizes blocks, and this weight has one scale a channel: use `rtn`.")
    unsigned, scales, zero_points = _solve(weight, form)
    middle = 2.0 ** (form.weight_bits - 1)
    if form.weight_bits == 8:
        scales, zero_points = _whole(weight, form, scales, zero_points)
        unsigned = _nearest(weight, form, scales, zero_points)
        signed = (zero_points - middle).to(torch.int8)
    else:
        signed = (zero_points / FINEST).round() * FINEST - middle
    codes = (unsigned - middle).to(torch.int8)
    return WeightCodes(codes, scales, signed, form.weight_bits, form.block_size)


def _solve(weight: Tensor, form: Format) -> tuple[Tensor, Tensor, Tensor]:
    """Unsigned codes [out, in], scales and unsigned zero points [out, blocks], float32."""
    config_class, quantizer_class = _library()
    quantizer = quantizer_class(config_class(form.block_size, form.weight_bits))
    codes, scales, zero_points = quantizer.quantize_internal(
        weight.float(), bits=form.weight_bits, group_size=form.block_size
    )
    return codes[:, : weight.shape[1]].float(), scales, zero_points


def _library() -> tuple[Any, Any]:
    """ONNX Runtime's HQQ classes. Importing them sets up the whole program's root logger: undone here."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        from onnxruntime.quantization import matmul_nbits_quantizer as library
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
    return library.HQQWeightOnlyQuantConfig, library.HQQWeightOnlyQuantizer


def _whole(weight: Tensor, form: Format, scales: Tensor, zero_points: Tensor) -> tuple[Tensor, Tensor]:
    """Scales, and zero points rounded to codes.

    HQQ's range need not hold 0. Where its zero point is no code at all, in blocks of one sign, the block
    keeps the grid of rounding to nearest.
    """
    most = 2.0**form.weight_bits - 1.0
    plain = rtn(weight, replace(form, symmetric_weights=False))
    assert plain.zero_points is not None
    rounded = zero_points.round()
    outside = (rounded < 0.0) | (rounded > most)
    unsigned = plain.zero_points.float() + 2.0 ** (form.weight_bits - 1)
    return torch.where(outside, plain.scales, scales), torch.where(outside, unsigned, rounded)


def _nearest(weight: Tensor, form: Format, scales: Tensor, zero_points: Tensor) -> Tensor:
    """Nearest unsigned codes on a grid, ties to even as HQQ rounds them, float32 [out, in]."""
    block_of = torch.arange(weight.shape[1]) // form.block_size
    unsigned = (weight / scales[:, block_of] + zero_points[:, block_of]).round()
    return unsigned.clamp(0.0, 2.0**form.weight_bits - 1.0)
