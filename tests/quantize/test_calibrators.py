"""Ranges of the exported graph against the torch model's own activations, and against slower searches."""

import tracemalloc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxruntime.quantization.calibrate import HistogramCollector

from holdfast.errors import QuantizationError
from holdfast.exporter.architectures import linear_modules
from holdfast.exporter.export import export_model, read_export
from holdfast.exporter.graph import GraphLinear
from holdfast.exporter.source import load_source
from holdfast.quantize.activations.calibrators import Method, calibrated_ranges, equal_lengths, passes
from holdfast.quantize.activations.thresholds import (
    Histogram,
    entropy_ends,
    mse_ends,
    percentile_ends,
    quantization_errors,
    window_divergence,
)
from holdfast.quantize.fakequant import activation_parameters, fake_quantize_activation
from holdfast.recipe import ExportConfig
from tests.tiny import tiny_llama

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    """A tiny exported model; what its torch original reads, by module path."""

    graph: Path
    modules: dict[str, GraphLinear]
    prompts: list[list[int]]
    inputs: dict[str, Floats]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    source = load_source(tiny_llama(tmp_path_factory.mktemp("model"), seed=0))
    out = tmp_path_factory.mktemp("exported")
    export_model(tiny_llama(tmp_path_factory.mktemp("again"), seed=0), out, ExportConfig())
    draws = np.random.default_rng(0)
    prompts = [draws.integers(0, 300, size).tolist() for size in (9, 5, 9, 17, 5, 1, 30, 9)]
    found: dict[str, list[Floats]] = {path: [] for path in linear_modules(source.model)}
    for path, linear in linear_modules(source.model).items():
        linear.register_forward_pre_hook(
            lambda _, inputs, path=path: found[path].append(inputs[0].detach().numpy().reshape(-1))
        )
    with torch.no_grad():
        for prompt in prompts:
            source.model(torch.tensor([prompt]), use_cache=False)
    inputs = {path: np.concatenate(arrays) for path, arrays in found.items()}
    return Case(out / "model.onnx", read_export(out).modules, prompts, inputs)


def ranges(case: Case, **settings: Any) -> dict[str, tuple[float, float]]:
    chosen = {"method": "minmax", "bits": 8, "symmetric": False, **settings}
    return calibrated_ranges(case.graph, case.modules, case.prompts, **chosen)


def histogram(values: Floats, first: float, last: float, bins: int) -> Histogram:
    counts, _ = np.histogram(values, bins, range=(np.float32(first), np.float32(last)))
    return Histogram(counts, np.float32(first), np.float32(last), values.min(), values.max())


def skewed(seed: int, size: int = 20_000) -> Floats:
    """Values with far outliers, mostly on one side."""
    values = np.random.default_rng(seed).standard_t(3, size)
    return np.where(values < 0, values / 3, values).astype(np.float32)


def test_minmax_is_what_torch_reads(case: Case) -> None:
    found = ranges(case)
    assert found.keys() == case.inputs.keys() == case.modules.keys()
    for path, values in case.inputs.items():
        assert found[path] == pytest.approx((values.min(), values.max()), abs=1e-4)
    for path, (low, high) in ranges(case, symmetric=True).items():
        assert (-low, high) == (high, max(map(abs, found[path])))


@pytest.mark.parametrize("percentile", [90.3, 99.1])  # no sample lies on these quantiles
def test_percentile_is_the_quantile_within_a_bin(case: Case, percentile: float) -> None:
    found = ranges(case, method="percentile", percentile=percentile)
    for path, values in case.inputs.items():
        bin_width = 2 * np.abs(values).max() / 2048
        tail = (100 - percentile) / 200
        exact = np.quantile(values, [tail, 1 - tail], method="inverted_cdf")
        assert found[path] == pytest.approx(tuple(exact), abs=bin_width * 1.01)


def test_symmetric_percentile_counts_absolute_values(case: Case) -> None:
    found = ranges(case, method="percentile", percentile=95.3, symmetric=True)
    for path, values in case.inputs.items():
        exact = np.quantile(np.abs(values), 0.953, method="inverted_cdf")
        bin_width = np.abs(values).max() / 2048
        assert found[path][1] == pytest.approx(exact, abs=bin_width * 1.01)
        assert found[path][0] == -found[path][1]


def test_the_hundredth_percentile_is_minmax() -> None:
    values = skewed(0)
    limit = float(np.abs(values).max())
    low, high = percentile_ends(histogram(values, -limit, limit, 512), 100.0, symmetric=False)
    assert low == pytest.approx(values.min(), abs=2 * limit / 512)
    assert high == pytest.approx(values.max(), abs=2 * limit / 512)


