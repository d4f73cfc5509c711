"""Rounding to nearest, as ONNX Runtime's own quantizers do it."""

from __future__ import annotations

import torch
from torch import Tensor

from holdfast.errors import QuantizationError
from holdfast.quantize.fakequant import round_weight
from holdfast.quantize.formats import Format
from holdfast.quantize.weights.codes import WeightCodes


def rtn(weight: Tensor, form: Format, clip_frac: Tensor | None = None) -> WeightCodes:
    """Every weight becomes the nearest code of its block's grid, or of its channel's.

    Blocks: `MatMulNBitsQuantizer`'s codes bit for bit. Symmetric: the element of largest magnitude becomes
    the code `-2^(bits - 1)`; otherwise the block's range, widened to hold 0, is spread over all codes.
    Channels: absmax / 127 and ties to even, as `QDQQuantizer` does; one scale for the whole tensor where
    the format says so.

    Arguments:
        weight: float32 [out, in].
        clip_frac: float32 [out, blocks], or [out] for channels: share of the range that is kept.

    Raises:
        QuantizationError: the weight is not finite.
    """
    require_finite(weight, "weight")
    return round_weight(weight, form, clip_frac)


def require_finite(values: Tensor, what: str) -> None:
    """Raise QuantizationError where a tensor holds NaN or infinity."""
    if values.numel() and not bool(torch.isfinite(values).all()):
        raise QuantizationError(f"The {what} holds values that are not finite, and cannot be quantized.")
