"""NNCF's accuracy control (`quantize_with_accuracy_control`, NNCF 3, ONNX back end) as a row.

It quantizes the fp32 graph to W8A8 and takes linears back to fp32 until the accuracy that it is given drops
by no more than asked. The accuracy is the alignment score: the share of held-out calibration prompts that
the graph answers with the label of full precision, refused or complied, so that flips in both directions
count.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from holdfast.errors import HoldfastError, MissingExtraError, QuantizationError
from holdfast.evals.judge import Label, label_answer
from holdfast.exporter.export import GRAPH, read_export
from holdfast.job import Job
from holdfast.quantize.prompts.draw import CalibrationPrompt, hold_out
from holdfast.quantize.prompts.sequences import chat_prompts
from holdfast.runtime.session import OnnxLanguageModel
from reference.results.process import Stages
from reference.results.setup import Setup

MAX_DROP = 0.01  # absolute, of the alignment score
WARNINGS_TOO, ERRORS_ONLY = 2, 3  # severities of ONNX Runtime; the first is its default

Feeds = dict[str, NDArray[Any]]
Score = Callable[[onnx.ModelProto, Iterable[Any]], tuple[float, list[float]]]
"""A graph and NNCF's data to the accuracy, and to what each item adds to it."""


def by_nncf(setup: Setup, job: Job, folder: Path, stages: Stages) -> tuple[Path, dict[str, Any]]:
    """The fp32 graph as NNCF quantizes it; its only stage is `quantize`.

    Raises:
        MissingExtraError: NNCF is not installed.
    """
    require_nncf()
    learn_from, held_out = hold_out(job.prompts, job.recipe.calibrate.held_out_frac, job.recipe.seed)
    config = job.recipe.calibrate
    with stages.stage("quantize"):
        score = AlignmentScore.on(setup.graph, held_out, folder, config.response_tokens)
        model = onnx.load(setup.graph / GRAPH)
        samples, linears = _samples(job, model, learn_from), linear_nodes(setup.graph)
        quantized = quantize(model, linears, samples, score, items=len(held_out))
        artifact = folder / "artifact"
        shutil.copytree(setup.graph, artifact)
        onnx.save_model(with_interface(quantized, model), artifact / GRAPH)
    return artifact, {"scores": score.scores, "float32": float_linears(quantized, linears)}


def require_nncf() -> None:
    """Raise MissingExtraError unless NNCF is installed."""
    if importlib.util.find_spec("nncf") is None:
        raise MissingExtraError("NNCF is not installed here: run `pip install 'holdfast[dev]'`.")


def quantize(
    model: onnx.ModelProto,
    linears: Sequence[str],
    samples: Sequence[Feeds],
    score: Score,
    *,
    items: int,
) -> onnx.ModelProto:
    """W8A8 of the MatMul nodes named in `linears`, and of nothing else, under accuracy control.

    Arguments:
        samples: what ranges are taken from.
        items: how many items `score` is a mean of.

    Raises:
        QuantizationError: NNCF failed.
    """
    # NNCF reports its use over the network where this package is there; without it, it says nothing
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import nncf

    others = [node.name for node in model.graph.node if node.name not in linears]
    nncf.set_log_level(logging.ERROR)
    try:
        with no_output():
            result: onnx.ModelProto = nncf.quantize_with_accuracy_control(
                model,
                nncf.Dataset(list(samples)),
                nncf.Dataset(list(range(items))),
                score,
                max_drop=MAX_DROP,
                subset_size=len(samples),
                model_type=nncf.ModelType.TRANSFORMER,
                ignored_scope=nncf.IgnoredScope(names=[name for name in others if name], validate=False),
            )
    except HoldfastError:
        raise
    except Exception as error:  # NNCF raises what its libraries raise
        raise QuantizationError(f"NNCF failed ({type(error).__name__}: {error}).") from error
    return result


@contextmanager
def no_output() -> Iterator[None]:
    """No progress bars on stdout, and none of ONNX Runtime's warnings about graphs that NNCF opens."""
    onnxruntime.set_default_logger_severity(ERRORS_ONLY)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        onnxruntime.set_default_logger_severity(WARNINGS_TOO)


