"""Runs Intel Neural Compressor in a process of its own: `python -m ...inc_worker request.json`.

Importing neural_compressor is heavy and has side effects (warnings filters, loggers, a workspace in the
current folder), and its `fit` swallows every exception and returns None. So it gets a process and a
folder of its own, and the caller believes only the files that come back.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from holdfast.quantize.backends import inc_smooth, inc_weight_only
from holdfast.quantize.backends.inc_samples import SampleLoader

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
OUT = "quantized.onnx"
SMOOTHED = "smoothed.onnx"
WEIGHTS = "weights.npz"

Request = dict[str, Any]


def float_matmuls(graph: onnx.GraphProto, nodes: Sequence[str]) -> list[str]:
    """MatMul nodes that stay in float32: attention, rotary embedding, excluded linears."""
    return [n.name for n in graph.node if n.op_type == "MatMul" and n.name not in nodes]


def static_settings(model: onnx.ModelProto, asked: dict[str, bool], samples: int) -> dict[str, Any]:
    """Keyword arguments of PostTrainingQuantConfig for W8A8.

    Arguments:
        asked: node -> whether its weight has a scale for each output channel, or one in all.
        samples: number of calibration prompts.
    """
    whole = {"weight": {**INT8_WEIGHT, "granularity": ["per_tensor"]}, "activation": UINT8_INPUT}
    by_name = {name: FLOAT32 for name in float_matmuls(model.graph, list(asked))}
    by_name |= {name: whole for name, per_channel in asked.items() if not per_channel}
    return {
        "approach": "static",
        "quant_format": "QDQ",
        "quant_level": 1,
        "op_type_dict": {
            NOT_MATMUL: FLOAT32,
            "MatMul": {"weight": INT8_WEIGHT, "activation": UINT8_INPUT},
        },
        "op_name_dict": by_name,
        "calibration_sampling_size": [samples],
        "recipes": {
            "graph_optimization_level": "DISABLE_ALL",
            "gemm_to_matmul": False,
            "optypes_to_exclude_output_quant": ["MatMul"],
        },
    }


def quantize_static(
    model: onnx.ModelProto, asked: dict[str, bool], samples: list[list[int]], **tuning: Any
) -> onnx.ModelProto | None:
    """W8A8 through `fit`; None where neural_compressor gave up.

    Arguments:
        tuning: `criteria`, further settings, and `eval_func`, for accuracy-driven tuning.
    """
    from neural_compressor import PostTrainingQuantConfig, quantization

    settings = static_settings(model, asked, len(samples)) | tuning.get("criteria", {})
    onnx.save_model(model, "float.onnx")  # it takes a path where it is to change nothing else
    result = quantization.fit(
        "float.onnx",
        PostTrainingQuantConfig(**settings),
        calib_dataloader=SampleLoader(model.graph, samples),
        eval_func=tuning.get("eval_func"),
    )
    return None if result is None else result.model


def quantize_blocks(model: onnx.ModelProto, request: Request) -> onnx.ModelProto:
    """Integer weights into weights.npz; the graph stays in float32, with AWQ's scales in it."""
    asked, level = request["blocks"], request["accuracy_level"]
    nodes, samples = asked["nodes"], request["samples"]
    if asked["method"] == "gptq":
        found = inc_weight_only.gptq(_copy(model), nodes, samples, level)
    elif asked["method"] == "awq":
        model, found = inc_weight_only.awq(model, nodes, samples, level)
    else:
        found = inc_weight_only.round_to_nearest(model, nodes)
    arrays = {
        f"{index}.{name}": array for index, node in enumerate(nodes) for name, array in found[node].items()
    }
    np.savez(WEIGHTS, **arrays)
    return model


def quantize(request: Request) -> onnx.ModelProto | None:
    """Smooth, round in blocks, quantize statically: what the request holds of these, in this order."""
    model = onnx.load(request["graph"])
    if request["smooth"]:
        asked = request["smooth"]
        model = inc_smooth.smooth(model, asked["nodes"], request["samples"], asked["alpha"])
        onnx.save_model(model, SMOOTHED)
    if request["blocks"]:
        model = quantize_blocks(model, request)
    if request["tuning"]:
        from holdfast.quantize.backends.inc_score import tune_static

        return tune_static(model, request)
    if request["static"]:
        return quantize_static(model, request["static"], request["samples"])
    return model


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def main(arguments: list[str], work: Callable[[Request], onnx.ModelProto | None] = quantize) -> int:
    """Do as the request file says; 0 when the graph was written."""
    from neural_compressor import set_random_seed

    request = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    set_random_seed(request["seed"])
    result = work(request)
    if result is None:
        return NO_MODEL
    onnx.save_model(result, OUT)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
