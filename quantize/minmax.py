"""Plain min-max ranges of the exported graph: the baseline where no calibration was made."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx

from holdfast.exporter.graph import GraphLinear
from holdfast.exporter.parity import empty_cache, open_session


def minmax_ranges(
    model: onnx.ModelProto, modules: dict[str, GraphLinear], prompts: Sequence[Sequence[int]]
) -> dict[str, tuple[float, float]]:
    """Smallest and largest value that each linear reads, over all tokens of the prompts.

    Arguments:
        model: the exported float graph.
        prompts: token ids; each is run by itself, so that no padding is seen.

    Returns:
        module path -> (low, high), float32 values.
    """
    names = sorted({linear.input for linear in modules.values()})
    lows, highs = np.full(len(names), np.inf), np.full(len(names), -np.inf)
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(_watched(model, names, Path(folder)))
    inputs = {item.name for item in session.get_inputs()}
    cache = empty_cache(session, rows=1)
    for prompt in prompts:
        ids = np.array([prompt], dtype=np.int64)
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), **cache}
        if "position_ids" in inputs:
            feeds["position_ids"] = np.arange(len(prompt), dtype=np.int64)[None]
        values = session.run(names, feeds)
        lows = np.minimum(lows, [value.min() for value in values])
        highs = np.maximum(highs, [value.max() for value in values])
    ends = {name: (float(lows[i]), float(highs[i])) for i, name in enumerate(names)}
    return {path: ends[linear.input] for path, linear in modules.items()}


def _watched(model: onnx.ModelProto, names: Sequence[str], folder: Path) -> Path:
    """A copy of the graph that also gives the tensors `names`."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for name in names:
        copy.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    path = folder / "watched.onnx"
    onnx.save_model(copy, path, save_as_external_data=True, location="watched.data")
    return path
