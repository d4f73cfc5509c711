"""Speed and memory of an artifact, as ExecuTorch reports them for devices.

Prefill and decode in tokens/s, time to first token, file bytes and resident bytes, for one
conversation at a time. Absolute figures of different runs do not compare; several artifacts are
therefore measured interleaved, and compared with the first one in the same run.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holdfast.errors import UsageError
from holdfast.runtime.environment import environment
from holdfast.runtime.external_data import graph_files
from holdfast.runtime.memory import Memory, measure_memory
from holdfast.runtime.session import OnnxLanguageModel

# Threads of the session that ran last keep spinning for a moment and would slow the next one.
SETTLE_S = 0.05


@dataclass(frozen=True)
class Spread:
    """Median and range of repeated measurements."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    @property
    def single(self) -> bool:
        """Whether there is no range to show."""
        return self.lowest == self.highest


@dataclass(frozen=True)
class Round:
    """Times of one measured answer.

    Attributes:
        first_token_s: from token ids of the prompt to the id of the first new token.
        decode_s: from there to the last new token.
    """

    first_token_s: float
    decode_s: float


@dataclass(frozen=True)
class CacheFigures:
    """The KV cache of the measured answer.

    Attributes:
        dtype: element type of keys and values, for example `float32`.
        shared: whether past and present were one buffer, or a longer copy was made at every step.
        largest_bytes: one cache at its longest; one that is not shared exists twice during a step.
    """

    dtype: str
    shared: bool
    largest_bytes: int


@dataclass(frozen=True)
class BenchReport:
    """What `holdfast bench` says about one artifact.

    Attributes:
        prefill_tokens_per_s: prompt tokens over time to first token.
        decode_tokens_per_s: new tokens after the first, over the time they took.
        file_bytes: graph and its external data.
        memory: None where the system does not tell.
    """

    name: str
    prompt_tokens: int
    new_tokens: int
    repeats: int
    prefill_tokens_per_s: Spread
    decode_tokens_per_s: Spread
    first_token_s: Spread
    cache: CacheFigures
    file_bytes: int
    memory: Memory | None
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return asdict(self)


def bench(
    model: OnnxLanguageModel,
    *,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    warmup: int = 1,
) -> BenchReport:
    """Measure one loaded model; see `bench_models`."""
    return bench_models(
        [model], prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats, warmup=warmup
    )[0]


def bench_folders(
    folders: Sequence[Path],
    *,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    threads: int = 0,
    warmup: int = 1,
) -> list[BenchReport]:
    """Load artifacts and measure them interleaved; see `bench_models`.

    Raises:
        InputError, ExecutionError: one cannot be loaded or run.
    """
    models = [
        OnnxLanguageModel.open(folder, threads=threads, name=folder.resolve().name) for folder in folders
    ]
    return bench_models(
        models, prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats, warmup=warmup
    )


def bench_models(
    models: Sequence[OnnxLanguageModel],
    *,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    warmup: int,
) -> list[BenchReport]:
    """Measure models in turns, each in another (seeded) order, so that what disturbs one disturbs all.

    Arguments:
        prompt_tokens: length of the prompt (random ids: speed does not depend on them).
        new_tokens: length of the answer, at least 2; stop ids do not end it.
        repeats: measured rounds, at least 1.
        warmup: rounds before them, not counted.

    Raises:
        UsageError: too few tokens or rounds.
        InputError: prompt and answer do not fit the context.
        ExecutionError: ONNX Runtime failed.
    """
    if new_tokens < 2 or repeats < 1 or prompt_tokens < 1:
        raise UsageError(
            "A bench needs at least one prompt token, two new tokens and one repeat; "
            f"found {prompt_tokens}, {new_tokens} and {repeats}."
        )
    for model in models:
        model.require_room([prompt_tokens], new_tokens)
    rounds: list[list[Round]] = [[] for _ in models]
    for turn in range(warmup + repeats):
        # another order in every turn: what ran just before leaves its traces in caches and clocks
        for index in random.Random(turn).sample(range(len(models)), len(models)):
            time.sleep(SETTLE_S)
            measured = _measure(models[index], prompt_tokens, new_tokens)
            if turn >= warmup:
                rounds[index].append(measured)
    return [
        _report(model, measured, prompt_tokens, new_tokens)
        for model, measured in zip(models, rounds, strict=True)
    ]