@pytest.mark.parametrize("values", [skewed(1), np.maximum(skewed(2), 0), skewed(3, 300) + 4])
@pytest.mark.parametrize(("bins", "bits"), [(512, 8), (301, 3)])
def test_entropy_is_onnxruntimes_own_search(values: Floats, bins: int, bits: int) -> None:
    limit = np.float32(np.abs(values).max())
    own = histogram(values, -limit, limit, bins)
    collector = HistogramCollector("entropy", False, bins, 2**bits, 100.0, "same")
    theirs = (own.counts, own.edges, own.low, own.high, limit)
    expected = collector.get_entropy_threshold(theirs, 2**bits)
    found = entropy_ends(own, bits, symmetric=False)
    assert found == (float(expected[0]), float(expected[1]))
    assert entropy_ends(own, bits, symmetric=True)[1] == max(map(abs, found))


def test_onnxruntimes_default_bins_leave_entropy_no_choice() -> None:
    """128 bins merged into 128: why more are the default here."""
    values = skewed(4)
    limit = np.float32(np.abs(values).max())
    collector = HistogramCollector("entropy", False, 128, 128, 100.0, "same")
    own = histogram(values, -limit, limit, 128)
    theirs = (own.counts, own.edges, own.low, own.high, limit)
    assert collector.get_entropy_threshold(theirs, 128) == (values.min(), values.max())


def test_divergence_of_a_window_by_hand() -> None:
    """Two equal bins a step lose nothing, unequal ones do, and an empty window cannot be compared."""
    assert window_divergence(np.array([4, 4, 2, 2]), 0, 4, merged=2) == pytest.approx(0.0, abs=1e-6)
    assert window_divergence(np.array([3, 5, 2, 2]), 0, 4, merged=2) > 1e-3
    assert window_divergence(np.array([0, 0, 7, 7]), 0, 2, merged=1) == float("inf")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_mse_range_is_as_good_as_brute_force(bits: int, symmetric: bool) -> None:
    values = skewed(5, 4000)
    low, high = float(values.min()), float(values.max())
    found = mse_ends(histogram(values, low, high, 2048), bits, symmetric=symmetric)
    tried = np.linspace(1.0, 0.04, 13)
    pairs = (
        [(-max(-low, high) * f, max(-low, high) * f) for f in tried]
        if symmetric
        else [(low * f, high * g) for f in tried for g in tried]
    )
    best = min(true_error(values, pair, bits) for pair in pairs)
    assert true_error(values, found, bits) <= 1.02 * best
    assert bits == 8 or best < 0.8 * true_error(values, pairs[0], bits)


def true_error(values: Floats, ends: tuple[float, float], bits: int) -> float:
    """Squared error of the torch simulation on the values themselves."""
    low, high = (torch.tensor(end, dtype=torch.float32) for end in ends)
    whole = torch.from_numpy(values)
    return float((fake_quantize_activation(whole, low, high, bits) - whole).double().square().sum())


