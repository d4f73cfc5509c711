"""The factor of the inverse in the Hessian's own memory: the same as by inverting and factoring."""

import pytest
import torch
from torch import Tensor

from holdfast.errors import QuantizationError
from holdfast.quantize.weights import inverse_factor as module
from holdfast.quantize.weights.inverse_factor import inverse_factor_


def hessian_of(columns: int, *, seed: int = 0) -> Tensor:
    """X X' of correlated inputs, float64."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2 * columns, columns, generator=generator, dtype=torch.float64)
    inputs += inputs[:, :1]
    return inputs.T @ inputs


def plainly(hessian: Tensor, damp_frac: float) -> Tensor:
    """Section 3.3 of GPTQ as it is written: damp, invert, factor."""
    added = damp_frac * hessian.diagonal().mean()
    damped = hessian + added * torch.eye(len(hessian), dtype=hessian.dtype)
    return torch.linalg.cholesky(torch.linalg.inv(damped)).mT


@pytest.mark.parametrize("chunk", [1 << 16, 5])
@pytest.mark.parametrize("columns", [1, 2, 7, 130])
def test_in_place_as_plainly(monkeypatch: pytest.MonkeyPatch, columns: int, chunk: int) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    hessian = hessian_of(columns)
    expected, memory = plainly(hessian, 0.01), hessian.data_ptr()
    found = inverse_factor_(hessian, 0.01)
    assert found.data_ptr() == memory
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_by_hand() -> None:
    """H = (4 2; 2 2) has the inverse (1/2 -1/2; -1/2 1) = U' U with U = (1 -1; 0 1) / sqrt 2."""
    found = inverse_factor_(torch.tensor([[4.0, 2.0], [2.0, 2.0]], dtype=torch.float64), 0.0)
    expected = torch.tensor([[1.0, -1.0], [0.0, 1.0]], dtype=torch.float64) / 2**0.5
    torch.testing.assert_close(found, expected)


def test_a_channel_that_was_never_seen_stands_alone() -> None:
    hessian = hessian_of(6)
    hessian[2], hessian[:, 2] = 0.0, 0.0
    seen = [0, 1, 3, 4, 5]
    damped = hessian.clone()
    damped.diagonal().add_(0.01 * hessian.diagonal().mean())
    found = inverse_factor_(hessian, 0.01)
    assert found[2].tolist() == [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    assert not found[:2, 2].any()
    torch.testing.assert_close(found[seen][:, seen], plainly(damped[seen][:, seen], 0.0))


def test_a_hessian_that_cannot_be_inverted() -> None:
    with pytest.raises(QuantizationError, match="damp_frac"):
        inverse_factor_(torch.ones(3, 3, dtype=torch.float64), 0.0)
