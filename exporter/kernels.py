"""Whether ONNX Runtime's CPU provider has a kernel for every node: operator, version and types.

The table of kernels is that of the installed ONNX Runtime; nothing is loaded or run. How a kernel is
chosen follows `KernelRegistry::VerifyKernelDef` of ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import onnx
from onnx import TensorProto
from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema, get_all_opkernel_def

from holdfast.errors import ExportError
from holdfast.exporter.operators import (
    Operator,
    is_standard,
    operator_of,
    opset_versions,
    standard_name,
)

PROVIDER = "CPUExecutionProvider"
OPEN_END = 2**31 - 1  # a kernel for its version and, so far, no newer one of the operator
# ONNX Runtime's spelling of element types, where it is not ONNX's in lower case
_SPELLED = {TensorProto.FLOAT: "float"}

Types = dict[str, str]
"""Tensor name -> type as ONNX Runtime spells it, for example `tensor(float)`."""


@dataclass(frozen=True)
class Kernel:
    """One kernel of the CPU provider.

    Attributes:
        first, last: versions of the operator that it computes.
        types: type parameter, or input or output -> types that it takes.
    """

    first: int
    last: int
    types: dict[str, tuple[str, ...]]

    def computes(self, since: int) -> bool:
        """Whether it is for the operator as defined in version `since`."""
        if self.last == OPEN_END:
            return self.first == since
        return self.first <= since <= self.last

    def takes(self, types: Types) -> bool:
        """Whether it takes these types; parameters that it does not constrain are free."""
        return all(types[name] in known for name, known in self.types.items() if name in types)


def require_kernels(model: onnx.ModelProto) -> None:
    """Raise ExportError naming the first node for which the CPU provider has no kernel.

    An operator that ONNX defines by other operators passes: ONNX Runtime replaces it by them.
    External data need not be loaded. A function of the model's own is an unknown operator.

    Raises:
        ExportError: no kernel, or one for other types; or a type that cannot be told.
    """
    opsets = opset_versions(model)
    for node, types in typed_nodes(model):
        operator = operator_of(node, opsets)
        kernels = cpu_kernels(operator)
        if not any(kernel.takes(types) for kernel in kernels) and not _has_body(operator):
            why = f"takes {_listed(types)}" if kernels else "computes this operator"
            raise ExportError(
                f"Expected a kernel for {operator} (node `{node.name}`), and none of ONNX Runtime's CPU "
                f"provider {why}: export with another `opset`, or without the pass that wrote the node."
            )


def cpu_kernels(operator: Operator) -> tuple[Kernel, ...]:
    """The CPU provider's kernels for one operator at its version, of any types."""
    found = _registry().get((operator.domain, operator.name), ())
    return tuple(kernel for kernel in found if kernel.computes(operator.since))


def typed_nodes(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, Types]]:
    """Every node, subgraphs included, with the types of its type parameters, inputs and outputs.

    Raises:
        ExportError: the type of a tensor follows from nothing in the graph.
    """
    yield from _typed(model.graph, {}, opset_versions(model))


def _typed(
    graph: onnx.GraphProto, outer: Types, opsets: dict[str, int]
) -> Iterator[tuple[onnx.NodeProto, Types]]:
    known = outer | _declared(graph)
    for node in graph.node:
        inner: Types = {}
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                if body.node or body.output:
                    yield from _typed(body, known, opsets)
                    inner |= _declared(body)
        schema = _schema(node, opsets)
        bound = _bound(node, known, schema)
        for index, name in enumerate(node.output):
            if name and name not in known:
                known[name] = _output_type(node, index, schema, bound, inner)
        yield node, bound | _bound(node, known, schema)


def _declared(graph: onnx.GraphProto) -> Types:
    """Types that the graph states: inputs, outputs, weights, and values it has noted."""
    values = (*graph.input, *graph.output, *graph.value_info)
    stated = {
        value.name: _spell(value.type.tensor_type.elem_type)
        for value in values
        if value.type.HasField("tensor_type") and value.type.tensor_type.elem_type
    }
    return stated | {tensor.name: _spell(tensor.data_type) for tensor in graph.initializer}


