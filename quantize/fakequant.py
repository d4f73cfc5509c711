"""Fake quantization that mirrors ONNX Runtime bit for bit, as pure functions on tensors.

Conventions of ONNX `QuantizeLinear` and `onnxruntime.quantization`:

- `code = clamp(round(x / scale) + zero_point, low, high)`, division and rounding in float32, ties to
  the even neighbour; `x' = (code - zero_point) * scale`.
- Activations: one asymmetric range for each tensor, codes 0..2^bits - 1. The range always holds 0.
- Weights at 8 bits: symmetric for each output channel, `scale = absmax / 127`, codes -127..127.
- Weights at 4 bits: symmetric for each block of input channels, `scale = extreme / -8`, codes -8..7,
  as `MatMulNBits` stores them.

Scales are computed in float64 and rounded once to float32, as `compute_scale_zp` does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
WEIGHT_CODE_MAX = 127


def activation_parameters(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a static activation range.

    Arguments:
        low, high: float32 scalars, the range [low, high]; it is widened to hold 0.
        bits: width of the codes, 2 to 8.

    Returns:
        scale, zero_point: float32 scalars; the zero point holds an integer. Both carry gradients
        to `low` and `high` (straight through the rounding of the zero point). An empty range gives
        scale 1 and zero point 0, as ONNX Runtime does.
    """
    low64 = low.double().clamp(max=0.0)
    span = high.double().clamp(min=0.0) - low64
    scale = span / (2**bits - 1)
    if float(scale.detach()) < SMALLEST_NORMAL:
        return torch.ones_like(low), torch.zeros_like(low)
    exact = -low64 / scale
    zero_point = exact + (exact.round() - exact).detach()
    return scale.float(), zero_point.float()


def channel_scale(weight: Tensor, clip_frac: Tensor | None = None) -> Tensor:
    """Symmetric int8 scale of every output channel.

    Arguments:
        weight: float32 [out, in].
        clip_frac: float32 [out], share of the channel's absmax that is kept; None keeps all.

    Returns:
        float32 [out, 1]. A channel of zeros gets scale 1, as in ONNX Runtime.
    """
    limit = channel_limit(weight, clip_frac).double()
    scale = limit / WEIGHT_CODE_MAX
    return torch.where(scale < SMALLEST_NORMAL, 1.0, scale).float()


def channel_limit(weight: Tensor, clip_frac: Tensor | None = None) -> Tensor:
    """Largest absolute value that each output channel keeps, float32 [out, 1]."""
    limit = weight.abs().amax(dim=1, keepdim=True)
    return limit if clip_frac is None else limit * clip_frac[:, None]


def block_scale(blocks: Tensor, clip_frac: Tensor | None = None) -> Tensor:
    """Symmetric 4-bit scale of every block, with the sign that ONNX Runtime gives it.

    The element of largest magnitude becomes code -8, so the scale is negative where that element is
    positive; where both ends are equally large the negative one decides.

    Arguments:
        blocks: float32 [out, blocks, block_size].
        clip_frac: float32 [out, blocks], share of the block's absmax that is kept; None keeps all.

    Returns:
        float32 [out, blocks, 1].
    """
    if clip_frac is not None:
        blocks = torch.minimum(torch.maximum(blocks, -(limit := block_limit(blocks, clip_frac))), limit)
    low, high = blocks.amin(dim=2, keepdim=True), blocks.amax(dim=2, keepdim=True)
    return torch.where(high.abs() > low.abs(), high, low) / -8.0


def block_limit(blocks: Tensor, clip_frac: Tensor) -> Tensor:
    """Largest absolute value that each block keeps, float32 [out, blocks, 1]."""
    return blocks.abs().amax(dim=2, keepdim=True) * clip_frac[:, :, None]


def to_blocks(weight: Tensor, block_size: int) -> Tensor:
    """[out, in] to [out, ceil(in / block_size), block_size]; the last block is padded with zeros."""
    padding = -weight.shape[1] % block_size
    padded = torch.nn.functional.pad(weight, (0, padding))
    return padded.reshape(weight.shape[0], -1, block_size)


