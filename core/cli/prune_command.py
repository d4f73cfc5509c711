"""`holdfast prune`: a model folder to a sparser model folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from holdfast.cli.options import (
    FOLDER,
    calibration_data_option,
    emit,
    json_option,
    out_option,
    overwrite_option,
    safety_weight_option,
    samples_option,
    seed_option,
)
from holdfast.config import decode
from holdfast.errors import UsageError
from holdfast.extras import require_extra
from holdfast.files import atomic_folder, refuse_existing, write_json
from holdfast.recipe import PRUNE_METHODS, STRUCTURE_KINDS, PruneConfig, StructuredConfig

if TYPE_CHECKING:
    from holdfast.exporter.source import SourceModel
    from holdfast.prune.report import PruneReport
    from holdfast.prune.structured.remove import StructuredReport
    from holdfast.quantize.prompts.draw import CalibrationPrompt

DEFAULTS = PruneConfig()
STRUCTURED = StructuredConfig()
SHARE = click.FloatRange(0.0, 1.0, min_open=True, max_open=True)


@click.command("prune")
@click.argument("model", type=FOLDER)
@out_option("the pruned model")
@click.option(
    "--method",
    type=click.Choice([name for name in PRUNE_METHODS if name != "none"]),
    help="How weights are scored; combined, set-difference and aligned-sparsegpt know of alignment.  "
    "[default: wanda, or no "
    "zeros at all with --remove]",
)
@click.option(
    "--sparsity",
    "sparsity_frac",
    type=click.FloatRange(0.0, 1.0, max_open=True),
    help=f"Share of the weights set to zero.  [default: {DEFAULTS.sparsity_frac}, or what --pattern says]",
)
@click.option(
    "--pattern",
    default=DEFAULTS.pattern,
    show_default=True,
    metavar="N:M",
    help="2:4, 4:8, ...: of each M neighbouring weights, N stay.",
)
@click.option(
    "--allocation",
    type=click.Choice(["auto", "uniform", "sensitivity"]),
    default=DEFAULTS.allocation,
    show_default=True,
    help="The same sparsity in each layer, or by sensitivity at the same total; auto: by sensitivity with "
    "aligned-sparsegpt where there is no pattern.",
)
@click.option(
    "--rest",
    type=click.Choice(["wanda", "sparsegpt", "aligned-sparsegpt"]),
    default=DEFAULTS.rest,
    show_default=True,
    help="How set-difference chooses among weights that it does not protect.",
)
@safety_weight_option
@click.option(
    "--safety-top",
    "safety_top_frac",
    type=SHARE,
    default=DEFAULTS.safety_top_frac,
    show_default=True,
    help="q of set-difference: this top of safety is protected ...",
)
@click.option(
    "--utility-top",
    "utility_top_frac",
    type=SHARE,
    default=DEFAULTS.utility_top_frac,
    show_default=True,
    help="... without this top of utility, p.",
)
@click.option(
    "--safety-heads",
    type=click.IntRange(min=0),
    default=DEFAULTS.safety_heads,
    show_default=True,
    help="Attention heads to protect, those that refusals hang on most.",
)
@click.option(
    "--safety-loss",
    type=click.Choice(["nll", "contrastive"]),
    default=DEFAULTS.safety_loss,
    show_default=True,
    help="Loss of the harmful prompts; contrastive needs --base.",
)
@click.option("--base", help="Folder or hub name of the base, or `ablate`; for --safety-loss contrastive.")
@click.option(
    "--response-tokens",
    type=click.IntRange(min=1),
    default=DEFAULTS.response_tokens,
    show_default=True,
    help="Tokens of the model's own answers that gradients are taken on.",
)
@click.option(
    "--remove",
    metavar="KINDS",
    help=f"{', '.join(STRUCTURE_KINDS)}, or some of them with commas: structures that are removed for "
    "real, so that graph, bytes and latency shrink.",
)
@click.option(
    "--remove-frac",
    type=SHARE,
    help=f"Share of the decoder blocks' weights to remove.  [default: {STRUCTURED.sparsity_frac}]",
)
@click.option("--allow-zeros", is_flag=True, help="Prune a model further that is sparse already.")
@samples_option
@calibration_data_option
@seed_option
@overwrite_option
@json_option
def command(
    model: Path,
    out: Path,
    base: str | None,
    samples: int,
    calibration_data: str,
    seed: int,
    overwrite: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Set the least important weights of the model folder MODEL to zero, or remove structures.

    The result is an ordinary model folder in fp32. A folder that `holdfast calibrate` wrote keeps its
    calibration, with zeros in its integer codes. Zeros make the artifact compress better; ONNX
    Runtime on a CPU does not run unstructured zeros or N:M patterns any faster. Structures (--remove)
    are gone for real.
    """
    config = _config(settings, base)
    refuse_existing(out, overwrite=overwrite)
    require_extra("export", "`holdfast prune`")
    from holdfast.exporter.architectures import block_linear_modules
    from holdfast.exporter.source import load_source, save_source
    from holdfast.prune.apply import prune_model
    from holdfast.prune.calibrated import carry_calibration, check_after_calibration, is_calibrated
    from holdfast.prune.checks import check_config
    from holdfast.prune.report import prune_record
    from holdfast.prune.structured.prune import prune_structures
    from holdfast.quantize.prompts.draw import load_calibration
    from holdfast.quantize.prompts.sequences import chat_prompts

    check_config(config, {})
    calibrated = is_calibrated(model)
    if calibrated:
        check_after_calibration(model, config)
    prompts = load_calibration(calibration_data, samples, seed)
    harmful = [prompt.kind == "harmful" for prompt in prompts]
    source = load_source(model)
    negative = None if base is None else _negative(source, base, prompts)
    ids = chat_prompts(source.tokenizer, [prompt.prompt for prompt in prompts])
    with atomic_folder(out, overwrite=overwrite) as fresh:
        removed = None
        if config.structured is not None:
            source, removed = prune_structures(
                source, ids, config.structured, harmful=harmful, response_tokens=config.response_tokens
            )
        report = prune_model(source, ids, config, harmful=harmful, negative=negative)
        save_source(source, fresh)
        if calibrated:
            carry_calibration(model, fresh, block_linear_modules(source.model))
        record = prune_record(report, removed)
        write_json(fresh / "prune.json", record)
    emit(record, _lines(out, report, removed), as_json=as_json)


