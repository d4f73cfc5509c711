"""The quantized bundle: the exported folder with its graph quantized, read back and accounted for."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import msgspec
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
from holdfast.quantize.activations.calibrators import calibrated_ranges
from holdfast.quantize.artifact.embedding import EmbeddingReport, quantize_embedding, read_embedding
from holdfast.quantize.artifact.possible import require_possible
from holdfast.quantize.artifact.read_back import BLOCK_KERNEL, QuantizedTensor, read_back
from holdfast.quantize.backends import inc, ort
from holdfast.quantize.decisions import Decisions, read_decisions
from holdfast.quantize.formats import FLOAT_BITS, formats
from holdfast.quantize.graph import Graph, histogram
from holdfast.quantize.prompts.draw import BUILTIN, load_calibration
from holdfast.quantize.prompts.sequences import chat_prompts
from holdfast.quantize.record import ActivationRange, activation_range, range_of_parameters
from holdfast.quantize.tuning import TuningReport, search
from holdfast.recipe import QuantizeConfig

REPORT = "quantize.json"
CALIBRATION_PROMPTS = 96


class QuantizeReport(Config, frozen=True):
    """What was quantized, and how; quantize.json.

    Attributes:
        method: how weights and ranges were decided, as `calibrate.method` names it.
        ranges_from: `calibration`, a calibrator as `quantize.ranges` names it, `inc` or `none`.
        tensors: module path -> what it became.
        float32: module paths of linears left in float32.
        embedding: the token table, where anything was quantized.
        tuning: what accuracy-driven tuning did, where it was asked for.
        operators: operator type -> nodes in the artifact's graph.
        bytes_before, bytes_after: graph with its external data.
        kv_cache: type of the keys and values that decoding keeps.
    """

    scheme: str
    backend: str
    method: str
    ranges_from: str
    tensors: dict[str, QuantizedTensor]
    float32: tuple[str, ...]
    operators: dict[str, int]
    bytes_before: int
    bytes_after: int
    embedding: EmbeddingReport | None = None
    tuning: TuningReport | None = None
    kv_cache: str = "fp32"
    accuracy_level: int | None = None
    versions: dict[str, str] = {}


def quantize_bundle(
    export_folder: Path,
    out: Path,
    calibration: Path | None,
    config: QuantizeConfig,
    *,
    method: str = "rtn",
) -> QuantizeReport:
    """Quantize an exported folder into the existing, empty folder `out`.

    Everything but the graph is copied. With a calibration, its ranges and integer codes are the ones in the
    graph: they are read back and compared bit for bit. Static ranges that it does not hold are found by the
    calibrator that `config.ranges` names, on the built-in calibration prompts, and the report says so.

    Arguments:
        export_folder: what `holdfast export` wrote, of the calibrated model where there is one.
        calibration: folder with calibration.json, or None.
        method: algorithm, where there is no calibration: `rtn`, or for `inc` one of its own.

    Raises:
        QuantizationError: the calibration was made for other settings, the backend failed, or the
            artifact does not hold what was asked.
    """
    export = read_export(export_folder)
    if (export_folder / REPORT).is_file():
        raise QuantizationError(
            f"{export_folder} is quantized already (it holds {REPORT}): give the folder that "
            "`holdfast export` wrote."
        )
    decided = _decisions(list(export.modules), calibration, config)
    method = method if calibration is None else decided.origin
    require_possible(export, decided, config, method)
    modules = {path: export.modules[path] for path in decided.formats}
    _copy_companions(export_folder, out)
    tensors: dict[str, QuantizedTensor] = {}
    ranges_from, embedding, tuning = "none", None, None
    if not modules:
        _copy_graph(export_folder, out)
    else:
        decided, ranges_from = _with_ranges(decided, export_folder, modules, config)
        tuning = _write(export_folder, out, modules, decided, config, method)
        if tuning is not None:
            decided = decided.without(tuning.float32)
            modules = {path: export.modules[path] for path in decided.formats}
        written = onnx.load(out / GRAPH)
        tensors = read_back(written, modules, decided, config)
        embedding = read_embedding(Graph(written), export.embedding)
    operators = histogram(onnx.load(out / GRAPH, load_external_data=False))
    report = QuantizeReport(
        scheme=config.scheme,
        backend=config.backend if tensors else "none",
        method=method if tensors else "none",
        ranges_from=ranges_from,
        embedding=embedding,
        tuning=tuning,
        tensors=tensors,
        float32=tuple(path for path in export.modules if path not in tensors),
        operators=operators,
        bytes_before=graph_bytes(export_folder),
        bytes_after=graph_bytes(out),
        accuracy_level=config.accuracy_level if BLOCK_KERNEL in operators else None,
        versions=_versions(config) if tensors else {},
    )
    write_report(report, out)
    return report


def ranges_of(report: QuantizeReport, *, signed: bool = False) -> dict[str, ActivationRange]:
    """Module path -> static input range that the artifact holds."""
    return {
        path: range_of_parameters(tensor.scale, tensor.zero_point, tensor.activation_bits, signed=signed)
        for path, tensor in report.tensors.items()
        if tensor.scale is not None and tensor.zero_point is not None and tensor.activation_bits is not None
    }


def _decisions(paths: Sequence[str], calibration: Path | None, config: QuantizeConfig) -> Decisions:
    if calibration is not None:
        return read_decisions(calibration, paths, config)
    return Decisions(formats(paths, config))


def _with_ranges(
    decided: Decisions,
    export_folder: Path,
    modules: dict[str, GraphLinear],
    config: QuantizeConfig,
) -> tuple[Decisions, str]:
    """The decisions with a range for every static linear, and where the ranges come from."""
    if not decided.static:
        return decided, "none"
    if decided.ranges:
        return decided, "calibration"
    if config.backend == "inc":
        return decided, "inc"
    static = {path: modules[path] for path in decided.static}
    forms = {decided.formats[path] for path in static}
    found: dict[str, ActivationRange] = {}
    for form in forms:
        own = {path: place for path, place in static.items() if decided.formats[path] == form}
        ends = calibrated_ranges(
            export_folder / GRAPH,
            own,
            calibration_prompts(export_folder),
            method=config.ranges,
            bits=form.activation_bits or 8,
            symmetric=form.symmetric_activations,
        )
        found |= {path: activation_range(*pair, form) for path, pair in ends.items()}
    return replace(decided, ranges=found), config.ranges


def calibration_prompts(export_folder: Path) -> list[list[int]]:
    """Token ids of the built-in calibration prompts, for what is calibrated on the graph."""
    prompts = [p.prompt for p in load_calibration(BUILTIN, CALIBRATION_PROMPTS, seed=0)]
    return chat_prompts(ChatTokenizer.from_folder(export_folder), prompts)


def _write(
    export_folder: Path,
    out: Path,
    modules: dict[str, GraphLinear],
    decided: Decisions,
    config: QuantizeConfig,
    method: str,
) -> TuningReport | None:
    """The quantized graph, loaded once by ONNX Runtime."""
    model, report = onnx.load(export_folder / GRAPH), None
    if config.backend == "inc":
        interface = onnx.ModelProto(metadata_props=model.metadata_props)
        interface.graph.input.extend(model.graph.input)
        prompts = calibration_prompts(export_folder)
        if config.tuning is not None:
            result, report = search(export_folder, modules, decided.formats, prompts, config.tuning)
            model = result.model
        else:
            model = inc.quantize(
                export_folder,
                modules,
                decided.formats,
                decided.ranges or None,
                decided.codes or None,
                config,
                method=_inc_method(decided, method),
                prompts=prompts,
            )
        model = gather_first(model)
        _keep_interface(model, interface)
    else:
        model = ort.quantize(model, modules, decided, config)
    if config.embedding_bits != FLOAT_BITS:
        export = read_export(export_folder)
        quantize_embedding(
            model,
            export.embedding,
            bits=config.embedding_bits,
            block_size=config.block_size,
            portable=export.target == "portable",
        )
    save_graph(model, out)
    _require_loads(out)
    return report


def _inc_method(decided: Decisions, method: str) -> inc.Method:
    """neural-compressor's algorithm: its own, or the one whose numbers are overwritten by those decided."""
    own: dict[str, inc.Method] = {"gptq": "gptq", "awq": "awq", "smoothquant": "smoothquant"}
    if decided.codes or method not in own:
        return "static" if decided.static else "rtn"
    return own[method]


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


def _versions(config: QuantizeConfig) -> dict[str, str]:
    names = ["onnx", "onnxruntime"]
    if config.backend == "inc":
        names.append("neural-compressor")
    return {name: version(name) for name in names}


def write_report(report: QuantizeReport, out: Path) -> None:
    """Write quantize.json."""
    text = msgspec.json.format(msgspec.json.encode(report, order="sorted"), indent=2)
    write_text(out / REPORT, text.decode("utf-8") + "\n")
