"""Intel Neural Compressor 3.7.1 as a backend: run apart, believed only where the file proves it.

neural-compressor brings its own ranges from a short calibration run; the learned ones are written
over them, so that nothing recalibrates them away.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from holdfast.errors import QuantizationError
from holdfast.exporter.export import EXTERNAL, GRAPH
from holdfast.exporter.graph import GraphLinear
from holdfast.extras import require_extra
from holdfast.quantize.backends import inc_worker
from holdfast.quantize.graph import Graph, add_clips
from holdfast.quantize.record import ActivationRange
from holdfast.recipe import QuantizeConfig

SAMPLES = [list(range(4, 12)), list(range(12, 16))]  # any ids do: these ranges are overwritten
WORKER = (sys.executable, "-m", inc_worker.__name__)
TIMEOUT_S = 3600.0


def quantize(
    export_folder: Path,
    modules: dict[str, GraphLinear],
    ranges: dict[str, ActivationRange],
    config: QuantizeConfig,
) -> onnx.ModelProto:
    """W8A8 or 4-bit RTN by neural-compressor, with the learned ranges.

    Arguments:
        modules: module path -> linear to quantize; every other MatMul stays float32.
        ranges: module path -> range of its input; unused for `w4`.

    Raises:
        MissingExtraError: neural-compressor is not installed.
        QuantizationError: it gave no model, or not the linears that were asked for.
    """
    require_extra("inc", "`backend: inc`")
    with tempfile.TemporaryDirectory(prefix="holdfast-inc-") as name:
        model = run_worker(export_folder, Path(name), request(modules, config), WORKER)
    _drop_unused_domains(model)
    if config.scheme == "w8a8":
        write_ranges(model, modules, ranges)
        if config.activation_bits < 8:
            add_clips(model, config.activation_bits)
    return model


def request(modules: dict[str, GraphLinear], config: QuantizeConfig) -> dict[str, object]:
    """What the worker is asked to do, as JSON."""
    return {
        "scheme": config.scheme,
        "nodes": list(dict.fromkeys(linear.node for linear in modules.values())),
        "block_size": config.block_size,
        "accuracy_level": config.accuracy_level,
        "samples": SAMPLES,
        "graph": GRAPH,
        "out": "quantized.onnx",
    }


def run_worker(
    export_folder: Path, folder: Path, asked: dict[str, object], command: Sequence[str]
) -> onnx.ModelProto:
    """Run the worker in `folder` on copies of the graph, and load what it wrote.

    Raises:
        QuantizationError: it failed, gave no model, or left no readable graph.
    """
    for name in (GRAPH, EXTERNAL):
        if (export_folder / name).is_file():
            shutil.copyfile(export_folder / name, folder / name)
    (folder / "request.json").write_text(json.dumps(asked), encoding="utf-8")
    try:
        done = subprocess.run(
            [*command, "request.json"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise QuantizationError(
            f"neural-compressor did not finish within {TIMEOUT_S:.0f} s: use `backend: ort`."
        ) from None
    written = folder / str(asked["out"])
    if done.returncode == inc_worker.NO_MODEL or not written.is_file():
        raise QuantizationError(
            f"neural-compressor gave no quantized model ({_reason(done.stderr + done.stdout)}): "
            "use `backend: ort`, or exclude the linear that it names."
        )
    if done.returncode != 0:
        raise QuantizationError(f"neural-compressor failed ({_reason(done.stderr)}): use `backend: ort`.")
    return _load(written)


def _load(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path)
    except Exception as error:  # protobuf and onnx raise unrelated types for a broken file
        raise QuantizationError(
            f"neural-compressor wrote a graph that cannot be read ({error}): use `backend: ort`."
        ) from error


def write_ranges(
    model: onnx.ModelProto, modules: dict[str, GraphLinear], ranges: dict[str, ActivationRange]
) -> None:
    """Put the learned scales and zero points in place of neural-compressor's, in the initializers.

    Raises:
        QuantizationError: a linear is not quantized in the graph.
    """
    graph = Graph(model)
    for path, linear in modules.items():
        matmul = graph.producer(linear.output, "MatMul", path)
        dequantize = graph.producer(matmul.input[0], "DequantizeLinear", path)
        learned = ranges[path]
        for name, value in (
            (dequantize.input[1], np.float32(learned.scale)),
            (dequantize.input[2], np.uint8(learned.zero_point)),
        ):
            tensor = graph.initializers[name]
            shape = tuple(tensor.dims)
            tensor.CopyFrom(numpy_helper.from_array(np.full(shape, value), name))


def _drop_unused_domains(model: onnx.ModelProto) -> None:
    """neural-compressor leaves every operator set that ONNX Runtime knows in the graph."""
    used = {"" if node.domain == "ai.onnx" else node.domain for node in model.graph.node}
    kept = [opset for opset in model.opset_import if opset.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)


def _reason(log: str) -> str:
    """The last line of a log that speaks of an error or exception, or the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    telling = [line for line in lines if "rror" in line or "xception" in line]
    return (telling or lines or ["no message"])[-1][:300]