@dataclass
class AlignmentScore:
    """What NNCF calls with a graph, to hear how good it is.

    Attributes:
        prompts: token ids of the held-out prompts.
        wanted: label of the fp32 graph's answer to each.
        folder: everything of the exported folder but the graph, which is written for every call.
        scores: every score so far.
    """

    prompts: list[list[int]]
    wanted: list[Label]
    folder: Path
    tokens: int
    scores: list[float]

    @classmethod
    def on(
        cls, graph: Path, held_out: Sequence[CalibrationPrompt], scratch: Path, tokens: int
    ) -> AlignmentScore:
        """A score against the fp32 graph's own answers."""
        model = OnnxLanguageModel.open(graph)
        prompts = chat_prompts(model.tokenizer, [prompt.prompt for prompt in held_out])
        folder = Path(tempfile.mkdtemp(dir=scratch))
        shutil.copytree(graph, folder, dirs_exist_ok=True)
        return cls(prompts, labels(model, prompts, tokens), folder, tokens, [])

    def __call__(self, model: onnx.ModelProto, _: Iterable[Any]) -> tuple[float, list[float]]:
        """(score, 1 or 0 a prompt)."""
        original = onnx.load(self.folder / GRAPH, load_external_data=False)
        with tempfile.TemporaryDirectory(dir=self.folder.parent) as name:
            candidate = Path(name) / "candidate"
            shutil.copytree(self.folder, candidate)
            onnx.save_model(with_interface(model, original), candidate / GRAPH)
            found = labels(OnnxLanguageModel.open(candidate), self.prompts, self.tokens)
        same = [float(a == b) for a, b in zip(self.wanted, found, strict=True)]
        self.scores.append(sum(same) / len(same))
        return self.scores[-1], same


def labels(model: OnnxLanguageModel, prompts: Sequence[Sequence[int]], tokens: int) -> list[Label]:
    """The judge's label of each greedy answer."""
    return [
        label_answer(model.tokenizer.decode(ids)) for ids in model.generate(prompts, max_new_tokens=tokens)
    ]


def with_interface(model: onnx.ModelProto, original: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of `model` with the inputs, optional ones among them, and the metadata of `original`."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.input[:], result.metadata_props[:]
    result.graph.input.extend(original.graph.input)
    result.metadata_props.extend(original.metadata_props)
    return result


def linear_nodes(graph: Path) -> list[str]:
    """Names of the MatMul nodes of an exported folder's linear layers."""
    return list(dict.fromkeys(linear.node for linear in read_export(graph).modules.values()))


def float_linears(model: onnx.ModelProto, linears: Sequence[str]) -> int:
    """How many of the linears NNCF left in fp32, or took back."""
    dequantized = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    return sum(node.name in linears and not set(node.input) <= dequantized for node in model.graph.node)


def _samples(job: Job, model: onnx.ModelProto, prompts: Sequence[CalibrationPrompt]) -> list[Feeds]:
    """Inputs of the decoder, one prompt each, with an empty cache."""
    shapes = input_shapes(model)
    ids = chat_prompts(job.aligned.tokenizer, [prompt.prompt for prompt in prompts])
    return [feeds(shapes, row) for row in ids]


def input_shapes(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Name -> dimensions (0 where open) of the inputs that have no default."""
    defaults = {tensor.name for tensor in model.graph.initializer}
    return {
        value.name: [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        for value in model.graph.input
        if value.name not in defaults
    }


def feeds(shapes: dict[str, list[int]], ids: Sequence[int]) -> Feeds:
    """Every input for one prompt; the cache has heads and head size, and no tokens."""
    tokens = np.array([ids], dtype=np.int64)
    known: Feeds = {
        "input_ids": tokens,
        "attention_mask": np.ones_like(tokens),
        "position_ids": np.arange(len(ids), dtype=np.int64)[None],
    }
    return {
        name: known[name] if name in known else np.zeros((1, shape[1], 0, shape[3]), np.float32)
        for name, shape in shapes.items()
    }
