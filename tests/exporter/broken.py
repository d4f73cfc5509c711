"""Good exports of tiny models, and copies of them that are wrong in one place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from holdfast.exporter.export import export_source
from holdfast.exporter.source import SourceModel
from holdfast.recipe import ExportConfig

WRONG = 0.5  # what a quirk adds to every logit

Condition = tuple[str, str, int]
"""Value, operator and number, for example `("rows", "Greater", 1)`."""


def export_plain(source: SourceModel, out: Path) -> Path:
    """model.onnx as Optimum traces it."""
    out.mkdir()
    export_source(source, out, ExportConfig(target="portable", atol=2e-5))
    return out / "model.onnx"


def export_fused(source: SourceModel, out: Path) -> Path:
    """model.onnx with GroupQueryAttention."""
    out.mkdir()
    export_source(source, out, ExportConfig(target="cpu-x86", atol=2e-5))
    return out / "model.onnx"


def changed(graph: Path, out: Path, change: Callable[[onnx.GraphProto], None]) -> Path:
    """A copy of a graph, and of the export.json beside it, after `change`."""
    model = onnx.load(graph)
    change(model.graph)
    out.mkdir()
    onnx.save(model, out / "model.onnx")
    report = graph.parent / "export.json"
    (out / "export.json").write_bytes(report.read_bytes())
    return out / "model.onnx"


def scaled(name: str, factor: float, place: tuple[slice, ...] = ()) -> Callable[[onnx.GraphProto], None]:
    """Multiplies a part of an initializer, or the value of a Constant by the name of its output."""

    def change(graph: onnx.GraphProto) -> None:
        tensors = {tensor.name: tensor for tensor in graph.initializer}
        constants = {n.output[0]: n.attribute[0].t for n in graph.node if n.op_type == "Constant"}
        tensor = (tensors | constants)[name]
        values = numpy_helper.to_array(tensor).copy()
        values[place] = values[place] * factor
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    return change


def attribute(node: str, name: str, factor: float) -> Callable[[onnx.GraphProto], None]:
    """Multiplies a float attribute of a node."""

    def change(graph: onnx.GraphProto) -> None:
        found = next(item for item in graph.node if item.name == node)
        next(item for item in found.attribute if item.name == name).f *= factor

    return change


def no_change(graph: onnx.GraphProto) -> None:
    """For a copy that is right."""


def quirk(*conditions: Condition, factor: float = 1.0) -> Callable[[onnx.GraphProto], None]:
    """Logits that are off by `WRONG`, and multiplied by `factor`, in the runs where all conditions hold.

    Values: `rows` and `new` tokens of the run, tokens in the cache (`past`), positions with logits
    (`kept`), and the smallest entry of the mask: of its `first` column, its `last`, or all (`least`).
    """

    def change(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            for index, name in enumerate(node.output):
                if name == "logits":
                    node.output[index] = "right"
        graph.node.extend(_values())
        flags = []
        for index, (value, operator, number) in enumerate(conditions):
            number_name, flag = f"q_number_{index}", f"q_flag_{index}"
            graph.node.append(_constant(number_name, np.array(number)))
            graph.node.append(helper.make_node(operator, [f"q_{value}", number_name], [f"{flag}_bool"]))
            graph.node.append(helper.make_node("Cast", [f"{flag}_bool"], [flag], to=TensorProto.FLOAT))
            flags.append(flag)
        graph.node.append(_constant("q_one", np.array(1.0, np.float32)))
        total = "q_one"
        for flag in flags:
            graph.node.append(helper.make_node("Mul", [total, flag], [f"{total}_{flag}"]))
            total = f"{total}_{flag}"
        graph.node.append(_constant("q_wrong", np.array(WRONG, np.float32)))
        graph.node.append(_constant("q_factor", np.array(factor - 1.0, np.float32)))
        graph.node.append(helper.make_node("Mul", ["right", "q_factor"], ["q_scaled"]))
        graph.node.append(helper.make_node("Add", ["q_scaled", "q_wrong"], ["q_change"]))
        graph.node.append(helper.make_node("Mul", ["q_change", total], ["q_applied"]))
        graph.node.append(helper.make_node("Add", ["right", "q_applied"], ["logits"], name="/quirk"))

    return change


def _values() -> list[onnx.NodeProto]:
    """Nodes that compute what conditions name, as int64 scalars."""
    nodes = [
        _constant("q_0", np.array(0)),
        _constant("q_1", np.array(1)),
        _constant("q_minus", np.array(-1)),
        helper.make_node("Shape", ["input_ids"], ["q_ids"]),
        helper.make_node("Shape", ["attention_mask"], ["q_mask"]),
        helper.make_node("Shape", ["right"], ["q_logits"]),
        helper.make_node("Gather", ["q_ids", "q_0"], ["q_rows"]),
        helper.make_node("Gather", ["q_ids", "q_1"], ["q_new"]),
        helper.make_node("Gather", ["q_logits", "q_1"], ["q_kept"]),
        helper.make_node("Gather", ["q_mask", "q_1"], ["q_total"]),
        helper.make_node("Sub", ["q_total", "q_new"], ["q_past"]),
        helper.make_node("ReduceMin", ["attention_mask"], ["q_least"], keepdims=0),
    ]
    for name, index in (("first", "q_0"), ("last", "q_minus")):
        nodes.append(helper.make_node("Gather", ["attention_mask", index], [f"q_{name}_column"], axis=1))
        nodes.append(helper.make_node("ReduceMin", [f"q_{name}_column"], [f"q_{name}"], keepdims=0))
    return nodes


def _constant(name: str, value: np.ndarray) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value))