def quantize_codes(values: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """Integer codes, kept as float32: `clamp(round(values / scale) + zero_point, low, high)`."""
    return ((values / scale).round() + zero_point).clamp(low, high)


class FakeQuantize(torch.autograd.Function):
    """Quantize and dequantize, with the gradients of LSQ (Esser et al. 2020, section 2.1).

    `apply(values, scale, zero_point, low, high)`: `scale` and `zero_point` broadcast over `values`.
    Inside the range the gradient passes straight through the rounding; outside it reaches only the
    scale and the zero point.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
        ctx.save_for_backward(values, scale, zero_point)
        ctx.low, ctx.high = low, high
        return (quantize_codes(values, scale, zero_point, low, high) - zero_point) * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, scale, zero_point = ctx.saved_tensors
        ratio = values / scale
        code = ratio.round() + zero_point
        clamped = code.clamp(ctx.low, ctx.high)
        inside = code == clamped
        to_values = gradient * inside
        # d out / d scale = (code - zero_point) - [inside] * ratio
        to_scale = (gradient * torch.addcmul(clamped - zero_point, ratio, inside, value=-1)).sum_to_size(
            scale.shape
        )
        to_zero_point = None
        if ctx.needs_input_grad[2]:
            to_zero_point = (-(gradient - to_values) * scale).sum_to_size(zero_point.shape)
        return to_values, to_scale, to_zero_point, None, None


def fake_quantize(values: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """Values as they are after QuantizeLinear and DequantizeLinear; see `FakeQuantize`."""
    result: Tensor = FakeQuantize.apply(  # type: ignore[no-untyped-call]
        values, scale, zero_point, low, high
    )
    return result


def fake_quantize_activation(values: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Static per-tensor activation quantization to the range [low, high]."""
    scale, zero_point = activation_parameters(low, high, bits)
    return fake_quantize(values, scale, zero_point, 0, 2**bits - 1)


def fake_quantize_channels(weight: Tensor, clip_frac: Tensor | None = None) -> Tensor:
    """int8 per-channel weights; [out, in] to [out, in]."""
    scale = channel_scale(weight, clip_frac)
    return fake_quantize(weight, scale, weight.new_zeros(()), -WEIGHT_CODE_MAX, WEIGHT_CODE_MAX)


def fake_quantize_blocks(weight: Tensor, block_size: int, clip_frac: Tensor | None = None) -> Tensor:
    """4-bit blockwise weights as MatMulNBits stores them; [out, in] to [out, in].

    Gradients are those of `FakeQuantize`, which rounds ties to even.
    """
    blocks = to_blocks(weight, block_size)
    scale = block_scale(blocks, clip_frac)
    scale = torch.where(scale == 0.0, 1.0, scale)
    learnable = fake_quantize(blocks, scale, weight.new_zeros(()), -8, 7)
    with torch.no_grad():
        exact = block_codes(blocks, scale) * scale - learnable
    return (learnable + exact).flatten(1)[:, : weight.shape[1]]


def block_codes(blocks: Tensor, scale: Tensor) -> Tensor:
    """Codes -8..7 as ONNX Runtime's MatMulNBits packer computes them, kept as float32.

    It multiplies by the reciprocal of the scale, adds 8 and applies `roundf`, so ties go up. They are
    common: weights stored in 16 bits lie on them exactly.
    """
    shifted = blocks * (1.0 / scale) + 8.0
    floor = shifted.floor()
    return (floor + (shifted - floor >= 0.5)).clamp(0.0, 15.0) - 8.0


def fake_quantize_blocks_inc(weight: Tensor, block_size: int) -> Tensor:
    """4-bit blockwise weights as neural-compressor's symmetric RTN stores them; [out, in] to [out, in].

    It spreads 16 codes over twice the absmax, so every block's extreme lies on a tie: the division has
    to be the float64 one that it does.
    """
    blocks = to_blocks(weight, block_size).double()
    scale = blocks.abs().amax(dim=2, keepdim=True) * 2.0 / 15.0
    scale = torch.where(scale == 0.0, 1.0, scale)
    codes = (blocks / scale + 8.0).round().clamp(0.0, 15.0) - 8.0
    result = codes.float() * scale.float()
    return result.flatten(1)[:, : weight.shape[1]]


def fake_quantize_rows_int8(values: Tensor, block_size: int) -> Tensor:
    """Dynamic int8 activations inside MatMulNBits at accuracy_level 4.

    Every row is cut into blocks of `block_size` input channels, symmetric, `scale = absmax / 127`.

    Arguments:
        values: float32 [..., in].
    """
    rows = values.reshape(-1, values.shape[-1])
    blocks = to_blocks(rows, block_size)
    scale = blocks.abs().amax(dim=2, keepdim=True) / 127.0
    safe = torch.where(scale == 0.0, 1.0, scale)
    result = fake_quantize(blocks, safe, values.new_zeros(()), -127, 127)
    return result.flatten(1)[:, : values.shape[-1]].reshape(values.shape)