def _bound(node: onnx.NodeProto, known: Types, schema: Any) -> Types:
    """Type parameters, and formal inputs and outputs, of a node -> type, as far as they are known."""
    bound: Types = {}
    for names, formals in ((node.input, schema.inputs), (node.output, schema.outputs)):
        for index, name in enumerate(names):
            formal = formals[min(index, len(formals) - 1)]
            if name in known:
                bound |= {formal.typeStr: known[name], formal.name: known[name]}
    return bound


def _output_type(node: onnx.NodeProto, index: int, schema: Any, bound: Types, inner: Types) -> str:
    """Type of an output that the graph does not state; `inner` is what the node's subgraphs state."""
    attributes = {attribute.name: attribute for attribute in node.attribute}
    if node.op_type == "Cast":
        return _spell(attributes["to"].i)
    if node.op_type == "Constant":
        return _constant_type(node)
    if node.op_type == "ConstantOfShape":
        return _spell(attributes["value"].t.data_type) if "value" in attributes else "tensor(float)"
    if node.op_type == "If":
        given = attributes["then_branch"].g.output[index].name
        possible = {inner[given]} if given in inner else set()
        return _only(possible, node, index)
    formal = schema.outputs[min(index, len(schema.outputs) - 1)]
    possible = {bound[formal.typeStr]} if formal.typeStr in bound else set(formal.types)
    return _only(possible, node, index)


def _only(possible: set[str], node: onnx.NodeProto, index: int) -> str:
    if len(possible) != 1:
        raise ExportError(
            f"The type of `{node.output[index]}`, which {node.op_type} (node `{node.name}`) gives, cannot "
            "be told: run `onnx.shape_inference.infer_shapes` on the graph first."
        )
    return possible.pop()


def _constant_type(node: onnx.NodeProto) -> str:
    attribute = node.attribute[0]
    spelled = {"value_float": "float", "value_floats": "float", "value_int": "int64", "value_ints": "int64"}
    if attribute.name in spelled:
        return f"tensor({spelled[attribute.name]})"
    return "tensor(string)" if "string" in attribute.name else _spell(attribute.t.data_type)


def _spell(element: int) -> str:
    """ONNX Runtime's name of a tensor type, for example `tensor(int64)`."""
    return f"tensor({_SPELLED.get(element, TensorProto.DataType.Name(element).lower())})"


def _listed(types: Types) -> str:
    return ", ".join(sorted({found for found in types.values()}))


def _has_body(operator: Operator) -> bool:
    """Whether ONNX defines the operator by others, which then stand in its place; or a constant."""
    if operator.name == "Constant":  # becomes a weight when the graph is loaded
        return True
    if not is_standard(operator):
        return False
    schema = onnx.defs.get_schema(operator.name, operator.since)
    return bool(schema.has_function or schema.has_context_dependent_function)


def _schema(node: onnx.NodeProto, opsets: dict[str, int]) -> Any:
    domain = standard_name(node.domain)
    return _schema_of(domain, node.op_type, opsets.get(domain, 1))


@cache
def _schema_of(domain: str, name: str, opset: int) -> Any:
    """ONNX Runtime's definition of an operator, the newest up to `opset`."""
    found = [schema for schema in _schemas().get((domain, name), ()) if schema.since_version <= opset]
    if not found:
        raise ExportError(
            f"ONNX Runtime knows no operator {domain or 'ai.onnx'}::{name} at version {opset}: export with "
            "the versions that Holdfast names."
        )
    return max(found, key=lambda schema: schema.since_version)


@cache
def _schemas() -> dict[tuple[str, str], tuple[Any, ...]]:
    found: dict[tuple[str, str], tuple[Any, ...]] = {}
    for schema in get_all_operator_schema():
        key = (schema.domain, schema.name)
        found[key] = (*found.get(key, ()), schema)
    return found


@cache
def _registry() -> dict[tuple[str, str], tuple[Kernel, ...]]:
    found: dict[tuple[str, str], tuple[Kernel, ...]] = {}
    for entry in get_all_opkernel_def():
        if entry.provider != PROVIDER:
            continue
        first, last = entry.version_range
        kernel = Kernel(first, last, {k: tuple(v) for k, v in entry.type_constraints.items()})
        found[entry.domain, entry.op_name] = (*found.get((entry.domain, entry.op_name), ()), kernel)
    return found
