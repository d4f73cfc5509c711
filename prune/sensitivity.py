"""Which sparsity each layer gets, by what pruning it alone costs the answers: wiring of `allocation`.

One walk through the unpruned model. What the recipe's method would make of each linear at a few sparsities
is computed on the inputs that it has there, and the linear stays as it was.
"""

from __future__ import annotations

from torch import Tensor, nn

from holdfast.exporter.architectures import block_paths
from holdfast.prune.activations import input_hessian
from holdfast.prune.allocation import (
    SLACK_FRAC,
    Choice,
    allocate,
    anchors,
    interpolated,
    sparsity_grid,
    topped_up,
)
from holdfast.prune.block_scores import (
    Evidence,
    Linears,
    block_protected,
    block_scores,
    choose,
    row_weights,
    updates,
)
from holdfast.prune.checks import check_finite
from holdfast.prune.gradients import output_importances
from holdfast.prune.masks import parse_pattern, pruned_count
from holdfast.prune.sparsegpt import output_error, sparsegpt
from holdfast.recipe import PruneConfig


def importances(
    config: PruneConfig, model: nn.Module, linears: Linears, evidence: Evidence
) -> dict[str, Tensor]:
    """Module path -> importance of each output channel, of utility plus lambda times safety, float32 [out].

    Arguments:
        evidence: before the first block; it stays there.

    Raises:
        PruneError: gradients that are not finite.
    """
    found = output_importances(model, linears, evidence.utility)
    for path, values in output_importances(model, linears, evidence.safety).items():
        found[path].add_(values, alpha=config.safety_weight)
        check_finite(path, found[path], what="gradients")
    return found


def sensitivity_fracs(
    config: PruneConfig, model: nn.Module, linears: Linears, evidence: Evidence
) -> dict[str, float]:
    """Module path -> sparsity, the least harmful at the total that was asked for.

    Arguments:
        evidence: before the first block, with the answers and with them as calibration rows, for this walk
            alone (`Evidence.unpruned`), and with importances.

    Raises:
        PruneError: inputs or gradients that are not finite.
    """
    sizes = {path: module.weight.numel() for path, module in linears.items()}
    costs: dict[Choice, float] = {}
    for index, path in enumerate(block_paths(model)):
        inside = {name: module for name, module in linears.items() if name.startswith(f"{path}.")}
        for name, measured in _block_costs(config, model, inside, index, evidence).items():
            for frac in sparsity_grid(config.sparsity_frac):
                costs[name, frac] = interpolated(measured, frac)
        evidence.advance_answers(model.get_submodule(path), index)
    zeros = {(name, frac): pruned_count(sizes[name], frac) for name, frac in costs}
    most = pruned_count(sum(sizes.values()), config.sparsity_frac)
    uniform = sum(zeros[name, config.sparsity_frac] for name in linears)
    least = uniform - round(SLACK_FRAC * sum(sizes.values()))
    return topped_up(allocate(costs, zeros, least=least, most=most), sizes, config.sparsity_frac)


def _block_costs(
    config: PruneConfig, model: nn.Module, inside: Linears, index: int, evidence: Evidence
) -> dict[str, dict[float, float]]:
    """Module path -> sparsity -> squared output error on the calibration rows, by channels' importance."""
    protected = block_protected(config, model, inside, index, evidence)
    scores = {} if updates(config) else block_scores(config, model, inside, index, evidence)
    block, found = model.get_submodule(block_paths(model)[index]), {}
    for path, module in inside.items():
        hessian = input_hessian(block, module, evidence.stream, index)
        check_finite(path, hessian)
        given = (module.weight, hessian, scores.get(path), protected.get(path))
        weights = row_weights(config, path, evidence)
        roots = evidence.importances[path].sqrt()[:, None]
        found[path] = {
            frac: output_error(roots * _change(config, frac, *given, weights), hessian)
            for frac in anchors(config.sparsity_frac)
        }
    return found


def _change(
    config: PruneConfig,
    sparsity_frac: float,
    weight: Tensor,
    hessian: Tensor,
    scores: Tensor | None,
    protected: Tensor | None,
    weights: Tensor | None,
) -> Tensor:
    """What pruning adds to a weight, float32 [out, in]; scores where weights that stay are not changed."""
    if scores is not None:
        return -weight.masked_fill(choose(config, scores, sparsity_frac, protected), 0.0)
    pattern = parse_pattern(config.pattern)
    pruned, _ = sparsegpt(
        weight, hessian, sparsity_frac, pattern=pattern, protected=protected, row_weights=weights
    )
    return pruned - weight
