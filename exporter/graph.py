"""Where the linear layers of the torch model are in the exported graph, proved weight by weight."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import nn

from holdfast.errors import ExportError


@dataclass(frozen=True)
class GraphLinear:
    """One linear layer in the graph: `output = input @ weight (+ bias)`.

    Attributes:
        node: name of the MatMul node.
        input: tensor that the node multiplies.
        weight: initializer, float32.
        output: tensor that the node gives, before a bias is added.
        bias: initializer added next, or None.
        transposed: whether the initializer is the transpose of torch's `weight`, [in, out].
        shape: shape of the initializer.
        columns: (first, after the last) column of the initializer that is this layer's, where several
            layers that read one input are packed into one MatMul; None where it has all of them.
    """

    node: str
    input: str
    weight: str
    output: str
    bias: str | None
    transposed: bool
    shape: tuple[int, ...]
    columns: tuple[int, int] | None = None


def node_name(path: str) -> str:
    """Graph scope of a module, for example `/model/layers.0/mlp/up_proj`."""
    return "/" + re.sub(r"\.(?!\d)", "/", path)


def restore_scopes(graph: onnx.GraphProto, scopes: tuple[tuple[str, str], ...]) -> None:
    """Name nodes after their module where transformers calls it past its parent.

    Arguments:
        scopes: (scope that the exporter saw, module path), for example `("decoder", "model.decoder")`.
    """
    for seen, path in scopes:
        for node in graph.node:
            if node.name.startswith(f"/{seen}/"):
                node.name = node_name(path) + node.name.removeprefix(f"/{seen}")


def name_weights(graph: onnx.GraphProto, paths: list[str]) -> None:
    """Give the anonymous initializers of linear layers (`onnx::MatMul_728`) readable names.

    The exporter numbers them by a counter over the whole trace; `{path}.weight_T` says what they
    are in every tool and does not change when another layer does.
    """
    nodes = {node.name: node for node in graph.node}
    renamed: dict[str, str] = {}
    for path in paths:
        node = nodes.get(f"{node_name(path)}/MatMul")
        if node is not None and node.input[1].startswith("onnx::"):
            renamed.setdefault(node.input[1], f"{path}.weight_T")
    for initializer in graph.initializer:
        initializer.name = renamed.get(initializer.name, initializer.name)
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)


def map_linears(
    graph: onnx.GraphProto, modules: dict[str, nn.Linear], folder: Path
) -> dict[str, GraphLinear]:
    """Find every linear layer and check that its weights arrived bit for bit.

    Arguments:
        modules: module path -> linear, all that the model has.
        folder: where the graph's external data is, if it has any.

    Raises:
        ExportError: a linear is not in the graph, its weight differs, or the graph multiplies by a
            weight that belongs to no module.
    """
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    nodes = {node.name: node for node in graph.node}
    adds = {name: node for node in graph.node if node.op_type == "Add" for name in node.input}
    found = {}
    for path, module in modules.items():
        node = nodes.get(f"{node_name(path)}/MatMul")
        tensor = initializers.get(node.input[1]) if node is not None else None
        if node is None or tensor is None:
            raise ExportError(
                f"The graph has no weight for the linear layer `{path}`: this version of Optimum "
                "writes it differently, so use the versions that Holdfast names."
            )
        _check_weight(path, numpy_helper.to_array(tensor, str(folder)), module)
        bias = _bias(path, module, adds.get(node.output[0]), initializers)
        found[path] = GraphLinear(
            node=node.name,
            input=node.input[0],
            weight=tensor.name,
            output=node.output[0],
            bias=bias,
            transposed=True,
            shape=tuple(tensor.dims),
        )
    _refuse_unknown(graph, {linear.node for linear in found.values()}, initializers)
    return found


def _check_weight(path: str, found: NDArray[np.float32], module: nn.Linear) -> None:
    expected = module.weight.detach().numpy()
    # as integers: NaN equals itself, and 0.0 is not -0.0
    if found.dtype != expected.dtype or not np.array_equal(found.view(np.int32), expected.view(np.int32).T):
        raise ExportError(
            f"The graph's weight for `{path}` is not the model's: export again, and report this."
        )


def _bias(
    path: str,
    module: nn.Linear,
    add: onnx.NodeProto | None,
    initializers: dict[str, onnx.TensorProto],
) -> str | None:
    if "bias" not in dict(module.named_parameters()):
        return None
    added = [] if add is None else [str(name) for name in add.input if name in initializers]
    if len(added) != 1:
        raise ExportError(f"The graph does not add the bias of the linear layer `{path}`.")
    return added[0]


def _refuse_unknown(
    graph: onnx.GraphProto, known: set[str], initializers: dict[str, onnx.TensorProto]
) -> None:
    """A product with a weight of no module would escape pruning and quantization."""
    for node in graph.node:
        weighted = node.op_type in ("MatMul", "Gemm") and initializers.keys() & set(node.input)
        if weighted and node.name not in known:
            raise ExportError(
                f"The graph multiplies by a weight at `{node.name}` that belongs to no linear "
                "layer of the architecture table."
            )
