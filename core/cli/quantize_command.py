"""`holdfast quantize`: an exported folder to a quantized one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from holdfast.cli.options import (
    FOLDER,
    emit,
    json_option,
    kv_cache_option,
    out_option,
    overwrite_option,
    quantization_options,
    quantization_settings,
)
from holdfast.config import decode, encode
from holdfast.extras import require_extra
from holdfast.files import atomic_folder
from holdfast.recipe import RANGES, QuantizeConfig


@click.command("quantize")
@click.argument("exported", type=FOLDER)
@out_option("the quantized model")
@click.option(
    "--calibration",
    type=FOLDER,
    help="Folder that `holdfast calibrate` wrote; without it weights are rounded and --ranges decide.",
)
@click.option(
    "--backend", type=click.Choice(["ort", "inc"]), default="ort", show_default=True, help="Backend."
)
@click.option(
    "--method",
    type=click.Choice(["rtn", "gptq", "awq", "smoothquant"]),
    default="rtn",
    show_default=True,
    help="Without --calibration; all but rtn are neural-compressor's own.",
)
@click.option(
    "--ranges",
    type=click.Choice(RANGES),
    default="minmax",
    show_default=True,
    help="Calibrator of static ranges that no calibration decided, over built-in prompts.",
)
@quantization_options
@click.option(
    "--embedding-bits",
    type=click.Choice(["32", "8", "4"]),
    default="32",
    show_default=True,
    help="Width of the embedding table.",
)
@click.option(
    "--accuracy-level",
    type=click.Choice(["0", "1", "4"]),
    default="4",
    show_default=True,
    help="Compute type inside MatMulNBits: 0 unset, 1 fp32, 4 int8.",
)
@kv_cache_option
@overwrite_option
@json_option
def command(
    exported: Path, out: Path, calibration: Path | None, overwrite: bool, as_json: bool, **flags: Any
) -> None:
    """Quantize the ONNX folder EXPORTED, which `holdfast export` wrote.

    The ranges of --calibration are the ones in the graph; they are read back and compared.
    """
    require_extra("export", "`holdfast quantize`")
    if flags["backend"] == "inc":
        require_extra("inc", "`--backend inc`")
    from holdfast.quantize.artifact.finish import finish_artifact
    from holdfast.quantize.artifact.write import quantize_bundle

    settings = quantization_settings(flags) | {
        "backend": flags["backend"],
        "ranges": flags["ranges"],
        "accuracy_level": int(flags["accuracy_level"]),
        "embedding_bits": int(flags["embedding_bits"]),
        "kv_cache": flags["kv_cache"],
    }
    config = decode(settings, QuantizeConfig, what="command line")
    with atomic_folder(out, overwrite=overwrite) as fresh:
        report = quantize_bundle(exported, fresh, calibration, config, method=flags["method"])
        report = finish_artifact(exported, fresh, report, config)
    operators = ", ".join(f"{count} {name}" for name, count in sorted(report.operators.items()))
    lines = [
        f"{out}: {report.scheme} by {report.backend}, ranges from {report.ranges_from}, "
        f"{report.bytes_before:,} -> {report.bytes_after:,} bytes, {report.kv_cache} KV cache",
        f"  {len(report.tensors)} linear layers quantized, {len(report.float32)} left in fp32",
        f"  operators: {operators}",
    ]
    emit(encode(report), lines, as_json=as_json)
