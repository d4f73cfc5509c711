"""Fake quantization that mirrors ONNX Runtime bit for bit, as pure functions on tensors.

Conventions of ONNX `QuantizeLinear` and `onnxruntime.quantization`:

- `code = clamp(round(x / scale) + zero_point, low, high)`, division and rounding in float32, ties to
  the even neighbour; `x' = (code - zero_point) * scale`.
- Activations: one range for each tensor, asymmetric with codes 0..2^bits - 1 unless symmetric or signed
  ones are asked for. The range always holds 0.
- 8-bit weights under static activations: symmetric for each output channel, `scale = absmax / 127`,
  codes -127..127.
- Other weights, as `MatMulNBits` stores them: for each block of input channels, all signed codes and
  `scale = extreme / -2^(bits - 1)`, or asymmetric with a zero point.

Scales are computed in float64 and rounded once to float32, as `compute_scale_zp` does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from holdfast.quantize.formats import Format
from holdfast.quantize.weights.codes import WeightCodes

SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
WEIGHT_CODE_MAX = 127


def activation_parameters(
    low: Tensor, high: Tensor, bits: int, *, symmetric: bool = False, signed: bool = False
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a static activation range.

    Arguments:
        low, high: float32 scalars, the range [low, high]; it is widened to hold 0.
        bits: width of the codes, 2 to 8.
        symmetric: widen the range to [-m, m].
        signed: codes are signed, which is symmetric with the zero point 0.

    Returns:
        scale, zero_point: float32 scalars; the zero point holds an integer. Both carry gradients
        to `low` and `high` (straight through the rounding of the zero point). An empty range gives
        scale 1 and zero point 0, as ONNX Runtime does.
    """
    low64, high64 = low.double().clamp(max=0.0), high.double().clamp(min=0.0)
    if symmetric or signed:
        high64 = torch.maximum(-low64, high64)
        low64 = -high64
    first, last = activation_codes(bits, signed=signed)
    scale = (high64 - low64) / (last - first)
    if float(scale.detach()) < SMALLEST_NORMAL:
        return torch.ones_like(low), torch.zeros_like(low)
    exact = first - low64 / scale
    zero_point = exact + (exact.round() - exact).detach()
    return scale.float(), zero_point.float()


def activation_codes(bits: int, *, signed: bool = False) -> tuple[int, int]:
    """Smallest and largest code of an activation."""
    half = 2 ** (bits - 1)
    return (1 - half, half - 1) if signed else (0, 2 * half - 1)


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


def block_scale(blocks: Tensor, clip_frac: Tensor | None = None, bits: int = 4) -> Tensor:
    """Symmetric scale of every block, with the sign that ONNX Runtime gives it.

    The element of largest magnitude becomes the lowest code, -8 at 4 bits, so the scale is negative where
    that element is positive; where both ends are equally large the negative one decides.

    Arguments:
        blocks: float32 [out, blocks, block_size].
        clip_frac: float32 [out, blocks], share of the block's absmax that is kept; None keeps all.

    Returns:
        float32 [out, blocks, 1].
    """
    if clip_frac is not None:
        blocks = torch.minimum(torch.maximum(blocks, -(limit := block_limit(blocks, clip_frac))), limit)
    low, high = blocks.amin(dim=2, keepdim=True), blocks.amax(dim=2, keepdim=True)
    return torch.where(high.abs() > low.abs(), high, low) / -(2.0 ** (bits - 1))


def block_grid(blocks: Tensor, clip_frac: Tensor | None, bits: int) -> tuple[Tensor, Tensor]:
    """Asymmetric scale and zero point of every block, as ONNX Runtime's block quantizer has them.

    Arguments:
        blocks, clip_frac: as in `block_scale`; the clip shortens both ends.

    Returns:
        scale, zero_point: float32 [out, blocks, 1]; the zero point is an unsigned code, with a straight
        gradient through its rounding.
    """
    frac = 1.0 if clip_frac is None else clip_frac[:, :, None]
    low = blocks.amin(dim=2, keepdim=True).clamp(max=0.0) * frac
    high = blocks.amax(dim=2, keepdim=True).clamp(min=0.0) * frac
    most = 2.0**bits - 1.0
    scale = (high - low) / most
    exact = -low / torch.where(scale == 0.0, 1.0, scale)
    rounded = (exact + 0.5).floor().clamp(0.0, most)
    return scale, exact + (rounded - exact).detach()


def block_limit(blocks: Tensor, clip_frac: Tensor) -> Tensor:
    """Largest absolute value that each block keeps, float32 [out, blocks, 1]."""
    return blocks.abs().amax(dim=2, keepdim=True) * clip_frac[:, :, None]


def to_blocks(weight: Tensor, block_size: int) -> Tensor:
    """[out, in] to [out, ceil(in / block_size), block_size]; the last block is padded with zeros.

    A block size of 0 is the whole row.
    """
    if not block_size:
        return weight[:, None, :]
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


def fake_quantize_activation(
    values: Tensor,
    low: Tensor,
    high: Tensor,
    bits: int,
    *,
    symmetric: bool = False,
    signed: bool = False,
) -> Tensor:
    """Static per-tensor activation quantization to the range [low, high]."""
    scale, zero_point = activation_parameters(low, high, bits, symmetric=symmetric, signed=signed)
    return fake_quantize(values, scale, zero_point, *activation_codes(bits, signed=signed))


