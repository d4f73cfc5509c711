"""neural-compressor itself, in its own process: what it rounds and measures, held against its graph."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from holdfast.errors import QuantizationError
from holdfast.quantize.backends import inc
from holdfast.quantize.backends.inc_check import check_operators, check_written
from holdfast.quantize.backends.inc_samples import SampleLoader
from holdfast.quantize.backends.ort import join_codes
from holdfast.quantize.formats import Format
from holdfast.quantize.graph import Graph, histogram, read_blocks, read_static
from holdfast.quantize.record import ActivationRange
from holdfast.quantize.weights.codes import WeightCodes
from holdfast.recipe import QuantizeConfig
from tests.quantize.inc_examples import (
    PROMPTS,
    W4,
    W8A4,
    W8A8,
    grid_weight,
    modules_of,
    needs_inc,
    quantize,
    worker,
)


def static_parameters(model: onnx.ModelProto, folder: Path, path: str) -> tuple[float, int]:
    found = read_static(Graph(model), path, modules_of(folder)[path].output)
    return float(found.input.scale), found.input.zero_point


@needs_inc
@pytest.mark.slow
def test_static_and_gptq_in_one_graph(plain: Path) -> None:
    """Own ranges and own GPTQ; the head in 4-bit activations, one linear left out."""
    modules = modules_of(plain)
    formats = {path: W8A8 if "mlp" in path else W4 for path in modules if path != "lm_head"}
    formats["lm_head"] = W8A4
    del formats["model.layers.0.mlp.up_proj"]
    model = quantize(plain, formats, "gptq")
    check_operators(model, modules, formats)
    ranges = inc.read_ranges(model, modules, formats)
    assert set(ranges) == {path for path, format in formats.items() if format.activation_bits}
    assert all(r.low <= 0 <= r.high and r.scale > 0 for r in ranges.values())
    head = read_static(Graph(model), "lm_head", modules["lm_head"].output)
    assert head.input.clip is not None and ranges["lm_head"].zero_point <= 15
    blocks = read_blocks(Graph(model), "q", modules["model.layers.0.self_attn.q_proj"].output)
    assert (blocks.bits, blocks.block_size, blocks.accuracy_level) == (4, 16, 1)
    agreement = check_written(onnx.load(plain / "model.onnx"), model, PROMPTS)
    assert agreement.same_top_frac > 0.3  # random weights; a wrong graph gives 1 in 300


@needs_inc
@pytest.mark.slow
def test_learned_ranges_and_codes_are_written_over(fused: Path) -> None:
    modules = modules_of(fused)
    attention = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    formats = {path: W4 for path in attention} | {"model.layers.1.mlp.down_proj": W8A8}
    codes = {}
    for index, path in enumerate(attention):
        first, last = modules[path].columns or (0, 0)
        whole = join_codes([grid_weight(W4, modules[path].shape[0], seed=index + n)[0] for n in range(4)])
        codes[path] = WeightCodes(
            whole.codes[: last - first], whole.scales[: last - first] / 40, None, 4, 16
        )
    width, rows = modules["model.layers.1.mlp.down_proj"].shape
    learned = torch.arange(rows * width).reshape(rows, width) % 255 - 127
    codes["model.layers.1.mlp.down_proj"] = WeightCodes(
        learned.to(torch.int8), torch.linspace(0.001, 0.002, rows)[:, None], None, 8, 0
    )
    ranges = {"model.layers.1.mlp.down_proj": ActivationRange(-1.0, 2.0, 3 / 255, 85)}
    model = quantize(fused, formats, "rtn", ranges=ranges, codes=codes)
    path = "model.layers.1.mlp.down_proj"
    assert static_parameters(model, fused, path) == (float(np.float32(3 / 255)), 85)
    found = read_static(Graph(model), path, modules[path].output)
    np.testing.assert_array_equal(found.weight_codes, learned.numpy().T.astype(np.int8))
    stored = read_blocks(Graph(model), "qkv", modules[attention[0]].output)
    ordered = sorted(attention, key=lambda p: modules[p].columns or (0, 0))
    expected = torch.cat([codes[p].scales for p in ordered]).flatten().numpy()
    np.testing.assert_array_equal(stored.scales, expected)


@needs_inc
@pytest.mark.slow
def test_smoothquant_keeps_the_function_and_searches_alpha(fused: Path) -> None:
    modules = modules_of(fused)
    formats = dict.fromkeys(modules, W8A8)
    model = quantize(fused, formats, "smoothquant", alpha="auto")
    before = histogram(onnx.load(fused / "model.onnx", load_external_data=False))
    assert histogram(model)["Mul"] > before["Mul"]
    products = {linear.node for linear in modules.values()}
    assert histogram(model)["DequantizeLinear"] - histogram(model)["QuantizeLinear"] == len(products)
    assert check_written(onnx.load(fused / "model.onnx"), model, PROMPTS).same_top_frac > 0.5


@needs_inc
@pytest.mark.slow
@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_weights_in_blocks(method: str, plain: Path) -> None:
    """8 bits in blocks, asymmetric: what its own writer cannot store."""
    format = Format(8, None, 16, symmetric_weights=False)
    formats = dict.fromkeys(modules_of(plain), format)
    model = quantize(plain, formats, method)
    blocks = read_blocks(Graph(model), "head", modules_of(plain)["lm_head"].output)
    assert (blocks.bits, blocks.symmetric) == (8, False)
    agreement = check_written(onnx.load(plain / "model.onnx"), model, PROMPTS)
    assert agreement.same_top_frac > 0.9


@needs_inc
@pytest.mark.slow
def test_gptq_is_closer_than_rounding(plain: Path, tmp_path: Path) -> None:
    """On its calibration inputs. neural-compressor's own call gives round-to-nearest to the last bit."""
    body = """
import json, numpy as np, onnx
from holdfast.quantize.backends import inc_weight_only as methods
from holdfast.quantize.backends.inc_samples import SampleLoader
from neural_compressor.adaptor.ox_utils.weight_only import gptq_quantize
asked = json.load(open("request.json"))
nodes, samples, model = asked["blocks"]["nodes"], asked["samples"], onnx.load("model.onnx")
repaired = methods.gptq(onnx.load("model.onnx"), nodes, samples, 0)
with methods._no_graph_writer():
    own = gptq_quantize(
        onnx.load("model.onnx"), SampleLoader(model.graph, samples),
        weight_config=methods.weight_config(model, nodes, "gptq"), n_samples=-1,
    )
rounded = methods.round_to_nearest(model, nodes)
node = next(iter(nodes))
found = rounded[node]
nearest = ((found["codes"] - 8.0).reshape(-1, found["scales"].shape[1], 16) * found["scales"][..., None])
np.savez(
    "compared.npz", repaired=repaired[node]["grid"], own=methods._weights(own.model, nodes)[node].array.T,
    nearest=nearest.reshape(len(nearest), -1), weight=methods._weights(model, nodes)[node].array.T,
)
onnx.save(model, "quantized.onnx")
"""
    modules = modules_of(plain)
    path = "model.layers.1.mlp.down_proj"
    asked = inc.request(modules, {path: W4}, QuantizeConfig(), method="gptq", prompts=PROMPTS)
    inc.run_worker(plain, tmp_path, asked, worker(tmp_path, body))
    found = np.load(tmp_path / "compared.npz")
    np.testing.assert_allclose(found["own"], found["nearest"], rtol=1e-5, atol=1e-7)
    inputs = read_tensor(onnx.load(plain / "model.onnx"), modules[path].input)
    errors = {
        name: float((((found[name] - found["weight"]) @ inputs.T) ** 2).mean())
        for name in ("repaired", "nearest")
    }
    assert errors["repaired"] < 0.8 * errors["nearest"]


