"""Measured figures as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def graphs_table(result: dict[str, Any]) -> str:
    """What `benchmarks.graphs` measured."""
    header = [
        "graph",
        f"prefill of {result['prompt_tokens']}, tokens/s",
        "x first row",
        f"decode of {result['new_tokens']}, tokens/s",
        "x first row",
        "file, MiB",
        "peak resident, MiB",
        "logits off by",
        "same tokens",
    ]
    rows = [_graph_row(row, result["new_tokens"]) for row in result["rows"]]
    rows += [[name, "not measured", *["-"] * (len(header) - 2)] for name in result["not_measured"]]
    return table(header, rows)


def _graph_row(row: dict[str, Any], new_tokens: int) -> list[str]:
    memory = row["memory"]
    return [
        row["name"],
        f"{statistics.median(row['prefill']):,.0f}",
        spread(row["prefill_ratios"]),
        f"{statistics.median(row['decode']):,.1f}",
        spread(row["decode_ratios"]),
        mib(row["file_bytes"]),
        mib(memory["peak_resident_bytes"]) if memory else "not known",
        f"{row['max_logit_difference']:.1e}",
        f"{row['same_tokens']}/{new_tokens}" if row["scheme"] == "fp32" else "-",
    ]


def exports_table(result: dict[str, Any]) -> str:
    """What `benchmarks.exports` measured: medians over the repeats, the first variant as the measure."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for run in result["runs"]:
        runs.setdefault(run["variant"], []).append(run)
    first = next(iter(runs.values()), [])
    header = [
        "export",
        "seconds",
        "x first row",
        "peak resident / weights",
        "peak anonymous / weights",
        "phases: s (peak by then, MiB)",
    ]
    rows = [_export_row(name, own, first, result["weight_bytes"]) for name, own in runs.items()]
    rows += [[name, "not measured", *["-"] * (len(header) - 2)] for name in result["not_measured"]]
    return table(header, rows)


def _export_row(
    name: str, runs: Sequence[dict[str, Any]], first: Sequence[dict[str, Any]], weight_bytes: int
) -> list[str]:
    ratios = [run["seconds"] / other["seconds"] for run, other in zip(runs, first, strict=True)]
    peaks = [
        f"{statistics.median(run[field] / weight_bytes for run in runs):.2f}"
        for field in ("peak_resident_bytes", "peak_anonymous_bytes")
    ]
    phases = {
        phase: [statistics.median(run[what][phase] for run in runs) for what in ("phases", "peaks")]
        for phase in runs[0]["phases"]
    }
    return [
        name,
        spread([run["seconds"] for run in runs], digits=1),
        spread(ratios),
        *peaks,
        ", ".join(f"{phase} {seconds:.1f} ({mib(peak)})" for phase, (seconds, peak) in phases.items()),
    ]


def spread(values: Sequence[float], *, digits: int = 2) -> str:
    """Median and range."""
    median, lowest, highest = statistics.median(values), min(values), max(values)
    return f"{median:,.{digits}f} [{lowest:,.{digits}f}, {highest:,.{digits}f}]"


def mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.0f}"
