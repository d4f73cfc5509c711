"""neural-compressor's accuracy-driven search, asked to keep the labels of the fp32 graph's answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from holdfast.config import Config
from holdfast.evals.judge import label_answer
from holdfast.exporter.graph import GraphLinear
from holdfast.quantize.backends.inc_tuning import ANSWER_TOKENS, TuningResult, tune
from holdfast.quantize.formats import Format
from holdfast.recipe import TuningConfig
from holdfast.runtime.session import OnnxLanguageModel


class TuningReport(Config, frozen=True):
    """What the search did; part of quantize.json.

    Attributes:
        prompts: calibration prompts that it was judged on.
        baseline: share of them on which the fp32 graph keeps its own label.
        score: the same of the configuration that was taken.
        met: whether that is within the tolerance.
        trials: configurations that were tried.
        float32: module paths that it left in float32.
    """

    prompts: int
    baseline: float
    score: float
    met: bool
    trials: int
    float32: tuple[str, ...]


def search(
    export_folder: Path,
    modules: dict[str, GraphLinear],
    chosen: dict[str, Format],
    prompts: Sequence[list[int]],
    config: TuningConfig,
    *,
    seed: int = 0,
) -> tuple[TuningResult, TuningReport]:
    """Tune on the fp32 graph's own labels.

    Arguments:
        prompts: token ids of calibration prompts; the first `config.prompts` of them are used.

    Raises:
        QuantizationError: no configuration is within the tolerance, and `keep_best` is off.
    """
    judged = list(prompts[: config.prompts])
    reference = OnnxLanguageModel.open(export_folder)
    answers = reference.generate(judged, max_new_tokens=ANSWER_TOKENS)
    labels = [label_answer(reference.tokenizer.decode(answer)) for answer in answers]
    result = tune(export_folder, modules, chosen, judged, labels, config, seed=seed)
    report = TuningReport(
        prompts=len(judged),
        baseline=result.baseline,
        score=result.chosen.score,
        met=result.met,
        trials=len(result.trials),
        float32=result.float32,
    )
    return result, report
