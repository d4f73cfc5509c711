"""One decoding loop for every graph in Optimum's layout, whoever wrote it.

    python -m benchmarks.decoding '{"graph": ..., ...}'

runs one graph alone and prints the memory of that process. No torch, transformers or onnx in here.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from holdfast.runtime.memory import PROCESS_STATUS, own_memory

PAST = "past_key_values."
KEEP = "logits_to_keep"


@dataclass(frozen=True)
class Plan:
    """A graph and what the session does not tell of it.

    Attributes:
        graph: path of the ONNX file.
        shared: whether past and present may be one buffer: its attention writes in place.
        vocabulary, kv_heads, head_size: of the model; the builder of onnxruntime-genai leaves the last
            two open in the graph.
        threads: intra-op threads.
    """

    graph: str
    shared: bool
    vocabulary: int
    kv_heads: int
    head_size: int
    threads: int


@dataclass(frozen=True)
class Answer:
    """One prompt and its greedy answer.

    Attributes:
        prefill_s: from the prompt's ids to the id of the first new token.
        decode_s: from there to the last new token.
        tokens: ids of the new tokens, the first one included.
        logits: at the prompt's end and at the answer's last step, float32 [2, vocabulary].
    """

    prefill_s: float
    decode_s: float
    tokens: list[int]
    logits: NDArray[np.float32]


class Decoder:
    """A session of ONNX Runtime with its KV cache; one conversation at a time.

    Everything is bound where it is: the prompt's logits and, where the graph shares it, the cache are
    allocated once for the whole answer. Other graphs pass the longer cache of each step on without a copy.
    """

    def __init__(self, plan: Plan, *, profile: Path | None = None) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = plan.threads
        options.log_severity_level = 3
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        self.plan = plan
        self.session = ort.InferenceSession(plan.graph, options, providers=["CPUExecutionProvider"])
        inputs = {node.name: node for node in self.session.get_inputs()}
        self.positions = "position_ids" in inputs
        self.past = [name for name in inputs if name.startswith(PAST)]
        self.takes_keep = KEEP in {node.name for node in self.session.get_overridable_initializers()}
        self._caches: list[Any] = []

    def start(self, capacity: int) -> None:
        """Forget the conversation; make room for `capacity` tokens where the graph shares its cache."""
        room = capacity if self.plan.shared else 0
        shape = (1, self.plan.kv_heads, room, self.plan.head_size)
        self._caches = [ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32)) for _ in self.past]

    def step(self, ids: NDArray[np.int64], total: int, *, last: bool) -> NDArray[np.float32]:
        """Logits [positions, vocabulary] of new tokens [new], which are the last of `total`.

        Arguments:
            last: ask for the last position only, where the graph can be asked.
        """
        new = len(ids)
        logits: NDArray[np.float32] = np.empty(
            (1, 1 if last and self.takes_keep else new, self.plan.vocabulary), np.float32
        )
        binding = self.session.io_binding()
        for name, array in self._feeds(ids, total, last).items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for name, cache in zip(self.past, self._caches, strict=True):
            binding.bind_ortvalue_input(name, cache)
            present = name.replace(PAST, "present.")
            if self.plan.shared:
                binding.bind_ortvalue_output(present, cache)
            else:
                binding.bind_output(present)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        self.session.run_with_iobinding(binding)
        if not self.plan.shared:
            self._caches = binding.get_outputs()[: len(self.past)]  # in the order they were bound
        return np.asarray(logits[0], np.float32)

    def _feeds(self, ids: NDArray[np.int64], total: int, last: bool) -> dict[str, NDArray[np.int64]]:
        feeds = {"input_ids": ids[None], "attention_mask": np.ones((1, total), np.int64)}
        if self.positions:
            feeds["position_ids"] = np.arange(total - len(ids), total)[None]
        if self.takes_keep and last:
            feeds[KEEP] = np.array([1])
        return feeds

    def answer(self, prompt: NDArray[np.int64], new_tokens: int, *, last: bool) -> Answer:
        """Read a prompt [tokens] and answer greedily; no token ends the answer."""
        self.start(len(prompt) + new_tokens)
        started = time.perf_counter()
        logits = self.step(prompt, len(prompt), last=last)[-1]
        tokens = [int(logits.argmax())]
        first_at, first = time.perf_counter(), logits
        for total in range(len(prompt) + 1, len(prompt) + new_tokens):
            logits = self.step(np.array(tokens[-1:]), total, last=last)[-1]
            tokens.append(int(logits.argmax()))
        return Answer(first_at - started, time.perf_counter() - first_at, tokens, np.stack([first, logits]))


def prompt_ids(vocabulary: int, tokens: int) -> NDArray[np.int64]:
    """Random ids: speed does not depend on them."""
    return np.random.default_rng(0).integers(vocabulary, size=tokens)


def memory_of(plan: Plan, *, prompt_tokens: int, new_tokens: int, last: bool) -> dict[str, int] | None:
    """Peak and final memory of a fresh process that loads a graph and answers once.

    Returns:
        `peak_resident_bytes`, `resident_bytes` and `anonymous_bytes` (what is not a mapped file) after the
        answer; None where the system does not tell.
    """
    if not PROCESS_STATUS.is_file():
        return None
    task = {"plan": asdict(plan), "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "last": last}
    command = [sys.executable, "-m", "benchmarks.decoding", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout)
    return found


def status_bytes(status: str, field: str) -> int:
    """A field of /proc/PID/status that is given in kB."""
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return int(fields[field].split()[0]) * 1024


def main(text: str) -> None:
    """Answer once and print this process's memory."""
    task = json.loads(text)
    plan = Plan(**task["plan"])
    prompt = prompt_ids(plan.vocabulary, task["prompt_tokens"])
    Decoder(plan).answer(prompt, task["new_tokens"], last=task["last"])
    status = PROCESS_STATUS.read_text(encoding="ascii")
    memory = asdict(own_memory(status)) | {"anonymous_bytes": status_bytes(status, "RssAnon")}
    print(json.dumps(memory))


if __name__ == "__main__":
    main(sys.argv[1])
