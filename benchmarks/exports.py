"""Time and peak memory of an export: Holdfast's fused one against Optimum's, from one checkpoint.

    python -m benchmarks.exports --size 125m --work FOLDER --out exports-125m.json

Each export is a process of its own, and they take turns. Time starts when the libraries are imported,
and the weights are in the page cache for everyone. Memory is what Linux says of the process, interpreter
and libraries included: the peak of all that is resident, mapped weights with it, and of what is not a
mapped file.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from benchmarks.build import size_options, work_folders
from benchmarks.decoding import status_bytes
from benchmarks.exports_worker import VARIANTS
from benchmarks.models import weight_bytes
from benchmarks.tables import exports_table
from holdfast.files import write_json
from holdfast.progress import say
from holdfast.runtime.environment import environment

PACKAGES = ("torch", "transformers", "optimum", "optimum-onnx", "onnx", "onnxscript")
SAMPLE_S = 0.02


class _FailedError(Exception):
    """An export ended without a result."""

    def __init__(self, status: int, errors: str) -> None:
        super().__init__(f"the export ended with exit status {status}")
        self.errors = errors


def run_in_turns(
    variants: Sequence[str], source: Path, repeats: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Figures of every export, and why variants are missing; one that fails is not tried again."""
    runs: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for turn in range(repeats):
        for variant in variants:
            if variant in failed:
                continue
            say(f"{turn + 1} of {repeats}: {variant}")
            warm(source)
            try:
                runs.append(run_once(variant, source))
            except _FailedError as error:
                say(error.errors)
                failed[variant] = str(error)
    return [run for run in runs if run["variant"] not in failed], failed


def run_once(variant: str, source: Path) -> dict[str, Any]:
    """One export in a process of its own, its output removed afterwards."""
    out = Path(tempfile.mkdtemp(prefix="benchmark-export-", dir=source.parent))
    command = [sys.executable, "-m", "benchmarks.exports_worker", variant, str(source), str(out)]
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        peak = _Watch(process.pid)
        printed, errors = process.communicate()
        anonymous = peak.stop()
        if process.returncode:
            raise _FailedError(process.returncode, errors)
    finally:
        shutil.rmtree(out, ignore_errors=True)
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return {"variant": variant, "peak_anonymous_bytes": anonymous, **found}


class _Watch:
    """Samples the anonymous memory of another process."""

    def __init__(self, process_id: int) -> None:
        self._status = Path(f"/proc/{process_id}/status")
        self._peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_S):
            try:
                self._peak = max(
                    self._peak, status_bytes(self._status.read_text(encoding="ascii"), "RssAnon")
                )
            except (OSError, KeyError):  # it has ended
                return

    def stop(self) -> int:
        """The most that was seen, in bytes."""
        self._done.set()
        self._thread.join()
        return self._peak


def warm(folder: Path) -> None:
    """Read the weights once, so that the first export has them in the page cache as the others have."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as stream:
            while stream.read(1 << 24):
                pass


@click.command()
@size_options
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The JSON file to write.")
@click.option("--repeats", default=3, show_default=True)
@click.option("--variant", "chosen", type=click.Choice(list(VARIANTS)), multiple=True, help="These only.")
def main(
    size: str, work: Path, given: Path | None, out: Path, repeats: int, chosen: tuple[str, ...]
) -> None:
    """Export in turns, write figures and print a table."""
    source, _ = work_folders(size, work, given)
    runs, failed = run_in_turns(chosen or tuple(VARIANTS), source, repeats)
    result = {
        "size": size,
        "repeats": repeats,
        "weight_bytes": weight_bytes(source),
        "environment": environment() | {name: version(name) for name in PACKAGES},
        "runs": runs,
        "not_measured": failed,
    }
    write_json(out, result)
    click.echo(exports_table(result))


if __name__ == "__main__":
    main()