def read_tensor(model: onnx.ModelProto, name: str) -> np.ndarray:
    """What a tensor holds on the prompts, float32 [tokens, width]."""
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    feeds = SampleLoader(model.graph, PROMPTS).feeds
    return np.concatenate([session.run([name], feed)[0][0] for feed in feeds])


@needs_inc
@pytest.mark.slow
def test_rtn_equals_what_its_own_writer_stores(plain: Path, tmp_path: Path) -> None:
    """At 4 bits, symmetric, neural-compressor writes MatMulNBits itself, and rightly."""
    body = """
import onnx
from neural_compressor.adaptor.ox_utils.weight_only import rtn_quantize
model = rtn_quantize(onnx.load("model.onnx"), num_bits=4, group_size=16, scheme="sym", accuracy_level=1)
onnx.save(model.model, "quantized.onnx")
"""
    own = inc.run_worker(plain, tmp_path, {}, worker(tmp_path, body))
    modules = modules_of(plain)
    model = quantize(plain, dict.fromkeys(modules, W4), "rtn")
    for path, linear in modules.items():
        ours, theirs = (read_blocks(Graph(m), path, linear.output) for m in (model, own))
        np.testing.assert_array_equal(ours.packed, theirs.packed)
        np.testing.assert_array_equal(ours.scales, theirs.scales.reshape(-1))


@needs_inc
@pytest.mark.slow
def test_no_model_from_fit_is_an_error(plain: Path) -> None:
    """Token ids outside the vocabulary: fit() swallows ONNX Runtime's error and returns None."""
    with pytest.raises(QuantizationError, match="neural-compressor gave no quantized model"):
        quantize(plain, {"lm_head": W8A8}, "static", prompts=[[100_000]])


def test_importing_the_backend_leaves_neural_compressor_alone() -> None:
    code = "import sys, holdfast.quantize.backends.inc; sys.exit('neural_compressor' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
