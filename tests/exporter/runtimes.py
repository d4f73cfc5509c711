"""Greedy answers of one bundle in runtimes that share no decoding code with Holdfast.

Each function takes a folder, prompts as token ids, and how many tokens; it returns the new ids of each
prompt, ended before the first stop id, as `OnnxLanguageModel.generate` does. A runtime that is not
installed skips the test.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from holdfast.chat import ChatTokenizer
from holdfast.runtime.graph import Cache, DecoderGraph
from holdfast.runtime.session import OnnxLanguageModel

Ids = list[list[int]]
WEB = Path(__file__).parent / "web"
GREEDY = Path(__file__).parent / "greedy.py"
ARM64 = "HOLDFAST_ARM64"


def in_holdfast(folder: Path, prompts: Ids, tokens: int) -> Ids:
    return OnnxLanguageModel.open(folder).generate(prompts, max_new_tokens=tokens)


def in_optimum(folder: Path, prompts: Ids, tokens: int) -> Ids:
    """`optimum.onnxruntime`, which generates with transformers."""
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM

    model = ORTModelForCausalLM.from_pretrained(folder)
    stop = _stop(folder)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
        )
        answers.append(until(out[0, len(prompt) :].tolist(), stop))
    return answers


def in_genai(folder: Path, prompts: Ids, tokens: int) -> Ids:
    """onnxruntime-genai, from token ids: its own tokenizer has no part in it."""
    genai = pytest.importorskip("onnxruntime_genai")
    model = genai.Model(str(folder))
    stop = _stop(folder)
    return [until(genai_answer(genai, model, [prompt], tokens)[0], stop) for prompt in prompts]


def genai_answer(genai: Any, model: Any, batch: Ids, tokens: int) -> Ids:
    """New ids of a batch of prompts of one length, padded by the caller; stop ids and padding included."""
    settings = genai.GeneratorParams(model)
    settings.set_search_options(max_length=len(batch[0]) + tokens, batch_size=len(batch))
    generator = genai.Generator(model, settings)
    generator.append_tokens(batch if len(batch) > 1 else batch[0])
    while not generator.is_done():
        generator.generate_next_token()
    return [generator.get_sequence(row)[len(batch[0]) :].tolist() for row in range(len(batch))]


def in_web(folder: Path, prompts: Ids, tokens: int) -> Ids:
    """onnxruntime-web's WASM build under Node."""
    node = shutil.which("node")
    if node is None or not (WEB / "node_modules" / "onnxruntime-web").is_dir():
        pytest.skip("needs node and onnxruntime-web: install node and npm, then `make unit`")
    graph = DecoderGraph.open(folder)
    job = {
        "graph": str(folder / "model.onnx"),
        "data": [path.name for path in folder.glob("model.onnx_data")],
        "prompts": prompts,
        "tokens": tokens,
        "stop": _stop(folder),
        "cache": [[entry.past, entry.kv_heads, entry.head_size] for entry in graph.cache_inputs],
    }
    done = subprocess.run(
        [node, "run.mjs"], cwd=WEB, input=json.dumps(job), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    answers: Ids = json.loads(done.stdout.splitlines()[-1])
    return answers


class OpenVinoModel:
    """A bundle's graph in OpenVINO's CPU plugin, all of it in float32; one sequence at a time."""

    def __init__(self, folder: Path) -> None:
        openvino = pytest.importorskip("openvino")
        exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        exact["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = "0"
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(folder / "model.onnx"), "CPU", exact)
        self.request = compiled.create_infer_request()
        self.entries = DecoderGraph.open(folder).cache_inputs
        self.names = {name for node in compiled.inputs for name in node.names}

    def empty_cache(self) -> Cache:
        return [np.zeros((1, entry.kv_heads, 0, entry.head_size), np.float32) for entry in self.entries]

    def forward(self, ids: Sequence[int], cache: Cache) -> tuple[np.ndarray, Cache]:
        """Logits float32 [token, vocabulary], and the longer cache."""
        seen = cache[0].shape[2]
        feeds = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, seen + len(ids)), np.int64),
            "position_ids": np.arange(seen, seen + len(ids), dtype=np.int64)[None],
        }
        feeds = {name: value for name, value in feeds.items() if name in self.names}
        feeds |= {entry.past: past for entry, past in zip(self.entries, cache, strict=True)}
        found = {key.any_name: np.array(value) for key, value in self.request.infer(feeds).items()}
        return found["logits"][0], [found[entry.present] for entry in self.entries]

    def answer(self, prompt: Sequence[int]) -> Iterator[int]:
        """Token after token, without end."""
        ids, cache = prompt, self.empty_cache()
        while True:
            logits, cache = self.forward(ids, cache)
            ids = [int(logits[-1].argmax())]
            yield ids[0]


def in_openvino(folder: Path, prompts: Ids, tokens: int) -> Ids:
    model, stop = OpenVinoModel(folder), _stop(folder)
    return [
        until([token for _, token in zip(range(tokens), model.answer(p), strict=False)], stop)
        for p in prompts
    ]


def on_arm64(graphs: Sequence[Path], prompts: Ids, tokens: int, stop: Sequence[int]) -> dict[str, Any]:
    """What greedy.py prints on AArch64; skipped unless `HOLDFAST_ARM64` starts a Python there.

    For example `HOLDFAST_ARM64="qemu-aarch64 -L root root/usr/bin/python3.11"`, with numpy and onnxruntime
    for AArch64 on its `PYTHONPATH`. QEMU 10 runs ONNX Runtime 1.31, QEMU 7.2 crashes from 1.29 on.
    """
    command = os.environ.get(ARM64)
    if not command:
        pytest.skip(f"needs {ARM64}, a command that starts an AArch64 Python with onnxruntime")
    job = graphs[0].parent / "arm64.json"
    work = {"graphs": [str(path) for path in graphs], "prompts": prompts, "tokens": tokens}
    job.write_text(json.dumps({**work, "stop": list(stop)}), encoding="utf-8")
    done = subprocess.run(
        [*shlex.split(command), str(GREEDY), str(job)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _stop(folder: Path) -> list[int]:
    return list(ChatTokenizer.from_folder(folder).eos_ids)


def until(ids: Sequence[int], stop: Sequence[int]) -> list[int]:
    """The ids before the first stop id."""
    return list(takewhile(lambda token: token not in stop, ids))
