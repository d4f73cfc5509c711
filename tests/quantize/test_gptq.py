"""GPTQ against a hand-worked example, an independent reference, and neural-compressor's."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from holdfast.errors import QuantizationError
from holdfast.quantize.fakequant import round_weight
from holdfast.quantize.formats import Format
from holdfast.quantize.weights.gptq import gptq, gptq_carried, hessian_update, inverse_factor
from holdfast.quantize.weights.rtn import rtn

CHANNELS = Format(8, 8, 0)
W4 = Format(4, None, 32)
W4_ASYMMETRIC = Format(4, None, 32, symmetric_weights=False)
W2 = Format(2, None, 16)


def case(rows: int = 24, columns: int = 96, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, correlated inputs and their Hessian."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.1
    mixing = torch.eye(columns) + torch.randn(columns, columns, generator=generator) * 0.1
    inputs = torch.randn(400, columns, generator=generator) @ mixing
    hessian = torch.zeros(columns, columns, dtype=torch.float64)
    for part in inputs.split(150):
        hessian_update(hessian, part)
    return weight, inputs, hessian


def output_error(inputs: Tensor, weight: Tensor, rounded: Tensor) -> float:
    return float((inputs @ (weight - rounded).T).norm())


def test_hand_worked_example() -> None:
    # Both channels have the scale 127 / 127 = 1, and nothing is added to the diagonal. Rounding the first
    # column leaves the error e; the output error is then least at w + e * H01 / H11 = w + 1.5 e.
    # Row 0: e = 10.4 - 10 = 0.4, -127 + 0.6 = -126.4 -> -126. Row 1: e = 0.3, -127 + 0.45 -> -127.
    weight = torch.tensor([[10.4, -127.0], [20.3, -127.0]])
    hessian = torch.tensor([[4.0, 1.5], [1.5, 1.0]])
    found = gptq(weight, hessian, CHANNELS, damp_frac=0.0)
    assert found.scales.tolist() == [[1.0], [1.0]]
    assert found.codes.tolist() == [[10, -126], [20, -127]]
    assert rtn(weight, CHANNELS).codes.tolist() == [[10, -127], [20, -127]]


@pytest.mark.parametrize("form", [W4, W4_ASYMMETRIC, W2], ids=lambda form: form.name)
@pytest.mark.parametrize("fixed", [False, True])
def test_carried_weights_round_to_the_same_codes(form: Format, fixed: bool) -> None:
    """Rounding that is learned from there starts at GPTQ's codes; weights that are zero stay zero."""
    weight, _, hessian = case(columns=100)
    weight[3, 5:40] = 0.0
    found = gptq_carried(weight, hessian, form, fixed=fixed)
    rounded = round_weight(found.weight, form, None, found.shift)
    different = rounded.dequantized() != found.codes.dequantized()
    assert float(different.float().mean()) < 0.002  # ties, which one more float32 operation decides
    assert bool((rounded.dequantized()[3, 5:40] == 0.0).all())
    if fixed:
        assert torch.equal(found.weight, weight)
    else:
        assert torch.equal(found.codes.codes, gptq(weight, hessian, form).codes)


def test_hessian_is_the_sum_over_all_tokens() -> None:
    _, inputs, hessian = case()
    torch.testing.assert_close(hessian, inputs.double().T @ inputs.double(), rtol=1e-4, atol=1e-3)


def reference_codes(weight: Tensor, hessian: Tensor, scale: Tensor) -> NDArray[np.int8]:
    """Optimal brain quantization in a fixed order, row by row and with a fresh inverse for each column.

    Frantar et al. 2022, equations 2 and 3; `scale` is symmetric, one for each row.
    """
    damped = hessian.double().numpy() + 0.01 * hessian.diagonal().mean().item() * np.eye(len(hessian))
    codes = np.zeros(weight.shape, dtype=np.int8)
    for row in range(len(weight)):
        left = weight[row].double().numpy().copy()
        step = float(scale[row])
        for column in range(len(left)):
            codes[row, column] = np.clip(np.round(left[column] / step), -127, 127)
            inverse = np.linalg.inv(damped[column:, column:])
            error = (left[column] - codes[row, column] * step) / inverse[0, 0]
            left[column:] -= error * inverse[0]
    return codes


@pytest.mark.parametrize("columns", [7, 150])  # less than a lazy batch, and more
def test_codes_are_those_of_a_plain_loop(columns: int) -> None:
    weight, _, hessian = case(4, columns)
    found = gptq(weight, hessian, CHANNELS)
    expected = reference_codes(weight, hessian, found.scales[:, 0])
    np.testing.assert_array_equal(found.codes.numpy(), expected)
    assert torch.equal(found.scales, rtn(weight, CHANNELS).scales)


