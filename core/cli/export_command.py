"""`holdfast export`: a model to an ONNX folder for one target, proved against torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from holdfast.cli.options import (
    emit,
    json_option,
    load_model,
    out_option,
    overwrite_option,
    seed_option,
    source_options,
    target_option,
)
from holdfast.errors import UsageError
from holdfast.extras import require_extra
from holdfast.files import atomic_folder
from holdfast.progress import say
from holdfast.recipe import ExportConfig


@click.command("export")
@click.argument("model")
@out_option("the ONNX model")
@target_option
@click.option("--opset", type=click.IntRange(14, 21), help="ONNX opset.  [default: the target's]")
@click.option(
    "--atol",
    type=click.FloatRange(min=0, min_open=True),
    default=ExportConfig().atol,
    show_default=True,
    help="Largest logit difference to torch that passes.",
)
@source_options
@seed_option
@overwrite_option
@json_option
def command(
    model: str,
    out: Path,
    target: Any,
    opset: int | None,
    atol: float,
    revision: str | None,
    trust_remote_code: bool,
    adapter_base: str | None,
    seed: int,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Export MODEL to ONNX in fp32, and hold the graph against torch.

    MODEL is a folder or a hub name: a causal language model, an adapter of one, or a sequence classifier
    (a reward or preference model).
    """
    require_extra("export", "`holdfast export`")
    from holdfast.exporter.classifier import is_classifier

    config = ExportConfig(target=target, opset=opset, atol=atol)
    source = {"revision": revision, "trust_remote_code": trust_remote_code, "adapter_base": adapter_base}
    with atomic_folder(out, overwrite=overwrite) as fresh:
        if is_classifier(Path(model)):
            _refuse_source_options(source)
            result, lines = _classifier(Path(model), fresh, config, seed)
        else:
            result, lines = _language_model(model, source, fresh, config, seed)
    emit(result, [f"{out}: {lines[0]}", *lines[1:]], as_json=as_json)


def _language_model(
    model: str, options: dict[str, Any], fresh: Path, config: ExportConfig, seed: int
) -> tuple[dict[str, Any], list[str]]:
    from holdfast.exporter.export import export_source, report_lines

    source = load_model(model, **options)
    report = export_source(source, fresh, config, seed=seed, on_stage=_stage)
    return dataclasses.asdict(report), report_lines(report)


def _classifier(
    folder: Path, fresh: Path, config: ExportConfig, seed: int
) -> tuple[dict[str, Any], list[str]]:
    from holdfast.exporter.classifier import export_classifier

    report = export_classifier(folder, fresh, config, seed=seed, on_stage=_stage)
    lines = [
        f"{report.architecture}, plain graph, opset {report.opset}, {report.graph_bytes:,} bytes",
        f"against torch: largest logit difference {report.parity.max_abs:.2e} (allowed {config.atol:.0e})",
    ]
    return dataclasses.asdict(report), lines


def _refuse_source_options(options: dict[str, Any]) -> None:
    given = [name for name, value in options.items() if value]
    if given:
        raise UsageError(
            f"--{given[0].replace('_', '-')} is for causal language models, and this is a sequence "
            "classifier: leave it out."
        )


def _stage(stage: str) -> None:
    say(f"      {stage}")
