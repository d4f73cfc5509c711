"""The quantized bundle: the exported folder with its graph quantized, read back and accounted for."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx

from holdfast.chat import ChatTokenizer
from holdfast.config import Config
from holdfast.errors import ExecutionError, QuantizationError
from holdfast.exporter.export import EXTERNAL, GRAPH, LARGEST_INLINE_BYTES, graph_bytes, read_export
from holdfast.exporter.graph import GraphLinear
from holdfast.exporter.ort_format import OPERATORS_FILE, ORT_FILE
from holdfast.exporter.parity import open_session
from holdfast.exporter.passes.gather_first import gather_first
from holdfast.files import disk_errors, write_text
from holdfast.quantize.backends import inc, ort
from holdfast.quantize.graph import Graph, histogram, read_blocks, read_static
from holdfast.quantize.minmax import minmax_ranges
from holdfast.quantize.plan import quantized_paths, require_whole_products
from holdfast.quantize.prompts import BUILTIN, load_calibration
from holdfast.quantize.record import (
    CALIBRATION_FILE,
    ActivationRange,
    CalibrationRecord,
    activation_range,
    read_record,
)
from holdfast.quantize.sequences import chat_prompts
from holdfast.recipe import QuantizeConfig

REPORT = "quantize.json"
MINMAX_PROMPTS = 96
KERNELS = {"w8a8": "MatMulIntegerToFloat", "w4": "MatMulNBits"}


class QuantizedTensor(Config, frozen=True):
    """One linear layer in the artifact, as read back from it.

    Attributes:
        bits: width of the weights.
        activation_bits: width of the input's codes, or None where the input stays float32.
        scale, zero_point: of the input; None for weight-only quantization.
        weight_scheme: in words.
        block_size: weights that share a scale; 0 is an output channel.
        kernel: operator that ONNX Runtime is expected to run.
    """

    bits: int
    activation_bits: int | None
    scale: float | None
    zero_point: int | None
    weight_scheme: str
    block_size: int
    kernel: str


class QuantizeReport(Config, frozen=True):
    """What was quantized, and how; quantize.json.

    Attributes:
        ranges_from: `calibration`, `minmax` or `none`.
        tensors: module path -> what it became.
        float32: module paths of linears left in float32.
        operators: operator type -> nodes in the artifact's graph.
        bytes_before, bytes_after: graph with its external data.
        kv_cache: type of the keys and values that decoding keeps.
    """

    scheme: str
    backend: str
    ranges_from: str
    tensors: dict[str, QuantizedTensor]
    float32: tuple[str, ...]
    operators: dict[str, int]
    bytes_before: int
    bytes_after: int
    kv_cache: str = "fp32"
    accuracy_level: int | None = None
    versions: dict[str, str] = {}


def quantize_bundle(
    export_folder: Path, out: Path, calibration: Path | None, config: QuantizeConfig
) -> QuantizeReport:
    """Quantize an exported folder into the existing, empty folder `out`.

    Everything but the graph is copied. With a calibration, its ranges are the ones in the graph: they
    are read back and compared bit for bit. Without one, `w8a8` takes min-max ranges over the built-in
    calibration prompts, and the report says so.

    Arguments:
        export_folder: what `holdfast export` wrote, of the calibrated model where there is one.
        calibration: folder with calibration.json, or None.

    Raises:
        QuantizationError: the calibration was made for other settings, the backend failed, or the
            artifact does not hold what was asked.
    """
    export = read_export(export_folder)
    paths = quantized_paths(list(export.modules), config.exclude)
    if config.kv_cache != "fp32" and export.graph.form == "plain":
        raise QuantizationError(
            f"`kv_cache: {config.kv_cache}` needs attention as one operator, and this is a plain graph "
            f"({export.graph.why_plain}): leave the cache in fp32."
        )
    require_whole_products(export.modules, paths)
    modules = {path: export.modules[path] for path in paths}
    model = onnx.load(export_folder / GRAPH)
    ranges, origin = _ranges(model, modules, export_folder, calibration, config)
    _copy_companions(export_folder, out)
    tensors: dict[str, QuantizedTensor] = {}
    if config.scheme == "none":
        _copy_graph(export_folder, out)
    else:
        interface = onnx.ModelProto(metadata_props=model.metadata_props)
        interface.graph.input.extend(model.graph.input)
        quantized = gather_first(_quantized(model, export_folder, modules, ranges, config))
        _keep_interface(quantized, interface)
        save_graph(quantized, out)
        _require_loads(out)
        tensors = _read_back(onnx.load(out / GRAPH), modules, ranges, config)
    operators = histogram(onnx.load(out / GRAPH, load_external_data=False))
    report = QuantizeReport(
        scheme=config.scheme,
        backend=config.backend if tensors else "none",
        ranges_from=origin,
        tensors=tensors,
        float32=tuple(path for path in export.modules if path not in tensors),
        operators=operators,
        bytes_before=graph_bytes(export_folder),
        bytes_after=graph_bytes(out),
        accuracy_level=config.accuracy_level if config.scheme == "w4" else None,
        versions=_versions(config) if tensors else {},
    )
    write_report(report, out)
    return report


def _ranges(
    model: onnx.ModelProto,
    modules: dict[str, GraphLinear],
    export_folder: Path,
    calibration: Path | None,
    config: QuantizeConfig,
) -> tuple[dict[str, ActivationRange], str]:
    """Input ranges by module path, and where they come from."""
    if calibration is not None:
        record = read_record(calibration)
        _check_calibration(record, list(modules), config)
        return record.activation_ranges, "calibration"
    if config.scheme != "w8a8":
        return {}, "none"
    tokenizer = ChatTokenizer.from_folder(export_folder)
    prompts = [p.prompt for p in load_calibration(BUILTIN, MINMAX_PROMPTS, seed=0)]
    ends = minmax_ranges(model, modules, chat_prompts(tokenizer, prompts))
    bits = config.activation_bits
    return {path: activation_range(*pair, bits) for path, pair in ends.items()}, "minmax"


def _check_calibration(record: CalibrationRecord, paths: Sequence[str], config: QuantizeConfig) -> None:
    """Ranges and clips hold for the settings they were learned for, and no others."""
    wanted: dict[str, Any] = {"scheme": config.scheme, "exclude": config.exclude}
    if config.scheme == "w8a8":
        wanted["activation_bits"] = config.activation_bits
    if config.scheme == "w4":
        wanted["block_size"] = config.block_size
    for name, value in wanted.items():
        found = getattr(record, name)
        if found != value:
            raise QuantizationError(
                f"The calibration was made for {name} {found!r}, and {value!r} is asked for: "
                "calibrate again with the settings of the quantization."
            )
    missing = [path for path in paths if path not in record.activation_ranges]
    if config.scheme == "w8a8" and missing:
        raise QuantizationError(
            f"The {CALIBRATION_FILE} has no range for `{missing[0]}`: calibrate this model again."
        )


def _quantized(
    model: onnx.ModelProto,
    export_folder: Path,
    modules: dict[str, GraphLinear],
    ranges: dict[str, ActivationRange],
    config: QuantizeConfig,
) -> onnx.ModelProto:
    if config.backend == "inc":
        return inc.quantize(export_folder, modules, ranges, config)
    if config.scheme == "w8a8":
        return ort.quantize_static(model, modules, ranges, config)
    return ort.quantize_blocks(model, modules, config)


def _copy_companions(export_folder: Path, out: Path) -> None:
    """Everything but the graph, byte for byte."""
    with disk_errors(out):
        for path in sorted(export_folder.iterdir()):
            if path.is_file() and path.name not in (GRAPH, EXTERNAL, ORT_FILE, OPERATORS_FILE):
                shutil.copyfile(path, out / path.name)


def _copy_graph(export_folder: Path, out: Path) -> None:
    with disk_errors(out):
        for name in (GRAPH, EXTERNAL):
            if (export_folder / name).is_file():
                shutil.copyfile(export_folder / name, out / name)


def save_graph(model: onnx.ModelProto, out: Path) -> None:
    """Weights beyond 256 MiB go into one file beside the graph."""
    large = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > LARGEST_INLINE_BYTES
    with disk_errors(out):
        onnx.save_model(
            model, out / GRAPH, save_as_external_data=large, location=EXTERNAL if large else None
        )


def _keep_interface(model: onnx.ModelProto, interface: onnx.ModelProto) -> None:
    """Inputs, optional ones among them, and what the exporter noted; neural-compressor drops both."""
    del model.metadata_props[:], model.graph.input[:]
    model.metadata_props.extend(interface.metadata_props)
    model.graph.input.extend(interface.graph.input)


def _require_loads(out: Path) -> None:
    try:
        open_session(out / GRAPH)
    except ExecutionError as error:
        raise QuantizationError(
            f"The backend wrote a graph that ONNX Runtime refuses ({error}): use `backend: ort`, or "
            "exclude the linear that it names."
        ) from error


def _read_back(
    model: onnx.ModelProto,
    modules: dict[str, GraphLinear],
    ranges: dict[str, ActivationRange],
    config: QuantizeConfig,
) -> dict[str, QuantizedTensor]:
    """Every linear as the artifact holds it, compared with what was asked."""
    graph = Graph(model)
    products = {linear.node for linear in modules.values()}
    _check_histogram(histogram(model), len(products), config.scheme)
    if config.scheme == "w4":
        return {p: _block_tensor(graph, p, linear, config) for p, linear in modules.items()}
    return {p: _static_tensor(graph, p, linear, ranges[p], config) for p, linear in modules.items()}


def _check_histogram(found: dict[str, int], linears: int, scheme: str) -> None:
    """No more was quantized than what was asked for, and with no other operators."""
    quantizing = {
        name: count
        for name, count in found.items()
        if any(part in name for part in ("uantize", "QLinear", "Integer", "NBits", "QAttention"))
    }
    pairs = quantizing.get("QuantizeLinear", 0)
    wanted = {"QuantizeLinear": pairs, "DequantizeLinear": pairs + linears}
    if scheme == "w4":
        wanted = {"MatMulNBits": linears}
    if quantizing != wanted:
        raise QuantizationError(
            f"The backend was asked to quantize {linears} linears and wrote {quantizing}: "
            "use the other backend, and report this."
        )


def _static_tensor(
    graph: Graph, path: str, linear: GraphLinear, learned: ActivationRange, config: QuantizeConfig
) -> QuantizedTensor:
    found = read_static(graph, path, linear.output)
    if (found.scale, found.zero_point) != (np.float32(learned.scale), learned.zero_point):
        raise QuantizationError(
            f"The artifact quantizes the input of `{path}` with scale {found.scale} and zero point "
            f"{found.zero_point}, and calibration decided {learned.scale} and {learned.zero_point}."
        )
    clips = config.activation_bits < 8
    if found.input != linear.input or (found.clip is not None) != clips:
        raise QuantizationError(
            f"The artifact does not quantize what `{path}` reads, or not to {config.activation_bits} bits."
        )
    return QuantizedTensor(
        bits=8,
        activation_bits=config.activation_bits,
        scale=float(found.scale),
        zero_point=found.zero_point,
        weight_scheme="int8, symmetric, per output channel",
        block_size=0,
        kernel=KERNELS["w8a8"],
    )


def _block_tensor(graph: Graph, path: str, linear: GraphLinear, config: QuantizeConfig) -> QuantizedTensor:
    found = read_blocks(graph, path, linear.output)
    wanted = (4, config.block_size, config.accuracy_level, True)
    if (found.bits, found.block_size, found.accuracy_level, found.symmetric) != wanted:
        raise QuantizationError(
            f"The artifact holds `{path}` with {found.bits} bits in blocks of {found.block_size} at "
            f"accuracy_level {found.accuracy_level}, and {wanted[:3]} was asked for."
        )
    return QuantizedTensor(
        bits=4,
        activation_bits=None,
        scale=None,
        zero_point=None,
        weight_scheme="int4, symmetric, per block of input channels",
        block_size=found.block_size,
        kernel=KERNELS["w4"],
    )


def _versions(config: QuantizeConfig) -> dict[str, str]:
    names = ["onnx", "onnxruntime"]
    if config.backend == "inc":
        names.append("neural-compressor")
    return {name: version(name) for name in names}


def write_report(report: QuantizeReport, out: Path) -> None:
    """Write quantize.json."""
    text = msgspec.json.format(msgspec.json.encode(report, order="sorted"), indent=2)
    write_text(out / REPORT, text.decode("utf-8") + "\n")
