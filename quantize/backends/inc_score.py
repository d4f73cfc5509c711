"""Accuracy-driven tuning inside the worker: neural-compressor's candidates, scored on what they answer.

The score is the share of prompts whose label (refused, complied, incoherent) is the fp32 model's. Flips
in both directions lower it: a candidate that refuses more than the original is damaged too.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx

from holdfast.evals.judge import label_answer
from holdfast.exporter.export import EXTERNAL, GRAPH, read_export
from holdfast.quantize.backends import inc_static
from holdfast.quantize.backends.inc_worker import quantize_static
from holdfast.quantize.formats import Format
from holdfast.quantize.graph import Graph
from holdfast.runtime.session import OnnxLanguageModel

TRIALS = "trials.json"
BEST = "best.onnx"
CANDIDATE = "candidate"
STRICTLY = 1e-9  # neural-compressor wants more than the baseline less the tolerance, not as much


def tune_static(model: onnx.ModelProto, request: dict[str, Any]) -> onnx.ModelProto | None:
    """The first candidate that meets the criterion, in its final form; None where none did.

    Every trial is appended to trials.json, and the best so far is in best.onnx, so that nothing is lost
    when the process is ended from outside.
    """
    from neural_compressor.config import AccuracyCriterion, TuningCriterion

    asked = request["tuning"]
    scorer = Scorer(model, asked)
    loss = asked["tolerance_frac"] + STRICTLY
    criteria = {
        "tuning_criterion": TuningCriterion(
            strategy="basic", timeout=0, max_trials=asked["max_trials"]
        ),  # with a timeout it would go on for all of it after a success
        "accuracy_criterion": AccuracyCriterion(criterion="absolute", tolerable_loss=loss),
    }
    result = quantize_static(
        model, request["static"], request["samples"], criteria=criteria, eval_func=scorer
    )
    return None if result is None else scorer.finished(result)


class Scorer:
    """neural_compressor's `eval_func`: a graph in, its score out."""

    def __init__(self, model: onnx.ModelProto, asked: dict[str, Any]) -> None:
        self.inputs, self.asked = list(model.graph.input), asked
        export = Path(asked["export_folder"])
        self.folder = _companions(export)
        modules = read_export(export).modules
        self.formats = {path: Format(**fields) for path, fields in asked["formats"].items()}
        self.modules = {path: modules[path] for path in self.formats}
        self.trials: list[dict[str, Any]] = []
        self.began = time.monotonic()

    def __call__(self, candidate: onnx.ModelProto | str) -> float:
        """Score a candidate, beyond 2 GB as a path; the first is neural_compressor's fp32 baseline.

        Raises:
            KeyboardInterrupt: the time is used up, which `fit` takes for the end of its search.
        """
        start = time.monotonic()
        finished = self.finished(onnx.load(candidate) if isinstance(candidate, str) else candidate)
        score = self.score(finished)
        best = max((trial["score"] for trial in self.trials if not trial["baseline"]), default=-1.0)
        baseline = not self.trials
        if not baseline and score > best:
            onnx.save_model(finished, BEST)
        self.trials.append(
            {
                "baseline": baseline,
                "score": score,
                "seconds": round(time.monotonic() - start, 3),
                "float32": self.left_in_float(finished),
            }
        )
        Path(TRIALS).write_text(json.dumps(self.trials), encoding="utf-8")
        met = not baseline and score >= self.trials[0]["score"] - self.asked["tolerance_frac"]
        if not met and time.monotonic() - self.began > self.asked["time_budget_s"]:
            raise KeyboardInterrupt
        return score

    def finished(self, candidate: onnx.ModelProto) -> onnx.ModelProto:
        """A copy with the ranges and clips of the formats, where it is quantized."""
        copy = onnx.ModelProto()
        copy.CopyFrom(candidate)
        left = set(self.left_in_float(copy))
        formats = {path: format for path, format in self.formats.items() if path not in left}
        inc_static.finish(copy, self.modules, formats, None)
        return copy

    def left_in_float(self, model: onnx.ModelProto) -> list[str]:
        """Module paths of linears that read a float32 tensor."""
        graph = Graph(model)
        products = {path: graph.producers[linear.output] for path, linear in self.modules.items()}
        readers = {path: graph.producers.get(node.input[1]) for path, node in products.items()}
        return [
            path for path, node in readers.items() if node is None or node.op_type != "DequantizeLinear"
        ]

    def score(self, model: onnx.ModelProto) -> float:
        """Share of prompts, 0 to 1, whose answer has the reference's label."""
        del model.graph.input[:]  # it drops the optional ones, which the runtime looks for
        model.graph.input.extend(self.inputs)
        onnx.save_model(model, self.folder / GRAPH)
        runner = OnnxLanguageModel.open(self.folder, threads=0)
        ids = runner.generate(self.asked["prompts"], max_new_tokens=self.asked["max_new_tokens"])
        labels = [label_answer(runner.tokenizer.decode(answer)) for answer in ids]
        return agreement(labels, self.asked["labels"])


def agreement(labels: Sequence[str], reference: Sequence[str]) -> float:
    """Share of equal labels, 0 to 1."""
    return sum(a == b for a, b in zip(labels, reference, strict=True)) / len(reference)


def _companions(export: Path) -> Path:
    """A folder with everything of the export but its graph."""
    folder = Path(CANDIDATE)
    folder.mkdir()
    for path in export.iterdir():
        if path.is_file() and path.name not in (GRAPH, EXTERNAL) and path.suffix in (".json", ".jinja"):
            shutil.copyfile(path, folder / path.name)
    return folder
