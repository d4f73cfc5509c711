"""Several weights as one: what the passes that pack MatMuls share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from holdfast.exporter.passes.rule import maker, module_of
from holdfast.exporter.tracing import MODULE

COLUMNS = "columns"  # metadata of a packed MatMul: module path -> (first, after the last) column, as JSON


def concatenated(values: Sequence[ir.Value], name: str) -> ir.LazyTensor:
    """Constants side by side along their last axis, put together when the graph is saved and not before."""
    tensors: list[Any] = [value.const_value for value in values]

    def together() -> ir.TensorProtocol:
        return ir.tensor(np.concatenate([tensor.numpy() for tensor in tensors], axis=-1), name=name)

    shape = [*tensors[0].shape[:-1], sum(tensor.shape[-1] for tensor in tensors)]
    return ir.LazyTensor(together, dtype=tensors[0].dtype, shape=ir.Shape(shape), name=name)


def pack_reason(products: Sequence[ir.Value]) -> str:
    """Why MatMuls cannot be packed; empty where they can."""
    nodes = [product.producer() for product in products]
    if any(node is None or node.op_type != "MatMul" for node in nodes):
        return "one of them is not a product"
    if any(_weight(product).const_value is None for product in products):
        return "a weight is not a constant"
    if any(len(product.uses()) != 1 or product.is_graph_output() for product in products):
        return "a product is read elsewhere as well"
    return ""


def write_columns(packed: ir.Value, module: str, parts: Sequence[ir.Value]) -> None:
    """Note on the node of the packed product which columns come from the module of which part."""
    ends = np.cumsum([0, *(_width(part) for part in parts)]).tolist()
    columns = {
        module_of(part): (first, last) for part, first, last in zip(parts, ends[:-1], ends[1:], strict=True)
    }
    maker(packed).metadata_props[MODULE] = module
    maker(packed).metadata_props[COLUMNS] = json.dumps(columns)


def _weight(product: ir.Value) -> ir.Value:
    weight = maker(product).inputs[1]
    assert weight is not None
    return weight


def _width(product: ir.Value) -> int:
    tensor = _weight(product).const_value
    assert tensor is not None
    return int(tensor.shape.numpy()[-1])
