"""A decoder graph in ONNX Runtime: token ids and a KV cache in, logits and the longer cache out.

The layout is Optimum's text-generation-with-past: inputs `input_ids`, `attention_mask`, optionally
`position_ids`, and `past_key_values.N.key|value`; outputs `logits` and `present.N.key|value`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from holdfast.errors import ExecutionError
from holdfast.runtime.external_data import graph_files

PROVIDER = "CPUExecutionProvider"
QUIET = 4  # ONNX Runtime's FATAL: what goes wrong is raised, and need not be printed as well

Cache = list[NDArray[np.float32]]
"""One array [batch, kv_heads, past_tokens, head_size] a `past_key_values` input, in order."""

CACHE_TYPE = "tensor(float)"


@dataclass(frozen=True)
class CacheInput:
    """One `past_key_values` input and the `present` output that follows it."""

    past: str
    present: str
    kv_heads: int
    head_size: int


@dataclass(frozen=True)
class DecoderGraph:
    """A loaded graph.

    Attributes:
        path: the file it was loaded from.
        vocabulary_size: length of the logits.
        threads: intra-op threads asked for; 0 left the choice to ONNX Runtime.
    """

    session: ort.InferenceSession
    path: Path
    cache_inputs: tuple[CacheInput, ...]
    takes_positions: bool
    vocabulary_size: int
    threads: int

    @classmethod
    def open(cls, folder: Path, *, threads: int = 0) -> DecoderGraph:
        """Load `model.onnx` of `folder` on the CPU.

        Raises:
            ExecutionError: missing, malformed, refused by ONNX Runtime, of another layout, or
                reading data outside the folder.
        """
        path = graph_files(folder)[0]
        session = _load(path, threads)
        names = {node.name for node in session.get_inputs()}
        cache_inputs = tuple(
            _cache_input(node, path)
            for node in session.get_inputs()
            if node.name.startswith("past_key_values.")
        )
        _check_layout(session, names, cache_inputs, path)
        logits = next(node for node in session.get_outputs() if node.name == "logits")
        return cls(
            session=session,
            path=path,
            cache_inputs=cache_inputs,
            takes_positions="position_ids" in names,
            vocabulary_size=_fixed(logits.shape[-1], "logits", path),
            threads=threads,
        )

    def empty_cache(self, batch: int) -> Cache:
        """The cache before the first token."""
        return [
            np.zeros((batch, entry.kv_heads, 0, entry.head_size), np.float32) for entry in self.cache_inputs
        ]

    def forward(
        self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64], cache: Cache
    ) -> tuple[NDArray[np.float32], Cache]:
        """One run of the graph.

        Arguments:
            input_ids: the new tokens, [batch, new_tokens].
            attention_mask: 1 where there is a token, [batch, past_tokens + new_tokens].
            cache: what the run before returned, or `empty_cache`.

        Returns:
            logits [batch, new_tokens, vocabulary] and the cache with the new tokens in it.

        Raises:
            ExecutionError: ONNX Runtime failed.
        """
        feeds: dict[str, NDArray[Any]] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.takes_positions:
            feeds["position_ids"] = positions(attention_mask)[:, -input_ids.shape[1] :]
        feeds |= {entry.past: past for entry, past in zip(self.cache_inputs, cache, strict=True)}
        outputs = ["logits", *(entry.present for entry in self.cache_inputs)]
        try:
            logits, *present = self.session.run(outputs, feeds)
        except Exception as error:  # ONNX Runtime's errors share no base class below Exception
            raise ExecutionError(
                f"ONNX Runtime failed while running {self.path}: {one_line(error)}"
            ) from error
        return np.asarray(logits, np.float32), present


def positions(attention_mask: NDArray[np.int64]) -> NDArray[np.int64]:
    """Position of each token, counted from the first one that is not padding; padding gets 0."""
    return np.maximum(attention_mask.cumsum(axis=1) - 1, 0)


def one_line(error: Exception) -> str:
    """A foreign message without line breaks."""
    return " ".join(str(error).split())


def _load(path: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.use_deterministic_compute = True
    options.log_severity_level = QUIET
    try:
        session = ort.InferenceSession(str(path), options, providers=[PROVIDER])
    except Exception as error:  # ONNX Runtime's errors share no base class below Exception
        raise ExecutionError(
            f"ONNX Runtime {ort.__version__} could not load {path}: {one_line(error)}"
        ) from error
    if session.get_providers() != [PROVIDER]:
        raise ExecutionError(
            f"Expected {path} to run on {PROVIDER} alone, "
            f"ONNX Runtime chose {session.get_providers()}: use the plain onnxruntime package."
        )
    return session


def _cache_input(node: Any, path: Path) -> CacheInput:
    if node.type != CACHE_TYPE:
        raise ExecutionError(
            f"{path}: the cache input {node.name} is {node.type}, expected {CACHE_TYPE}: "
            "export the model again with `holdfast export`."
        )
    return CacheInput(
        past=node.name,
        present=node.name.replace("past_key_values.", "present."),
        kv_heads=_fixed(node.shape[1], node.name, path),
        head_size=_fixed(node.shape[-1], node.name, path),
    )


def _fixed(size: Any, what: str, path: Path) -> int:
    if not isinstance(size, int):
        raise ExecutionError(
            f"{path}: {what} has the open dimension {size!r} where a fixed size was expected: "
            "export the model again with `holdfast export`."
        )
    return size


def _check_layout(
    session: ort.InferenceSession,
    inputs: set[str],
    cache_inputs: tuple[CacheInput, ...],
    path: Path,
) -> None:
    """Raise ExecutionError unless the graph is a decoder with a KV cache as Optimum exports it."""
    required = {"input_ids", "attention_mask", *(entry.past for entry in cache_inputs)}
    outputs = {node.name for node in session.get_outputs()}
    missing = sorted(({"logits"} | {entry.present for entry in cache_inputs}) - outputs)
    unknown = sorted(inputs - required - {"position_ids"})
    missing += sorted(required - inputs)
    if missing or unknown or not cache_inputs:
        raise ExecutionError(
            f"{path} is not a decoder graph with a KV cache in Optimum's layout (missing: "
            f"{missing}; unknown inputs: {unknown}): export the model with `holdfast export`."
        )
