"""Fake quantization against hand-worked numbers and against ONNX Runtime's own operators."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi._pybind_state import quantize_matmul_4bits
from onnxruntime.quantization.quant_utils import compute_scale_zp

from holdfast.quantize.fakequant import (
    activation_codes,
    activation_parameters,
    block_codes,
    block_scale,
    channel_scale,
    fake_quantize,
    fake_quantize_activation,
    fake_quantize_channels,
    fake_quantize_weight,
    quantize_codes,
    round_weight,
    to_blocks,
)
from holdfast.quantize.formats import Format

GENERATOR = np.random.default_rng(0)


def run_quantize_linear(
    values: NDArray[Any], scale: float, zero_point: int, clip: Sequence[float] | None = None
) -> NDArray[Any]:
    """uint8 codes that ONNX Runtime's QuantizeLinear gives, after a Clip where one is asked for."""
    constants = [
        numpy_helper.from_array(np.float32(scale), "scale"),
        numpy_helper.from_array(np.uint8(zero_point), "zero_point"),
    ]
    nodes = [helper.make_node("QuantizeLinear", ["x", "scale", "zero_point"], ["y"])]
    if clip is not None:
        constants += [numpy_helper.from_array(np.float32(end), f"end{i}") for i, end in enumerate(clip)]
        nodes = [helper.make_node("Clip", ["x", "end0", "end1"], ["c"]), nodes[0]]
        nodes[1].input[0] = "c"
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(values.shape))],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, None)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    codes: NDArray[Any] = session.run(None, {"x": values})[0]
    return codes


def test_hand_worked_example() -> None:
    # range [-1, 2] at 2 bits: scale = 3 / 3 = 1, zero point = 1, codes 0..3
    scale, zero_point = activation_parameters(torch.tensor(-1.0), torch.tensor(2.0), bits=2)
    assert (float(scale), float(zero_point)) == (1.0, 1.0)
    values = torch.tensor([-5.0, -1.5, -0.5, 0.5, 1.5, 2.5, 9.0])
    # round half to even: -1.5 -> -2, -0.5 -> 0, 0.5 -> 0, 1.5 -> 2, 2.5 -> 2; then + 1, clamped
    assert quantize_codes(values, scale, zero_point, 0, 3).tolist() == [0, 0, 1, 1, 3, 3, 3]
    quantized = fake_quantize_activation(values, torch.tensor(-1.0), torch.tensor(2.0), bits=2)
    assert quantized.tolist() == [-1, -1, 0, 0, 2, 2, 2]


@pytest.mark.parametrize("bits", [8, 6, 4, 2])
@pytest.mark.parametrize("ends", [(-1.3, 2.7), (0.4, 3.1), (-2.5, -0.1), (-1e-3, 50.0)])
def test_parameters_are_onnxruntimes(bits: int, ends: tuple[float, float]) -> None:
    low, high = (np.array(end, dtype=np.float32) for end in ends)
    codes = np.array(0, dtype=np.uint8), np.array(2**bits - 1, dtype=np.uint8)
    zero_point, scale = compute_scale_zp(low, high, *codes)
    found = activation_parameters(torch.tensor(low), torch.tensor(high), bits)
    assert np.float32(found[0]) == scale
    assert int(found[1]) == int(zero_point)


def test_empty_range_quantizes_to_nothing() -> None:
    zero = torch.tensor(0.0)
    scale, zero_point = activation_parameters(zero, zero, bits=8)
    assert (float(scale), float(zero_point)) == (1.0, 0.0)


def test_codes_are_those_of_quantize_linear() -> None:
    values = GENERATOR.normal(0.0, 3.0, size=20000).astype(np.float32)
    scale, zero_point = activation_parameters(torch.tensor(-4.1), torch.tensor(6.3), bits=8)
    ties = (np.arange(-40, 40) + 0.5).astype(np.float32) * np.float32(scale)
    values = np.concatenate([values, ties])
    expected = run_quantize_linear(values, float(scale), int(zero_point))
    found = quantize_codes(torch.from_numpy(values), scale, zero_point, 0, 255)
    np.testing.assert_array_equal(found.numpy(), expected)


