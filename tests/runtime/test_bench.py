"""Bench: figures that follow from each other, refusals, and memory of a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from holdfast.errors import ExecutionError, InputError, UsageError
from holdfast.runtime.bench import Spread, bench, bench_folders, bench_lines
from holdfast.runtime.memory import PROCESS_STATUS, Memory, measure_memory, own_memory
from holdfast.runtime.session import OnnxLanguageModel

linux_only = pytest.mark.skipif(not PROCESS_STATUS.is_file(), reason="needs /proc")


def test_a_report_holds_together(model: OnnxLanguageModel, exported: Path) -> None:
    report = bench(model, prompt_tokens=16, new_tokens=8, repeats=3)
    assert report.repeats == 3
    assert report.file_bytes == (exported / "model.onnx").stat().st_size
    first = report.first_token_s
    assert 0 < first.lowest <= first.median <= first.highest
    assert report.prefill_tokens_per_s.median == pytest.approx(16 / first.median)
    assert report.decode_tokens_per_s.lowest > 0
    assert report.environment["threads"] == 1
    assert (report.cache.dtype, report.cache.shared) == ("float32", False)
    assert json.loads(json.dumps(report.to_dict()))["prompt_tokens"] == 16


def test_several_folders_are_compared_with_the_first(exported: Path) -> None:
    reports = bench_folders([exported, exported], prompt_tokens=8, new_tokens=4, repeats=2, threads=1)
    lines = bench_lines(reports)
    assert lines[0] == exported.name
    assert sum("tokens/s" in line for line in lines) == 4
    (ratio,) = [line for line in lines if "against" in line]
    assert "size x1.00" in ratio


def test_the_cache_is_told(fused: Path) -> None:
    """2 layers x key and value x 2 heads x 16 floats are 512 bytes a token."""
    (report,) = bench_folders([fused], prompt_tokens=8, new_tokens=4, repeats=1, threads=1)
    assert (report.cache.shared, report.cache.largest_bytes) == (True, 12 * 512)
    (line,) = [line for line in bench_lines([report]) if "KV cache" in line]
    assert line.endswith("0.0 MiB of float32, one buffer")
    assert report.to_dict()["cache"]["dtype"] == "float32"


def test_what_cannot_be_measured_is_refused(model: OnnxLanguageModel) -> None:
    with pytest.raises(UsageError, match="two new tokens"):
        bench(model, prompt_tokens=8, new_tokens=1, repeats=1)
    with pytest.raises(InputError, match="holds 128"):
        bench(model, prompt_tokens=120, new_tokens=9, repeats=1)


def test_a_spread_by_hand() -> None:
    assert Spread.of([5.0, 1.0, 2.0, 4.0]) == Spread(3.0, 1.0, 5.0)


def test_memory_is_read_in_bytes() -> None:
    status = "Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\nThreads:\t1\n"
    assert own_memory(status) == Memory(resident_bytes=1 << 20, peak_resident_bytes=2 << 20)


@linux_only
def test_memory_is_that_of_a_fresh_process(exported: Path) -> None:
    ballast = bytearray(300 << 20)  # in this process: must not count
    memory = measure_memory(exported, prompt_tokens=8, new_tokens=4, threads=1)
    assert memory is not None
    assert len(ballast) > memory.peak_resident_bytes >= memory.resident_bytes > 10 << 20


@linux_only
def test_a_failing_process_is_told_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ExecutionError, match=r"Measuring the memory of .* failed: Expected a folder"):
        measure_memory(tmp_path / "nowhere", prompt_tokens=8, new_tokens=4, threads=1)
