"""`holdfast calibrate`: contrastive PTQ calibration of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from holdfast.cli.options import (
    FOLDER,
    alphas_option,
    base_option,
    calibration_data_option,
    emit,
    json_option,
    loss_option,
    method_option,
    out_option,
    overwrite_option,
    quantization_options,
    quantization_settings,
    seed_option,
)
from holdfast.config import decode, encode
from holdfast.extras import require_extra
from holdfast.files import atomic_folder, refuse_existing
from holdfast.recipe import Recipe


@click.command("calibrate")
@click.argument("model", type=FOLDER)
@base_option
@click.option("--aligned", type=FOLDER, help="The unpruned aligned model, where MODEL is a pruned one.")
@out_option("the calibrated model")
@method_option
@loss_option
@alphas_option
@click.option("--steps", type=int, help="Steps for each alpha.")
@click.option("--block-steps", type=int, help="Steps for each decoder block, before those.")
@click.option(
    "--scope",
    type=click.Choice(["end-to-end", "blocks"]),
    help="`blocks`: one decoder block in memory at a time, for models that do not fit.",
)
@quantization_options
@calibration_data_option
@seed_option
@overwrite_option
@json_option
def command(
    model: Path, base: str, aligned: Path | None, out: Path, overwrite: bool, as_json: bool, **flags: Any
) -> None:
    """Decide activation ranges, channel scales and integer weight codes for the model folder MODEL.

    Writes a model folder (scales folded) with calibration.json and the codes beside the weights.
    """
    refuse_existing(out, overwrite=overwrite)
    recipe = _recipe(aligned or model, base, flags)
    require_extra("export", "`holdfast calibrate`")
    from holdfast.job import calibrate_blocks, prepare, prepare_data

    if recipe.calibrate.scope == "blocks":
        prompts = prepare_data(recipe)[1]
        with atomic_folder(out, overwrite=overwrite) as fresh:
            record = calibrate_blocks(recipe, prompts, model, fresh)
    else:
        job = prepare(recipe)
        calibration = job.calibrate(job.aligned if aligned is None else job.load(model))
        with atomic_folder(out, overwrite=overwrite) as fresh:
            calibration.save(fresh)
        record = calibration.record
    lines = [f"{out}: {record.method}, {len(record.formats)} linear layers"]
    if record.candidates:
        lines = [
            f"{out}: alpha {record.chosen_alpha} after {record.chosen_steps} steps, "
            f"chosen on {record.held_out} held-out prompts"
        ]
    lines += [
        f"  alpha {c.alpha:<5} steps {c.steps:<4} lost {c.flips_lost:>3}  gained {c.flips_gained:>3}  "
        f"other {c.flips_other:>3}  changed tokens {c.changed_tokens_frac:.1%}"
        for c in record.candidates
    ]
    emit(encode(record), lines, as_json=as_json)


def _recipe(aligned: Path, base: str, flags: dict[str, Any]) -> Recipe:
    """The flags as a recipe, so that a single step and a whole run check the same things."""
    calibrate = {
        "method": flags["method"],
        "loss": flags["loss"],
        "alphas": list(flags["alphas"]) or None,
        "steps": flags["steps"],
        "block_steps": flags["block_steps"],
        "scope": flags["scope"],
        "data": flags["calibration_data"],
    }
    given = {
        "model": str(aligned),
        "base": base,
        "seed": flags["seed"],
        "calibrate": {key: value for key, value in calibrate.items() if value is not None},
        "quantize": quantization_settings(flags),
    }
    return decode(given, Recipe, what="command line")
