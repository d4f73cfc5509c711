"""What a figure or an answer was made on: machine, instruction sets, threads and versions.

Instruction sets belong to it: ONNX Runtime picks its 8-bit kernels by them, and on x86 without VNNI
some of these saturate intermediate sums, so that the same graph may answer differently.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

import holdfast
from holdfast.runtime.graph import PROVIDER

CPU_INFO = Path("/proc/cpuinfo")
INSTRUCTION_SETS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
    "sve",
)


def environment(*, threads: int = 0) -> dict[str, Any]:
    """Plain data for reports; unknown values are None.

    Arguments:
        threads: intra-op threads asked for; 0 means that ONNX Runtime chose.
    """
    cpu = _cpu_info(CPU_INFO)
    flags = set((cpu.get("flags") or cpu.get("Features") or "").split())
    return {
        "cpu": cpu.get("model name") or platform.processor() or None,
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": usable_cores(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "threads": threads,
        "provider": PROVIDER,
        "holdfast": holdfast.__version__,
        "onnxruntime": ort.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_info(path: Path) -> dict[str, str]:
    """Fields of the first processor in a Linux cpuinfo; empty where there is none."""
    if not path.is_file():
        return {}
    first = path.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def environment_rows(*, threads: int = 0) -> dict[str, str | int | None]:
    """`environment` as one value a row, for tables."""
    return {
        key: ", ".join(value) if isinstance(value, list) else value
        for key, value in environment(threads=threads).items()
    }
