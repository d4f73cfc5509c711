"""`holdfast sensitivity`: what each layer's quantization costs, and bits under a budget."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

from holdfast.cli.options import (
    FOLDER,
    base_option,
    block_size_option,
    calibration_data_option,
    emit,
    json_option,
    overwrite_option,
    safety_weight_option,
    samples_option,
    seed_option,
)
from holdfast.config import decode, encode
from holdfast.errors import UsageError
from holdfast.extras import require_extra
from holdfast.files import refuse_existing, to_json, write_text
from holdfast.quantize.formats import parse_scheme
from holdfast.recipe import QuantizeConfig, Recipe, anchored

if TYPE_CHECKING:
    from holdfast.quantize.allocation.search import Trial
    from holdfast.quantize.allocation.solve import Allocation
    from holdfast.study import Study

PLOT_SUFFIXES = (".png", ".svg", ".pdf")


@click.command("sensitivity")
@click.argument("model")
@base_option
@click.option(
    "--schemes",
    default="w8a8,w4a8,w2a8",
    show_default=True,
    metavar="NAME,...",
    help="Schemes to choose among, for example w8,w4,w2.",
)
@click.option(
    "--draws",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Backward passes a batch: more make the figures less noisy.",
)
@click.option("--validate", "validated", is_flag=True, help="Compare with brute force: rank correlations.")
@click.option("--plot", type=FOLDER, metavar="FILE", help="Plot by layer: .png, .svg or .pdf.")
@click.option(
    "--budget-bytes",
    type=click.IntRange(min=1),
    help="Budget for all weights: linear layers, and embeddings, norms and biases in float32.",
)
@click.option(
    "--bits",
    type=click.FloatRange(0, 32, min_open=True),
    help="Budget as average stored bits of a linear layer's weight, scales and zero points included.",
)
@click.option(
    "--candidates",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Allocations that are measured.",
)
@safety_weight_option
@click.option("--auto", is_flag=True, help="Go on, from small budgets up, until the gate passes.")
@block_size_option
@samples_option
@calibration_data_option
@seed_option
@click.option("--out", type=FOLDER, metavar="FILE", help="Write a recipe (.yaml) or everything (.json).")
@overwrite_option
@json_option
def command(
    model: str,
    out: Path | None,
    plot: Path | None,
    overwrite: bool,
    as_json: bool,
    validated: bool,
    auto: bool,
    **flags: Any,
) -> None:
    """Rank the layers of MODEL by what quantizing them does to alignment and to utility.

    With --bits or --budget-bytes, choose each layer's scheme by integer programming, measure the best few
    on held-out prompts, and write a recipe for `holdfast run`.
    """
    _check(out, plot, overwrite, auto, flags)
    recipe = _recipe(model, flags)
    for scheme in flags["schemes"].split(","):
        parse_scheme(scheme, recipe.quantize)
    require_extra("export", "`holdfast sensitivity`")
    if plot is not None:
        require_extra("plots", "`--plot`")
    from holdfast.job import prepare
    from holdfast.study import study_sensitivity, validate

    study = study_sensitivity(
        prepare(recipe),
        flags["schemes"].split(","),
        draws=flags["draws"],
        total_bytes=flags["budget_bytes"],
        bits=flags["bits"],
    )
    result, lines = _table(study, flags["safety_weight"])
    if validated:
        correlations, measured = validate(study)
        result |= {"rank_correlations": correlations, "brute_force": [asdict(entry) for entry in measured]}
        lines += _correlation_lines(correlations)
    if study.budget_bytes is not None:
        chosen, more = _allocate(study, study.budget_bytes, auto, flags, lines)
        result |= more
        if out is not None and out.suffix != ".json":
            write_text(out, _recipe_text(study, chosen))
    if plot is not None:
        from holdfast.quantize.allocation.sensitivity_plot import plot_sensitivity

        plot_sensitivity(study.units, study.found, plot)
    if out is not None and out.suffix == ".json":
        write_text(out, to_json(result))
    emit(result, lines, as_json=as_json)


def _check(out: Path | None, plot: Path | None, overwrite: bool, auto: bool, flags: dict[str, Any]) -> None:
    """What the flags contradict, before any work."""
    budgets = [name for name in ("bits", "budget_bytes") if flags[name] is not None]
    if len(budgets) == 2:
        raise UsageError("Give a budget once: --bits or --budget-bytes.")
    if auto and not budgets:
        raise UsageError("--auto needs the largest budget that it may use: give --bits or --budget-bytes.")
    if out is not None and not budgets and out.suffix != ".json":
        raise UsageError(
            "Without a budget there is no recipe to write: give --bits, or name --out FILE.json."
        )
    if plot is not None and plot.suffix not in PLOT_SUFFIXES:
        raise UsageError(f"--plot expects a file ending in {', '.join(PLOT_SUFFIXES)}, got {plot.name}.")
    for path in (out, plot):
        if path is not None:
            refuse_existing(path, overwrite=overwrite)


def _recipe(model: str, flags: dict[str, Any]) -> Recipe:
    """The flags as a recipe, so that a study and a whole run check the same things."""
    data = flags["calibration_data"]
    given = {
        "model": anchored(model, Path()),
        "base": anchored(flags["base"], Path()),
        "seed": flags["seed"],
        "calibrate": {
            "data": data if data == "builtin" else str(Path(data).resolve()),
            "samples": flags["samples"],
        },
        "quantize": {"block_size": flags["block_size"]},
    }
    return decode(given, Recipe, what="command line")


def _table(study: Study, safety_weight: float) -> tuple[dict[str, Any], list[str]]:
    """Every unit under every scheme, in the model's order; rank 1 hurts most among those of its scheme."""
    ranks: dict[tuple[str, str], int] = {}
    for scheme in study.schemes:
        same = [entry for entry in study.found if entry.scheme == scheme]
        same.sort(key=lambda entry: -entry.cost(safety_weight))
        ranks |= {(entry.unit, scheme): place for place, entry in enumerate(same, start=1)}
    rows = [
        {
            **asdict(entry),
            "rank": ranks[entry.unit, entry.scheme],
            "size_bytes": study.sizes[entry.unit, entry.scheme],
        }
        for entry in study.found
    ]
    width = max(len(unit.name) for unit in study.units)
    head = (
        f"{'KL in nats':<{width}}  {'scheme':<6}  {'safety: weights':>15} {'activations':>11}  "
        f"{'utility: weights':>16} {'activations':>11}  {'rank':>4}  {'bytes':>12}"
    )
    lines = [head] + [
        f"{row['unit']:<{width}}  {row['scheme']:<6}  {row['safety']['weights']:>15.2e} "
        f"{row['safety']['activations']:>11.2e}  {row['utility']['weights']:>16.2e} "
        f"{row['utility']['activations']:>11.2e}  {row['rank']:>4}  {row['size_bytes']:>12,}"
        for row in rows
    ]
    units = {unit.name: {"paths": list(unit.paths), "weights": unit.weights} for unit in study.units}
    return {"units": units, "sensitivity": rows, "fixed_bytes": study.fixed_bytes}, lines


