"""The KV cache of one generation: arrays that grow, or one buffer shared between past and present.

A graph whose attention is one operator writes new keys and values behind the old ones when its past
and its present are the same memory. Memory is then allocated once for the whole generation, and a step
moves only what is new. Other graphs return a longer copy of the cache at every step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from holdfast.errors import ExecutionError

Array = NDArray[Any]
DTYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
}
"""Element types a cache may have; what quantized values mean is a constant of the graph."""


@dataclass(frozen=True)
class CacheInput:
    """One `past_key_values` input and the `present` output that follows it.

    Attributes:
        dtype: element type of both.
    """

    past: str
    present: str
    kv_heads: int
    head_size: int
    dtype: type[np.generic] = np.float32

    @property
    def token_bytes(self) -> int:
        """What one token of one row takes."""
        return self.kv_heads * self.head_size * np.dtype(self.dtype).itemsize

    def zeros(self, batch: int, tokens: int) -> Array:
        """A cache [batch, kv_heads, tokens, head_size]."""
        return np.zeros((batch, self.kv_heads, tokens, self.head_size), self.dtype)


@dataclass(frozen=True)
class GrowingCache:
    """One array [batch, kv_heads, past_tokens, head_size] a `past_key_values` input, in order.

    A value: a run leaves it as it is and returns a longer one.
    """

    inputs: tuple[CacheInput, ...]
    arrays: tuple[Array, ...]

    @classmethod
    def empty(cls, inputs: tuple[CacheInput, ...], batch: int) -> GrowingCache:
        """Before the first token."""
        return cls(inputs, tuple(entry.zeros(batch, 0) for entry in inputs))

    @property
    def tokens(self) -> int:
        """Columns that are in use, padding included."""
        return int(self.arrays[0].shape[2])

    def select(self, rows: NDArray[np.bool_]) -> GrowingCache:
        """The cache of these rows of the batch only."""
        return GrowingCache(self.inputs, tuple(array[rows] for array in self.arrays))

    def run(self, session: ort.InferenceSession, feeds: Mapping[str, Array]) -> tuple[Array, GrowingCache]:
        """Logits and the cache with the tokens of `feeds` in it."""
        past = {entry.past: array for entry, array in zip(self.inputs, self.arrays, strict=True)}
        outputs = ["logits", *(entry.present for entry in self.inputs)]
        logits, *present = session.run(outputs, {**feeds, **past})
        return logits, GrowingCache(self.inputs, tuple(present))


class SharedCache:
    """One buffer [batch, kv_heads, capacity, head_size] an input, which the graph fills in place.

    Not a value: a run adds its tokens to this very object, and one thread may use it at a time.

    Arguments:
        capacity: most tokens of a row, padding included.

    Attributes:
        tokens: columns that are in use.

    Raises:
        ExecutionError: the memory is not there.
    """

    def __init__(self, inputs: tuple[CacheInput, ...], batch: int, capacity: int) -> None:
        self.inputs = inputs
        self.capacity = capacity
        self.tokens = 0
        try:
            self.buffers = [entry.zeros(batch, capacity) for entry in inputs]
        except MemoryError:
            size = batch * capacity * sum(entry.token_bytes for entry in inputs)
            raise ExecutionError(
                f"A KV cache of {batch} x {capacity} tokens takes {size / 2**20:,.0f} MiB, more than there "
                "is: ask for fewer new tokens or use a smaller batch."
            ) from None
        self._binding: Any = None  # made by the first run; names buffers by address

    @property
    def batch(self) -> int:
        """Rows."""
        return len(self.buffers[0])

    def select(self, rows: NDArray[np.bool_]) -> SharedCache:
        """This cache with these rows only, moved to the front of the same memory."""
        count = int(rows.sum())
        moved = np.flatnonzero(rows)
        first = int(np.argmin(np.append(rows, False)))  # rows before it stay where they are
        for buffer in self.buffers:
            for target in range(first, count):
                buffer[target, :, : self.tokens] = buffer[moved[target], :, : self.tokens]
        self.buffers = [buffer[:count] for buffer in self.buffers]
        self._binding = None
        return self

    def run(
        self, session: ort.InferenceSession, feeds: Mapping[str, Array], logits: Array
    ) -> tuple[Array, SharedCache]:
        """Logits and this cache, with the tokens of `feeds` in it.

        Arguments:
            feeds: every input but the cache.
            logits: an array of the shape and type that the graph gives, filled here.

        Raises:
            ExecutionError: the tokens do not follow those in the cache, or there is no room for them.
        """
        total = self._require_room(feeds["input_ids"], feeds["attention_mask"])
        if self._binding is None:
            self._binding = self._bind(session)
        bind(self._binding, inputs=feeds, outputs={"logits": logits})
        session.run_with_iobinding(self._binding)
        self.tokens = total
        return logits, self

    def _bind(self, session: ort.InferenceSession) -> Any:
        binding = session.io_binding()
        past = {entry.past: buffer for entry, buffer in zip(self.inputs, self.buffers, strict=True)}
        present = {entry.present: past[entry.past] for entry in self.inputs}
        bind(binding, inputs=past, outputs=present)
        return binding

    def _require_room(self, input_ids: Array, attention_mask: Array) -> int:
        (batch, new), total = input_ids.shape, int(attention_mask.shape[1])
        if batch != self.batch or total != self.tokens + new:
            raise ExecutionError(
                f"The KV cache holds {self.tokens} tokens of {self.batch} rows, and {new} new tokens of "
                f"{batch} rows with a mask of {total} do not follow them: pass the tokens in order."
            )
        if total > self.capacity:
            raise ExecutionError(
                f"The KV cache was made for {self.capacity} tokens, and {total} do not fit: "
                "make it as long as prompt and answer together."
            )
        if self.tokens and new > 1 and batch > 1:
            raise ExecutionError(
                f"After the prompt a shared KV cache takes one token a step, found {new} for each of "
                f"{batch} rows: pass them one by one, or run one row at a time."
            )
        return total


Cache = GrowingCache | SharedCache


def token_bytes(inputs: Sequence[CacheInput]) -> int:
    """What one token of one row takes in all caches together."""
    return sum(entry.token_bytes for entry in inputs)


def bind(binding: Any, *, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
    """Let a run read and write C-contiguous arrays where they are; they must outlive it."""
    for method, arrays in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
        for name, array in arrays.items():
            method(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
