"""ONNX Runtime's quantizers, given everything that calibration decided: nothing is calibrated here."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from holdfast.exporter.graph import GraphLinear
from holdfast.exporter.quiet import quiet
from holdfast.quantize.graph import add_clips, keep_float_inputs
from holdfast.quantize.record import ActivationRange
from holdfast.recipe import QuantizeConfig


def quantize_static(
    model: onnx.ModelProto,
    modules: dict[str, GraphLinear],
    ranges: dict[str, ActivationRange],
    config: QuantizeConfig,
) -> onnx.ModelProto:
    """W8A8: QDQ pairs around the MatMuls of `modules` and nowhere else.

    Inputs get the learned scales and zero points (uint8 codes, per tensor), weights symmetric int8 per
    output channel. Outputs stay float, so that ONNX Runtime fuses `MatMulIntegerToFloat`.

    Arguments:
        model: the exported graph; it is changed.
        modules: module path -> where the linear is.
        ranges: module path -> range of its input.
    """
    tensors = {linear.input: ranges[path] for path, linear in modules.items()}
    nodes = list(dict.fromkeys(linear.node for linear in modules.values()))  # packed linears share one
    with quiet(), _no_logging():
        quantizer = QDQQuantizer(
            model,
            per_channel=True,
            reduce_range=False,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=_tensor_ranges(tensors),
            nodes_to_quantize=nodes,
            nodes_to_exclude=[],
            op_types_to_quantize=["MatMul"],
            extra_options={
                "OpTypesToExcludeOutputQuantization": ["MatMul"],
                "QDQOpTypePerChannelSupportToAxis": {"MatMul": 1},
                "TensorQuantOverrides": {name: [_override(r)] for name, r in tensors.items()},
            },
        )
        result: onnx.ModelProto = quantizer.quantize_model()
    keep_float_inputs(result, nodes)
    if config.activation_bits < 8:
        add_clips(result, config.activation_bits)
    return result


def quantize_blocks(
    model: onnx.ModelProto, modules: dict[str, GraphLinear], config: QuantizeConfig
) -> onnx.ModelProto:
    """4-bit weights: every MatMul of `modules` becomes MatMulNBits, symmetric, scales per block.

    Arguments:
        model: the exported graph; it is changed.
    """
    nodes = {linear.node for linear in modules.values()}
    others = [n.name for n in model.graph.node if n.op_type == "MatMul" and n.name not in nodes]
    with quiet(), _no_logging():
        # importing it calls logging.basicConfig(level=INFO) on the whole program's logger
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        quantizer = MatMulNBitsQuantizer(
            model,
            bits=4,
            block_size=config.block_size,
            is_symmetric=True,
            accuracy_level=config.accuracy_level or None,
            nodes_to_exclude=others,
        )
        quantizer.process()
    result: onnx.ModelProto = quantizer.model.model
    return result


def _tensor_ranges(tensors: dict[str, ActivationRange]) -> TensorsData:
    """Ranges in the quantizer's own type; only the names count, scales come from the overrides."""
    data = {
        name: TensorData(lowest=np.float32(r.low), highest=np.float32(r.high))
        for name, r in tensors.items()
    }
    return TensorsData(CalibrationMethod.MinMax, data)


def _override(learned: ActivationRange) -> dict[str, Any]:
    return {
        "scale": np.array(learned.scale, dtype=np.float32),
        "zero_point": np.array(learned.zero_point, dtype=np.uint8),
    }


@contextmanager
def _no_logging() -> Iterator[None]:
    """No log lines below ERROR inside; the root logger's level and handlers are restored."""
    root = logging.getLogger()
    level, handlers, disabled = root.level, list(root.handlers), root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.setLevel(level)
        root.handlers[:] = handlers
