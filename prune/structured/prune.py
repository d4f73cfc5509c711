"""Structures of a loaded model, scored for utility and for safety, and removed."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.errors import PruneError
from holdfast.exporter.source import SourceModel
from holdfast.prune.gradients import answer_batches, own_answers
from holdfast.prune.structured.measure import BATCH_SIZE, measure_first_order, measure_structures
from holdfast.prune.structured.plan import plan_structured, possible_shapes
from holdfast.prune.structured.remove import StructuredReport, remove, report_removed
from holdfast.prune.structured.scores import StructureScores, protect
from holdfast.recipe import StructuredConfig


def prune_structures(
    source: SourceModel,
    token_ids: Sequence[Sequence[int]],
    config: StructuredConfig,
    *,
    harmful: Sequence[bool],
    response_tokens: int,
) -> tuple[SourceModel, StructuredReport]:
    """The model without its least important structures; `source` stays as it is.

    Utility is what a structure writes on the harmless prompts; safety, the first-order change of the
    likelihood of the model's own answers to the harmful ones.

    Arguments:
        token_ids: calibration rows (chat-templated prompts).
        harmful: which of them are the safety set.
        response_tokens: tokens of the model's own answers.

    Raises:
        PruneError: see `plan_structured`; no harmful or no harmless prompts.
    """
    safety = [row for row, kind in zip(token_ids, harmful, strict=True) if kind]
    utility = [row for row, kind in zip(token_ids, harmful, strict=True) if not kind]
    if not utility or (config.safety_weight and not safety):
        raise PruneError(
            f"Structures are ranked on harmless prompts and protected on harmful ones, found "
            f"{len(utility)} and {len(safety)}: give both kinds, or set "
            "`prune.structured.safety_weight` to 0."
        )
    possible_shapes(source, config.sparsity_frac, config.kinds, config.channel_multiple)  # or refuses now
    scores = measure_structures(source, utility)
    if config.safety_weight:
        scores = protect(scores, _safety(source, safety, response_tokens), config.safety_weight)
    plan = plan_structured(
        source,
        scores,
        sparsity_frac=config.sparsity_frac,
        kinds=config.kinds,
        channel_multiple=config.channel_multiple,
    )
    smaller = remove(source, plan)
    return smaller, report_removed(source, smaller, plan)


def _safety(source: SourceModel, rows: Sequence[Sequence[int]], response_tokens: int) -> StructureScores:
    answers = own_answers(source, rows, response_tokens, BATCH_SIZE)
    return measure_first_order(source, answer_batches(source, rows, answers))
