"""Greedy tokens with numpy and ONNX Runtime alone, so that a foreign Python can run it as a script.

    python greedy.py job.json     {"graphs": [path], "prompts": [[id]], "tokens": n, "stop": [id]}

prints {"machine": ..., "onnxruntime": ..., "answers": {path: [[id]]}, "logits": {path: [float]}}, one line
of JSON; `logits` are those after the last token of the first prompt.
"""

from __future__ import annotations

import json
import platform
import sys

import numpy as np
import onnxruntime as ort


class Greedy:
    """One graph, or one ORT-format file, in Optimum's layout; one sequence at a time."""

    def __init__(self, path: str) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = {node.name: node for node in self.session.get_inputs()}
        self.outputs = [node.name for node in self.session.get_outputs()]

    def step(self, ids: list[int], past: dict[str, np.ndarray], seen: int) -> dict[str, np.ndarray]:
        end = seen + len(ids)
        feeds = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(seen, end, dtype=np.int64)[None],
        }
        given = {name: value for name, value in feeds.items() if name in self.inputs} | past
        return dict(zip(self.outputs, self.session.run(None, given), strict=True))

    def empty(self) -> dict[str, np.ndarray]:
        return {
            name: np.zeros((1, node.shape[1], 0, node.shape[3]), np.float32)
            for name, node in self.inputs.items()
            if name.startswith("past_key_values.")
        }

    def answer(self, prompt: list[int], tokens: int, stop: list[int]) -> list[int]:
        found: list[int] = []
        ids, past, seen = prompt, self.empty(), 0
        while len(found) < tokens:
            outputs = self.step(ids, past, seen)
            token = int(outputs.pop("logits")[0, -1].argmax())
            if token in stop:
                break
            found.append(token)
            past = {name.replace("present.", "past_key_values."): v for name, v in outputs.items()}
            seen, ids = seen + len(ids), [token]
        return found

    def first_logits(self, prompt: list[int]) -> np.ndarray:
        """Logits after the last token of the prompt, float32 [vocabulary]."""
        return self.step(prompt, self.empty(), 0)["logits"][0, -1]


def main(job_path: str) -> None:
    with open(job_path, encoding="utf-8") as stream:
        job = json.load(stream)
    answers, logits = {}, {}
    for path in job["graphs"]:
        model = Greedy(path)
        answers[path] = [model.answer(p, job["tokens"], job["stop"]) for p in job["prompts"]]
        logits[path] = model.first_logits(job["prompts"][0]).tolist()
    found = {"machine": platform.machine(), "onnxruntime": ort.__version__}
    print(json.dumps({**found, "answers": answers, "logits": logits}))


if __name__ == "__main__":
    main(sys.argv[1])
