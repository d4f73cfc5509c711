"""Scores of one method on one checkpoint, in this process: what benchmarks.prune_memory starts.

    python -m benchmarks.prune_memory_worker '{"variant": ..., "checkpoint": ..., ...}'

prints JSON. The variant runs on a small model first, so that what is loaded and allocated once, the
interpreter with its libraries, is resident before anything is counted.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from holdfast.exporter.architectures import block_paths
from holdfast.exporter.source import SourceModel, load_source
from holdfast.exporter.walk import BlockBatch
from holdfast.prune.apply import prune_model
from holdfast.prune.gradients import answer_batches, own_answers
from holdfast.prune.structured.measure import measure_first_order, measure_structures
from holdfast.recipe import PRUNE_METHODS, PruneConfig
from holdfast.runtime.memory import PROCESS_STATUS, Memory, own_memory

RESET_PEAK = Path("/proc/self/clear_refs"), "5"  # proc(5): forget the highest resident size
SEED = 0


@dataclass(frozen=True)
class Task:
    """What is run.

    Attributes:
        checkpoint: what is measured; `small` is what is run before it.
        prompts: rows of random token ids, each of `prompt_tokens`; every other one counts as harmful.
        answer_tokens: of the model's own answers, where a method reads them.
        blocks: stop when so many decoder blocks are done; 0 for all.
    """

    variant: str
    checkpoint: str
    small: str
    prompts: int
    prompt_tokens: int
    answer_tokens: int
    blocks: int
    threads: int


class _EnoughError(Exception):
    """So many blocks are done as were asked for."""


def prune(options: dict[str, Any]) -> Callable[[SourceModel, Task], None]:
    """A run of `holdfast prune` at 50 %, without reading and writing folders."""

    def run(source: SourceModel, task: Task) -> None:
        done = 0

        def count(blocks: int) -> None:
            nonlocal done
            done += blocks
            if done == task.blocks:
                raise _EnoughError

        rows, harmful = prompt_rows(source, task)
        config = PruneConfig(sparsity_frac=0.5, response_tokens=task.answer_tokens, **options)
        prune_model(source, rows, config, harmful=harmful, on_done=count)

    return run


def structures(source: SourceModel, task: Task) -> None:
    """Scores of heads, channels and blocks, of all blocks."""
    measure_structures(source, prompt_rows(source, task)[0])


def structures_with_safety(source: SourceModel, task: Task) -> None:
    """The same, and those by gradients on the harmful half."""
    structures(source, task)
    rows, harmful = prompt_rows(source, task)
    prompts = [row for row, kind in zip(rows, harmful, strict=True) if kind]
    answers = own_answers(source, prompts, task.answer_tokens, len(prompts))
    measure_first_order(source, answer_batches(source, prompts, answers))


VARIANTS: dict[str, Callable[[SourceModel, Task], None]] = {
    **{method: prune({"method": method}) for method in PRUNE_METHODS if method != "none"},
    "set-difference, rest by wanda": prune({"method": "set-difference", "rest": "wanda"}),
    "combined, shared out by sensitivity": prune({"method": "combined", "allocation": "sensitivity"}),
    "wanda, 8 safety heads": prune({"method": "wanda", "safety_heads": 8}),
    "structures": structures,
    "structures, with safety": structures_with_safety,
}


def prompt_rows(source: SourceModel, task: Task) -> tuple[list[list[int]], list[bool]]:
    """Random token ids, and which rows count as harmful; the same every time."""
    generator = torch.Generator().manual_seed(SEED)
    words = source.model.config.vocab_size
    ids = torch.randint(3, words, (task.prompts, task.prompt_tokens), generator=generator)
    return ids.tolist(), [index % 2 == 0 for index in range(task.prompts)]


def measure(task: Task) -> dict[str, Any]:
    """Resident bytes above those of the interpreter with its libraries, and seconds.

    Returns:
        loaded_bytes, loading_peak_bytes, peak_bytes: when the model is loaded, the most until then, and the
        most from then on; rows_bytes: hidden states of the rows on their way from block to block.
    """
    run = VARIANTS[task.variant]
    attempt(run, load_source(Path(task.small)), task)
    before = settle().resident_bytes
    source = load_source(Path(task.checkpoint))
    rows = CarriedRows(source.model)
    loading_peak = memory().peak_resident_bytes
    loaded = settle().resident_bytes
    started = time.perf_counter()
    blocks = attempt(run, source, task)
    return {
        "variant": task.variant,
        "blocks": blocks,
        "seconds": time.perf_counter() - started,
        "loaded_bytes": loaded - before,
        "loading_peak_bytes": loading_peak - before,
        "peak_bytes": memory().peak_resident_bytes - before,
        "rows_bytes": rows.most_bytes,
    }


class CarriedRows:
    """The most that the hidden states of all `BlockBatch`es take, as seen whenever the first block runs."""

    def __init__(self, model: Any) -> None:
        self.most_bytes = 0
        model.get_submodule(block_paths(model)[0]).register_forward_pre_hook(self._look)

    def _look(self, block: Any, args: Any) -> None:
        batches = [found for found in gc.get_objects() if type(found) is BlockBatch]
        hidden = {batch.hidden.data_ptr(): batch.hidden.nbytes for batch in batches}
        self.most_bytes = max(self.most_bytes, sum(hidden.values()))


def attempt(run: Callable[[SourceModel, Task], None], source: SourceModel, task: Task) -> int:
    """Run until it ends or enough blocks are done; how many were."""
    try:
        run(source, task)
    except _EnoughError:
        return task.blocks
    return int(source.model.config.num_hidden_layers)


def memory() -> Memory:
    return own_memory(PROCESS_STATUS.read_text(encoding="ascii"))


def settle() -> Memory:
    """Memory when all that is free is given back, from where the peak counts anew."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    path, value = RESET_PEAK
    path.write_text(value, encoding="ascii")
    return memory()


def main(arguments: list[str]) -> None:
    """Measure once and print."""
    task = Task(**json.loads(arguments[0]))
    torch.set_num_threads(task.threads)
    print(json.dumps(measure(task)))


if __name__ == "__main__":
    main(sys.argv[1:])