@pytest.mark.parametrize("form", [CHANNELS, W4, W4_ASYMMETRIC, W2], ids=lambda form: form.name)
@pytest.mark.parametrize("act_order", [False, True])
def test_beats_rounding_to_nearest(form: Format, act_order: bool) -> None:
    for columns in (96, 150):  # 150: the last block is shorter
        weight, inputs, hessian = case(columns=columns)
        found = gptq(weight, hessian, form, act_order=act_order)
        plain = rtn(weight, form)
        assert (found.codes.dtype, found.scales.shape) == (torch.int8, plain.scales.shape)
        error = output_error(inputs, weight, found.dequantized())
        assert error < 0.85 * output_error(inputs, weight, plain.dequantized())


def test_uncorrelated_inputs_are_rounded_to_nearest() -> None:
    weight = case()[0]
    for form in (CHANNELS, W4, W4_ASYMMETRIC, W2):
        found, plain = gptq(weight, torch.eye(96), form), rtn(weight, form)
        assert torch.equal(found.codes, plain.codes)
        assert torch.equal(found.scales, plain.scales)
        if found.zero_points is not None and plain.zero_points is not None:
            assert torch.equal(found.zero_points, plain.zero_points)


def test_act_order_keeps_the_unchanged_weights_grid() -> None:
    weight, _, hessian = case()
    assert torch.equal(gptq(weight, hessian, W4, act_order=True).scales, rtn(weight, W4).scales)
    assert not torch.equal(gptq(weight, hessian, W4).scales, rtn(weight, W4).scales)


def test_later_blocks_have_the_grid_of_updated_weights() -> None:
    weight, _, hessian = case()
    found, plain = gptq(weight, hessian, W4), rtn(weight, W4)
    assert torch.equal(found.scales[:, 0], plain.scales[:, 0])
    assert bool((found.scales[:, 1] != plain.scales[:, 1]).any())


def test_a_clip_shortens_every_range() -> None:
    weight, _, hessian = case()
    for form, shape in ((CHANNELS, (24,)), (W4, (24, 3))):
        kept = torch.full(shape, 0.5)
        found = gptq(weight, hessian, form, act_order=True, clip_frac=kept)
        assert torch.equal(found.scales, rtn(weight, form, kept).scales)


def test_unseen_channels_keep_their_rounded_weights() -> None:
    weight, inputs, _ = case()
    inputs[:, 5] = 0.0
    hessian = inputs.T @ inputs
    found = gptq(weight, hessian, CHANNELS)
    assert torch.equal(found.codes[:, 5], rtn(weight, CHANNELS).codes[:, 5])
    assert bool((found.codes[:, 5] != 0).any())
    zeros = gptq(weight, torch.zeros(96, 96), W4)
    assert torch.equal(zeros.codes, rtn(weight, W4).codes)


@pytest.mark.parametrize("form", [CHANNELS, W4, W4_ASYMMETRIC], ids=["channels", "symmetric", "asymmetric"])
def test_pruned_weights_stay_zero(form: Format) -> None:
    weight, _, hessian = case()
    weight[weight.abs() < 0.05] = 0.0
    rounded = gptq(weight, hessian, form).dequantized()
    assert bool((rounded[weight == 0.0] == 0.0).all())


def test_arguments_are_left_as_they_are() -> None:
    weight, _, hessian = case()
    copies = weight.clone(), hessian.clone()
    gptq(weight, hessian, W4)
    assert torch.equal(weight, copies[0])
    assert torch.equal(hessian, copies[1])


def test_what_cannot_be_used() -> None:
    weight, _, hessian = case()
    with pytest.raises(QuantizationError, match="Hessian holds values that are not finite"):
        gptq(weight, hessian * float("nan"), W4)
    with pytest.raises(QuantizationError, match="weight holds values that are not finite"):
        gptq(weight * float("inf"), hessian, W4)
    with pytest.raises(QuantizationError, match="damp_frac"):
        inverse_factor(torch.ones(3, 3), damp_frac=0.0)


@pytest.mark.parametrize(("form", "scheme"), [(W4, "sym"), (W4_ASYMMETRIC, "asym")], ids=["sym", "asym"])
def test_error_is_not_above_neural_compressors(form: Format, scheme: str) -> None:
    library = pytest.importorskip("neural_compressor.adaptor.ox_utils.weight_only")
    weight, inputs, hessian = case(48, 256)
    theirs = library.gptq(weight.T.numpy().copy(), hessian.numpy().copy(), 4, 32, scheme)
    their_error = output_error(inputs, weight, torch.from_numpy(theirs.T).float())
    our_error = output_error(inputs, weight, gptq(weight, hessian, form).dequantized())
    assert 0.5 * their_error < our_error < 1.02 * their_error
