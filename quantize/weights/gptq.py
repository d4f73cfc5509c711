"""GPTQ: round column by column, and let the columns to come make up for the error.

Frantar et al. 2022, arXiv 2210.17323. Differences from the paper's own code: a block's grid is computed
from weights that all earlier errors have reached, an input channel that calibration never saw keeps its
rounded weight instead of 0, and weights that are 0 (pruned) stay 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.quantize.fakequant import block_codes, weight_grid
from holdfast.quantize.formats import Format
from holdfast.quantize.weights.codes import WeightCodes
from holdfast.quantize.weights.inverse_factor import inverse_factor_
from holdfast.quantize.weights.rtn import require_finite

LAZY_COLUMNS = 128
"""Columns whose errors are carried to the rest of the matrix in one product (section 3.3, step 2)."""


def hessian_update(hessian: Tensor, inputs: Tensor) -> None:
    """Add some tokens to the Hessian of the squared output error, in place; its scale is free.

    Arguments:
        hessian: float32 or float64 [in, in], zeros at first.
        inputs: float32 [tokens, in].
    """
    values = inputs.to(hessian.dtype)
    hessian.addmm_(values.T, values)  # no second matrix of its size


@torch.no_grad()
def gptq(
    weight: Tensor,
    hessian: Tensor,
    form: Format,
    *,
    damp_frac: float = 0.01,
    act_order: bool = False,
    clip_frac: Tensor | None = None,
) -> WeightCodes:
    """Codes of a weight with a small output error on the inputs that the Hessian was made of.

    Arguments:
        weight: float32 [out, in].
        hessian: float32 or float64 [in, in], see `hessian_update`; not changed.
        damp_frac: share of the mean diagonal that is added to the diagonal (section 3.3, step 3).
        act_order: columns of the strongest inputs first. MatMulNBits has no group index, so the blocks'
            grids are then those of the unchanged weights.
        clip_frac: float32 [out, blocks], or [out] for channels: share of each range that is kept.

    Raises:
        QuantizationError: values that are not finite, or a Hessian that cannot be inverted.
    """
    return _solve(weight, hessian, form, damp_frac, clip_frac, act_order=act_order, fixed=act_order)[0]


@dataclass(frozen=True)
class Carried:
    """GPTQ's result as weights to be rounded: the codes are those of `weight / scale + shift`.

    Attributes:
        weight: float32 [out, in]; rounding it gives the same grids. With `fixed`, the unchanged weight.
        shift: float32 [out, in], in steps of the grid.
    """

    codes: WeightCodes
    weight: Tensor
    shift: Tensor


@torch.no_grad()
def gptq_carried(
    weight: Tensor, hessian: Tensor, form: Format, *, fixed: bool, damp_frac: float = 0.01
) -> Carried:
    """What the errors of other columns make of each weight, for rounding that is learned from there on.

    Arguments:
        fixed: keep the grids of the unchanged weights (columns of the strongest inputs come first then);
            otherwise each block's grid is that of its weights when its turn comes, as in `gptq`.
    """
    codes, grids, carried = _solve(weight, hessian, form, damp_frac, None, act_order=fixed, fixed=fixed)
    started = weight if fixed else torch.where(weight == 0.0, 0.0, grids.weights(weight))
    size = form.block_size if form.in_blocks else weight.shape[1]
    scales = codes.scales.repeat_interleave(size, dim=1)[:, : weight.shape[1]]
    return Carried(codes, started, torch.where(weight == 0.0, 0.0, (carried - started) / scales))


def _solve(
    weight: Tensor,
    hessian: Tensor,
    form: Format,
    damp_frac: float,
    clip_frac: Tensor | None,
    *,
    act_order: bool,
    fixed: bool,
) -> tuple[WeightCodes, _Grids, Tensor]:
    """Codes, the grids, and the values that were rounded, float32 [out, in]."""
    require_finite(weight, "weight")
    require_finite(hessian, "Hessian")
    order = torch.arange(weight.shape[1])
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    grids = _Grids(weight, form, clip_frac, order, fixed=fixed)
    inverse = inverse_factor(hessian[order][:, order], damp_frac)
    codes, carried = torch.empty_like(weight), torch.empty_like(weight)
    codes[:, order], carried[:, order] = _round_columns(weight[:, order], inverse, grids)
    found = WeightCodes(
        codes=codes.to(torch.int8),
        scales=grids.scales.T.contiguous(),
        zero_points=None if form.symmetric_weights else grids.zero_points.T.to(torch.int8).contiguous(),
        bits=form.weight_bits,
        block_size=form.block_size,
    )
    return found, grids, carried


def inverse_factor(hessian: Tensor, damp_frac: float) -> Tensor:
    """Upper Cholesky factor of the damped Hessian's inverse (section 3.3, step 3), float32 [in, in].

    Raises:
        QuantizationError: it is not positive definite.
    """
    return inverse_factor_(hessian.to(torch.float64, copy=True), damp_frac).float()


def _round_columns(weight: Tensor, inverse: Tensor, grids: _Grids) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of the paper, with columns in the order of computation.

    Returns:
        signed codes, and the values that were rounded to them, float32 [out, in].

    Inside, everything lies column by column, [in, out]: a column's values are next to each other.
    """
    work = weight.T.contiguous()
    keep_zero, codes, carried = work == 0.0, torch.empty_like(work), torch.empty_like(work)
    pivots = inverse.diagonal().tolist()
    columns, lazy = len(work), grids.lazy_columns
    for start in range(0, columns, lazy):
        end = min(start + lazy, columns)
        errors = torch.empty_like(work[start:end])
        for column in range(start, end):
            ahead = work[column:end]
            carried[column] = ahead[0]
            codes[column], rounded = grids.round(ahead, column, keep_zero=keep_zero[column])
            error = torch.sub(ahead[0], rounded, out=errors[column - start]).div_(pivots[column])
            ahead.addr_(inverse[column, column:end], error, alpha=-1.0)
        work[end:].addmm_(inverse[start:end, end:].T, errors, alpha=-1.0)
    return codes.T, carried.T


