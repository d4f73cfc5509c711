"""Resident memory of a model that runs alone: measured in a process of its own.

    python -m holdfast.runtime.memory FOLDER PROMPT_TOKENS NEW_TOKENS THREADS

prints `{"resident_bytes": ..., "peak_resident_bytes": ...}`. The figures are those of the whole
process, interpreter included: what a device has to have.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from holdfast.errors import ExecutionError, HoldfastError
from holdfast.runtime.session import OnnxLanguageModel

PROCESS_STATUS = Path("/proc/self/status")
TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Memory:
    """Memory of a process that loaded a model and answered one prompt.

    Attributes:
        resident_bytes: after the answer.
        peak_resident_bytes: the most there was, loading included.
    """

    resident_bytes: int
    peak_resident_bytes: int


def measure_memory(folder: Path, *, prompt_tokens: int, new_tokens: int, threads: int) -> Memory | None:
    """Load `folder` in a fresh process, answer once, and read the process's memory.

    Returns:
        None where the system does not tell (it is read from Linux's /proc).

    Raises:
        ExecutionError: the process failed.
    """
    if not PROCESS_STATUS.is_file():
        return None
    numbers = [str(number) for number in (prompt_tokens, new_tokens, threads)]
    command = [sys.executable, "-m", "holdfast.runtime.memory", str(folder), *numbers]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise ExecutionError(
            f"Measuring the memory of {folder} took longer than {TIMEOUT_S:.0f} s: ask for fewer tokens."
        ) from None
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ExecutionError(f"Measuring the memory of {folder} failed: {last}")
    return Memory(**json.loads(done.stdout))


def own_memory(status: str) -> Memory:
    """Memory from the text of /proc/self/status.

    Not `getrusage`: its peak is inherited from the parent process over fork and exec.
    """
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    resident, peak = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))  # kB
    return Memory(resident, peak)


def main(arguments: list[str]) -> int:
    folder, prompt_tokens, new_tokens, threads = arguments
    try:
        model = OnnxLanguageModel.open(Path(folder), threads=int(threads))
        model.generate([[0] * int(prompt_tokens)], max_new_tokens=int(new_tokens))
    except HoldfastError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(vars(own_memory(PROCESS_STATUS.read_text(encoding="ascii")))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
