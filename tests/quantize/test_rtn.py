"""Rounding to nearest against ONNX Runtime's own quantizers, bit for bit."""

from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto
from onnxruntime.quantization.quant_utils import compute_scale_zp, quantize_nparray
from torch import Tensor

from holdfast.errors import QuantizationError
from holdfast.quantize.formats import Format
from holdfast.quantize.weights.codes import PackedWeight, WeightCodes, pack, unpack
from holdfast.quantize.weights.rtn import rtn


def weights(columns: int, *, half: bool) -> Tensor:
    """[out, in] with a block of zeros, a block of one sign, and ties between both ends."""
    weight = torch.from_numpy(np.random.default_rng(0).normal(size=(40, columns)).astype(np.float32))
    weight[0, :16] = 0.0
    weight[1, :16] = weight[1, :16].abs() + 0.1
    weight[2, 0], weight[2, 1] = 4.0, -4.0
    return weight.half().float() if half else weight


def onnxruntimes(weight: Tensor, form: Format) -> WeightCodes:
    """What `DefaultWeightOnlyQuantizer` makes of a weight."""
    from onnxruntime.quantization import matmul_nbits_quantizer as library

    config = library.DefaultWeightOnlyQuantConfig(
        block_size=form.block_size, is_symmetric=form.symmetric_weights, bits=form.weight_bits
    )
    quantizer = library.DefaultWeightOnlyQuantizer(config)
    packed, scales, zero_points = (
        torch.from_numpy(part)
        for part in quantizer.qbits_block_quant(np.ascontiguousarray(weight.T.numpy()))
    )
    kept = None if form.symmetric_weights else zero_points
    return unpack(PackedWeight(packed, scales, kept), bits=form.weight_bits, in_features=weight.shape[1])


@pytest.mark.parametrize("half", [True, False])  # weights stored in 16 bits lie on ties
@pytest.mark.parametrize("columns", [128, 104])
@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_blocks_are_onnxruntimes(bits: int, symmetric: bool, size: int, columns: int, half: bool) -> None:
    weight = weights(columns, half=half)
    form = Format(bits, None, size, symmetric_weights=symmetric)
    found, expected = rtn(weight, form), onnxruntimes(weight, form)
    assert torch.equal(found.codes, expected.codes)
    empty = expected.scales == 0.0  # a block of zeros, where any scale gives the same weights
    assert torch.equal(found.scales[~empty], expected.scales[~empty])
    assert torch.equal(found.dequantized(), expected.dequantized())
    assert (found.zero_points is None) == symmetric
    if found.zero_points is not None and expected.zero_points is not None:
        assert torch.equal(found.zero_points, expected.zero_points)
    assert int(empty.sum()) == (1 if size == 16 else 0)


def test_packed_bytes_are_onnxruntimes() -> None:
    weight = weights(104, half=True)
    form = Format(4, None, 32)
    assert torch.equal(pack(rtn(weight, form)).packed, pack(onnxruntimes(weight, form)).packed)


@pytest.mark.parametrize("per_channel", [True, False])
def test_channels_are_onnxruntimes(per_channel: bool) -> None:
    weight = weights(96, half=True)
    weight[3] = 0.0
    found = rtn(weight, Format(8, 8, 0, per_channel=per_channel))
    ends = np.array(-127, dtype=np.int8), np.array(127, dtype=np.int8)
    rows: list[Any] = list(weight.numpy()) if per_channel else [weight.numpy()]
    parts = []
    for row in rows:
        limit = np.abs(row).max()
        zero_point, scale = compute_scale_zp(-limit, limit, *ends, symmetric=True)
        codes = quantize_nparray(TensorProto.INT8, row, scale, zero_point)
        parts.append((np.atleast_2d(codes), np.float32(scale)))
    assert torch.equal(found.codes, torch.from_numpy(np.concatenate([codes for codes, _ in parts])))
    scales = torch.tensor([scale for _, scale in parts])
    assert torch.equal(found.scales[:, 0], scales.expand(len(weight)) if not per_channel else scales)
    assert found.zero_points is None


def test_hand_worked_example() -> None:
    # 2 bits, codes -2..1: the extreme 4 becomes -2, so the scale is -2; 1 / -2 = -0.5 ties up to 0
    found = rtn(torch.tensor([[4.0, -2.0, 1.0, -1.0]]), Format(2, None, 16))
    assert found.scales.tolist() == [[-2.0]]
    assert found.codes.tolist() == [[-2, 1, 0, 1]]
    # the range [-1, 2] in three steps: scale 1, zero point 1 - 2 = -1
    found = rtn(torch.tensor([[2.0, -1.0, 0.5, 0.0]]), Format(2, None, 16, symmetric_weights=False))
    assert found.zero_points is not None
    assert (found.scales.tolist(), found.zero_points.tolist()) == ([[1.0]], [[-1]])
    assert found.codes.tolist() == [[1, -2, 0, -1]]
    assert found.dequantized().tolist() == [[2.0, -1.0, 1.0, 0.0]]


def test_a_clip_shortens_the_range() -> None:
    weight = weights(64, half=False)
    for form in (Format(4, None, 32), Format(4, None, 32, symmetric_weights=False), Format(8, 8, 0)):
        shape = (40, 2) if form.in_blocks else (40,)
        plain, clipped = rtn(weight, form), rtn(weight, form, torch.full(shape, 0.5))
        torch.testing.assert_close(clipped.scales.abs(), plain.scales.abs() / 2, rtol=1e-5, atol=0.0)
        assert float(clipped.dequantized().abs().max()) < float(weight.abs().max()) * 0.6


def test_weights_that_are_not_finite() -> None:
    weight = torch.ones(2, 32)
    weight[1, 3] = float("nan")
    with pytest.raises(QuantizationError, match="weight holds values that are not finite"):
        rtn(weight, Format(4, None, 32))