def test_errors_are_those_of_the_simulation() -> None:
    """With one value a bin, at its centre, nothing is approximated."""
    own = Histogram(np.ones(64, np.int64), *map(np.float32, (-2.0, 6.0, -1.9375, 5.9375)))
    centres = ((own.edges[:-1] + own.edges[1:]) / 2).astype(np.float32)
    found = quantization_errors(own, np.array([-1.5, -2.0]), np.array([3.0, 6.0]), 3)
    expected = [true_error(centres, (-1.5, 3.0), 3), true_error(centres, (-2.0, 6.0), 3)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    scale, zero_point = activation_parameters(torch.tensor(-1.5), torch.tensor(3.0), 3)
    assert (float(scale), float(zero_point)) == (pytest.approx(4.5 / 7), 2.0)


@pytest.mark.parametrize("method", ["percentile", "entropy", "mse"])
def test_order_of_the_prompts_does_not_matter(case: Case, method: Method) -> None:
    settings: dict[str, Any] = {"method": method, "bits": 4, "symmetric": False, "bins": 256}
    one = calibrated_ranges(case.graph, case.modules, case.prompts, **settings)
    other = calibrated_ranges(case.graph, case.modules, case.prompts[::-1], **settings)
    for path in one:
        assert one[path] == pytest.approx(other[path], rel=1e-5)
    extremes = ranges(case)
    for path, (low, high) in one.items():
        assert extremes[path][0] <= low < high <= extremes[path][1]


def test_memory_does_not_grow_with_the_prompts(case: Case) -> None:
    def peak(prompts: list[list[int]]) -> int:
        tracemalloc.start()
        calibrated_ranges(case.graph, case.modules, prompts, method="percentile", bits=8, symmetric=False)
        _, found = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return found

    prompts = np.random.default_rng(1).integers(0, 300, (24, 32)).tolist()
    peak(prompts[:16])  # what is imported and cached on the way
    activations = 4 * 24 * 32 * 32 * len({linear.input for linear in case.modules.values()})
    assert peak(prompts) - peak(prompts[:16]) < activations / 8


def test_progress_counts_every_pass(case: Case) -> None:
    done: list[int] = []
    ranges(case, method="mse", bins=256, on_done=done.append)
    assert sum(done) == passes("mse") * len(case.prompts) == 2 * passes("minmax") * len(case.prompts)


def test_only_prompts_of_one_length_share_a_run() -> None:
    assert equal_lengths([3, 2, 3, 2, 3]) == [[0, 2, 4], [1, 3]]
    assert equal_lengths([200] * 5) == [[0, 1], [2, 3], [4]]
    assert equal_lengths([4096, 4096]) == [[0], [1]]


@pytest.mark.parametrize("method", ["percentile", "entropy", "mse"])
@pytest.mark.parametrize("value", [0.0, -2.5])
def test_a_constant_tensor_keeps_its_value(tmp_path: Path, method: Method, value: float) -> None:
    graph, modules = constant_graph(tmp_path, value)
    settings: dict[str, Any] = {"method": method, "bits": 8, "bins": 256}
    found = calibrated_ranges(graph, modules, [[1, 2], [3]], symmetric=False, **settings)
    assert found == {"head": (value, value)}
    centred = calibrated_ranges(graph, modules, [[1, 2], [3]], symmetric=True, **settings)
    assert centred == {"head": (-abs(value), abs(value))}


def constant_graph(folder: Path, value: float) -> tuple[Path, dict[str, GraphLinear]]:
    """`logits = (0 * ids + value) @ weight`, with the weight in a file beside the graph."""
    make = onnx.helper.make_node
    nodes = [
        make("Cast", ["input_ids"], ["ids"], to=onnx.TensorProto.FLOAT),
        make("Unsqueeze", ["ids", "last"], ["wide"]),
        make("Mul", ["wide", "zero"], ["zeros"]),
        make("Add", ["zeros", "value"], ["hidden"]),
        make("MatMul", ["hidden", "weight"], ["logits"], "head"),
    ]
    arrays = {
        "last": np.array([-1]),
        "zero": np.float32(0),
        "value": np.float32(value),
        "weight": np.ones((1, 300), np.float32),
    }
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "constant",
        [info("input_ids", onnx.TensorProto.INT64, ["rows", "tokens"])],
        [info("logits", onnx.TensorProto.FLOAT, ["rows", "tokens", 300])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    path = folder / "model.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="model.onnx_data", size_threshold=64)
    assert (folder / "model.onnx_data").stat().st_size >= 1200
    linear = GraphLinear("head", "hidden", "weight", "logits", None, True, (1, 300))
    return path, {"head": linear}


def test_what_is_not_finite_is_named(case: Case, tmp_path: Path) -> None:
    """Token 7 has an infinite embedding, and is in the third prompt alone."""
    model = onnx.load(case.graph)
    table = next(t for t in model.graph.initializer if t.name == read_export(case.graph.parent).embedding)
    weights = numpy_helper.to_array(table).copy()
    weights[7] = np.inf
    table.CopyFrom(numpy_helper.from_array(weights, table.name))
    onnx.save(model, tmp_path / "model.onnx")
    prompts = [[1, 2], [3, 4], [5, 7], [6]]
    with pytest.raises(QuantizationError) as caught:
        calibrated_ranges(
            tmp_path / "model.onnx", case.modules, prompts, method="mse", bits=8, symmetric=False
        )
    assert str(caught.value) == (
        "`model.layers.0.self_attn.v_proj` reads NaN or infinity on calibration prompt 3 of 4: "
        "check the model's weights, or leave that prompt out."
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"percentile": 0.0}, "percentile above 0 and up to 100, found 0"),
        ({"method": "mse", "bins": 255}, "256 to 8192 bins for the `mse` ranges of 8-bit codes, found 255"),
    ],
)
def test_settings_out_of_range_are_refused(case: Case, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        ranges(case, **settings)


@pytest.mark.parametrize("prompts", [[], [[1], []]])
def test_no_prompt_is_an_error(case: Case, prompts: list[list[int]]) -> None:
    with pytest.raises(QuantizationError, match="at least one token"):
        calibrated_ranges(case.graph, case.modules, prompts, method="minmax", bits=8, symmetric=False)
