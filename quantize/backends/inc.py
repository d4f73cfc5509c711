"""Intel Neural Compressor 3.7.1 as a backend: run apart, believed only where the file proves it.

What it measures and rounds is read back from what it wrote; ranges and integer weights that calibration
learned are written over its own, so that nothing recalibrates them away.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import onnx

from holdfast.errors import QuantizationError
from holdfast.exporter.export import EXTERNAL, GRAPH
from holdfast.exporter.graph import GraphLinear
from holdfast.extras import require_extra
from holdfast.quantize.backends import inc_static, inc_worker
from holdfast.quantize.backends.inc_blocks import codes_of, write_blocks
from holdfast.quantize.backends.inc_check import check_operators, check_written, require_same_function
from holdfast.quantize.backends.ort import join_codes
from holdfast.quantize.formats import Format, compute_level
from holdfast.quantize.graph import Array
from holdfast.quantize.record import ActivationRange
from holdfast.quantize.weights.codes import WeightCodes
from holdfast.recipe import QuantizeConfig

Method = Literal["rtn", "gptq", "awq", "static", "smoothquant"]
BLOCK_METHODS = ("rtn", "gptq", "awq")
WORKER = (sys.executable, "-m", inc_worker.__name__)
TIMEOUT_S = 3600.0

Modules = Mapping[str, GraphLinear]
Formats = Mapping[str, Format]
Ranges = Mapping[str, ActivationRange]
Codes = Mapping[str, WeightCodes]


def quantize(
    export_folder: Path,
    modules: dict[str, GraphLinear],
    formats: dict[str, Format],
    ranges: dict[str, ActivationRange] | None,
    codes: dict[str, WeightCodes] | None,
    config: QuantizeConfig,
    *,
    method: Method,
    prompts: Sequence[Sequence[int]],
    alpha: float | Literal["auto"] = "auto",
    seed: int = 0,
) -> onnx.ModelProto:
    """The exported graph quantized by neural-compressor, checked; `read_ranges` says with which ranges.

    Arguments:
        modules: module path -> where the linear is, of at least those in `formats`.
        formats: module path -> format of the linears to quantize; every other MatMul stays float32.
        ranges: learned input ranges; None keeps those that neural-compressor measures, min-max.
        codes: learned integer weights by module path, written over neural-compressor's; may be partial.
        method: `rtn`, `gptq` or `awq` for weights in blocks (static inputs are min-max then), `static` or
            `smoothquant` for static inputs (weights in blocks are rounded to nearest then).
        prompts: calibration prompts, token ids.
        alpha: strength of SmoothQuant, 0 to 1; `auto` searches one for each input.

    Raises:
        MissingExtraError: neural-compressor is not installed.
        QuantizationError: it gave no model, or one that does not run or does not hold what was asked.
    """
    require_extra("inc", "`backend: inc`")
    require_possible(modules, formats, ranges, codes, method, prompts)
    asked = request(modules, formats, config, method=method, prompts=prompts, alpha=alpha, seed=seed)
    source = onnx.load(export_folder / GRAPH)
    with tempfile.TemporaryDirectory(prefix="holdfast-inc-") as name:
        folder = Path(name)
        model = run_worker(export_folder, folder, asked, WORKER)
        if method == "smoothquant":
            smoothed = onnx.load(folder / inc_worker.SMOOTHED)
            require_same_function(check_written(source, smoothed, prompts), "SmoothQuant")
        rounded = read_weights(folder, modules, formats)
    finish(model, modules, formats, ranges, rounded | whole_products(modules, formats, codes or {}), config)
    inc_static.write_codes(model, modules, static_codes(formats, codes or {}))
    check_operators(model, modules, formats)
    check_written(source, model, prompts)
    return model


def read_ranges(model: onnx.ModelProto, modules: Modules, formats: Formats) -> dict[str, ActivationRange]:
    """Input ranges as the quantized graph holds them; see `inc_static.read_ranges`."""
    return inc_static.read_ranges(model, modules, formats)


def require_possible(
    modules: Modules,
    formats: Formats,
    ranges: Ranges | None,
    codes: Codes | None,
    method: str,
    prompts: Sequence[Sequence[int]],
) -> None:
    """Raise QuantizationError for what neural-compressor, or the combination, cannot do."""
    if not formats:
        raise QuantizationError("neural-compressor was given no linear to quantize: choose a scheme.")
    if not prompts or not all(prompts):
        raise QuantizationError(
            "neural-compressor calibrates on prompts of at least one token, and got none: give some."
        )
    in_blocks = [path for path, format in formats.items() if format.in_blocks]
    static = [path for path, format in formats.items() if format.activation_bits is not None]
    if method in BLOCK_METHODS and not in_blocks:
        raise QuantizationError(
            f"`{method}` rounds weights in blocks, and no linear has such a format: use `static`, or a "
            "scheme such as `w4`."
        )
    if method in ("static", "smoothquant") and not static:
        raise QuantizationError(
            f"`{method}` quantizes inputs, and no linear has static activations: use `rtn`, or a scheme "
            "such as `w8a8`."
        )
    learned = "ranges" if ranges else "integer weights" if codes else None
    if method in ("smoothquant", "awq") and learned:
        raise QuantizationError(
            f"`{method}` of neural-compressor rescales channels, which learned {learned} do not fit: "
            "quantize without the calibration, or by another method."
        )
    _require_one_format(modules, formats)
    _require_one_range(modules, {path: formats[path] for path in static})


def _require_one_format(modules: Modules, formats: Formats) -> None:
    """Linears that share a MatMul share its format."""
    first: dict[str, str] = {}
    for path, format in formats.items():
        other = first.setdefault(modules[path].node, path)
        if format != formats[other]:
            raise QuantizationError(
                f"`{other}` and `{path}` share one MatMul in this graph and cannot be "
                f"{formats[other].name} and {format.name}: give them one format, or export with "
                "`target: portable`."
            )


def _require_one_range(modules: Modules, static: Formats) -> None:
    """neural-compressor quantizes a tensor once, for all of its readers."""
    first: dict[str, str] = {}
    for path, format in static.items():
        other = first.setdefault(modules[path].input, path)
        if _input_format(format) != _input_format(static[other]):
            raise QuantizationError(
                f"`{other}` and `{path}` read one tensor, which neural-compressor quantizes once: give "
                "both the same kind of activations, or use `backend: ort`."
            )


def _input_format(format: Format) -> tuple[object, ...]:
    return format.activation_bits, format.symmetric_activations, format.signed_activations


def request(
    modules: Modules,
    formats: Formats,
    config: QuantizeConfig,
    *,
    method: str,
    prompts: Sequence[Sequence[int]],
    alpha: float | str = "auto",
    seed: int = 0,
) -> dict[str, object]:
    """What the worker is asked to do, as JSON."""
    nodes = {modules[path].node: format for path, format in formats.items()}
    blocks = {name: _block_settings(format) for name, format in nodes.items() if format.in_blocks}
    static = {name: f.per_channel for name, f in nodes.items() if f.activation_bits is not None}
    block_method = method if method in BLOCK_METHODS else "rtn"
    smooth = {"nodes": list(static), "alpha": alpha} if method == "smoothquant" else None
    return {
        "graph": GRAPH,
        "samples": [list(map(int, prompt)) for prompt in prompts],
        "seed": seed,
        "accuracy_level": config.accuracy_level,
        "smooth": smooth,
        "blocks": {"method": block_method, "nodes": blocks} if blocks else None,
        "static": static,
        "tuning": None,
    }


def _block_settings(format: Format) -> dict[str, object]:
    scheme = "sym" if format.symmetric_weights else "asym"
    return {"bits": format.weight_bits, "group_size": format.block_size, "scheme": scheme}


def run_worker(
    export_folder: Path,
    folder: Path,
    asked: Mapping[str, object],
    command: Sequence[str],
    timeout_s: float = TIMEOUT_S,
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
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise QuantizationError(
            f"neural-compressor did not finish within {timeout_s:.0f} s: allow more time, give fewer "
            "prompts, or use `backend: ort`."
        ) from None
    written = folder / inc_worker.OUT
    if done.returncode == inc_worker.NO_MODEL or not written.is_file():
        raise QuantizationError(
            f"neural-compressor gave no quantized model ({_reason(done.stderr + done.stdout)}): "
            "use `backend: ort`, or exclude the linear that it names."
        )
    if done.returncode != 0:
        raise QuantizationError(f"neural-compressor failed ({_reason(done.stderr)}): use `backend: ort`.")
    model = _load(written)
    _drop_unused_domains(model)
    return model


def _load(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path)
    except Exception as error:  # protobuf and onnx raise unrelated types for a broken file
        raise QuantizationError(
            f"neural-compressor wrote a graph that cannot be read ({error}): use `backend: ort`."
        ) from error


def read_weights(folder: Path, modules: Modules, formats: Formats) -> dict[str, WeightCodes]:
    """Output tensor -> the weight that the worker rounded in blocks; empty where it rounded none."""
    nodes = {modules[p].node: (modules[p], f) for p, f in formats.items() if f.in_blocks}
    if not nodes:
        return {}
    with np.load(folder / inc_worker.WEIGHTS) as stored:
        arrays: dict[str, dict[str, Array]] = {}
        for key in stored.files:
            index, name = key.split(".")
            arrays.setdefault(index, {})[name] = stored[key]
    return {
        linear.output: codes_of(arrays[str(index)], linear.shape[0], format)
        for index, (linear, format) in enumerate(nodes.values())
    }


def whole_products(modules: Modules, formats: Formats, codes: Codes) -> dict[str, WeightCodes]:
    """Learned weights in blocks by output tensor; packed linears one behind the other.

    Raises:
        QuantizationError: only some of the linears of one MatMul have learned weights.
    """
    parts: dict[str, list[str]] = {}
    for path, format in formats.items():
        if format.in_blocks:
            parts.setdefault(modules[path].output, []).append(path)
    found = {}
    for output, paths in parts.items():
        known = [path for path in paths if path in codes]
        if known and len(known) < len(paths):
            raise QuantizationError(
                f"`{known[0]}` has learned integer weights and others in the same MatMul have none: "
                "calibrate all of them."
            )
        if known:
            ordered = sorted(paths, key=lambda path: modules[path].columns or (0, 0))
            found[output] = join_codes([codes[path] for path in ordered])
    return found


def static_codes(formats: Formats, codes: Codes) -> dict[str, WeightCodes]:
    """Learned weights that the graph holds between QuantizeLinear and DequantizeLinear."""
    return {
        path: weight for path, weight in codes.items() if path in formats and not formats[path].in_blocks
    }


def finish(
    model: onnx.ModelProto,
    modules: Modules,
    formats: Formats,
    ranges: Ranges | None,
    blocks: Codes,
    config: QuantizeConfig,
) -> None:
    """Ranges, clips and MatMulNBits nodes into the graph that the worker left."""
    if any(format.activation_bits is not None for format in formats.values()):
        inc_static.finish(model, modules, formats, ranges)
    levels = {modules[path].output: compute_level(format, config) for path, format in formats.items()}
    write_blocks(model, blocks, levels)


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
