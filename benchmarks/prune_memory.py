"""Peak memory of every score of pruning on a model of 1.1 billion parameters, random weights.

    python -m benchmarks.prune_memory --work build/prune-memory --out docs/pruning-memory.md

Each score is a process of its own, one after the other; Linux, 10 GB of memory, 5 GB of disk. What is in
the work folder already is not measured again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import click

from benchmarks.models import SHAPES, Shape, checkpoint, weight_bytes
from benchmarks.prune_memory_worker import VARIANTS, Task
from benchmarks.tables import mib, table
from holdfast.exporter.weights import read_header
from holdfast.files import write_json, write_text
from holdfast.progress import say
from holdfast.runtime.environment import environment

PAGE = """# Memory of pruning

Printed by `make prune-memory` (`python -m benchmarks.prune_memory`), on {machine}; torch {torch},
transformers {transformers}, numpy {numpy}, scipy {scipy}; {threads} thread.

A Llama of TinyLlama's shape with random weights: hidden {hidden_size}, FFN {intermediate_size},
{num_attention_heads} heads on {num_key_value_heads} KV heads, {num_hidden_layers} blocks, vocabulary
{vocab_size}. Its checkpoint has {weights} MiB of fp32 weights, and two of its blocks {blocks} MiB. Each
score runs in a process of its own, on {prompts} rows of {prompt_tokens} random token ids ({tokens} tokens),
half of which count as harmful, and on answers of {answer_tokens} tokens where it reads answers. Sparsity
50 %.{cut}

The peak is that of the process (`VmHWM`), less what the interpreter and its libraries take after a run on a
tiny model; it includes the model and what the rows take. "Loaded" is what is resident before the scores
start, "on top" the rest of the peak. The rows' hidden states, on their way from block to block, grow with
the calibration rows and are part of it; so are the activations of a batch of rows inside a block.

{table}
"""


def block_bytes(folder: Path) -> int:
    """Weights of the first decoder block of a Llama's checkpoint, as float32."""
    headers = [read_header(path) for path in folder.glob("*.safetensors")]
    tensors = [entry for found in headers for name, entry in found.items() if ".layers.0." in name]
    return 4 * sum(prod(entry.shape) for entry in tensors)


def run_once(task: Task, work: Path) -> dict[str, Any]:
    """Figures of one variant, from the work folder where they are those of the same task.

    Raises:
        CalledProcessError: the process failed.
    """
    kept = work / "runs" / f"{task.variant.replace(' ', '-').replace(',', '')}.json"
    if kept.is_file():
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        if found["task"] == asdict(task):
            return found
    say(task.variant)
    command = [sys.executable, "-m", "benchmarks.prune_memory_worker", json.dumps(asdict(task))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1]) | {"task": asdict(task)}
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_json(kept, found)
    return found


def memory_table(runs: Sequence[Mapping[str, Any]], budget_bytes: int) -> str:
    """One row a variant.

    Arguments:
        budget_bytes: of the weights and two blocks.
    """
    header = [
        "scores",
        "loaded, MiB",
        "on top, MiB",
        "rows' part, MiB",
        "peak, MiB",
        f"under {mib(budget_bytes)} MiB",
        "blocks",
        "seconds",
    ]
    return table(header, [_row(run, budget_bytes) for run in runs])


def _row(run: Mapping[str, Any], budget_bytes: int) -> list[str]:
    peak = max(run["peak_bytes"], run["loading_peak_bytes"])
    return [
        run["variant"],
        mib(run["loaded_bytes"]),
        mib(peak - run["loaded_bytes"]),
        mib(run["rows_bytes"]),
        mib(peak),
        "yes" if peak < budget_bytes else "no",
        str(run["blocks"]),
        f"{run['seconds']:,.0f}",
    ]


def page(shape: Shape, runs: Sequence[Mapping[str, Any]], source: Path, found: Mapping[str, Any]) -> str:
    """docs/pruning-memory.md."""
    task, weights, block = runs[0]["task"], weight_bytes(source), block_bytes(source)
    cut = f"""
Pruning stops after {task["blocks"]} blocks: the others are of the same size and have fewer blocks behind
them, whose inputs gradients need; structures are scored in all blocks."""
    return PAGE.format(
        **asdict(shape),
        **{name: task[name] for name in ("prompts", "prompt_tokens", "answer_tokens", "threads")},
        **{name: version(name) for name in ("torch", "transformers", "numpy", "scipy")},
        machine=f"{found['cpu']} ({found['machine']}, {found['cores']} cores), {found['system']}",
        tokens=task["prompts"] * task["prompt_tokens"],
        weights=mib(weights),
        blocks=mib(2 * block),
        cut=cut if task["blocks"] else "",
        table=memory_table(runs, weights + 2 * block),
    )


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Models and figures are here.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The page to write.")
@click.option("--size", type=click.Choice(list(SHAPES)), default="1b", show_default=True)
@click.option("--prompts", default=16, show_default=True)
@click.option("--prompt-tokens", default=32, show_default=True)
@click.option("--answer-tokens", default=16, show_default=True)
@click.option("--blocks", default=0, help="Prune only so many blocks; 0 for all.")
@click.option("--threads", default=1, show_default=True)
@click.option("--variant", "chosen", type=click.Choice(list(VARIANTS)), multiple=True, help="These only.")
def main(
    work: Path,
    out: Path,
    size: str,
    prompts: int,
    prompt_tokens: int,
    answer_tokens: int,
    blocks: int,
    threads: int,
    chosen: tuple[str, ...],
) -> None:
    """Measure every score and write the page."""
    source, small = (checkpoint(name, work / name / "checkpoint") for name in (size, "tiny"))
    given = (str(source), str(small), prompts, prompt_tokens, answer_tokens, blocks, threads)
    runs = [run_once(Task(name, *given), work) for name in chosen or VARIANTS]
    text = page(SHAPES[size], runs, source, environment())
    write_text(out, text)
    click.echo(text)


if __name__ == "__main__":
    main()
