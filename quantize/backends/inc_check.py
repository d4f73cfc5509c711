"""What neural-compressor wrote is loaded, run, and held against what was asked for."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from holdfast.errors import ExecutionError, ParityError, QuantizationError
from holdfast.exporter.graph import GraphLinear
from holdfast.exporter.parity import Divergence, Logits, compare_distributions, open_session
from holdfast.quantize.backends.inc_samples import sample_feeds
from holdfast.quantize.formats import Format
from holdfast.quantize.graph import Graph, histogram

QUANTIZING = ("uantize", "QLinear", "Integer", "NBits", "QAttention")
CHECKED_PROMPTS = 8
SMOOTH_ATOL = 1e-2  # largest logit difference that scaling channels back and forth may make


def check_written(
    float_model: onnx.ModelProto, written: onnx.ModelProto, prompts: Sequence[Sequence[int]]
) -> Divergence:
    """Load and run both graphs on the same prompts; the logits have to be numbers.

    Raises:
        QuantizationError: ONNX Runtime refuses what was written, cannot run it, or it gives NaN.
    """
    shown = prompts[:CHECKED_PROMPTS]
    try:
        return compare_distributions(run(float_model, shown), run(written, shown))
    except (ExecutionError, ParityError) as error:
        raise QuantizationError(
            f"neural-compressor wrote a graph that does not run ({error}): use `backend: ort`, or exclude "
            "the linear that it names."
        ) from error


def require_same_function(found: Divergence, what: str) -> None:
    """Raise QuantizationError where a float graph was to stay the same function and did not."""
    if found.max_abs > SMOOTH_ATOL:
        raise QuantizationError(
            f"neural-compressor's {what} changed the float graph by up to {found.max_abs:.3g} in a logit, "
            f"and {SMOOTH_ATOL:g} is allowed: use `backend: ort`."
        )


def run(model: onnx.ModelProto, prompts: Sequence[Sequence[int]]) -> Logits:
    """Logits float32 [tokens of all prompts, vocabulary].

    Raises:
        ExecutionError: ONNX Runtime refuses the graph or cannot run it.
    """
    with tempfile.TemporaryDirectory(prefix="holdfast-inc-") as name:
        path = Path(name) / "model.onnx"
        copy = onnx.ModelProto()  # saving with external data empties what is saved
        copy.CopyFrom(model)
        onnx.save_model(copy, path, save_as_external_data=True, location="model.data")
        del copy
        session = open_session(path)
        feeds = [sample_feeds(model.graph, prompt) for prompt in prompts]
        try:
            logits = [session.run(["logits"], feed)[0][0] for feed in feeds]
        except Exception as error:  # onnxruntime's exceptions have no common base but Exception
            raise ExecutionError(f"ONNX Runtime cannot run the graph: {error}") from error
    return np.concatenate(logits)


def check_operators(
    model: onnx.ModelProto, modules: Mapping[str, GraphLinear], formats: Mapping[str, Format]
) -> None:
    """Every linear is what was asked for, and nothing else was quantized.

    Raises:
        QuantizationError: the operator histogram differs, or a linear's operator.
    """
    nodes = {modules[path].node: format for path, format in formats.items()}
    graph = Graph(model)
    inputs = set()
    for path, format in formats.items():
        product = graph.producer(
            modules[path].output, "MatMulNBits" if format.in_blocks else "MatMul", path
        )
        if format.activation_bits is not None:
            inputs.add(graph.producer(product.input[0], "DequantizeLinear", path).name)
    blocks = sum(format.in_blocks for format in nodes.values())
    wanted = {
        "DequantizeLinear": len(inputs) + len(nodes) - blocks,
        "MatMulNBits": blocks,
        "QuantizeLinear": len(inputs),
    }
    found = {k: n for k, n in histogram(model).items() if any(part in k for part in QUANTIZING)}
    if found != {kind: count for kind, count in wanted.items() if count}:
        raise QuantizationError(
            f"neural-compressor was asked to quantize {len(nodes)} products, which takes {wanted}, and "
            f"wrote {found}: use `backend: ort`."
        )