class _Grids:
    """Scales and signed zero points of the blocks, float32 [blocks, out], as they become known.

    Those of a fixed grid are known from the start, the others when the first column of their block is
    rounded.
    """

    def __init__(
        self, weight: Tensor, form: Format, clip_frac: Tensor | None, order: Tensor, *, fixed: bool
    ) -> None:
        self.form, self.clip_frac = form, clip_frac
        self.size = form.block_size or weight.shape[1]
        self.block_of: list[int] = (order // self.size).tolist()
        blocks = max(self.block_of) + 1
        self.scales = weight.new_ones(blocks, weight.shape[0])
        self.zero_points = weight.new_zeros(blocks, weight.shape[0])
        self.known = -1
        self.made_of: dict[int, Tensor] = {}  # block -> its weights when its grid was computed
        if fixed or not form.in_blocks:
            for block in range(blocks):
                self._compute(weight[:, block * self.size : (block + 1) * self.size], block)

    def weights(self, weight: Tensor) -> Tensor:
        """What the grids were computed from, float32 [out, in]; `weight` where that was all of a row."""
        blocks = [part for _, part in sorted(self.made_of.items())]
        return torch.cat(blocks, dim=1) if self.form.in_blocks else weight

    @property
    def lazy_columns(self) -> int:
        """A multiple of the block size, so that a block's weights are up to date when its turn comes."""
        return max(1, LAZY_COLUMNS // self.size) * self.size if self.form.in_blocks else LAZY_COLUMNS

    def round(self, ahead: Tensor, column: int, *, keep_zero: Tensor) -> tuple[Tensor, Tensor]:
        """Signed codes and rounded weights, each [out], of the first column `ahead` [columns, out]."""
        block, form = self.block_of[column], self.form
        if block > self.known:
            self._compute(ahead[: self.size].T, block)
        values, scale, zero_point = ahead[0], self.scales[block], self.zero_points[block]
        if form.in_blocks:
            unsigned = zero_point + 2.0 ** (form.weight_bits - 1)
            codes = block_codes(values, scale, form.weight_bits, unsigned, symmetric=form.symmetric_weights)
        else:
            codes = (values / scale).round().clamp(form.code_low, form.code_high)
        codes = torch.where(keep_zero, zero_point, codes)
        return codes, (codes - zero_point) * scale

    def _compute(self, weight: Tensor, block: int) -> None:
        """The grid of one block from its weights, float32 [out, columns of the block]."""
        clip_frac, form = self.clip_frac, self.form
        if clip_frac is not None and form.in_blocks:
            clip_frac = clip_frac[:, block : block + 1]
        self.made_of[block] = weight.clone()
        scale, zero_point = weight_grid(weight, form, clip_frac)
        self.scales[block] = scale[:, 0, 0]
        if not form.symmetric_weights:
            self.zero_points[block] = zero_point[:, 0, 0] - 2.0 ** (form.weight_bits - 1)
        self.known = block
