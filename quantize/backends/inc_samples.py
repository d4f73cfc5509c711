"""Calibration prompts the way that neural_compressor takes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

Feeds = dict[str, NDArray[Any]]


class SampleLoader:
    """What neural_compressor takes for a data loader: (feeds, label) pairs, one sequence each."""

    batch_size = 1

    def __init__(self, graph: onnx.GraphProto, samples: Sequence[Sequence[int]]) -> None:
        self.feeds = [sample_feeds(graph, ids) for ids in samples]

    def __iter__(self) -> Iterator[tuple[Feeds, int]]:
        for feeds in self.feeds:
            yield feeds, 0


def sample_feeds(graph: onnx.GraphProto, ids: Sequence[int]) -> Feeds:
    """Inputs of the exported decoder for one prompt with an empty cache."""
    tokens = np.array([ids], dtype=np.int64)
    known = {
        "input_ids": tokens,
        "attention_mask": np.ones_like(tokens),
        "position_ids": np.arange(len(ids), dtype=np.int64)[None],
    }
    feeds: Feeds = {}
    defaults = {tensor.name for tensor in graph.initializer}
    for value in graph.input:
        if value.name in defaults:
            continue
        shape = [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        empty = np.zeros((1, *shape[1:2], 0, *shape[3:4]), dtype=np.float32)
        feeds[value.name] = known.get(value.name, empty)
    return feeds


def even_length(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Prompts cut to one length, in the middle: where a chat template begins and ends is kept.

    SmoothQuant and AWQ of neural_compressor stack the activations of all samples, which have to be of
    one length. The length is the one that keeps most tokens; shorter prompts are left out.
    """
    lengths = [len(prompt) for prompt in prompts]
    size = max(sorted(set(lengths)), key=lambda size: size * sum(n >= size for n in lengths))
    tail = size // 2
    return [[*p[: size - tail], *p[len(p) - tail :]] for p in prompts if len(p) >= size]
