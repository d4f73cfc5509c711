"""HQQ: the library's own codes, lower p-norm error, and what the kernel takes of them."""

import logging

import pytest
import torch
from torch import Tensor

from holdfast.errors import QuantizationError
from holdfast.quantize.formats import Format
from holdfast.quantize.weights.codes import WeightCodes
from holdfast.quantize.weights.hqq import hqq
from holdfast.quantize.weights.rtn import rtn
from tests.quantize.nbits import run_matmul_nbits


def weights() -> Tensor:
    """Heavy-tailed, as trained weights are."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 200, generator=generator)
    return weight * torch.rand(48, 200, generator=generator).add(0.05).reciprocal() * 0.02


def norm(weight: Tensor, codes: WeightCodes) -> float:
    """||W - W^||_p^p with HQQ's p."""
    return float((weight - codes.dequantized()).abs().pow(0.7).sum())


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("bits", [4, 2])
def test_the_p_norm_is_below_rounding_to_nearest_with_the_same_ranges(bits: int, size: int) -> None:
    weight = weights()
    form = Format(bits, None, size, symmetric_weights=False)
    found = hqq(weight, form)
    least = {4: 0.98, 2: 0.999}[bits]  # two bits leave little to choose
    assert norm(weight, found) < least * norm(weight, rtn(weight, form))
    assert found.zero_points is not None
    assert found.zero_points.dtype == torch.float32
    assert bool((found.zero_points != found.zero_points.round()).any())


def test_codes_are_the_librarys() -> None:
    from onnxruntime.quantization import matmul_nbits_quantizer as library

    weight = weights()
    config = library.HQQWeightOnlyQuantConfig(block_size=32, bits=4)
    codes, scales, zero_points = library.HQQWeightOnlyQuantizer(config).quantize_internal(
        weight, bits=4, group_size=32
    )
    found = hqq(weight, Format(4, None, 32))
    assert torch.equal(found.codes.int() + 8, codes[:, :200])
    assert torch.equal(found.scales, scales)
    assert found.zero_points is not None
    torch.testing.assert_close(found.zero_points + 8.0, zero_points, atol=2.0**-16, rtol=0.0)


def test_eight_bits_have_whole_zero_points() -> None:
    weight = weights()
    weight[0, :32] = weight[0, :32].abs() + 0.5  # of one sign: HQQ's own zero point is no code
    form = Format(8, None, 32, symmetric_weights=False)
    found, plain = hqq(weight, form), rtn(weight, form)
    assert found.zero_points is not None
    assert found.zero_points.dtype == torch.int8
    assert norm(weight, found) < 1.01 * norm(weight, plain)
    assert torch.equal(found.dequantized()[0, :32], plain.dequantized()[0, :32])


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_the_kernel_multiplies_with_them(bits: int) -> None:
    weight = weights()
    found = hqq(weight, Format(bits, None, 32))
    values = torch.randn(5, 200, generator=torch.Generator().manual_seed(1))
    expected = values @ found.dequantized().T
    torch.testing.assert_close(run_matmul_nbits(values, found, 1), expected, atol=2e-4, rtol=0.0)
    # float32 zero points leave no integer path: level 4 is level 1
    difference = float((run_matmul_nbits(values, found, 4) - expected).abs().max())
    assert (difference > 1e-3) == (bits == 8)


def test_the_root_logger_is_left_alone() -> None:
    root = logging.getLogger()
    before = root.level, list(root.handlers)
    hqq(weights(), Format(4, None, 32))
    assert (root.level, root.handlers) == before


def test_what_cannot_be_used() -> None:
    with pytest.raises(QuantizationError, match="use `rtn`"):
        hqq(weights(), Format(8, 8, 0))
    with pytest.raises(QuantizationError, match="not finite"):
        hqq(weights() * float("nan"), Format(4, None, 32))
