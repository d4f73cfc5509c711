"""Weight codes: packing against ONNX Runtime's own kernel, and the file against what can happen to it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from holdfast.errors import CalibrationError, QuantizationError
from holdfast.quantize.fakequant import fake_quantize_rows_int8
from holdfast.quantize.weights.codes import (
    CODES_FILE,
    LAYOUT,
    WeightCodes,
    load_codes,
    pack,
    require_sound,
    save_codes,
    unpack,
)
from tests.quantize.nbits import run_matmul_nbits

KINDS = ("symmetric", "asymmetric", "float")


def random_codes(bits: int, kind: str, *, rows: int = 6, columns: int = 64, size: int = 32) -> WeightCodes:
    generator = torch.Generator().manual_seed(bits)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    blocks = -(-columns // size)
    zero_points = torch.randint(low, high, (rows, blocks), generator=generator, dtype=torch.int8)
    return WeightCodes(
        codes=torch.randint(low, high, (rows, columns), generator=generator, dtype=torch.int8),
        scales=torch.randn(rows, blocks, generator=generator) / high,
        zero_points={"symmetric": None, "asymmetric": zero_points, "float": zero_points + 0.25}[kind],
        bits=bits,
        block_size=size,
    )


def assert_same(found: WeightCodes, expected: WeightCodes) -> None:
    assert (found.bits, found.block_size) == (expected.bits, expected.block_size)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scales, expected.scales)
    assert (found.zero_points is None) == (expected.zero_points is None)
    if found.zero_points is not None and expected.zero_points is not None:
        assert found.zero_points.dtype == expected.zero_points.dtype
        assert torch.equal(found.zero_points, expected.zero_points)


def test_hand_worked_dequantization() -> None:
    # two blocks of two: (3 - 1) * 0.5, (-4 - 1) * 0.5 | (7 - -2) * -2, (0 - -2) * -2
    weight = WeightCodes(
        codes=torch.tensor([[3, -4, 7, 0]], dtype=torch.int8),
        scales=torch.tensor([[0.5, -2.0]]),
        zero_points=torch.tensor([[1, -2]], dtype=torch.int8),
        bits=4,
        block_size=2,
    )
    assert weight.dequantized().tolist() == [[1.0, -2.5, -18.0, -4.0]]


@pytest.mark.parametrize(
    ("bits", "first", "bytes_"),
    [
        (8, [-128, 127, 0, 1], [0, 255, 128, 129]),
        (4, [-8, 7, 0, 1], [0x0 | 0xF << 4, 0x8 | 0x9 << 4]),  # the first code in the low half
        (2, [-2, 1, 0, -1], [0b00 | 0b11 << 2 | 0b10 << 4 | 0b01 << 6]),
    ],
)
def test_hand_worked_bytes(bits: int, first: list[int], bytes_: list[int]) -> None:
    codes = torch.full((1, 16), -(2 ** (bits - 1)), dtype=torch.int8)
    codes[0, :4] = torch.tensor(first, dtype=torch.int8)
    packed = pack(WeightCodes(codes, torch.ones(1, 1), None, bits, 16)).packed
    assert packed.shape == (1, 1, 16 * bits // 8)
    assert packed.flatten().tolist() == bytes_ + [0] * (2 * bits - len(bytes_))


@pytest.mark.parametrize("columns", [64, 40])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_packing_round_trip(bits: int, kind: str, columns: int) -> None:
    weight = random_codes(bits, kind, columns=columns, size=16)
    assert_same(unpack(pack(weight), bits=bits, in_features=columns), weight)


@pytest.mark.parametrize("columns", [128, 100])  # 100 is no multiple of the block size
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_matmulnbits_multiplies_with_the_dequantized_weight(bits: int, kind: str, columns: int) -> None:
    weight = random_codes(bits, kind, rows=24, columns=columns)
    values = torch.randn(7, columns, generator=torch.Generator().manual_seed(1))
    expected = values @ weight.dequantized().T
    if kind == "float" and bits == 8:  # why HQQ rounds its zero points at 8 bits
        with pytest.raises(Exception, match="MatMulNBits"):
            run_matmul_nbits(values, weight, 0)
        return
    for level in (0, 1):
        found = run_matmul_nbits(values, weight, level)
        torch.testing.assert_close(found, expected, atol=5e-5, rtol=0.0)
    # float32 zero points are computed in float32, whatever the level
    rows = values if kind == "float" else fake_quantize_rows_int8(values, weight.block_size)
    found = run_matmul_nbits(values, weight, 4)
    torch.testing.assert_close(found, rows @ weight.dequantized().T, atol=5e-5, rtol=0.0)
    assert kind == "float" or float((found - expected).abs().max()) > 1e-3


def test_pack_refuses_what_the_operator_does_not_take() -> None:
    for size in (0, 8, 24):
        columns = size or 64
        weight = random_codes(4, "symmetric", columns=columns, size=columns)
        with pytest.raises(QuantizationError, match="power of two"):
            pack(replace(weight, block_size=size))


def test_parts_that_contradict_each_other() -> None:
    weight = random_codes(4, "asymmetric")
    for changed, reason in (
        (replace(weight, bits=3), "3 bits"),
        (replace(weight, codes=weight.codes.int()), "instead of int8"),
        (replace(weight, codes=weight.codes[:, :30]), "shape"),
        (replace(weight, scales=weight.scales * float("nan")), "finite"),
        (replace(weight, zero_points=torch.full_like(weight.scales, float("inf"))), "finite"),
        (replace(weight, bits=2), "outside -2..1"),
    ):
        with pytest.raises(QuantizationError, match=reason):
            require_sound(changed)


def mixed() -> dict[str, WeightCodes]:
    both = random_codes(4, "symmetric", rows=8)
    halves = {
        name: replace(both, codes=both.codes[rows], scales=both.scales[rows])
        for name, rows in (("model.q", slice(0, 4)), ("model.k", slice(4, 8)))
    }
    channels = WeightCodes(both.codes, torch.ones(1, 1).expand(8, 1), None, 8, 0)
    return {**halves, "model.up": random_codes(2, "float"), "lm_head": channels}


def test_saved_codes_read_back(tmp_path: Path) -> None:
    weights = mixed()
    save_codes(weights, tmp_path)
    found = load_codes(tmp_path)
    assert list(found) == sorted(weights)
    for path, weight in weights.items():
        assert_same(found[path], weight)
    assert [path.name for path in tmp_path.iterdir()] == [CODES_FILE]


def test_the_same_codes_are_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_codes(mixed(), tmp_path / name)
    assert (tmp_path / "one" / CODES_FILE).read_bytes() == (tmp_path / "two" / CODES_FILE).read_bytes()


def test_unsound_codes_are_not_saved(tmp_path: Path) -> None:
    weight = random_codes(4, "symmetric")
    with pytest.raises(QuantizationError, match="shape"):
        save_codes({"a": replace(weight, scales=weight.scales[:3])}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="holds no codes"):
        load_codes(tmp_path)
    file = tmp_path / CODES_FILE
    save_codes({"a": random_codes(4, "asymmetric")}, tmp_path)
    whole, tensors = file.read_bytes(), load_file(file)
    index = '{"weights":{"a":{"bits":4,"block_size":32}},"version":1}'

    def expect(reason: str) -> None:
        with pytest.raises(CalibrationError, match=reason):
            load_codes(tmp_path)

    file.write_bytes(whole[: len(whole) // 2])
    expect("calibrate again")
    save_file(tensors, file)
    expect("calibrate again")
    save_file(tensors, file, {LAYOUT: index.replace("1}", "2}")})
    expect("version")
    save_file({"a.codes": tensors["a.codes"]}, file, {LAYOUT: index})
    expect("scales of `a` are missing")
    save_file({**tensors, "b.codes": torch.zeros(1)}, file, {LAYOUT: index})
    expect("belongs to `b.codes`")
    save_file(tensors, file, {LAYOUT: index.replace("4", "2")})
    expect("outside -2..1")
    save_file(tensors, file, {LAYOUT: index})
    assert list(load_codes(tmp_path)) == ["a"]
