"""One MatMulNBits node, run by ONNX Runtime on the CPU."""

from __future__ import annotations

import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from holdfast.quantize.weights.codes import WeightCodes, pack


def run_matmul_nbits(values: Tensor, weight: WeightCodes, accuracy_level: int) -> Tensor:
    """`values` [rows, in] times the weight, float32 [rows, out]."""
    packed = pack(weight)
    parts = {"b": packed.packed, "scales": packed.scales, "zero_points": packed.zero_points}
    inputs = {name: part for name, part in parts.items() if part is not None}
    node = helper.make_node(
        "MatMulNBits",
        ["x", *inputs],
        ["y"],
        domain="com.microsoft",
        K=weight.codes.shape[1],
        N=weight.codes.shape[0],
        bits=weight.bits,
        block_size=weight.block_size,
        accuracy_level=accuracy_level,
    )
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(values.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(part.numpy(), name) for name, part in inputs.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": values.numpy()})[0])
