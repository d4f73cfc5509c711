"""Embedding rows are dequantized after they are gathered, with the values they had before."""

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

from holdfast.exporter.passes.gather_first import gather_first

ROWS, COLUMNS = 40, 8
IDS = np.array([[3, 39, 0], [7, 7, 21]])


def table_graph(scale: NDArray[np.float32], zero_point: NDArray[np.int8], axis: int) -> onnx.ModelProto:
    """Gather over a dequantized table int8 [ROWS, COLUMNS]."""
    codes = np.random.default_rng(0).integers(-127, 128, (ROWS, COLUMNS)).astype(np.int8)
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["table"], axis=axis),
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
    ]
    graph = helper.make_graph(
        nodes,
        "embedding",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["b", "s"])],
        [helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["b", "s", COLUMNS])],
        [
            numpy_helper.from_array(array, name)
            for name, array in (("codes", codes), ("scale", scale), ("zero", zero_point))
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def run(model: onnx.ModelProto) -> Any:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"ids": IDS})[0]


@pytest.mark.parametrize(
    ("scale", "zero"),
    [
        (np.float32(0.03), np.int8(5)),
        (np.linspace(0.01, 0.2, COLUMNS, dtype=np.float32), np.arange(COLUMNS, dtype=np.int8)),
    ],
    ids=["one scale", "a scale a column"],
)
def test_rows_are_gathered_first(scale: Any, zero: Any) -> None:
    before = table_graph(np.asarray(scale), np.asarray(zero), axis=1)
    after = gather_first(before)
    assert [node.op_type for node in after.graph.node] == ["Gather", "DequantizeLinear"]
    assert np.array_equal(run(after), run(before))


def test_a_scale_a_row_stays_as_it_is() -> None:
    before = table_graph(np.full(ROWS, 0.1, np.float32), np.zeros(ROWS, np.int8), axis=0)
    after = gather_first(before)
    assert [node.op_type for node in after.graph.node] == ["DequantizeLinear", "Gather"]


def test_a_graph_without_a_quantized_table_comes_back_untouched() -> None:
    before = table_graph(np.float32(0.03)[None].reshape(()), np.int8(0)[None].reshape(()), axis=1)
    del before.graph.node[0]
    before.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(np.zeros((ROWS, COLUMNS), np.float32), "table")
    )
    assert gather_first(before) is before


class _Ids(CalibrationDataReader):
    def __init__(self) -> None:
        self._left = [{"ids": IDS}]

    def get_next(self) -> Any:
        return self._left.pop() if self._left else None


def test_what_onnx_runtimes_quantizer_writes(tmp_path: Any) -> None:
    """Its static quantizer of Gather puts the dequantization first."""
    table = np.random.default_rng(1).normal(size=(ROWS, COLUMNS)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "ids"], ["rows"]),
            helper.make_node("Relu", ["rows"], ["out"]),
        ],
        "embedding",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["b", "s"])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["b", "s", COLUMNS])],
        [numpy_helper.from_array(table, "table")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, tmp_path / "float.onnx")
    quantize_static(
        tmp_path / "float.onnx",
        tmp_path / "int8.onnx",
        _Ids(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Gather"],
    )
    before = onnx.load(tmp_path / "int8.onnx")
    assert before.graph.node[0].op_type == "DequantizeLinear"
    after = gather_first(before)
    producers = {name: node for node in after.graph.node for name in node.output}
    gather = next(node for node in after.graph.node if node.op_type == "Gather")
    assert gather.input[0] not in producers  # the table itself, in int8
    assert np.array_equal(run(after), run(before))
