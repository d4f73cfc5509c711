"""The neural-compressor backend: nothing taken on trust. What needs no worker is tested first."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from holdfast.errors import QuantizationError
from holdfast.exporter.graph import GraphLinear
from holdfast.quantize.backends import inc, inc_static
from holdfast.quantize.backends.inc_blocks import codes_of, codes_on_grid, write_blocks
from holdfast.quantize.backends.inc_check import check_operators, check_written, run
from holdfast.quantize.backends.inc_samples import SampleLoader, even_length
from holdfast.quantize.backends.ort import join_codes
from holdfast.quantize.formats import Format
from holdfast.quantize.record import ActivationRange
from holdfast.quantize.weights.codes import WeightCodes
from tests.quantize.inc_examples import PROMPTS, W4, W8A4, W8A8, grid_weight, modules_of, quantize, worker

# --- weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("width", [48, 40])  # whole blocks, and a shorter one at the end
def test_codes_on_an_unknown_grid_are_found(bits: int, symmetric: bool, width: int) -> None:
    format = Format(bits, None, 16, symmetric_weights=symmetric)
    _, weight = grid_weight(format, width, seed=bits)
    found = codes_on_grid(weight.numpy(), format)
    torch.testing.assert_close(found.dequantized(), weight, rtol=1e-5, atol=1e-6)
    assert (found.zero_points is None) == symmetric
    assert int(found.codes.amin()) >= -(2 ** (bits - 1)) and int(found.codes.amax()) < 2 ** (bits - 1)


def test_a_block_of_zeros_has_a_grid() -> None:
    found = codes_on_grid(np.zeros((2, 32), np.float32), W4)
    assert torch.equal(found.dequantized(), torch.zeros(2, 32))


def test_a_weight_on_no_grid_is_an_error() -> None:
    weight = np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32)
    with pytest.raises(QuantizationError, match="to no grid of 16 steps in blocks of 16"):
        codes_on_grid(weight, W4)


def test_unsigned_codes_become_signed() -> None:
    arrays = {
        "codes": np.array([[0, 15] * 16], np.uint8),
        "scales": np.array([[0.5, 0.25]], np.float32),
        "zero_points": np.array([[8, 3]], np.uint8),
    }
    found = codes_of(arrays, 20, replace(W4, symmetric_weights=False))
    assert found.codes.shape == (1, 20) and found.codes[0, :2].tolist() == [-8, 7]
    assert found.zero_points is not None and found.zero_points.tolist() == [[0, -5]]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_written_blocks_multiply_by_the_codes(bits: int, symmetric: bool, plain: Path) -> None:
    """ONNX Runtime's MatMulNBits against the same graph with the dequantized weights."""
    modules, model, expected = modules_of(plain), onnx.load(plain / "model.onnx"), None
    path = "model.layers.1.mlp.down_proj"
    linear = modules[path]
    format = Format(bits, None, 16, symmetric_weights=symmetric)
    weight, dequantized = grid_weight(format, linear.shape[0], seed=1)
    rows = linear.shape[1]
    weight = join_codes([weight, weight])
    weight = WeightCodes(
        weight.codes[:rows],
        weight.scales[:rows] / 50,
        None if weight.zero_points is None else weight.zero_points[:rows],
        bits,
        16,
    )
    tensor = next(t for t in model.graph.initializer if t.name == linear.weight)
    exact = onnx.ModelProto()
    exact.CopyFrom(model)
    target = next(t for t in exact.graph.initializer if t.name == linear.weight)
    target.CopyFrom(numpy_helper.from_array(weight.dequantized().numpy().T.copy(), linear.weight))
    expected = run(exact, PROMPTS)
    write_blocks(model, {linear.output: weight}, {linear.output: 1})
    check_operators(model, modules, {path: format})
    np.testing.assert_allclose(run(model, PROMPTS), expected, rtol=0, atol=2e-4)
    assert tensor.name not in {t.name for t in model.graph.initializer}
    assert dequantized.shape[1] == linear.shape[0]


# --- ranges ------------------------------------------------------------------------------------


