"""A decoder graph in ONNX Runtime: token ids and a KV cache in, logits and the longer cache out.

The layout is Optimum's text-generation-with-past: inputs `input_ids`, `attention_mask`, optionally
`position_ids`, and `past_key_values.N.key|value`; outputs `logits` and `present.N.key|value`. Fused
graphs add two things: the initializer `logits_to_keep`, which a run may override, and the metadata
property `holdfast.shared_cache`, which says that past and present may be one buffer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from holdfast.errors import ExecutionError
from holdfast.runtime.cache import DTYPES, Cache, CacheInput, GrowingCache, SharedCache, token_bytes
from holdfast.runtime.external_data import graph_files

PROVIDER = "CPUExecutionProvider"
QUIET = 4  # ONNX Runtime's FATAL: what goes wrong is raised, and need not be printed as well

KEEP = "logits_to_keep"
"""Optional input int64 [1]: how many of the last positions get logits."""

EVERY = int(np.iinfo(np.int32).max)

SHARED_CACHE = "holdfast.shared_cache"
"""Metadata property; "1" where the attention appends to its past in place."""


@dataclass(frozen=True)
class DecoderGraph:
    """A loaded graph.

    Attributes:
        path: the file it was loaded from.
        cache_inputs: in the order of the graph's inputs.
        takes_positions: whether `position_ids` is an input.
        takes_keep: whether a run may ask for the last positions' logits only.
        shares_cache: whether past and present may be one buffer.
        vocabulary_size: length of the logits.
        logits_dtype: their element type in the graph; callers get float32.
        threads: intra-op threads asked for; 0 left the choice to ONNX Runtime.
    """

    session: ort.InferenceSession
    path: Path
    cache_inputs: tuple[CacheInput, ...]
    takes_positions: bool
    takes_keep: bool
    shares_cache: bool
    vocabulary_size: int
    logits_dtype: type[np.generic]
    threads: int

    @classmethod
    def open(cls, folder: Path, *, threads: int = 0) -> DecoderGraph:
        """Load `model.onnx` of `folder`, or the `model.ort` of one that has no other graph, on the CPU.

        Raises:
            ExecutionError: missing, malformed, refused by ONNX Runtime, of another layout, or
                reading data outside the folder.
        """
        path = graph_files(folder)[0]
        session = _load(path, threads)
        names = {node.name for node in session.get_inputs()}
        outputs = {node.name: node for node in session.get_outputs()}
        cache_inputs = tuple(
            _cache_input(node, outputs, path)
            for node in session.get_inputs()
            if node.name.startswith("past_key_values.")
        )
        _check_layout(names, set(outputs), cache_inputs, path)
        logits = outputs["logits"]
        return cls(
            session=session,
            path=path,
            cache_inputs=cache_inputs,
            takes_positions="position_ids" in names,
            takes_keep=KEEP in {node.name for node in session.get_overridable_initializers()},
            shares_cache=session.get_modelmeta().custom_metadata_map.get(SHARED_CACHE) == "1",
            vocabulary_size=_fixed(logits.shape[-1], "logits", path),
            logits_dtype=_dtype(logits, path),
            threads=threads,
        )

    @property
    def cache_token_bytes(self) -> int:
        """What one token of one row takes in the KV cache."""
        return token_bytes(self.cache_inputs)

    def empty_cache(self, batch: int, capacity: int | None = None) -> Cache:
        """The cache before the first token.

        Arguments:
            capacity: most tokens of a row, padding included. Where the graph shares its cache, this
                much is allocated now and nothing later; None, and any other graph: it grows with every run.

        Raises:
            ExecutionError: the memory is not there.
        """
        if capacity is None or not self.shares_cache:
            return GrowingCache.empty(self.cache_inputs, batch)
        return SharedCache(self.cache_inputs, batch, capacity)

    def forward(
        self,
        input_ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64],
        cache: Cache,
        *,
        keep: int | None = None,
    ) -> tuple[NDArray[np.float32], Cache]:
        """One run of the graph.

        Arguments:
            input_ids: the new tokens, [batch, new_tokens].
            attention_mask: 1 where there is a token, [batch, past_tokens + new_tokens].
            cache: what the run before returned, or `empty_cache`. One with a capacity is filled in place.
            keep: how many of the last positions to return, at least 1; None for every one.

        Returns:
            logits [batch, min(keep, new_tokens), vocabulary] and the cache with the new tokens in it.

        Raises:
            ExecutionError: ONNX Runtime failed, or the tokens do not fit into the cache or behind it.
        """
        feeds = self._feeds(input_ids, attention_mask, keep)
        after: Cache
        with self._one_sentence():
            if isinstance(cache, SharedCache):
                logits, after = cache.run(self.session, feeds, self._room_for_logits(input_ids, keep))
            else:
                logits, after = cache.run(self.session, feeds)
        return _last(logits, keep), after

    def logits(
        self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64], *, keep: int | None = None
    ) -> NDArray[np.float32]:
        """`forward` from the first token on, without a cache to go on with."""
        empty = GrowingCache.empty(self.cache_inputs, len(input_ids))
        past = {entry.past: array for entry, array in zip(empty.inputs, empty.arrays, strict=True)}
        with self._one_sentence():
            (logits,) = self.session.run(["logits"], self._feeds(input_ids, attention_mask, keep) | past)
        return _last(logits, keep)

    def _feeds(
        self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64], keep: int | None
    ) -> dict[str, NDArray[Any]]:
        feeds: dict[str, NDArray[Any]] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.takes_positions:
            feeds["position_ids"] = positions(attention_mask)[:, -input_ids.shape[1] :]
        if self.takes_keep:
            feeds[KEEP] = np.array([EVERY if keep is None else keep])
        return {name: np.ascontiguousarray(array, np.int64) for name, array in feeds.items()}

    def _room_for_logits(self, input_ids: NDArray[np.int64], keep: int | None) -> NDArray[Any]:
        """What the graph will fill: [batch, positions, vocabulary]."""
        batch, new = input_ids.shape
        count = new if keep is None or not self.takes_keep else min(keep, new)
        return np.empty((batch, count, self.vocabulary_size), self.logits_dtype)

    @contextmanager
    def _one_sentence(self) -> Iterator[None]:
        try:
            yield
        except ExecutionError:
            raise
        except Exception as error:  # ONNX Runtime's errors share no base class below Exception
            raise ExecutionError(
                f"ONNX Runtime failed while running {self.path}: {one_line(error)}"
            ) from error


def _last(logits: NDArray[Any], keep: int | None) -> NDArray[np.float32]:
    """The last `keep` positions as float32: a graph without the input returns every one."""
    return np.asarray(logits if keep is None else logits[:, -keep:], np.float32)


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


def _cache_input(node: Any, outputs: dict[str, Any], path: Path) -> CacheInput:
    present = node.name.replace("past_key_values.", "present.")
    dtype = _dtype(node, path)
    if present in outputs and outputs[present].type != node.type:
        raise ExecutionError(
            f"{path}: the cache input {node.name} is {node.type} and {present} is {outputs[present].type}, "
            "expected one type: export the model again with `holdfast export`."
        )
    return CacheInput(
        past=node.name,
        present=present,
        kv_heads=_fixed(node.shape[1], node.name, path),
        head_size=_fixed(node.shape[-1], node.name, path),
        dtype=dtype,
    )


def _dtype(node: Any, path: Path) -> type[np.generic]:
    if node.type not in DTYPES:
        raise ExecutionError(
            f"{path}: {node.name} is {node.type}, expected one of {', '.join(DTYPES)}: "
            "export the model again with `holdfast export`."
        )
    return DTYPES[node.type]


def _fixed(size: Any, what: str, path: Path) -> int:
    if not isinstance(size, int):
        raise ExecutionError(
            f"{path}: {what} has the open dimension {size!r} where a fixed size was expected: "
            "export the model again with `holdfast export`."
        )
    return size


def _check_layout(
    inputs: set[str], outputs: set[str], cache_inputs: tuple[CacheInput, ...], path: Path
) -> None:
    """Raise ExecutionError unless the graph is a decoder with a KV cache as Optimum exports it."""
    required = {"input_ids", "attention_mask", *(entry.past for entry in cache_inputs)}
    missing = sorted(({"logits"} | {entry.present for entry in cache_inputs}) - outputs)
    unknown = sorted(inputs - required - {"position_ids"})
    missing += sorted(required - inputs)
    if missing or unknown or not cache_inputs:
        raise ExecutionError(
            f"{path} is not a decoder graph with a KV cache in Optimum's layout (missing: "
            f"{missing}; unknown inputs: {unknown}): export the model with `holdfast export`."
        )