def test_fewer_bits_are_a_clip_before_the_same_operator() -> None:
    values = GENERATOR.normal(0.0, 3.0, size=20000).astype(np.float32)
    scale, zero_point = activation_parameters(torch.tensor(-2.1), torch.tensor(3.3), bits=4)
    ends = [float((code - zero_point) * scale) for code in (0, 15)]
    expected = run_quantize_linear(values, float(scale), int(zero_point), clip=ends)
    found = quantize_codes(torch.from_numpy(values), scale, zero_point, 0, 15)
    np.testing.assert_array_equal(found.numpy(), expected)
    assert expected.max() == 15


def test_a_channel_of_zeros_stays_zero() -> None:
    weight = torch.tensor([[0.0, 0.0], [1.0, -2.0]])
    assert channel_scale(weight)[0].item() == 1.0
    quantized = fake_quantize_channels(weight)
    assert quantized[0].tolist() == [0.0, 0.0]
    torch.testing.assert_close(quantized[1], torch.tensor([1.0, -2.0]), atol=0.01, rtol=0.0)


def test_zero_weights_stay_zero_under_scale_and_clip() -> None:
    weight = torch.from_numpy(GENERATOR.normal(size=(6, 16)).astype(np.float32))
    weight[weight.abs() < 0.5] = 0.0
    scaled = weight * torch.rand(16).add(0.1)
    quantized = fake_quantize_channels(scaled, torch.full((6,), 0.6))
    assert bool((quantized[weight == 0.0] == 0.0).all())


