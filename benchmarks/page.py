"""Renders docs/benchmarks.md from what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.graphs import ATOL
from benchmarks.tables import exports_table, graphs_table
from holdfast.files import write_text

NAMES = {"tiny": "tiny, for tests", "125m": "125 million parameters", "1b": "1.1 billion parameters"}
PAGE = """# Speed and memory

Printed by `make benchmarks` (`python -m benchmarks`), on {machine}. Llamas with random weights: speed
and memory do not depend on them. Compare rows of a table, never tables of different runs.

{versions}

## Graphs at work

All graphs run in one loop (`benchmarks/decoding.py`), in turns, on {threads} threads: a prompt of
{prompt_tokens} tokens, then {new_tokens} greedy ones. Every figure is a median; ratios are to the first
row in the same round, with their range over {rounds} rounds. Where the attention operator allows it,
past and present cache are one buffer. "Last logits only" asks for the prompt's last position, as
generation does; graphs without that input give the logits of every position. Memory is that of a
process that loads the graph and answers once. The two last columns say that it is the same model: the
largest difference of a logit to the first row, at the prompt's end and for fp32 at the last step as
well, and, for fp32, how many greedy tokens are the same (random weights leave near-ties, which
quantization decides otherwise). An fp32 graph that is off by more than {atol} is refused.
"Optimum, W4" is Optimum's graph quantized by Holdfast.

{graphs}
## Exports

Each export is a process of its own, and they take turns. Time starts with loading the checkpoint and
leaves out importing the libraries. Memory is the peak of the whole process, over the size of the
float32 weights: all that was resident (mapped weights included), and what was not a mapped file.
Seconds and ratios with their range.

{exports}
"""


def page(work: Path, sizes: tuple[str, ...]) -> str:
    """docs/benchmarks.md from the JSON files in `work`."""
    graphs = {size: _read(work / f"graphs-{size}.json") for size in sizes}
    files = {size: work / f"exports-{size}.json" for size in sizes}
    exports = {size: _read(file) if file.is_file() else None for size, file in files.items()}
    first = graphs[sizes[0]]
    return PAGE.format(
        machine=_machine(first["environment"]),
        versions=_versions(first["environment"]),
        threads=first["environment"]["threads"],
        prompt_tokens=first["prompt_tokens"],
        new_tokens=first["new_tokens"],
        rounds=" or ".join(dict.fromkeys(str(result["rounds"]) for result in graphs.values())),
        graphs="\n".join(_graphs(size, result) for size, result in graphs.items()),
        atol=ATOL,
        exports="\n\n".join(_exports(size, result) for size, result in exports.items()),
    )


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _machine(found: dict[str, Any]) -> str:
    sets = ", ".join(found["instruction_sets"])
    return f"{found['cpu']} ({found['machine']}, {found['cores']} cores; {sets}), {found['system']}"


def _versions(found: dict[str, Any]) -> str:
    names = (
        "python",
        "onnxruntime",
        "torch",
        "transformers",
        "optimum",
        "optimum-onnx",
        "onnx",
        "onnxscript",
        "numpy",
    )
    return "Versions: " + ", ".join(f"{name} {found[name]}" for name in names if name in found) + "."


def _graphs(size: str, result: dict[str, Any]) -> str:
    lines = [f"### {NAMES[size]}", "", graphs_table(result), ""]
    lines += [f"{name}: not measured, {why}.\n" for name, why in result["not_measured"].items()]
    lines += [f"Load average when it ended: {result['environment']['load_average']:.1f}.", ""]
    return "\n".join(lines)


def _exports(size: str, result: dict[str, Any] | None) -> str:
    if result is None:
        return f"### {NAMES[size]}\n\nNot measured."
    lines = [f"### {NAMES[size]}", "", exports_table(result), ""]
    lines += [f"{name}: not measured, {why}.\n" for name, why in result["not_measured"].items()]
    lines.append(f"Weights: {result['weight_bytes']:,} bytes, {result['repeats']} exports each.")
    return "\n".join(lines)


def write_page(work: Path, sizes: tuple[str, ...], out: Path) -> str:
    """Write the page, and return it."""
    text = page(work, sizes)
    write_text(out, text)
    return text