def _correlation_lines(correlations: dict[str, Any]) -> list[str]:
    figures = [
        f"{aim} of {part} {value:.3f}"
        for aim, parts in correlations.items()
        for part, value in parts.items()
    ]
    return [f"Spearman rank correlation with brute force: {', '.join(figures)}"]


def _allocate(
    study: Study, budget: int, auto: bool, flags: dict[str, Any], lines: list[str]
) -> tuple[Allocation, dict[str, Any]]:
    """The allocation to keep, and what is printed of it."""
    from holdfast.quantize.allocation.units import stored_bits
    from holdfast.study import best_allocations, first_passing

    settings = {"candidates": flags["candidates"], "safety_weight": flags["safety_weight"]}
    more: dict[str, Any] = {"budget_bytes": budget}
    if auto:
        chosen, verdict = first_passing(study, budget, **settings)
        more["verdict"] = verdict.to_dict()
        lines.append(f"{verdict.outcome}: {verdict.summary}")
    else:
        trials = best_allocations(study, budget, **settings)
        chosen = trials[0].allocation
        more["trials"] = [asdict(trial) for trial in trials]
        lines += [
            f"under {budget:,} bytes ({stored_bits(study.units, budget):.2f} stored bits a weight), on "
            f"{trials[0].score.prompts} held-out prompts, best first, then the baselines:",
            *(_trial_line(t, stored_bits(study.units, t.allocation.size_bytes)) for t in trials),
        ]
    for trial in more.get("trials", []):
        del trial["allocation"]["cost"]  # of no meaning for the baselines
    more["quantize"] = _section(study, chosen)
    counts = {scheme: list(chosen.schemes.values()).count(scheme) for scheme in study.schemes}
    lines.append(
        f"chosen: {', '.join(f'{n} units {s}' for s, n in counts.items() if n)}, "
        f"{chosen.size_bytes:,} bytes, {study.fixed_bytes:,} more in float32"
    )
    return chosen, more


def _trial_line(trial: Trial, bits: float) -> str:
    score = trial.score
    return (
        f"  {trial.name:<14}{bits:>6.2f} bits  flips {score.flips:>3} (lost {score.lost:>3}, gained "
        f"{score.gained:>3}, other {score.other:>3})  changed tokens {score.changed_tokens_frac:>6.1%}  "
        f"KL {score.divergence:.4f}"
    )


def _section(study: Study, chosen: Allocation) -> dict[str, Any]:
    """The quantize section of a recipe, without what has its default."""
    from holdfast.quantize.allocation.search import with_allocation

    plain = encode(QuantizeConfig())
    section = encode(with_allocation(study.config, chosen, study.units))
    return {k: value for k, value in section.items() if k in ("scheme", "mixed") or value != plain[k]}


def _recipe_text(study: Study, chosen: Allocation) -> str:
    """A recipe for `holdfast run` with the allocation."""
    recipe = study.job.recipe
    data = {"model": recipe.model, "base": recipe.base, "seed": recipe.seed}
    if recipe.calibrate.data != "builtin":
        data["calibrate"] = {"data": recipe.calibrate.data}
    text: str = yaml.safe_dump(data | {"quantize": _section(study, chosen)}, sort_keys=False)
    return text
