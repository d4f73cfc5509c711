"""Learned rounding: where it starts, what its gradients reach, and that it lowers an output error."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from holdfast.quantize.fakequant import to_blocks, weight_grid
from holdfast.quantize.formats import Format
from holdfast.quantize.rounding import (
    hard_codes,
    on_grid,
    positions,
    rectified_sigmoid,
    rounding_regularizer,
    shifted_codes,
    sign_step,
    soft_codes,
    start_offsets,
)
from holdfast.quantize.rtn import rtn

FORMS = {
    "w4": Format(4, None, 16),
    "w4 asymmetric": Format(4, None, 16, symmetric_weights=False),
    "w2": Format(2, None, 16),
}


def grid(weight: Tensor, form: Format, clip_frac: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks, scale and unsigned zero point."""
    scale, zero_point = weight_grid(weight, form, clip_frac)
    middle = zero_point if not form.symmetric_weights else torch.tensor(2.0 ** (form.weight_bits - 1))
    return to_blocks(weight, form.block_size), scale, middle


def random_weight() -> Tensor:
    """Stored in 16 bits, so that many weights lie on ties."""
    return torch.randn(12, 48, generator=torch.Generator().manual_seed(0)).half().float()


@pytest.mark.parametrize("name", FORMS)
def test_both_start_at_rounding_to_nearest(name: str) -> None:
    form, weight = FORMS[name], random_weight()
    blocks, scale, zero_point = grid(weight, form)
    position, most = positions(blocks, scale, zero_point), 2**form.weight_bits - 1
    expected = rtn(weight, form).dequantized()
    h = rectified_sigmoid(start_offsets(position))
    for codes in (hard_codes(position, h, most), shifted_codes(position, torch.zeros_like(position), most)):
        assert torch.equal(on_grid(codes, scale, zero_point).flatten(1), expected)
    soft = on_grid(soft_codes(position, h, most), scale, zero_point).flatten(1)
    inside = ((position > 0) & (position < most)).flatten(1)
    torch.testing.assert_close(soft[inside], weight[inside], atol=1e-3, rtol=0.0)


@pytest.mark.parametrize("name", FORMS)
def test_codes_stay_in_range(name: str) -> None:
    form, weight = FORMS[name], random_weight()
    blocks, scale, zero_point = grid(weight, form, torch.full((12, 3), 0.4))
    position, most = positions(blocks, scale, zero_point), 2**form.weight_bits - 1
    shift = torch.rand(position.shape, generator=torch.Generator().manual_seed(1))
    for codes in (
        hard_codes(position, shift, most),
        soft_codes(position, shift, most),
        shifted_codes(position, shift - 0.5, most),
    ):
        assert float(codes.amin()) == 0.0
        assert float(codes.amax()) == most


def test_rectified_sigmoid_by_hand() -> None:
    # sigmoid(0) = 0.5: 0.5 * 1.2 - 0.1; far out it is clipped to 0 and 1
    h = rectified_sigmoid(torch.tensor([0.0, -9.0, 9.0]))
    torch.testing.assert_close(h, torch.tensor([0.5, 0.0, 1.0]), rtol=0.0, atol=1e-7)


def test_regularizer_by_hand() -> None:
    h = torch.tensor([0.0, 1.0, 0.5, 0.75])  # 0, 0, 1 and 1 - 0.5^2
    assert float(rounding_regularizer(h, beta=2.0)) == pytest.approx(1.75)
    a = torch.tensor([0.3], requires_grad=True)
    rounding_regularizer(rectified_sigmoid(a), beta=2.0).backward()
    assert a.grad is not None and float(a.grad) < 0.0  # h is above 1/2: a descent step raises it


@pytest.mark.parametrize("name", FORMS)
def test_gradients_reach_the_rounding_and_the_clip(name: str) -> None:
    form, weight = FORMS[name], random_weight()
    most = 2**form.weight_bits - 1
    target = torch.randn(12, 48, generator=torch.Generator().manual_seed(2))

    def learned(soft: bool) -> tuple[Tensor, Tensor]:
        clip = torch.full((12, 3), 0.8, requires_grad=True)
        blocks, scale, zero_point = grid(weight, form, clip)
        position = positions(blocks, scale, zero_point)
        start = start_offsets(position.detach()) if soft else torch.zeros_like(position)
        start.requires_grad_()
        codes = (
            soft_codes(position, rectified_sigmoid(start), most)
            if soft
            else shifted_codes(position, start, most)
        )
        (on_grid(codes, scale, zero_point).flatten(1) * target).sum().backward()
        assert start.grad is not None and clip.grad is not None
        return start.grad, clip.grad

    for soft in (True, False):
        to_rounding, to_clip = learned(soft)
        assert bool(to_rounding.isfinite().all()) and bool(to_clip.isfinite().all())
        assert float((to_rounding != 0.0).float().mean()) > 0.3  # clamped weights have none
        assert bool((to_clip != 0.0).all())


def test_gradient_of_the_scale_is_lsqs() -> None:
    # positions 1.3 (inside) and 9 (beyond the code 3): d w / d scale = round(1.3) - 1.3, and 3
    scale = torch.tensor([[[0.5]]], requires_grad=True)
    codes = shifted_codes(positions(torch.tensor([[[0.65, 4.5]]]), scale, 0.0), torch.zeros(1, 1, 2), 3)
    on_grid(codes, scale, 0.0).sum().backward()
    assert scale.grad is not None
    assert float(scale.grad) == pytest.approx((1.0 - 1.3) + 3.0, abs=1e-5)


def test_sign_steps_stay_within_half_a_step() -> None:
    offset = torch.tensor([0.49, 0.0, -0.2], requires_grad=True)
    sign_step(offset, 0.1)  # no gradient yet: nothing moves
    (offset * torch.tensor([-3.0, 5.0, 0.0])).sum().backward()
    sign_step(offset, 0.1)
    torch.testing.assert_close(offset.detach(), torch.tensor([0.5, -0.1, -0.2]), rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("way", ["adaround", "signround"])
def test_learning_lowers_the_output_error(way: str) -> None:
    form, weight, most = FORMS["w2"], random_weight(), 3
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(200, 48, generator=generator) @ (torch.eye(48) + 0.1)
    blocks, scale, zero_point = grid(weight, form)
    position = positions(blocks, scale, zero_point)
    start = start_offsets(position) if way == "adaround" else torch.zeros_like(position)
    learned = start.requires_grad_()
    # SignRound's gradient does not fade where a code is right: many or long steps would undo the gain
    lr, steps = {"adaround": (0.05, 150), "signround": (0.002, 50)}[way]
    optimizer = torch.optim.Adam([learned], lr=lr)

    def error(codes: Tensor) -> Tensor:
        return (inputs @ (on_grid(codes, scale, zero_point).flatten(1) - weight).T).square().mean()

    def adaround() -> Tensor:
        h = rectified_sigmoid(learned)
        return error(soft_codes(position, h, most)) + 0.01 * rounding_regularizer(h, beta=2.0)

    def signround() -> Tensor:
        return error(shifted_codes(position, learned, most))

    loss: Callable[[], Tensor] = {"adaround": adaround, "signround": signround}[way]
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    with torch.no_grad():
        final = (
            hard_codes(position, rectified_sigmoid(learned), most)
            if way == "adaround"
            else shifted_codes(position, learned, most)
        )
        plain = shifted_codes(position, torch.zeros_like(position), most)
        assert float(error(final)) < 0.8 * float(error(plain))
