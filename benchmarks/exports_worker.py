"""One export, timed, in this process: what benchmarks.exports starts.

    python -m benchmarks.exports_worker VARIANT CHECKPOINT OUT

prints JSON. Each variant imports what it needs and nothing else, before its clock starts.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from holdfast.runtime.memory import PROCESS_STATUS, own_memory

OPSET = 17  # of the plain graph


@dataclass
class Clock:
    """Seconds of the phases that follow each other, and the process's peak memory at the end of each."""

    phases: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    _name: str = ""
    _since: float = 0.0

    def phase(self, name: str) -> None:
        """The phase before ends, this one begins."""
        now = time.perf_counter()
        if self._name:
            self.phases[self._name] = self.phases.get(self._name, 0.0) + now - self._since
            self.peaks[self._name] = peak_bytes()
        self._name, self._since = name, now

    @contextmanager
    def timing(self, first: str = "load") -> Iterator[None]:
        """From the first phase to the end."""
        self.phase(first)
        yield
        self.phase("")


def peak_bytes() -> int:
    """Most resident memory of this process so far."""
    return own_memory(PROCESS_STATUS.read_text(encoding="ascii")).peak_resident_bytes


def holdfast_graph(source: Path, out: Path, clock: Clock) -> None:
    """Load, trace, rewrite and write, and compare nothing."""
    from holdfast.exporter import tracing
    from holdfast.exporter.export import save_graph
    from holdfast.exporter.fused import fused_graph
    from holdfast.exporter.source import load_source
    from holdfast.exporter.targets import lookup_target

    def trace(model: Any, *, opset: int) -> Any:
        clock.phase("trace")
        traced = tracing.trace(model, opset=opset)
        clock.phase("passes")
        return traced

    opset = lookup_target("cpu-x86").opset
    with clock.timing(), mock.patch("holdfast.exporter.fused.trace", trace):
        model = load_source(source).model
        graph = fused_graph(model, opset=opset, positions=model.config.max_position_embeddings)
        clock.phase("write")
        save_graph(graph.model, out)


def holdfast_export(source: Path, out: Path, clock: Clock) -> None:
    """What `holdfast export` does, all of its comparisons with torch included."""
    from holdfast.exporter.export import export_model
    from holdfast.recipe import ExportConfig

    with clock.timing():
        export_model(source, out, ExportConfig(target="cpu-x86"), on_stage=clock.phase)


def optimum_graph(source: Path, out: Path, clock: Clock) -> None:
    """Load and export, without validation and post-processing, as Holdfast calls it for plain graphs."""
    from optimum.exporters.onnx import onnx_export_from_model
    from transformers import AutoModelForCausalLM

    with clock.timing():
        model = AutoModelForCausalLM.from_pretrained(source, dtype="float32").eval()
        clock.phase("trace and write")
        onnx_export_from_model(
            model=model,
            output=out,
            task="text-generation-with-past",
            opset=OPSET,
            do_validation=False,
            no_post_process=True,
        )


def optimum_export(source: Path, out: Path, clock: Clock) -> None:
    """What `optimum-cli export onnx` does, its validation and post-processing included."""
    from optimum.exporters.onnx import main_export

    with clock.timing("all"):
        main_export(str(source), out, task="text-generation-with-past", opset=OPSET, do_validation=True)


VARIANTS: dict[str, Callable[[Path, Path, Clock], None]] = {
    "Optimum, graph only": optimum_graph,
    "Holdfast, graph only": holdfast_graph,
    "Optimum, with its validation": optimum_export,
    "Holdfast, compared with torch": holdfast_export,
}


def main(arguments: list[str]) -> None:
    """Export once and print seconds and memory."""
    variant, source, out = arguments
    clock = Clock()
    VARIANTS[variant](Path(source), Path(out), clock)
    found = {
        "phases": clock.phases,
        "seconds": sum(clock.phases.values()),
        "peaks": clock.peaks,
        "peak_resident_bytes": peak_bytes(),
        "written_bytes": sum(path.stat().st_size for path in Path(out).iterdir()),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
