"""`holdfast run`: the whole job, from an aligned model or a recipe to a verified bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from holdfast.cli.options import FOLDER, alphas_option, emit, json_option, loss_option, overwrite_option
from holdfast.errors import ExitCode, UsageError
from holdfast.extras import require_extra
from holdfast.recipe import (
    CALIBRATION_METHODS,
    KV_CACHES,
    PRUNE_METHODS,
    RANGES,
    RECOVERY_OBJECTIVES,
    TARGETS,
    Recipe,
    anchored,
    make_recipe,
    read_recipe,
)

RECIPE_SUFFIXES = (".yaml", ".yml")

# flag -> the recipe key that it sets
FLAGS: dict[str, str] = {
    "base": "base",
    "revision": "revision",
    "base_revision": "base_revision",
    "target": "export.target",
    "seed": "seed",
    "threads": "threads",
    "prune_method": "prune.method",
    "sparsity": "prune.sparsity_frac",
    "rounds": "prune.rounds",
    "recover": "recover.objective",
    "method": "calibrate.method",
    "loss": "calibrate.loss",
    "alphas": "calibrate.alphas",
    "steps": "calibrate.steps",
    "calibration_data": "calibrate.data",
    "scheme": "quantize.scheme",
    "backend": "quantize.backend",
    "kv_cache": "quantize.kv_cache",
    "ranges": "quantize.ranges",
    "suites": "evaluate.suites",
    "limit": "evaluate.limit",
    "margin": "evaluate.margin_frac",
}


@click.command("run")
@click.argument("source")
@click.option("--base", help="Folder or hub name of the unaligned base, or `ablate`.  [default: ablate]")
@click.option("--revision", help="Commit, tag or branch of SOURCE on the hub.")
@click.option("--base-revision", help="Commit, tag or branch of the base on the hub.")
@click.option("--out", type=FOLDER, help="The bundle's folder.  [default: NAME-bundle, here]")
@click.option("--prune-method", type=click.Choice(PRUNE_METHODS), help="How to prune.")
@click.option("--sparsity", type=float, help="Share of weights to prune, 0 to below 1.")
@click.option("--rounds", type=click.IntRange(min=1), help="Prune, recover and look at the gate so often.")
@click.option("--recover", type=click.Choice(RECOVERY_OBJECTIVES), help="How to repair the pruned model.")
@click.option("--method", type=click.Choice(CALIBRATION_METHODS), help="Calibration method.")
@loss_option
@alphas_option
@click.option("--steps", type=int, help="Calibration steps for each alpha.")
@click.option("--calibration-data", help="`builtin`, or a JSONL file with prompt and kind.")
@click.option("--target", type=click.Choice(TARGETS), help="Where the graph is to run.")
@click.option("--scheme", metavar="SCHEME", help="w8a8 ... w8a2, w4a8, w8, w4, w2 or none.")
@click.option("--backend", type=click.Choice(["ort", "inc"]), help="Quantization backend.")
@click.option("--ranges", type=click.Choice(RANGES), help="Calibrator of ranges that are not learned.")
@click.option("--kv-cache", type=click.Choice(KV_CACHES), help="Type of the cached keys and values.")
@click.option("--suite", "suites", multiple=True, metavar="NAME[=PATH]", help="Suite to run; repeatable.")
@click.option("--limit", type=int, help="At most this many prompts a suite.")
@click.option("--margin", type=float, help="Non-inferiority margin, as a fraction.")
@click.option("--seed", type=int, help="Random seed, recorded in the bundle.")
@click.option("--threads", type=int, help="Intra-op threads; 0 leaves the choice to the libraries.")
@click.option("--work", type=FOLDER, help="Keep the steps here and reuse them in later runs.")
@overwrite_option
@json_option
@click.pass_context
def command(
    context: click.Context,
    /,
    source: str,
    out: Path | None,
    work: Path | None,
    overwrite: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Compress the aligned model SOURCE, or run the recipe SOURCE (.yaml), and verify the result.

    A model is a folder or a hub name (owner/name).

    Settings come from the recipe, then from flags. A run that was interrupted goes on where it
    stopped when the same command is given again.
    """
    recipe = effective_recipe(source, flags)
    require_extra("export", "`holdfast run`")
    if recipe.quantize.backend == "inc":
        require_extra("inc", "`--backend inc`")
    from holdfast.pipeline import run

    outcome = run(recipe, out or Path(f"{Path(recipe.model).name}-bundle"), work=work, overwrite=overwrite)
    emit(outcome.to_dict(), outcome.lines(), as_json=as_json)
    context.exit(ExitCode.for_verdict(outcome.verdict))


def effective_recipe(source: str, flags: dict[str, Any]) -> Recipe:
    """The recipe that SOURCE and the flags describe.

    Arguments:
        source: a model folder, a hub name or a YAML recipe.
        flags: values by flag name; None and empty tuples mean not given.
    """
    overrides = {FLAGS[name]: value for name, value in flags.items() if value not in (None, ())}
    if "evaluate.suites" in overrides:
        overrides["evaluate.suites"] = [suite_choice(text) for text in flags["suites"]]
    if "calibrate.alphas" in overrides:
        overrides["calibrate.alphas"] = list(flags["alphas"])
    if "base" in overrides:
        overrides["base"] = anchored(overrides["base"], Path())
    if overrides.get("calibrate.data") not in (None, "builtin"):
        overrides["calibrate.data"] = str(Path(overrides["calibrate.data"]).resolve())
    if Path(source).suffix in RECIPE_SUFFIXES:
        return read_recipe(Path(source), overrides)
    return make_recipe({"model": anchored(source, Path())}, overrides, what="command line")


def suite_choice(text: str) -> dict[str, str]:
    """`name` or `name=path` as a recipe entry.

    Raises:
        UsageError: nothing before or after the equals sign.
    """
    name, equals, path = text.partition("=")
    if not name or (equals and not path):
        raise UsageError(f"--suite expects NAME or NAME=PATH, got {text!r}.")
    return {"name": name, "path": str(Path(path).resolve())} if path else {"name": name}
