"""AWQ: channel scales and clips that protect the weights that strong inputs meet.

Lin et al. 2023, arXiv 2306.00978. The scales go into `folding.fold_scales`, the clips into `rtn.rtn`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from holdfast.errors import CalibrationError
from holdfast.quantize.fakequant import to_blocks
from holdfast.quantize.formats import Format
from holdfast.quantize.weights.codes import WeightCodes
from holdfast.quantize.weights.rtn import require_finite, rtn

SMALLEST_SCALE = 1e-4
CLIP_FRACS = tuple(1.0 - 0.05 * step for step in range(11))
"""Shares of a range that `search_clip` tries, as many and as small as the paper's code."""


@torch.no_grad()
def search_scales(
    weights: Sequence[Tensor],
    inputs: Tensor,
    mean_abs: Tensor,
    form: Format | Sequence[Format],
    grid: int = 20,
) -> Tensor:
    """Channel scales `s = mean_abs^alpha` with the least output error (equations 4 and 5).

    Weights are multiplied by `s` before they are rounded and inputs divided by it. Alpha 0, which is plain
    rounding, is among the candidates, so the error on `inputs` is never above that of plain rounding.

    Arguments:
        weights: float32 [out, in] of linears that read the same input; `form` is one for all or one each.
        inputs: float32 [tokens, in], a sample.
        mean_abs: float32 [in], mean |x| of each channel over all tokens. Channels whose scales have to be
            equal have equal means.
        grid: alphas 0, 1/grid, ..., 1 are tried.

    Returns:
        float32 [in], positive, centred on 1.

    Raises:
        CalibrationError: no inputs.
        QuantizationError: inputs or weights that are not finite.
    """
    _require_inputs(inputs)
    forms = [form] * len(weights) if isinstance(form, Format) else list(form)
    best, least = torch.ones_like(mean_abs), float("inf")
    for step in range(grid + 1):
        scales = scales_at(mean_abs, step / grid)
        error = sum(
            output_error(weight, _scaled(weight, scales, each), inputs)
            for weight, each in zip(weights, forms, strict=True)
        )
        if error < least:
            best, least = scales, error
    return best


def scales_at(mean_abs: Tensor, alpha: float) -> Tensor:
    """`mean_abs^alpha`, centred so that the largest times the smallest is 1; silent channels keep 1."""
    seen = mean_abs > 0.0
    if alpha == 0.0 or not bool(seen.any()):
        return torch.ones_like(mean_abs)
    scales = mean_abs[seen].pow(alpha).clamp(min=SMALLEST_SCALE)
    found = torch.ones_like(mean_abs)
    found[seen] = scales / (scales.amax() * scales.amin()).sqrt()
    return found


def _scaled(weight: Tensor, scales: Tensor, form: Format) -> Tensor:
    """The weight that acts on unscaled inputs after `weight * scales` is rounded, float32 [out, in]."""
    return rtn(weight * scales, form).dequantized() / scales


def output_error(weight: Tensor, quantized: Tensor, inputs: Tensor) -> float:
    """Sum of the squared differences of both products with the inputs [tokens, in]."""
    return float((inputs @ (weight - quantized).T).square().sum())


@torch.no_grad()
def search_clip(weight: Tensor, inputs: Tensor, form: Format) -> Tensor:
    """Share of each block's range that is kept, with the least output error.

    Each block is judged on its own inputs alone, as in the paper's code. Output channels whose whole error
    would grow by it, since blocks' errors can cancel, keep all of their range.

    Arguments:
        weight: float32 [out, in].
        inputs: float32 [tokens, in].

    Returns:
        float32 [out, blocks] for blocks, [out] for channels.

    Raises:
        CalibrationError, QuantizationError: as `search_scales`.
    """
    _require_inputs(inputs)
    rows = to_blocks(inputs, form.block_size)  # [tokens, blocks, size]
    products = torch.einsum("tbi,tbj->bij", rows, rows)
    shape = (weight.shape[0], rows.shape[1])
    best, least = torch.ones(shape), torch.full(shape, float("inf"))
    for frac in CLIP_FRACS:
        tried = torch.full(shape, frac)
        rounded = _clipped(weight, tried, form)
        error = _block_errors(weight - rounded.dequantized(), products, form)
        better = error < least
        best, least = torch.where(better, tried, best), torch.where(better, error, least)
    helps = _row_errors(weight, best, inputs, form) < _row_errors(weight, torch.ones(shape), inputs, form)
    best = torch.where(helps[:, None], best, 1.0)
    return best if form.in_blocks else best[:, 0]


def _clipped(weight: Tensor, clip_frac: Tensor, form: Format) -> WeightCodes:
    return rtn(weight, form, clip_frac if form.in_blocks else clip_frac[:, 0])


def _block_errors(difference: Tensor, products: Tensor, form: Format) -> Tensor:
    """d^T (X^T X) d of every block, float32 [out, blocks]; `products` is X^T X, [blocks, size, size]."""
    blocks = to_blocks(difference, form.block_size)
    return (torch.einsum("obi,bij->obj", blocks, products) * blocks).sum(dim=2)


def _row_errors(weight: Tensor, clip_frac: Tensor, inputs: Tensor, form: Format) -> Tensor:
    """Squared output error of every output channel, float32 [out]."""
    difference = weight - _clipped(weight, clip_frac, form).dequantized()
    return (inputs @ difference.T).square().sum(dim=0)


def _require_inputs(inputs: Tensor) -> None:
    if not len(inputs):
        raise CalibrationError("AWQ was given no calibration tokens: give at least one prompt.")
    require_finite(inputs, "calibration input")
