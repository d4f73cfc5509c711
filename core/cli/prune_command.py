"""`holdfast prune`: a model folder to a sparser model folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from holdfast.cli.options import (
    FOLDER,
    calibration_data_option,
    emit,
    json_option,
    out_option,
    overwrite_option,
    seed_option,
)
from holdfast.extras import require_extra
from holdfast.files import atomic_folder, write_json
from holdfast.recipe import CalibrateConfig, PruneConfig


@click.command("prune")
@click.argument("model", type=FOLDER)
@out_option("the pruned model")
@click.option(
    "--method",
    type=click.Choice(["magnitude", "wanda"]),
    default="wanda",
    show_default=True,
    help="How weights are scored.",
)
@click.option(
    "--sparsity",
    type=click.FloatRange(0, 1, max_open=True),
    default=PruneConfig().sparsity_frac,
    show_default=True,
    help="Share of each layer's weights set to zero.",
)
@calibration_data_option
@seed_option
@overwrite_option
@json_option
def command(
    model: Path,
    out: Path,
    method: str,
    sparsity: float,
    calibration_data: str,
    seed: int,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Set the least important weights of the model folder MODEL to zero.

    The result is an ordinary model folder in fp32. Zeros make the artifact compress better; ONNX
    Runtime on a CPU does not run unstructured zeros any faster.
    """
    require_extra("export", "`holdfast prune`")
    from holdfast.exporter.source import load_source, save_source
    from holdfast.prune.apply import prune_model
    from holdfast.quantize.prompts import load_calibration
    from holdfast.quantize.sequences import chat_prompts

    config = PruneConfig(method=method, sparsity_frac=sparsity)  # type: ignore[arg-type]
    source = load_source(model)
    prompts = load_calibration(calibration_data, CalibrateConfig().samples, seed)
    with atomic_folder(out, overwrite=overwrite) as fresh:
        report = prune_model(source, chat_prompts(source.tokenizer, [p.prompt for p in prompts]), config)
        save_source(source, fresh)
        write_json(fresh / "prune.json", dataclasses.asdict(report))
    line = f"{out}: {method}, {report.reached_frac:.2%} of the weights in the decoder blocks are zero"
    emit(dataclasses.asdict(report), [line], as_json=as_json)
