"""What reports say about the machine."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime as ort

from holdfast.runtime import environment as module
from holdfast.runtime.environment import environment, usable_cores


def test_the_environment_is_json_and_names_what_matters() -> None:
    found = json.loads(json.dumps(environment(threads=2)))
    assert found["threads"] == 2
    assert found["onnxruntime"] == ort.__version__
    assert found["provider"] == "CPUExecutionProvider"
    assert found["cores"] == usable_cores() >= 1


def test_the_processor_is_read_from_cpuinfo(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor\t: 0\nmodel name\t: Example 9000\nflags\t\t: fpu avx2 avx512_vnni\n\n"
        "processor\t: 1\nmodel name\t: Other\n"
    )
    fields = module._cpu_info(cpuinfo)
    assert fields["model name"] == "Example 9000"
    assert fields["flags"] == "fpu avx2 avx512_vnni"
    assert module._cpu_info(tmp_path / "none") == {}
