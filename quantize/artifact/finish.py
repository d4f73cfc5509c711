"""The end of an artifact, once its weights are proved: the width of the KV cache, the file's format."""

from __future__ import annotations

from pathlib import Path

import msgspec
import onnx

from holdfast.chat import ChatTokenizer
from holdfast.exporter.export import EXTERNAL, GRAPH, read_export
from holdfast.exporter.genai import name_graph
from holdfast.exporter.ort_format import ORT_FILE, write_ort_format
from holdfast.exporter.passes.kv_cache import halve_cache, measure_scales, quantize_cache
from holdfast.exporter.targets import lookup_target
from holdfast.quantize.artifact.write import QuantizeReport, save_graph, write_report
from holdfast.quantize.prompts.draw import BUILTIN, load_calibration
from holdfast.quantize.prompts.sequences import chat_prompts
from holdfast.recipe import QuantizeConfig
from holdfast.runtime.external_data import graph_files
from holdfast.runtime.graph import DecoderGraph

SCALE_PROMPTS = 96


def finish_artifact(
    export_folder: Path, out: Path, report: QuantizeReport, config: QuantizeConfig
) -> QuantizeReport:
    """Narrow the KV cache where the recipe asks for it, and leave the one file that the target deploys.

    The scales of an int8 cache are the largest absolute keys and values that the fp32 graph has on the
    built-in calibration prompts, divided by 127. Nothing is asked of the answers here: that is the suite's.

    Arguments:
        export_folder: what `out` was quantized from.
        out: what `quantize_bundle` wrote.

    Returns:
        the report as it now is; quantize.json is written again.

    Raises:
        ExportError: the graph has no cache that can be narrowed, or cannot be converted.
        ParityError: the converted file is not the graph.
    """
    export = read_export(export_folder)
    if config.kv_cache != "fp32":
        model = onnx.load(out / GRAPH)
        if config.kv_cache == "fp16":
            halve_cache(model)
        else:
            prompts = [p.prompt for p in load_calibration(BUILTIN, SCALE_PROMPTS, seed=0)]
            ids = chat_prompts(ChatTokenizer.from_folder(export_folder), prompts)
            quantize_cache(model, measure_scales(DecoderGraph.open(export_folder), ids))
        save_graph(model, out)
    if lookup_target(export.target).ort_format:
        write_ort_format(out, atol=config.atol)
        for name in (GRAPH, EXTERNAL):
            (out / name).unlink(missing_ok=True)
        name_graph(out, ORT_FILE)
    size = sum(path.stat().st_size for path in graph_files(out))
    finished = msgspec.structs.replace(report, kv_cache=config.kv_cache, bytes_after=size)
    write_report(finished, out)
    return finished
