"""`holdfast recover`: a pruned or calibrated model folder back towards the aligned model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from msgspec import structs

from holdfast.cli.options import (
    FOLDER,
    alphas_option,
    base_option,
    calibration_data_option,
    emit,
    json_option,
    out_option,
    overwrite_option,
    samples_option,
    seed_option,
)
from holdfast.config import decode, encode
from holdfast.errors import RecipeError
from holdfast.extras import require_extra
from holdfast.files import atomic_folder, refuse_existing
from holdfast.recipe import RECOVERY_OBJECTIVES, QuantizeConfig, Recipe, RecoverConfig

DEFAULTS = RecoverConfig()


@click.command("recover")
@click.argument("model", type=FOLDER)
@click.option("--aligned", type=FOLDER, required=True, help="The model that MODEL was made from.")
@base_option
@out_option("the recovered model")
@click.option(
    "--objective",
    type=click.Choice(RECOVERY_OBJECTIVES),
    default=DEFAULTS.objective,
    show_default=True,
    help="Distillation with the contrastive loss, preference, or restoring weights of the safety heads.",
)
@click.option(
    "--loss",
    type=click.Choice(["bounded", "kl", "apc"]),
    default=DEFAULTS.loss,
    show_default=True,
    help="Of --objective contrastive.",
)
@alphas_option
@click.option("--pairs", type=FOLDER, help="JSONL of prompt, chosen and rejected, for --objective dpo.")
@click.option(
    "--beta",
    type=click.FloatRange(min=0.0, min_open=True),
    default=DEFAULTS.beta,
    show_default=True,
    help="DPO's temperature.",
)
@click.option(
    "--hidden-weight",
    type=click.FloatRange(min=0.0),
    default=DEFAULTS.hidden_weight,
    show_default=True,
    help="Weight of the distance of the blocks' outputs from the aligned model's; 0 for none.",
)
@click.option(
    "--trained",
    type=click.Choice(["all", "safety-heads"]),
    default=DEFAULTS.trained,
    show_default=True,
    help="Train all linear layers of the blocks, or the weights of the safety heads alone.",
)
@click.option(
    "--safety-heads",
    type=click.IntRange(min=1),
    default=DEFAULTS.safety_heads,
    show_default=True,
    help="How many heads count as those that refusals hang on.",
)
@click.option(
    "--lora-rank",
    type=click.IntRange(min=0),
    default=DEFAULTS.lora_rank,
    show_default=True,
    help="Rank of adapters to train and merge; 0 trains the weights themselves.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=DEFAULTS.steps,
    show_default=True,
    help="Optimizer steps of the run without a push.",
)
@click.option(
    "--lr",
    type=click.FloatRange(min=0.0, min_open=True),
    default=DEFAULTS.lr,
    show_default=True,
    help="AdamW's learning rate at a hidden size of 256; it falls as that grows.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=DEFAULTS.batch_size,
    show_default=True,
    help="Prompts a step.",
)
@click.option(
    "--response-tokens",
    type=click.IntRange(min=1),
    default=DEFAULTS.response_tokens,
    show_default=True,
    help="Tokens of the aligned model's answers that are learned from.",
)
@samples_option
@calibration_data_option
@seed_option
@overwrite_option
@json_option
def command(
    model: Path, aligned: Path, base: str, out: Path, overwrite: bool, as_json: bool, **flags: Any
) -> None:
    """Fine-tune the pruned or calibrated model folder MODEL back towards the aligned model.

    Zeros of MODEL stay zero. A folder that `holdfast calibrate` wrote is trained with its quantization in
    the loop, and the result is calibrated for the same formats.
    """
    refuse_existing(out, overwrite=overwrite)
    require_extra("export", "`holdfast recover`")
    from holdfast.quantize.record import CALIBRATION_FILE

    recipe = _recipe(aligned, base, flags)
    work = _quantized if (model / CALIBRATION_FILE).is_file() else _pruned
    with atomic_folder(out, overwrite=overwrite) as fresh:
        result, lines = work(model, recipe, fresh)
    emit(result, [f"{out}: {lines[0]}", *lines[1:]], as_json=as_json)


def _recipe(aligned: Path, base: str, flags: dict[str, Any]) -> Recipe:
    """The flags as a recipe, so that a single step and a whole run check the same things."""
    data = {"data": flags.pop("calibration_data"), "samples": flags.pop("samples")}
    seed, pairs, alphas = flags.pop("seed"), flags.pop("pairs"), flags.pop("alphas")
    recover = {**flags, "pairs": None if pairs is None else str(pairs)}
    if alphas:
        recover["alphas"] = list(alphas)
    given = {"model": str(aligned), "base": base, "seed": seed, "calibrate": data, "recover": recover}
    return decode(given, Recipe, what="command line")


def _pruned(model: Path, recipe: Recipe, out: Path) -> tuple[dict[str, Any], list[str]]:
    """Recovery of a pruned model."""
    from holdfast.exporter.source import save_source
    from holdfast.job import prepare
    from holdfast.prune.recovery.record import write_recovery

    job = prepare(recipe)
    done = job.recover(job.load(model))
    save_source(done.source, out)
    write_recovery(done.record, out)
    before, after = done.record.before, done.record.after
    lines = [
        f"{done.record.objective}, {done.record.sparsity_frac:.2%} zeros",
        f"  flips on {sum(held for _, held in done.record.prompts.values())} held-out prompts: "
        f"{before.flips} before, {after.flips} after",
        f"  KL from the aligned model: {before.divergence:.4f} nats before, {after.divergence:.4f} after",
    ]
    if after.steps == 0 and not done.record.restored:
        lines.append("  nothing was better than the model as it was, which is what was written")
    return encode(done.record), lines


def _quantized(model: Path, recipe: Recipe, out: Path) -> tuple[dict[str, Any], list[str]]:
    """Recovery of a calibrated model: training with the quantization that it was calibrated for."""
    from holdfast.exporter.source import check_same_vocabulary, load_source
    from holdfast.job import prepare
    from holdfast.prune.recovery.recover import learning_rate, lesson_settings
    from holdfast.quantize.record import read_record

    assert recipe.recover is not None
    if recipe.recover.objective == "safety-heads" or recipe.recover.trained == "safety-heads":
        raise RecipeError(
            f"{model} is calibrated, and safety heads are restored or trained before that: recover the "
            "pruned model and calibrate it again, or use --objective contrastive or dpo."
        )
    made = read_record(model)
    data = {"scheme": "none", "mixed": made.formats, **made.layout}
    quantize = decode(data, QuantizeConfig, what=str(model / "calibration.json"))
    source = load_source(model)
    recover = structs.replace(recipe.recover, lr=learning_rate(recipe.recover, source.model))
    calibrate = lesson_settings(recover, recipe.calibrate)
    job = prepare(structs.replace(recipe, quantize=quantize, calibrate=calibrate, recover=None))
    check_same_vocabulary(job.aligned.tokenizer, source.tokenizer)
    calibration = job.calibrate(source)
    calibration.save(out)
    record = calibration.record
    flips = [candidate.flips for candidate in record.candidates]
    lines = [
        f"{recipe.recover.objective}, {len(record.formats)} linear layers quantized in the loop",
        f"  kept: alpha {record.chosen_alpha} after {record.chosen_steps} steps",
        f"  flips of the candidates on {record.held_out} held-out prompts: {', '.join(map(str, flips))}",
    ]
    return encode(record), lines