@pytest.mark.parametrize("dtype", [np.float32, np.float16])  # 16-bit weights lie on ties
def test_block_scales_and_codes_are_those_of_matmulnbits(dtype: type[np.floating[Any]]) -> None:
    columns, rows, size = 1024, 50, 16
    weight = GENERATOR.normal(size=(columns, rows)).astype(dtype).astype(np.float32)
    weight[:size, 0] = 0.0
    weight[0, 1], weight[1, 1] = 3.0, -3.0  # a tie of both ends: the negative one decides
    packed = np.zeros((rows, columns // size, size // 2), np.uint8)
    scales = np.zeros((rows, columns // size), np.float32)
    zero_points = np.zeros((rows, columns // size // 2), np.uint8)
    quantize_matmul_4bits(packed, weight, scales, zero_points, size, rows, columns, True)
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(rows, -1, size).astype(int) - 8

    blocks = to_blocks(torch.from_numpy(weight.T.copy()), size)
    scale = block_scale(blocks)
    np.testing.assert_array_equal(scale[..., 0].numpy(), scales)
    safe = torch.where(scale == 0.0, 1.0, scale)
    found = block_codes(blocks, safe)
    np.testing.assert_array_equal(found.numpy(), codes)


FORMATS = {
    "8 bits per channel": Format(8, 8, 0),
    "8 bits per tensor": Format(8, 8, 0, per_channel=False),
    "8 bits in blocks": Format(8, None, 16),
    "4 bits": Format(4, None, 16),
    "4 bits, asymmetric": Format(4, None, 16, symmetric_weights=False),
    "2 bits": Format(2, None, 16),
    "2 bits, asymmetric": Format(2, None, 16, symmetric_weights=False),
}


@pytest.mark.parametrize("name", FORMATS)
def test_codes_stand_for_what_learning_computes(name: str) -> None:
    """Clip and offset too: the artifact's integers are the loop's floats."""
    form = FORMATS[name]
    weight = torch.from_numpy(GENERATOR.normal(size=(7, 40)).astype(np.float32))
    clip = torch.linspace(0.5, 1.0, 7)
    if form.in_blocks:
        clip = clip[:, None].repeat(1, 3)
    offset = torch.from_numpy(GENERATOR.uniform(-0.5, 0.5, size=(7, 40)).astype(np.float32))
    learned = fake_quantize_weight(weight, form, clip, offset)
    codes = round_weight(weight, form, clip, offset)
    torch.testing.assert_close(learned, codes.dequantized(), rtol=0.0, atol=1e-6)
    assert int(codes.codes.min()) >= form.code_low
    assert int(codes.codes.max()) <= form.code_high
    nearest = round_weight(weight, form, clip)
    moved = (codes.codes.int() - nearest.codes.int()).abs()
    assert int(moved.max()) == 1  # an offset chooses between the two neighbours
    assert 0.05 < float(moved.float().mean()) < 0.6


@pytest.mark.parametrize("name", FORMATS)
def test_gradients_reach_weight_clip_and_offset(name: str) -> None:
    form = FORMATS[name]
    weight = torch.from_numpy(GENERATOR.normal(size=(3, 32)).astype(np.float32)).requires_grad_()
    clip = torch.full((3, 2) if form.in_blocks else (3,), 0.8, requires_grad=True)
    offset = torch.zeros(3, 32, requires_grad=True)
    fake_quantize_weight(weight, form, clip, offset).square().sum().backward()
    for parameter in (weight, clip, offset):
        assert parameter.grad is not None
        assert float(parameter.grad.abs().sum()) > 0.0


@pytest.mark.parametrize("bits", [8, 5, 4])
def test_signed_activations_are_symmetric(bits: int) -> None:
    low, high = torch.tensor(-1.0), torch.tensor(3.0)
    scale, zero_point = activation_parameters(low, high, bits, signed=True)
    most = 2 ** (bits - 1) - 1
    assert (float(zero_point), activation_codes(bits, signed=True)) == (0.0, (-most, most))
    assert float(scale) == pytest.approx(3.0 / most)
    found = fake_quantize_activation(torch.tensor([-9.0, 9.0]), low, high, bits, signed=True)
    torch.testing.assert_close(found, torch.tensor([-3.0, 3.0]), rtol=1e-6, atol=0.0)


def test_symmetric_unsigned_parameters_are_onnxruntimes() -> None:
    low, high = np.array(-1.3, dtype=np.float32), np.array(2.7, dtype=np.float32)
    zero_point, scale = compute_scale_zp(low, high, np.uint8(0), np.uint8(255), symmetric=True)
    found = activation_parameters(torch.tensor(low), torch.tensor(high), 8, symmetric=True)
    assert np.float32(found[0]) == scale
    assert int(found[1]) == int(zero_point)


def test_gradients_match_the_lsq_formula() -> None:
    values = torch.tensor([-3.0, -0.4, 0.3, 1.26, 9.0], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    zero_point = torch.tensor(2.0, requires_grad=True)
    fake_quantize(values, scale, zero_point, 0, 7).sum().backward()
    # codes: -6+2 -> 0, -1+2 = 1, 1+2 = 3, 3+2 = 5, 18+2 -> 7; the ends are outside
    assert values.grad is not None
    assert values.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]
    inside = sum(round(v / 0.5) - v / 0.5 for v in (-0.4, 0.3, 1.26))
    assert scale.grad is not None
    assert float(scale.grad) == pytest.approx(inside + (0 - 2) + (7 - 2), abs=1e-5)
    assert zero_point.grad is not None
    assert float(zero_point.grad) == pytest.approx(-2 * 0.5)


def test_range_gradient_reaches_both_ends() -> None:
    low = torch.tensor(-1.0, requires_grad=True)
    high = torch.tensor(1.0, requires_grad=True)
    fake_quantize_activation(torch.tensor([-2.0, 0.3, 3.0]), low, high, bits=4).sum().backward()
    assert low.grad is not None
    assert high.grad is not None
    assert float(low.grad) == pytest.approx(1.0, abs=0.3)
    assert float(high.grad) == pytest.approx(1.0, abs=0.3)
