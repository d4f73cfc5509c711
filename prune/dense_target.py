"""What a layer's weight would have to be to give the unpruned layer's outputs on the pruned model's inputs.

SparseGPT (arXiv 2301.00774) keeps a layer's own output, W X' for the inputs X' that the pruned layers
before let through, so that their errors are handed on and add up. Here the aim is what the unpruned layer
gives on the unpruned inputs X:

    T = argmin_V ||W X - V X'||^2 + lambda ||W - V||^2  =  (W X X'' + lambda W) (X' X'' + lambda I)^-1

with '' for transposed. SparseGPT then starts from T instead of W. Where no weight before the layer was
pruned, X' is X and T is W. The ridge lambda is SparseGPT's own damping. GPTAQ (Li et al. 2025, arXiv
2504.02692) has the same aim for rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from holdfast.errors import PruneError


def moment_update(moment: Tensor, weight: Tensor, dense_inputs: Tensor, inputs: Tensor) -> None:
    """Add some tokens to `W X X''`, in place.

    Arguments:
        moment: float32 [out, in], zeros at first.
        weight: float32 [out, in], unpruned.
        dense_inputs: float32 [tokens, in], X. inputs: the same tokens in the pruned model, X'.
    """
    moment += (dense_inputs @ weight.T).T @ inputs


@torch.no_grad()
def dense_target(weight: Tensor, moment: Tensor, hessian: Tensor, damp_frac: float) -> Tensor:
    """T, float32 [out, in].

    Arguments:
        weight: float32 [out, in], unpruned.
        moment: float32 [out, in], see `moment_update`.
        hessian: float32 [in, in], `X' X''` over the same tokens.
        damp_frac: lambda, as a share of the Hessian's mean diagonal.

    Raises:
        PruneError: a Hessian that cannot be inverted.
    """
    ridge = damp_frac * float(hessian.diagonal().double().mean())
    damped = hessian.to(torch.float64, copy=True)
    damped.diagonal().add_(ridge)
    try:
        factor = torch.linalg.cholesky(damped, out=damped)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        raise PruneError(
            "The Hessian of `aligned-sparsegpt` cannot be inverted: calibrate with more prompts, or use "
            "`wanda`."
        ) from None
    wanted = moment.double().add_(weight.double(), alpha=ridge)
    return torch.cholesky_solve(wanted.T, factor).T.float().contiguous()