def _lines(out: Path, report: PruneReport, removed: StructuredReport | None) -> list[str]:
    """What was done, for a person."""
    lines = []
    if removed is not None:
        lines.append(
            f"{out}: {removed.reached_frac:.2%} of the decoder blocks' weights removed, "
            f"{removed.before.parameters:,} parameters before, {removed.after.parameters:,} after"
        )
    if report.method != "none":
        share = f"{report.reached_frac:.2%} of the weights in the decoder blocks are zero"
        lines.append(f"{out}: {report.method}, {share}")
    protected = sum(entry.protected for entry in report.modules.values())
    return [*lines, f"  {protected:,} weights were protected"] if protected else lines


def _config(settings: dict[str, Any], base: str | None) -> PruneConfig:
    """The flags as a recipe's `prune` section.

    Raises:
        UsageError: `--base` without a use for it, or the other way round. RecipeError: out of range.
    """
    if (settings["safety_loss"] == "contrastive") != (base is not None):
        raise UsageError("--safety-loss contrastive and --base go together: give both, or neither.")
    kinds, share = settings.pop("remove"), settings.pop("remove_frac")
    if kinds is None and share is not None:
        raise UsageError("--remove-frac is the share of what --remove names: give both, or neither.")
    if kinds is not None:
        asked = {"kinds": [kind.strip() for kind in kinds.split(",")]}
        settings["structured"] = asked if share is None else {**asked, "sparsity_frac": share}
    settings["method"] = settings["method"] or ("wanda" if kinds is None else "none")
    if settings["sparsity_frac"] is None:
        settings["sparsity_frac"] = _pattern_sparsity(settings["pattern"])
    return decode(settings, PruneConfig, what="command line")


def _pattern_sparsity(pattern: str) -> float:
    """What a pattern leaves out; the recipe's default where it is none."""
    numbers = re.fullmatch(r"(\d+):(\d+)", pattern)
    if numbers is None or not 0 < int(numbers[1]) < int(numbers[2]):
        return DEFAULTS.sparsity_frac
    return 1.0 - int(numbers[1]) / int(numbers[2])


def _negative(source: SourceModel, base: str, prompts: list[CalibrationPrompt]) -> Any:
    """The unaligned transformers model: a checkpoint, or the model without its refusal direction."""
    from holdfast.exporter.hub import resolve_source
    from holdfast.exporter.source import load_base
    from holdfast.quantize.learning.ablate import make_twin

    if base == "ablate":
        return make_twin(source, prompts).model
    return load_base(resolve_source(base, None, role="base model"), source).model