def bench_lines(reports: Sequence[BenchReport]) -> list[str]:
    """A table for people; with several reports, ratios to the first one."""
    lines = []
    for report in reports:
        lines.append(report.name)
        for label, value in _figures(report):
            lines.append(f"  {label:<22}{value}")
        if report is not reports[0]:
            lines.append(f"  {'against ' + reports[0].name:<22}{_ratios(report, reports[0])}")
    return lines


def _measure(model: OnnxLanguageModel, prompt_tokens: int, new_tokens: int) -> Round:
    """One prefill and `new_tokens - 1` decode steps, greedy."""
    graph = model.graph
    ids: NDArray[np.int64] = np.random.default_rng(0).integers(
        graph.vocabulary_size, size=(1, prompt_tokens)
    )
    started = time.perf_counter()
    first_token_at = started
    cache = graph.empty_cache(1, prompt_tokens + new_tokens)
    for tokens in range(prompt_tokens, prompt_tokens + new_tokens):
        logits, cache = graph.forward(ids, np.ones((1, tokens), np.int64), cache, keep=1)
        ids = logits[:, -1:].argmax(axis=-1)
        if tokens == prompt_tokens:
            first_token_at = time.perf_counter()
    return Round(first_token_at - started, time.perf_counter() - first_token_at)


def _report(
    model: OnnxLanguageModel, rounds: list[Round], prompt_tokens: int, new_tokens: int
) -> BenchReport:
    graph = model.graph
    folder, threads = graph.path.parent, graph.threads
    return BenchReport(
        name=model.name,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=len(rounds),
        prefill_tokens_per_s=Spread.of([prompt_tokens / r.first_token_s for r in rounds]),
        decode_tokens_per_s=Spread.of([(new_tokens - 1) / r.decode_s for r in rounds]),
        first_token_s=Spread.of([r.first_token_s for r in rounds]),
        cache=CacheFigures(
            dtype=", ".join(sorted({np.dtype(entry.dtype).name for entry in graph.cache_inputs})),
            shared=graph.shares_cache,
            largest_bytes=(prompt_tokens + new_tokens) * graph.cache_token_bytes,
        ),
        file_bytes=sum(path.stat().st_size for path in graph_files(folder)),
        memory=measure_memory(folder, prompt_tokens=prompt_tokens, new_tokens=new_tokens, threads=threads),
        environment=environment(threads=threads),
    )


def _figures(report: BenchReport) -> list[tuple[str, str]]:
    memory, cache = report.memory, report.cache
    kind = "one buffer" if cache.shared else "copied every step"
    return [
        (f"prefill of {report.prompt_tokens}", _rate(report.prefill_tokens_per_s)),
        (f"decode of {report.new_tokens}", _rate(report.decode_tokens_per_s)),
        ("time to first token", f"{report.first_token_s.median * 1e3:.1f} ms"),
        ("KV cache", f"{_mib(cache.largest_bytes)} of {cache.dtype}, {kind}"),
        ("graph on disk", _mib(report.file_bytes)),
        ("resident, at its peak", _mib(memory.peak_resident_bytes) if memory else "not known"),
    ]


def _ratios(report: BenchReport, first: BenchReport) -> str:
    prefill = report.prefill_tokens_per_s.median / first.prefill_tokens_per_s.median
    decode = report.decode_tokens_per_s.median / first.decode_tokens_per_s.median
    size = report.file_bytes / first.file_bytes
    return f"prefill x{prefill:.2f}, decode x{decode:.2f}, size x{size:.2f}"


def _rate(spread: Spread) -> str:
    return f"{spread.median:,.0f} tokens/s ({spread.lowest:,.0f} to {spread.highest:,.0f})"


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.1f} MiB"