def quantized_graph(low: float, high: float) -> onnx.ModelProto:
    """One product with a uint8 range on its input, as neural-compressor writes it."""
    scale, zero_point = np.float32((high - low) / 255), np.uint8(round(-low / (high - low) * 255))
    constants = {
        "scale": scale,
        "zero": zero_point,
        "codes": np.ones((2, 3), np.int8),
        "scales": np.full(3, 0.5, np.float32),
        "zeros": np.zeros(3, np.int8),
    }
    make = onnx.helper.make_node
    nodes = [
        make("QuantizeLinear", ["x", "scale", "zero"], ["q"], "x_QuantizeLinear"),
        make("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        make("DequantizeLinear", ["codes", "scales", "zeros"], ["w"], axis=1),
        make("MatMul", ["d", "w"], ["y"], "product"),
    ]
    real = onnx.TensorProto.FLOAT
    ends = [onnx.helper.make_tensor_value_info(n, real, [1, k]) for n, k in (("x", 2), ("y", 3))]
    tensors = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    graph = onnx.helper.make_graph(nodes, "static", ends[:1], ends[1:], tensors)
    opset = onnx.helper.make_opsetid("", 17)
    return onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)


ONE = {"one": GraphLinear("product", "x", "w", "y", None, True, (2, 3))}


@pytest.mark.parametrize(
    ("format", "zero_point", "scale"),
    [
        (W8A8, 64, 4.0 / 255),
        (W8A4, 4, 4.0 / 15),
        (Format(8, 8, 0, signed_activations=True, symmetric_activations=True), 0, 3.0 / 127),
        (Format(8, 4, 0, signed_activations=True, symmetric_activations=True), 0, 3.0 / 7),
    ],
)
def test_a_measured_range_in_another_format(format: Format, zero_point: int, scale: float) -> None:
    """ONNX Runtime then gives what the formula of QuantizeLinear does, ends clipped."""
    model = quantized_graph(-1.0, 3.0)
    inc_static.finish(model, ONE, {"one": format}, None)
    found = inc_static.read_ranges(model, ONE, {"one": format})["one"]
    assert found.zero_point == zero_point
    assert found.scale == pytest.approx(scale, rel=0.01)
    x = np.array([[-7.0, 2.9]], np.float32)
    low, high = inc_static.code_ends(format)
    if format.activation_bits == 8:  # no clip: the integer type is the limit
        low = -128 if format.signed_activations else 0
    codes = np.clip(np.rint(x / np.float32(found.scale)) + zero_point, low, high) - zero_point
    expected = np.repeat(codes.sum() * found.scale * 0.5, 3)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    np.testing.assert_allclose(session.run(["y"], {"x": x})[0][0], expected, rtol=1e-5)


def test_a_linear_without_a_learned_range_is_an_error() -> None:
    with pytest.raises(QuantizationError, match="no range for the input of `one`"):
        other = {"other": ActivationRange(low=0.0, high=1.0, scale=1 / 255, zero_point=0)}
        inc_static.finish(quantized_graph(-1.0, 3.0), ONE, {"one": W8A8}, other)


def test_learned_weights_need_a_scale_for_each_channel() -> None:
    model = quantized_graph(-1.0, 3.0)
    for tensor, whole in (("scales", np.float32(0.5)), ("zeros", np.int8(0))):
        found = next(t for t in model.graph.initializer if t.name == tensor)
        found.CopyFrom(numpy_helper.from_array(np.asarray(whole), tensor))
    codes = WeightCodes(torch.ones(3, 2, dtype=torch.int8), torch.ones(3, 1), None, 8, 0)
    with pytest.raises(QuantizationError, match="one weight scale in all"):
        inc_static.write_codes(model, ONE, {"one": codes})


# --- prompts -----------------------------------------------------------------------------------


def test_even_length_cuts_the_middle() -> None:
    found = even_length([[1, 2, 3, 4, 5, 6], [1, 7, 8, 6], [1, 6], [1, 9, 9, 9, 6]])
    assert found == [[1, 2, 5, 6], [1, 7, 8, 6], [1, 9, 9, 6]]


def test_samples_fill_every_required_input(fused: Path, plain: Path) -> None:
    for folder in (fused, plain):
        model = onnx.load(folder / "model.onnx")
        feeds, _ = next(iter(SampleLoader(model.graph, PROMPTS)))
        assert feeds["input_ids"].tolist() == [PROMPTS[0]]
        assert np.isfinite(run(model, PROMPTS[:1])).all()


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"formats": {}}, "given no linear"),
        ({"prompts": []}, "at least one token"),
        ({"prompts": [[1], []]}, "at least one token"),
        ({"method": "gptq"}, "rounds weights in blocks, and no linear"),
        ({"formats": {"lm_head": W4}}, "quantizes inputs, and no linear"),
        (
            {"method": "smoothquant", "ranges": {"lm_head": ActivationRange(0.0, 1.0, 0.1, 0)}},
            "which learned ranges do not fit",
        ),
        (
            {"formats": {"model.layers.0.mlp.up_proj": W8A8, "model.layers.0.mlp.gate_proj": W8A4}},
            "read one tensor, which neural-compressor quantizes once",
        ),
    ],
)
def test_what_it_cannot_do_is_said_at_once(given: dict[str, object], message: str, plain: Path) -> None:
    asked = {"formats": {"lm_head": W8A8}, "ranges": None, "codes": None, "method": "static"}
    with pytest.raises(QuantizationError, match=message):
        inc.require_possible(modules_of(plain), **(asked | {"prompts": PROMPTS} | given))  # type: ignore[arg-type]


