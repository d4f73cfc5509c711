"""Losses of one decoder block, by hand."""

import math

import pytest
import torch

from holdfast.quantize.learning.block_losses import Probe, alignment_loss, block_error, fit_probe


def test_the_error_by_hand() -> None:
    """Channels' mean squares: error (1 + 0) / 2 and (4 + 4) / 2, target (1 + 9) / 2 and (16 + 0) / 2.

    With weights 1 and 3: (0.5 + 12) / (5 + 24).
    """
    target = torch.tensor([[[1.0, 3.0], [4.0, 0.0]]])
    output = torch.tensor([[[2.0, 3.0], [2.0, 2.0]]])
    error = block_error(output, target, torch.tensor([[1.0, 3.0]]))
    assert float(error) == pytest.approx(12.5 / 29.0, rel=1e-6)


def test_padding_does_not_count() -> None:
    target = torch.tensor([[[1.0], [2.0]]])
    output = torch.tensor([[[float(100)], [2.0]]])
    assert float(block_error(output, target, torch.tensor([[0.0, 1.0]]))) == 0.0


def test_the_error_does_not_depend_on_the_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    target, noise = torch.randn(2, 2, 3, 4, generator=generator).unbind()
    weights = torch.ones(2, 3)
    plain = block_error(target + 0.1 * noise, target, weights)
    large = block_error(1000 * (target + 0.1 * noise), 1000 * target, weights)
    assert float(large) == pytest.approx(float(plain), rel=1e-5)


def test_alignment_by_hand() -> None:
    """Of four prompts the first lost margin, the second gained, the third was never above the boundary.

    softplus(-1) = 0.313262, softplus(-2) = 0.126928: the mean of four is (0.313262 - 0.126928) / 4.
    """
    margin = torch.tensor([1.0, 3.0, -5.0, 0.5])
    reference = torch.tensor([2.0, 2.0, -1.0, 0.5])
    expected = (math.log1p(math.exp(-1)) - math.log1p(math.exp(-2))) / 4
    assert float(alignment_loss(margin, reference)) == pytest.approx(expected, rel=1e-6)
    assert expected == pytest.approx(0.0465835, abs=1e-6)


def test_alignment_pushes_no_further_than_full_precision() -> None:
    reference = torch.tensor([2.0, 2.0, -1.0])
    margin = torch.tensor([2.0, 2.5, -3.0], requires_grad=True)
    alignment_loss(margin, reference).backward()
    assert margin.grad is not None
    assert margin.grad.tolist() == [0.0, 0.0, 0.0]


def test_alignment_pulls_up_what_fell_behind() -> None:
    margin = torch.tensor([1.0], requires_grad=True)
    alignment_loss(margin, torch.tensor([2.0])).backward()
    assert margin.grad is not None
    assert float(margin.grad) == pytest.approx(-1 / (1 + math.e), rel=1e-5)  # d softplus(-m) / dm


def test_alignment_without_harmful_prompts() -> None:
    assert float(alignment_loss(torch.empty(0), torch.empty(0))) == 0.0


def test_the_margin_by_hand() -> None:
    probe = Probe(torch.tensor([2.0, -1.0]), torch.tensor(0.5))
    assert probe.margin(torch.tensor([[1.0, 1.0], [0.0, 3.0]])).tolist() == [1.5, -2.5]


def test_a_probe_in_one_dimension() -> None:
    """States -1 and 1 around 5: the boundary is at 5, and the states there weigh the same on both sides."""
    probe = fit_probe(torch.tensor([[6.0], [6.0], [6.0]]), torch.tensor([[4.0]]))
    assert float(probe.weight) > 1.0
    assert float(probe.margin(torch.tensor([5.0]))) == pytest.approx(0.0, abs=0.02)


def test_a_probe_finds_the_direction_that_differs() -> None:
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(80, 6, generator=generator)
    states[:40, 2] += 4.0
    probe = fit_probe(states[:40], states[40:])
    assert int(probe.weight.abs().argmax()) == 2
    right = (probe.margin(states) > 0) == (torch.arange(80) < 40)
    assert float(right.float().mean()) >= 0.95


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_a_probe_of_states_of_any_size(size: float) -> None:
    """Scaling the states leaves the margins as they are."""
    generator = torch.Generator().manual_seed(4)
    states = torch.randn(40, 3, generator=generator)
    states[:20, 0] += 2.0
    plain = fit_probe(states[:20], states[20:])
    scaled = fit_probe(size * states[:20], size * states[20:])
    torch.testing.assert_close(scaled.margin(size * states), plain.margin(states), rtol=0.02, atol=0.02)


def test_a_probe_of_equal_states_is_undecided() -> None:
    states = torch.ones(3, 2)
    assert fit_probe(states, states).margin(states).abs().max() < 1e-5
