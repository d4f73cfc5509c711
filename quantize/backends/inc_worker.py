"""Runs Intel Neural Compressor in a process of its own: `python -m ...inc_worker request.json`.

Importing neural_compressor is heavy and has side effects (warnings filters, loggers, a workspace in the
current folder), and its `fit` swallows every exception and returns None. So it gets a process and a
folder of its own, and the caller believes only the file that comes back.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

FLOAT32 = {"activation": {"dtype": ["fp32"]}, "weight": {"dtype": ["fp32"]}}
NOT_MATMUL = "^((?!(^MatMul$)).)*$"
INT8_WEIGHT = {"dtype": ["int8"], "scheme": ["sym"], "granularity": ["per_channel"]}
UINT8_INPUT = {
    "dtype": ["uint8"],
    "scheme": ["asym"],
    "granularity": ["per_tensor"],
    "algorithm": ["minmax"],
}
NO_MODEL = 3  # exit code: fit() returned None

Feeds = dict[str, NDArray[Any]]


class SampleLoader:
    """What neural_compressor takes for a data loader: (feeds, label) pairs, one sequence each."""

    batch_size = 1

    def __init__(self, graph: onnx.GraphProto, samples: list[list[int]]) -> None:
        self.feeds = [sample_feeds(graph, ids) for ids in samples]

    def __iter__(self) -> Iterator[tuple[Feeds, int]]:
        for feeds in self.feeds:
            yield feeds, 0


def sample_feeds(graph: onnx.GraphProto, ids: list[int]) -> Feeds:
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


def float_matmuls(graph: onnx.GraphProto, nodes: list[str]) -> list[str]:
    """MatMul nodes that stay in float32: attention, rotary embedding, excluded linears."""
    return [n.name for n in graph.node if n.op_type == "MatMul" and n.name not in nodes]


def static_settings(request: dict[str, Any], others: list[str]) -> dict[str, Any]:
    """Keyword arguments of PostTrainingQuantConfig for W8A8."""
    return {
        "approach": "static",
        "quant_format": "QDQ",
        "quant_level": 1,
        "op_type_dict": {
            NOT_MATMUL: FLOAT32,
            "MatMul": {"weight": INT8_WEIGHT, "activation": UINT8_INPUT},
        },
        "op_name_dict": {name: FLOAT32 for name in others},
        "calibration_sampling_size": [len(request["samples"])],
        "recipes": {
            "graph_optimization_level": "DISABLE_ALL",
            "gemm_to_matmul": False,
            "optypes_to_exclude_output_quant": ["MatMul"],
        },
    }


def quantize_static(request: dict[str, Any], graph: onnx.GraphProto, others: list[str]) -> Any:
    """W8A8 through `fit`; None where neural_compressor gave up."""
    from neural_compressor import PostTrainingQuantConfig, quantization

    return quantization.fit(
        request["graph"],
        PostTrainingQuantConfig(**static_settings(request, others)),
        calib_dataloader=SampleLoader(graph, request["samples"]),
    )


def quantize_blocks(request: dict[str, Any], others: list[str]) -> Any:
    """4-bit RTN by its own function.

    `fit` with approach `weight_only` loses `bits` and `group_size` as soon as an operator is
    configured (3.7.1), and then fails on every weight.
    """
    from neural_compressor.adaptor.ox_utils.weight_only import rtn_quantize

    return rtn_quantize(
        onnx.load(request["graph"]),
        weight_config={name: "fp32" for name in others},
        num_bits=4,
        group_size=request["block_size"],
        scheme="sym",
        accuracy_level=request["accuracy_level"],
    )


def main(arguments: list[str]) -> int:
    """Quantize as the request file says; 0 when the graph was written."""
    request = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    graph = onnx.load(request["graph"], load_external_data=False).graph
    others = float_matmuls(graph, request["nodes"])
    if request["scheme"] == "w8a8":
        result = quantize_static(request, graph, others)
    else:
        result = quantize_blocks(request, others)
    if result is None:
        return NO_MODEL
    onnx.save_model(result.model, request["out"])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