def test_linears_of_one_product_share_a_format(fused: Path) -> None:
    formats = {"model.layers.0.mlp.gate_proj": W4, "model.layers.0.mlp.up_proj": Format(8, None, 16)}
    with pytest.raises(QuantizationError, match="share one MatMul in this graph"):
        inc.require_possible(modules_of(fused), formats, None, None, "rtn", PROMPTS)


def test_a_part_of_a_product_cannot_have_learned_weights(fused: Path) -> None:
    formats = {"model.layers.0.mlp.gate_proj": W4, "model.layers.0.mlp.up_proj": W4}
    weight, _ = grid_weight(W4, 32, seed=0)
    with pytest.raises(QuantizationError, match="others in the same MatMul have none"):
        inc.whole_products(modules_of(fused), formats, {"model.layers.0.mlp.up_proj": weight})


# --- workers that misbehave --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "gave no quantized model"),
        ("raise SystemExit('ValueError: broken')", r"gave no quantized model \(ValueError: broken\)"),
        ("open('quantized.onnx', 'wb').write(b'not a graph')", "cannot be read"),
        ("open('quantized.onnx', 'w'); raise ValueError('late')", r"failed \(ValueError: late\)"),
    ],
)
def test_misbehaving_worker_is_an_error(body: str, message: str, plain: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match=message):
        inc.run_worker(plain, tmp_path, {}, worker(tmp_path, body))


def test_a_worker_that_never_ends_is_ended(plain: Path, tmp_path: Path) -> None:
    command = worker(tmp_path, "import time; time.sleep(60)")
    with pytest.raises(QuantizationError, match="did not finish within 1 s"):
        inc.run_worker(plain, tmp_path, {}, command, timeout_s=1.0)


def test_graph_left_in_float_is_an_error(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = "import shutil; shutil.copyfile('model.onnx', 'quantized.onnx')"
    monkeypatch.setattr(inc, "WORKER", worker(tmp_path, body))
    monkeypatch.setattr(inc, "require_extra", lambda *_: None)
    with pytest.raises(QuantizationError, match="left it in full precision"):
        quantize(plain, {"lm_head": W8A8}, "static")


def test_a_dangling_input_is_an_error(fused: Path) -> None:
    """As neural-compressor leaves it with its default list of operators."""
    model = onnx.load(fused / "model.onnx")
    broken = onnx.load(fused / "model.onnx")
    node = next(n for n in broken.graph.node if n.op_type == "GroupQueryAttention")
    node.input[0] = "nowhere"
    with pytest.raises(QuantizationError, match="a graph that does not run"):
        check_written(model, broken, PROMPTS)


def test_nan_is_an_error(plain: Path) -> None:
    model = onnx.load(plain / "model.onnx")
    broken = onnx.load(plain / "model.onnx")
    linear = modules_of(plain)["model.layers.0.mlp.up_proj"]
    tensor = next(t for t in broken.graph.initializer if t.name == linear.weight)
    nan = np.full(linear.shape, np.nan, np.float32)
    tensor.CopyFrom(numpy_helper.from_array(nan, tensor.name))
    with pytest.raises(QuantizationError, match="NaN"):
        check_written(model, broken, PROMPTS)


def test_more_than_what_was_asked_is_an_error(plain: Path) -> None:
    """Two products in blocks where one was asked for."""
    modules, model = modules_of(plain), onnx.load(plain / "model.onnx")
    paths = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    width, rows = modules[paths[0]].shape
    weight = WeightCodes(
        torch.ones(rows, width, dtype=torch.int8), torch.full((rows, width // 16), 0.01), None, 4, 16
    )
    outputs = [modules[path].output for path in paths]
    write_blocks(model, dict.fromkeys(outputs, weight), dict.fromkeys(outputs, 1))
    check_operators(model, modules, dict.fromkeys(paths, W4))
    with pytest.raises(QuantizationError, match="was asked to quantize 1 products"):
        check_operators(model, modules, {paths[0]: W4})
