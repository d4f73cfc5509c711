"""The factor along which GPTQ and SparseGPT carry errors, computed in the memory of the Hessian itself.

Both need U, upper triangular, with `U' U = H^-1` (Frantar et al. 2022, arXiv 2210.17323, section 3.3, step
3). Let J turn the order of the channels around, and `J H J = L L'` be Cholesky's factors. Then
`H = (J L J) (J L J)'` with `J L J` upper triangular, so that U is its inverse, `J L^-1 J`. One factor and
one triangular inverse do: LAPACK computes both in place, where inverting H and factoring the inverse takes
two more matrices and twice the operations.
"""

from __future__ import annotations

import torch
from scipy.linalg import lapack
from torch import Tensor

from holdfast.errors import QuantizationError

CHUNK = 1 << 16
"""Values that are moved at a time where the order is turned around."""


@torch.no_grad()
def inverse_factor_(hessian: Tensor, damp_frac: float) -> Tensor:
    """Upper Cholesky factor of the damped Hessian's inverse, float64 [in, in], in the Hessian's memory.

    Arguments:
        hessian: symmetric, finite and contiguous, float64 [in, in]; what it holds is lost.
        damp_frac: share of the mean diagonal that is added to the diagonal.

    Raises:
        QuantizationError: it is not positive definite.
    """
    _damp(hessian, damp_frac)
    _turn(hessian)
    upper, info = lapack.dpotrf(hessian.numpy().T, lower=0, overwrite_a=1)  # L', in Fortran's order
    if info == 0:
        upper, info = lapack.dtrtri(upper, lower=0, overwrite_c=1)
    if info != 0:
        raise QuantizationError(
            f"GPTQ's Hessian cannot be inverted with `damp_frac` {damp_frac}: calibrate with more tokens, "
            "or raise `damp_frac`."
        )
    factor = torch.from_numpy(upper.T)
    _turn(factor)
    return factor


def _damp(hessian: Tensor, damp_frac: float) -> None:
    diagonal = hessian.diagonal()
    unseen = diagonal == 0.0
    diagonal += damp_frac * diagonal.mean()
    diagonal[unseen] = 1.0  # alone in its row and column: no error reaches it, and none leaves it


def _turn(matrix: Tensor) -> None:
    """J M J in place: the last value first, and the first last."""
    flat = matrix.view(-1)
    size = len(flat)
    for start in range(0, size // 2, CHUNK):
        end = min(start + CHUNK, size // 2)
        front, back = flat[start:end], flat[size - end : size - start]
        kept = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(kept)
