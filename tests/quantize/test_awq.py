"""AWQ: never worse than rounding to nearest on its own tokens, and it finds what was planted."""

import pytest
import torch
from torch import Tensor

from holdfast.errors import CalibrationError, QuantizationError
from holdfast.quantize.formats import Format
from holdfast.quantize.weights.awq import output_error, scales_at, search_clip, search_scales
from holdfast.quantize.weights.rtn import rtn

FORMS = {
    "w4": Format(4, None, 32),
    "w4 asymmetric": Format(4, None, 32, symmetric_weights=False),
    "w2": Format(2, None, 16),
    "channels": Format(8, 8, 0),
}
SALIENT = 40


def case(*, loud: float = 1.0) -> tuple[list[Tensor], Tensor]:
    """Two weights that read one input; channel SALIENT is `loud` times as strong."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, 96, generator=generator) * 0.1 for rows in (16, 24)]
    inputs = torch.randn(200, 96, generator=generator)
    inputs[:, SALIENT] *= loud
    return weights, inputs


def error_with(scales: Tensor, weights: list[Tensor], inputs: Tensor, form: Format) -> float:
    return sum(
        output_error(weight, rtn(weight * scales, form).dequantized() / scales, inputs)
        for weight in weights
    )


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("loud", [1.0, 60.0])
def test_scales_are_never_worse_than_rounding_to_nearest(name: str, loud: float) -> None:
    weights, inputs = case(loud=loud)
    scales = search_scales(weights, inputs, inputs.abs().mean(dim=0), FORMS[name])
    assert scales.shape == (96,)
    plain = error_with(torch.ones(96), weights, inputs, FORMS[name])
    assert error_with(scales, weights, inputs, FORMS[name]) <= plain


@pytest.mark.parametrize("name", ["w4", "w4 asymmetric", "w2"])
def test_a_planted_salient_channel_is_protected(name: str) -> None:
    weights, inputs = case(loud=60.0)
    form = FORMS[name]
    scales = search_scales(weights, inputs, inputs.abs().mean(dim=0), form)
    assert int(scales.argmax()) == SALIENT
    assert float(scales[SALIENT] / scales.median()) > 2.0
    assert error_with(scales, weights, inputs, form) < 0.5 * error_with(
        torch.ones(96), weights, inputs, form
    )


def test_linears_of_different_widths_share_their_scales() -> None:
    weights, inputs = case(loud=60.0)
    means = inputs.abs().mean(dim=0)
    forms = [FORMS["w4"], FORMS["w2"]]
    scales = search_scales(weights, inputs, means, forms)
    assert not torch.equal(scales, torch.ones(96))
    with pytest.raises(ValueError, match="argument"):
        search_scales(weights, inputs, means, forms[:1])


def test_scales_by_hand() -> None:
    means = torch.tensor([4.0, 1.0, 0.0])  # alpha 1/2: 2 and 1, centred by sqrt(2 * 1); silent: 1
    torch.testing.assert_close(
        scales_at(means, 0.5), torch.tensor([2.0, 1.0, 2.0**0.5]) / 2.0**0.5, rtol=1e-6, atol=0.0
    )
    assert scales_at(means, 0.0).tolist() == [1.0, 1.0, 1.0]
    assert scales_at(torch.zeros(3), 0.5).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", FORMS)
def test_a_clip_is_never_worse_for_any_output(name: str) -> None:
    form = FORMS[name]
    (weight, _), inputs = case()
    kept = search_clip(weight, inputs, form)
    blocks = -(-96 // form.block_size) if form.in_blocks else None
    assert kept.shape == ((16,) if blocks is None else (16, blocks))
    assert 0.5 - 1e-6 <= float(kept.amin()) <= float(kept.amax()) == 1.0

    def row_errors(clip: Tensor | None) -> Tensor:
        return (inputs @ (weight - rtn(weight, form, clip).dequantized()).T).square().sum(dim=0)

    assert bool((row_errors(kept) <= row_errors(None)).all())
    if form.weight_bits < 8:
        assert float(row_errors(kept).sum()) < float(row_errors(None).sum())


def test_an_outlier_on_a_silent_channel_is_clipped() -> None:
    (weight, _), inputs = case()
    weight[3, 10], inputs[:, 10] = 1.0, 0.0  # it takes the scale and moves nothing
    kept = search_clip(weight, inputs, FORMS["w4"])
    assert float(kept[3, 0]) < 0.7 < float(kept[3, 1])


def test_no_inputs_and_bad_inputs() -> None:
    weights, inputs = case()
    with pytest.raises(CalibrationError, match="no calibration tokens"):
        search_scales(weights, inputs[:0], inputs.abs().mean(dim=0), FORMS["w4"])
    with pytest.raises(QuantizationError, match="calibration input holds values"):
        search_clip(weights[0], inputs * float("nan"), FORMS["w4"])