def fake_quantize_channels(weight: Tensor, clip_frac: Tensor | None = None) -> Tensor:
    """int8 per-channel weights; [out, in] to [out, in]."""
    scale = channel_scale(weight, clip_frac)
    return fake_quantize(weight, scale, weight.new_zeros(()), -WEIGHT_CODE_MAX, WEIGHT_CODE_MAX)


def fake_quantize_weight(
    weight: Tensor, form: Format, clip_frac: Tensor | None = None, offset: Tensor | None = None
) -> Tensor:
    """A weight as the artifact holds it, [out, in] to [out, in], with gradients to all three.

    Arguments:
        clip_frac: float32 [out] or [out, blocks], share of each scale's range that is kept.
        offset: float32 [out, in], added to every quotient before it is rounded (SignRound, Cheng et al.
            2023, equation 3); 0 is rounding to nearest.

    Gradients are those of `FakeQuantize`, which rounds ties to even; the values are `round_weight`'s.
    """
    scale, zero_point = weight_grid(weight, form, clip_frac)
    blocks = to_blocks(weight, form.block_size)
    low, high = (form.code_low, form.code_high) if form.symmetric_weights else (0, 2**form.weight_bits - 1)
    shifted = blocks
    if offset is not None:
        shifted = blocks + to_blocks(offset, form.block_size) * scale.detach()
    learnable = fake_quantize(shifted, scale, zero_point, low, high)
    with torch.no_grad():
        exact = round_weight(weight, form, clip_frac, offset).dequantized()
        correction = exact - learnable.flatten(1)[:, : weight.shape[1]]
    return learnable.flatten(1)[:, : weight.shape[1]] + correction


def weight_grid(weight: Tensor, form: Format, clip_frac: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scale and unsigned or zero zero point, float32 [out, blocks, 1]; a block of zeros has scale 1."""
    zero = weight.new_zeros(())
    if not form.in_blocks:
        rows = channel_limit(weight, clip_frac)
        scale = channel_scale(rows if form.per_channel else rows.amax().expand_as(rows))
        return scale[:, :, None], zero
    blocks = to_blocks(weight, form.block_size)
    if form.symmetric_weights:
        scale = block_scale(blocks, clip_frac, form.weight_bits)
    else:
        scale, zero = block_grid(blocks, clip_frac, form.weight_bits)
    return torch.where(scale == 0.0, 1.0, scale), zero


@torch.no_grad()
def round_weight(
    weight: Tensor, form: Format, clip_frac: Tensor | None = None, offset: Tensor | None = None
) -> WeightCodes:
    """Integer codes of a weight; see `fake_quantize_weight`. Without clip and offset: rounding to nearest,
    bit for bit as ONNX Runtime's own quantizers do it."""
    scale, zero_point = weight_grid(weight, form, clip_frac)
    blocks = to_blocks(weight, form.block_size)
    shift = 0.0 if offset is None else to_blocks(offset, form.block_size)
    if form.in_blocks:
        middle = 2.0 ** (form.weight_bits - 1)
        codes = block_codes(blocks, scale, form.weight_bits, zero_point, shift, form.symmetric_weights)
    else:
        codes = (blocks / scale + shift).round().clamp(form.code_low, form.code_high)
        middle = 0.0
    return WeightCodes(
        codes=codes.flatten(1)[:, : weight.shape[1]].to(torch.int8),
        scales=scale.squeeze(2).contiguous(),
        zero_points=None if form.symmetric_weights else (zero_point - middle).squeeze(2).to(torch.int8),
        bits=form.weight_bits,
        block_size=form.block_size,
    )


def block_codes(
    blocks: Tensor,
    scale: Tensor,
    bits: int = 4,
    zero_point: Tensor | None = None,
    shift: Tensor | float = 0.0,
    symmetric: bool = True,
) -> Tensor:
    """Signed codes as ONNX Runtime's MatMulNBits packer computes them, kept as float32.

    It multiplies by the reciprocal of the scale, adds the zero point and applies `roundf`, so ties go up.
    They are common: weights stored in 16 bits lie on them exactly.
    """
    middle = 2.0 ** (bits - 1)
    zero = middle if symmetric or zero_point is None else zero_point
    shifted = blocks * (1.0 / scale) + zero + shift
    floor = shifted.floor()
    return (floor + (shifted - floor >= 0.5)).clamp(0.0, 2.0 * middle - 1.0) - middle


def fake_quantize_rows_int8(values: Tensor, block_size: int) -> Tensor:
    """Dynamic int8 activations inside MatMulNBits at accuracy_level 4.

    Every row is cut into blocks of `block_size` input channels, symmetric, `scale = absmax / 127`. The
    kernel multiplies by the float32 reciprocal of that scale, which decides the ties that statically
    quantized values lie on.

    Arguments:
        values: float32 [..., in].
    """
    rows = values.reshape(-1, values.shape[-1])
    blocks = to_blocks(rows, block_size)
    scale = blocks.abs().amax(dim=2, keepdim=True) / WEIGHT_CODE_MAX
    result = (blocks * (1.0 / torch.where(scale == 0.0, 1.0, scale))).round() * scale
    return result.flatten(1)[:, : values.shape[-1]].reshape(values.shape)
