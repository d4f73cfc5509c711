"""What cannot be quantized as asked, refused before any work."""

from __future__ import annotations

from holdfast.errors import QuantizationError
from holdfast.exporter.export import ExportReport
from holdfast.exporter.targets import lookup_target
from holdfast.quantize.decisions import Decisions
from holdfast.quantize.plan import require_whole_products
from holdfast.recipe import QuantizeConfig

INC_METHODS = ("rtn", "gptq", "awq", "smoothquant")
"""Methods that neural-compressor has of its own."""


def require_possible(export: ExportReport, decided: Decisions, config: QuantizeConfig, method: str) -> None:
    """Raise QuantizationError where target, backend or graph cannot hold what was asked."""
    require_whole_products(export.modules, decided.formats)
    _require_operators(export, decided, config)
    _require_decided(decided, config, method)
    if config.kv_cache != "fp32" and export.graph.form == "plain":
        raise QuantizationError(
            f"`kv_cache: {config.kv_cache}` needs attention as one operator, and this is a plain graph "
            f"({export.graph.why_plain}): leave the cache in fp32."
        )


def _require_operators(export: ExportReport, decided: Decisions, config: QuantizeConfig) -> None:
    """Weights in blocks are ONNX Runtime's own operator."""
    in_blocks = [form.name for form in decided.formats.values() if form.in_blocks]
    if in_blocks and not lookup_target(export.target).fused:
        raise QuantizationError(
            f"`{in_blocks[0]}` needs ONNX Runtime's own MatMulNBits, and the target `{export.target}` has "
            "ONNX's operators alone: use w8a8, or export for another target."
        )


def _require_decided(decided: Decisions, config: QuantizeConfig, method: str) -> None:
    """With the backend `ort`, every method but `rtn` decides before the export."""
    if not decided.formats:
        return
    if config.backend == "ort" and decided.origin == "none" and method != "rtn":
        raise QuantizationError(
            f"`{method}` decides on the torch model: run `holdfast calibrate --method {method}`, export "
            "what it wrote and give it as --calibration, or use `backend: inc`."
        )
    if config.tuning is None:
        return
    static8 = all(form.activation_bits and not form.in_blocks for form in decided.formats.values())
    if config.backend != "inc" or not static8 or decided.codes:
        raise QuantizationError(
            "`tuning` is neural-compressor's search over static 8-bit weights with its own ranges: use "
            "`backend: inc`, a scheme from w8a2 to w8a8 and `calibrate.method: rtn`."
        )
