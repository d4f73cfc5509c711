"""neural-compressor's accuracy-driven tuning, with the alignment score as the accuracy.

It quantizes statically, asks for the score, and takes linears back to float32 until the score is met.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx

from holdfast.errors import QuantizationError
from holdfast.evals.judge import LABELS
from holdfast.exporter.export import GRAPH
from holdfast.exporter.graph import GraphLinear
from holdfast.extras import require_extra
from holdfast.quantize.backends import inc, inc_score
from holdfast.quantize.backends.inc_check import check_operators, check_written
from holdfast.quantize.formats import Format
from holdfast.recipe import QuantizeConfig, TuningConfig

ANSWER_TOKENS = 32
KILL_FACTOR, KILL_MARGIN_S = 2.0, 300.0  # the worker looks at the clock between trials only


@dataclass(frozen=True)
class Trial:
    """One configuration that was tried.

    Attributes:
        configuration: in words.
        score: share of prompts whose label is the fp32 model's, 0 to 1.
        seconds: to score it; quantizing it is not in it.
        float32: module paths of linears that it left in float32.
    """

    configuration: str
    score: float
    seconds: float
    float32: tuple[str, ...]


@dataclass(frozen=True)
class TuningResult:
    """What tuning ended with.

    Attributes:
        model: the first candidate that met the criterion; where none did, the best.
        trials: all of them, in order.
        met: whether `model` meets the criterion.
        baseline: score of the fp32 graph itself; below 1 where it and the reference labels differ.
    """

    model: onnx.ModelProto = field(repr=False)
    trials: tuple[Trial, ...]
    met: bool
    baseline: float

    @property
    def best_score(self) -> float:
        """The highest score of a trial."""
        return max(trial.score for trial in self.trials)

    @property
    def float32(self) -> tuple[str, ...]:
        """Linears that the chosen candidate left in float32."""
        return self.chosen.float32

    @property
    def chosen(self) -> Trial:
        """The trial whose graph `model` is."""
        return self.trials[-1] if self.met else max(self.trials, key=lambda trial: trial.score)


def tune(
    export_folder: Path,
    modules: dict[str, GraphLinear],
    formats: dict[str, Format],
    prompts: list[list[int]],
    reference_labels: Sequence[str],
    config: TuningConfig,
    *,
    seed: int,
    max_new_tokens: int = ANSWER_TOKENS,
) -> TuningResult:
    """Search for a static configuration whose answers keep the fp32 model's labels.

    Arguments:
        modules: module path -> where the linear is, of at least those in `formats`.
        formats: of the linears that may be quantized; 8-bit weights under static activations.
        prompts: held-out calibration prompts, token ids; never evaluation prompts.
        reference_labels: the fp32 model's label of each, see `holdfast.evals.judge`.
        config: when to stop; its `prompts` is not read, all that are given count.

    Raises:
        MissingExtraError: neural-compressor is not installed.
        QuantizationError: no candidate met the criterion, or neural-compressor failed.
    """
    require_extra("inc", "accuracy-driven tuning")
    _require_tunable(formats, prompts, reference_labels, config)
    asked = _request(modules, formats, prompts, seed) | {
        "tuning": {
            "export_folder": str(export_folder.resolve()),
            "formats": {path: asdict(format) for path, format in formats.items()},
            "prompts": prompts,
            "labels": list(reference_labels),
            "tolerance_frac": config.tolerance_frac,
            "time_budget_s": config.time_budget_s,
            "max_trials": config.max_trials,
            "max_new_tokens": max_new_tokens,
        }
    }
    limit = KILL_FACTOR * config.time_budget_s + KILL_MARGIN_S
    with tempfile.TemporaryDirectory(prefix="holdfast-inc-") as name:
        model, failure = _run(export_folder, Path(name), asked, limit)
        baseline, trials = _read_trials(Path(name), failure)
        met = model is not None
        if model is None:
            model = _best(Path(name), trials, baseline - config.tolerance_frac, failure, config.keep_best)
    result = TuningResult(model=model, trials=trials, met=met, baseline=baseline)
    kept = {path: format for path, format in formats.items() if path not in set(result.float32)}
    check_operators(model, modules, kept)
    check_written(onnx.load(export_folder / GRAPH), model, prompts)
    return result


def _require_tunable(
    formats: Mapping[str, Format],
    prompts: Sequence[Sequence[int]],
    labels: Sequence[str],
    config: TuningConfig,
) -> None:
    for path, format in formats.items():
        if format.in_blocks or format.activation_bits is None:
            raise QuantizationError(
                f"neural-compressor tunes 8-bit weights under static activations, and `{path}` is to be "
                f"{format.name}: give it such a scheme as `w8a8`, or leave it out."
            )
    if not formats or not prompts or len(prompts) != len(labels):
        raise QuantizationError(
            f"Tuning takes linears and a label for every prompt, and got {len(formats)} linears, "
            f"{len(prompts)} prompts and {len(labels)} labels."
        )
    unknown = set(labels) - set(LABELS)
    if unknown:
        raise QuantizationError(f"Tuning compares labels {', '.join(LABELS)}, and got `{min(unknown)}`.")
    if not 0 <= config.tolerance_frac < 1 or config.max_trials < 1:
        raise QuantizationError(
            "Tuning takes a tolerance from 0 to below 1 and at least one trial, and got "
            f"{config.tolerance_frac} and {config.max_trials}."
        )


def _request(
    modules: Mapping[str, GraphLinear],
    formats: Mapping[str, Format],
    samples: Sequence[Sequence[int]],
    seed: int,
) -> dict[str, Any]:
    return dict(
        inc.request(modules, formats, QuantizeConfig(), method="static", prompts=samples, seed=seed)
    )


def _run(
    export_folder: Path, folder: Path, asked: dict[str, Any], limit: float
) -> tuple[onnx.ModelProto | None, QuantizationError | None]:
    """The graph that met the criterion, or why there is none."""
    try:
        return inc.run_worker(export_folder, folder, asked, inc.WORKER, limit), None
    except QuantizationError as error:
        return None, error


def _read_trials(folder: Path, failure: QuantizationError | None) -> tuple[float, tuple[Trial, ...]]:
    """Score of the fp32 graph, and the trials.

    Raises:
        QuantizationError: there was no trial at all.
    """
    path = folder / inc_score.TRIALS
    entries = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    trials = tuple(
        Trial(_words(entry["float32"]), entry["score"], entry["seconds"], tuple(entry["float32"]))
        for entry in entries
        if not entry["baseline"]
    )
    if not trials:
        raise QuantizationError(
            f"neural-compressor ended before its first trial ({failure}): allow more time, or give fewer "
            "prompts."
        ) from failure
    return float(entries[0]["score"]), trials


def _words(left: Sequence[str]) -> str:
    return "static, every linear" if not left else f"static, float32: {', '.join(left)}"


def _best(
    folder: Path,
    trials: Sequence[Trial],
    wanted: float,
    failure: QuantizationError | None,
    keep_best: bool,
) -> onnx.ModelProto:
    best = max(trials, key=lambda trial: trial.score)
    if best.score >= wanted:  # it was found, and then something else went wrong
        raise failure or QuantizationError("neural-compressor lost a candidate that met the criterion.")
    if not keep_best:
        raise QuantizationError(
            f"None of the {len(trials)} configurations that neural-compressor tried keeps {wanted:.1%} of "
            f"the fp32 model's labels; the best keeps {best.score:.1%} ({best.configuration}): allow more "
            "time or trials, or a larger tolerance."
        ) from failure
    return onnx.load(folder / inc_score.BEST)
