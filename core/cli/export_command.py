"""`holdfast export`: a model folder to an ONNX folder, proved against torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from holdfast.cli.options import FOLDER, emit, json_option, out_option, overwrite_option, seed_option
from holdfast.extras import require_extra
from holdfast.files import atomic_folder
from holdfast.progress import say
from holdfast.recipe import ExportConfig


@click.command("export")
@click.argument("model", type=FOLDER)
@out_option("the ONNX model")
@click.option("--opset", type=click.IntRange(14, 21), default=17, show_default=True, help="ONNX opset.")
@click.option(
    "--atol",
    type=click.FloatRange(min=0, min_open=True),
    default=ExportConfig().atol,
    show_default=True,
    help="Largest logit difference to torch that passes.",
)
@seed_option
@overwrite_option
@json_option
def command(
    model: Path, out: Path, opset: int, atol: float, seed: int, overwrite: bool, as_json: bool
) -> None:
    """Export the model folder MODEL to ONNX through Optimum, in fp32, and compare it with torch."""
    require_extra("export", "`holdfast export`")
    from holdfast.exporter.export import export_model

    config = ExportConfig(opset=opset, atol=atol)
    with atomic_folder(out, overwrite=overwrite) as fresh:
        report = export_model(model, fresh, config, seed=seed, on_stage=lambda stage: say(f"      {stage}"))
    lines = [
        f"{out}: {report.architecture}, opset {report.opset}, {report.graph_bytes:,} bytes",
        f"against torch: largest logit difference {report.parity.max_abs:.2e} (allowed {atol:.0e}), "
        f"same next token {report.parity.same_top_frac:.1%} of {report.parity.positions} positions",
    ]
    emit(dataclasses.asdict(report), lines, as_json=as_json)
