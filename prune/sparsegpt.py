"""SparseGPT: drop weights column by column, and let the columns to come make up for it.

Frantar & Alistarh 2023, arXiv 2301.00774, algorithm 1: with U the upper Cholesky factor of the inverse of
X X' + lambda I, weight `ij` scores `W_ij^2 / U_jj^2` when its turn comes; dropping it costs that much of
the layer's squared output error, and `W_ij / U_jj * U_jk` is taken off the columns k > j of its row. Masks
are chosen for `MASK_COLUMNS` columns at a time from weights that all earlier drops have reached, over all
rows together; with N:M, group by group within a row.

Differences from the paper's own code: the count is exact, protected weights are dropped last, and weights
that are 0 already stay 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from holdfast.errors import PruneError, QuantizationError
from holdfast.prune.masks import Pattern, keep_all_but, keep_pattern, pruned_count
from holdfast.quantize.weights.inverse_factor import inverse_factor_

MASK_COLUMNS = 128  # the paper's B_s and its lazy update's B, which are best equal
DAMP_FRAC = 0.01  # lambda, as a share of the Hessian's mean diagonal


@torch.no_grad()
def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    sparsity_frac: float,
    *,
    pattern: Pattern | None = None,
    protected: Tensor | None = None,
    target: Tensor | None = None,
    row_weights: Tensor | None = None,
    damp_frac: float = DAMP_FRAC,
) -> tuple[Tensor, Tensor]:
    """A pruned weight with a small output error on the inputs that the Hessian was made of.

    Arguments:
        weight: float32 [out, in]; not changed.
        hessian: float32 or float64 [in, in], `X X'` over all calibration tokens up to a factor.
        sparsity_frac: share that is dropped, rounded down to whole weights of the layer. Not read with a
            pattern.
        protected: bool [out, in], what goes last; see `masks`. It keeps its place, and its value is
            updated like any other.
        target: float32 [out, in], whose output is to be kept instead of the weight's; see `dense_target`.
            What is 0 in the weight stays 0.
        row_weights: float32 [out], above 0, what each row's error counts where rows are compared, which is
            without a pattern; None: all the same.

    Returns:
        (weight, keep): float32 and bool [out, in]; the weight is 0 where `keep` is False.

    Raises:
        PruneError: a Hessian that cannot be inverted.
    """
    work = weight.clone() if target is None else target.masked_fill(weight == 0, 0.0)
    hessian = hessian.to(torch.float64, copy=True)
    keep = sparsegpt_(
        work,
        hessian,
        sparsity_frac,
        pattern=pattern,
        protected=protected,
        row_weights=row_weights,
        damp_frac=damp_frac,
    )
    return work, keep


@torch.no_grad()
def sparsegpt_(
    weight: Tensor,
    hessian: Tensor,
    sparsity_frac: float,
    *,
    pattern: Pattern | None = None,
    protected: Tensor | None = None,
    row_weights: Tensor | None = None,
    damp_frac: float = DAMP_FRAC,
) -> Tensor:
    """As `sparsegpt`, in place: beside the weight and the Hessian there is only the mask in memory.

    Arguments:
        weight: float32 [out, in], pruned here.
        hessian: float64 [in, in], contiguous; its memory is used for the factor, and what it holds is lost.

    Returns:
        keep: bool [out, in].
    """
    factor = _factor(hessian, damp_frac)
    rows, columns = weight.shape
    keep = weight != 0
    group = 1 if pattern is None else pattern.group
    block = max(1, MASK_COLUMNS // group) * group
    for start in range(0, columns, block):
        part = slice(start, min(start + block, columns))
        shielded = None if protected is None else protected[:, part]
        ahead = factor[part, start:].float()  # a factor that is float32 as a whole would be a second one
        own, rest = ahead[:, : part.stop - start], ahead[:, part.stop - start :]
        if pattern is None:
            before, after = (pruned_count(rows * end, sparsity_frac) for end in (start, part.stop))
            errors = obs_errors(weight[:, part] * keep[:, part], own)
            if row_weights is not None:
                errors *= row_weights[:, None]
            keep[:, part] &= _highest(errors, after - before, shielded)
        errors = _drop_columns(weight[:, part], keep[:, part], own, pattern, shielded)
        weight[:, part.stop :].addmm_(errors, rest, alpha=-1.0)
    return keep


def output_error(change: Tensor, hessian: Tensor) -> float:
    """Squared output error of a change of the weight on the Hessian's inputs, `tr(D H D')`.

    Arguments:
        change: float32 [out, in]. hessian: [in, in].
    """
    change = change.to(hessian.dtype)
    return float(((change @ hessian) * change).sum())


def obs_errors(weight: Tensor, factor: Tensor) -> Tensor:
    """Output error that dropping each weight costs, `W^2 / U_jj^2`, float32 [out, columns].

    Arguments:
        weight: float32 [out, columns]. factor: float32 [columns, columns], upper triangular.
    """
    return (weight / factor.diagonal()).square()


def _factor(hessian: Tensor, damp_frac: float) -> Tensor:
    try:
        return inverse_factor_(hessian, damp_frac)
    except QuantizationError:
        raise PruneError(
            "SparseGPT's Hessian cannot be inverted: calibrate with more prompts, or use `wanda`."
        ) from None


def _highest(errors: Tensor, count: int, protected: Tensor | None) -> Tensor:
    """Mask of some columns with the `count` lowest dropped over all rows, bool [out, columns]."""
    flat = None if protected is None else protected.reshape(1, -1)
    return keep_all_but(errors.reshape(1, -1), count, flat).reshape(errors.shape)


def _drop_columns(
    work: Tensor, keep: Tensor, factor: Tensor, pattern: Pattern | None, protected: Tensor | None
) -> Tensor:
    """Drop what `keep` says, column by column, and carry the errors on within these columns.

    Arguments:
        work, keep: [out, columns], changed in place; with a pattern, `keep` is narrowed here.
        factor: float32 [columns, columns], the columns' part of U.

    Returns:
        each column's error over its pivot, float32 [out, columns], for the columns after these.
    """
    errors = torch.empty_like(work)
    for column in range(work.shape[1]):
        if pattern is not None and column % pattern.group == 0:
            group = slice(column, column + pattern.group)
            shielded = None if protected is None else protected[:, group]
            errors_now = obs_errors(work[:, group] * keep[:, group], factor[group, group])
            keep[:, group] &= keep_pattern(errors_now, pattern, shielded)
        dropped = work[:, column].masked_fill(keep[:, column], 0.0)
        errors[:, column] = dropped / factor[column, column]
        work[:, column:] -= torch.outer(errors[:, column], factor[column, column:])
        work[:, column].masked_fill_(~keep[:, column], 0.0)  # exactly, whatever the rounding
    return errors
