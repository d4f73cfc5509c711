"""Prefill, decode, size and memory of every graph of one model, interleaved in one run.

    python -m benchmarks.graphs --size 125m --work FOLDER --out graphs-125m.json

prints a table. Graphs of onnxruntime-genai's model builder take part where their folders are given; it
needs an environment of its own, see genai_builder.md. All graphs run in the loop of decoding.py.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from benchmarks.build import Graph, graphs_of, size_options
from benchmarks.decoding import Answer, Decoder, memory_of, prompt_ids
from benchmarks.tables import graphs_table
from holdfast.errors import ParityError
from holdfast.files import write_json
from holdfast.progress import say
from holdfast.runtime.bench import SETTLE_S
from holdfast.runtime.environment import environment

PACKAGES = ("torch", "transformers", "optimum", "optimum-onnx", "onnx", "onnxscript")
WARMUP = 1
ATOL = 1e-3
"""Largest difference of a logit between fp32 graphs of one checkpoint."""


@dataclass(frozen=True)
class Task:
    """What is measured."""

    prompt_tokens: int
    new_tokens: int
    rounds: int


@dataclass
class Row:
    """A graph, asked for every logit or for the last ones only, and what was measured.

    Attributes:
        last: whether it was asked for the last position's logits only.
        prefill, decode: tokens/s of each round.
        prefill_ratios, decode_ratios: to the first row in the same round.
        same_tokens: greedy tokens that are those of the first row, from the first one on.
        max_logit_difference: to the first row, at the prompt's end; for fp32, at the last step as well.
    """

    graph: Graph
    last: bool
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    prefill_ratios: list[float] = field(default_factory=list)
    decode_ratios: list[float] = field(default_factory=list)
    same_tokens: int = 0
    max_logit_difference: float = 0.0
    memory: dict[str, int] | None = None

    @property
    def name(self) -> str:
        return f"{self.graph.maker}, {self.graph.scheme}" + (", last logits only" if self.last else "")


def rows_of(graph: Graph, decoder: Decoder) -> list[Row]:
    """A graph that can leave logits out is measured both ways."""
    return [Row(graph, last) for last in ((False, True) if decoder.takes_keep else (False,))]


def together(graphs: Sequence[Graph], most_bytes: int) -> list[list[Graph]]:
    """Groups whose files fit into `most_bytes`; the first graph is in every one of them."""
    first, *others = graphs
    groups: list[list[Graph]] = [[first]]
    for graph in others:
        if len(groups[-1]) > 1 and sum(g.file_bytes for g in [*groups[-1], graph]) > most_bytes:
            groups.append([first])
        groups[-1].append(graph)
    return groups


def measure_group(graphs: Sequence[Graph], task: Task) -> list[Row]:
    """Measure graphs in turns; ratios are to the first."""
    decoders = {graph: Decoder(graph.plan) for graph in graphs}
    rows = [row for graph, decoder in decoders.items() for row in rows_of(graph, decoder)]
    prompt = prompt_ids(graphs[0].plan.vocabulary, task.prompt_tokens)
    for turn in range(WARMUP + task.rounds):
        answers = _one_round(rows, decoders, prompt, task.new_tokens, turn)
        if turn == 0:
            _compare(rows, answers)
        if turn >= WARMUP:
            _note(rows, answers, task)
    return rows


def _one_round(
    rows: Sequence[Row],
    decoders: dict[Graph, Decoder],
    prompt: NDArray[np.int64],
    new_tokens: int,
    turn: int,
) -> list[Answer]:
    """An answer of every row, in the order of the rows; each round begins with another one."""
    answers: dict[int, Answer] = {}
    for offset in range(len(rows)):
        index = (turn + offset) % len(rows)
        time.sleep(SETTLE_S)  # threads of the session before spin for a moment
        answers[index] = decoders[rows[index].graph].answer(prompt, new_tokens, last=rows[index].last)
    return [answers[index] for index in range(len(rows))]


def _note(rows: Sequence[Row], answers: Sequence[Answer], task: Task) -> None:
    first = answers[0]
    for row, answer in zip(rows, answers, strict=True):
        row.prefill.append(task.prompt_tokens / answer.prefill_s)
        row.decode.append((task.new_tokens - 1) / answer.decode_s)
        row.prefill_ratios.append(first.prefill_s / answer.prefill_s)
        row.decode_ratios.append(first.decode_s / answer.decode_s)


def _compare(rows: Sequence[Row], answers: Sequence[Answer]) -> None:
    """The figures of a wrong graph are worth nothing.

    Raises:
        ParityError: an fp32 graph is not the first row's model.
    """
    first = answers[0]
    for row, answer in zip(rows, answers, strict=True):
        steps = 2 if row.graph.scheme == "fp32" else 1  # quantized graphs go on with other tokens
        gap = float(np.abs(answer.logits - first.logits)[:steps].max())
        row.max_logit_difference = gap
        row.same_tokens = _common(first.tokens, answer.tokens)
        if row.graph.scheme == "fp32" and not gap <= ATOL:
            raise ParityError(
                f"The logits of {row.name} differ by {gap:.1e} from those of {rows[0].name}: "
                "it is a graph of another checkpoint, or a wrong one."
            )


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens up to the first that differs."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def measure(graphs: Sequence[Graph], task: Task, most_bytes: int) -> list[Row]:
    """Speed of all graphs, then the memory of each alone; the first row is of the first group."""
    rows: list[Row] = []
    for group in together(graphs, most_bytes):
        say(f"measuring {', '.join(f'{graph.maker} {graph.scheme}' for graph in group)}")
        found = measure_group(group, task)
        rows += found if not rows else [row for row in found if row.graph is not graphs[0]]
        gc.collect()
    for row in rows:
        row.memory = memory_of(
            row.graph.plan, prompt_tokens=task.prompt_tokens, new_tokens=task.new_tokens, last=row.last
        )
    return rows


def result_of(
    size: str, task: Task, threads: int, rows: Sequence[Row], missing: dict[str, str]
) -> dict[str, Any]:
    """JSON types; no path of this machine."""
    return {
        "size": size,
        **asdict(task),
        "environment": environment(threads=threads)
        | {name: version(name) for name in PACKAGES}
        | {"load_average": os.getloadavg()[0]},
        "rows": [_row_result(row) for row in rows],
        "not_measured": missing,
    }


def _row_result(row: Row) -> dict[str, Any]:
    graph = row.graph
    fields = asdict(row) | {
        "name": row.name,
        "maker": graph.maker,
        "scheme": graph.scheme,
        "producer": graph.producer,
        "shared_cache": graph.plan.shared,
        "file_bytes": graph.file_bytes,
    }
    del fields["graph"]
    return fields


@click.command()
@size_options
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The JSON file to write.")
@click.option(
    "--genai", type=click.Path(path_type=Path, exists=True), help="An fp32 folder of its builder."
)
@click.option(
    "--genai-int4", type=click.Path(path_type=Path, exists=True), help="An int4 folder of its builder."
)
@click.option("--prompt-tokens", default=256, show_default=True)
@click.option("--new-tokens", default=64, show_default=True)
@click.option("--rounds", default=7, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--together-gib", default=9.0, show_default=True, help="Graphs that are loaded at once.")
def main(
    size: str,
    work: Path,
    given: Path | None,
    out: Path,
    genai: Path | None,
    genai_int4: Path | None,
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    threads: int,
    together_gib: float,
) -> None:
    """Make the graphs that are not there yet, measure them all, write figures and print a table."""
    graphs, missing = graphs_of(size, work, given, threads, {"fp32": genai, "W4": genai_int4})
    if not graphs or graphs[0].maker != "Optimum":
        raise click.ClickException(
            "Optimum's fp32 graph could not be made, and everything is held against it."
        )
    task = Task(prompt_tokens, new_tokens, rounds)
    rows = measure(graphs, task, int(together_gib * 2**30))
    result = result_of(size, task, threads, rows, missing)
    write_json(out, result)
    click.echo(graphs_table(result))


if __name__ == "__main__":
    main()
