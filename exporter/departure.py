"""Where a graph departs from torch: the first node whose value is not the torch module's.

Torch's values come from hooks on the modules of the architecture table and on the other leaves that
have parameters (norms); the graph's are exposed as further outputs of a copy of it. The search takes
two runs whatever the model's depth: the points where a block begins, through which everything before
them has to pass, and then every point between the last that agrees and the first that does not.

Exposing a tensor keeps ONNX Runtime from fusing across it, and the weights are not packed for its
kernels (see `open_session`): a fault of such a fusion, or of a packed kernel, is not found.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DynamicCache

from holdfast.exporter.architectures import linear_modules, row_of
from holdfast.exporter.graph import GraphLinear, node_name
from holdfast.exporter.parity import (
    Cache,
    GraphDecoder,
    decoder_of,
    load_session,
    session_options,
    torch_step,
)
from holdfast.exporter.source import SourceModel

REPORT = "export.json"  # of the exporter, beside a graph: where its linear layers are
DATA_FOLDER = "session.model_external_initializers_file_folder_path"

Values = NDArray[np.float32]
"""[token that is not padding, channel]"""


@dataclass(frozen=True)
class Checkpoint:
    """A tensor of the graph that torch computes as well.

    Attributes:
        tensor: its name in the graph.
        index: place of the node that gives it among the graph's nodes.
        module: path of the torch module.
        side: which of the module's values: "input", "output", "output 0" and on for a tuple,
            "key cache" or "value cache".
        columns: (first, after the last) of the tensor's channels that are the module's.
    """

    tensor: str
    index: int
    module: str
    side: str
    columns: tuple[int, int] | None = None

    def __str__(self) -> str:
        return f"{self.module} ({self.side})" if self.module else self.side


@dataclass(frozen=True)
class Departure:
    """The first value of a graph that is not torch's.

    Attributes:
        node: name of the node that gives it, and `operator` its type.
        module: torch module, and which of its values; for example "model.layers.0.mlp.up_proj (output)".
        tensor: name of the value in the graph.
        max_abs: largest absolute difference.
        allowed: largest difference that would have passed.
        agreed: the last checkpoint before it that agrees, as `module`; None where it is the first.
        region: names of the nodes that compute it from values that agree, in order, itself last. The
            fault is in one of them.
    """

    node: str
    operator: str
    module: str
    tensor: str
    max_abs: float
    allowed: float
    agreed: str | None
    region: tuple[str, ...]


def first_departure(
    graph: Path,
    source: SourceModel,
    ids: Tensor,
    mask: Tensor,
    *,
    atol: float,
    rtol: float,
    cached_tokens: int = 0,
    linears: Mapping[str, GraphLinear] | None = None,
) -> Departure | None:
    """The first node of a graph whose value departs from the torch model's, on given tokens.

    A value departs when it differs somewhere by more than `atol + rtol * (its largest value in torch)`.
    Padding is left out of the comparison. Where a departure only shows in the cache that one run
    leaves to the next, the node that is named is the first that reads it.

    Arguments:
        ids, mask: tokens and attention mask, int64 [row, token].
        cached_tokens: leading columns that a run of their own puts into the cache; the run that
            follows on the other columns is the one that is compared.
        linears: where the linear layers are. Without it, as the export.json beside the graph says; and
            for a layer that is in neither, the MatMul that is named after it.

    Returns:
        None where every value that torch has too agrees.

    Raises:
        ExecutionError: ONNX Runtime refuses the graph, or fails.
    """
    model = onnx.load(graph, load_external_data=False)
    known = {**written_linears(graph.parent), **(linears or {})}
    points = _comparable(checkpoints(model.graph, source.model, known), model.graph, mask)
    probe = _Probe(graph, model, source, ids, mask, cached_tokens)
    trunk = _trunk(points, source.model)
    agreeing, departed = _split(probe.gaps(trunk, atol, rtol))
    if departed is None:
        return None
    start = agreeing[-1].index if agreeing else -1
    between = [point for point in points if start < point.index <= departed.point.index]
    later, first = _split(probe.gaps(between, atol, rtol))
    gap = first or departed
    before = {point.tensor for point in points if point.index < gap.point.index}
    return _report(model.graph, gap, before, (agreeing + later)[-1:])


@dataclass(frozen=True)
class _Gap:
    """How far one checkpoint is from torch."""

    point: Checkpoint
    max_abs: float
    allowed: float

    @property
    def departs(self) -> bool:
        return not self.max_abs <= self.allowed  # NaN departs


def _split(gaps: Iterable[_Gap]) -> tuple[list[Checkpoint], _Gap | None]:
    """The checkpoints before the first that departs, and that one."""
    agreeing: list[Checkpoint] = []
    for gap in gaps:
        if gap.departs:
            return agreeing, gap
        agreeing.append(gap.point)
    return agreeing, None


def checkpoints(
    graph: onnx.GraphProto, model: nn.Module, linears: Mapping[str, GraphLinear]
) -> list[Checkpoint]:
    """Tensors of the graph that torch computes too, in the order in which the graph does.

    Of several names for one tensor (the output of a norm, the input of the linears behind it) the
    first in this order is kept: outputs, inputs.
    """
    producers = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    found: dict[tuple[str, tuple[int, int] | None], Checkpoint] = {}
    for tensor, module, side, columns in (
        *_module_tensors(graph, model),
        *_linear_tensors(graph, model, linears),
        *_cache_tensors(graph, model),
        ("logits", "", "logits", None),
    ):
        if tensor in producers:
            point = Checkpoint(tensor, producers[tensor], module, side, columns)
            found.setdefault((tensor, columns), point)
    return sorted(found.values(), key=lambda point: point.index)


_Place = tuple[str, str, str, tuple[int, int] | None]
"""Tensor, module, side, columns: see `Checkpoint`."""


def _module_tensors(graph: onnx.GraphProto, model: nn.Module) -> Iterator[_Place]:
    """Outputs of the embedding, the norms and the rotary embedding, by the names of their nodes."""
    linears = set(linear_modules(model))
    scopes = _scopes(graph)
    read_by: dict[str, list[str]] = {}
    for node in graph.node:
        for name in node.input:
            read_by.setdefault(name, []).append(_scope(node.name))
    for path, module in model.named_modules():
        if path in linears or any(True for _ in module.children()):
            continue
        scope = node_name(path)
        nodes = [node for node in scopes.get(scope, []) if node.op_type != "Constant"]
        if any(True for _ in module.parameters(recurse=False)):
            if nodes:
                yield nodes[-1].output[0], path, "output", None
                yield _normed(nodes), path, "input", None
        elif "Rotary" in type(module).__name__:
            leaving = [
                name
                for node in nodes
                for name in node.output
                if any(reader != scope for reader in read_by.get(name, []))
            ]
            for index, name in enumerate(leaving if len(leaving) == 2 else []):
                yield name, path, f"output {index}", None


def _normed(nodes: Sequence[onnx.NodeProto]) -> str:
    """The tensor that the nodes of a norm read; a skip norm gives it, a sum, as its fourth output."""
    first = nodes[0]
    if first.op_type.startswith("Skip"):
        return first.output[3] if len(first.output) > 3 else ""
    return str(first.input[0])


def _scopes(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """Module scope -> its own nodes in order, for example `/model/layers.0/input_layernorm`."""
    scopes: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        scopes.setdefault(_scope(node.name), []).append(node)
    return scopes


def _scope(name: str) -> str:
    return name.rpartition("/")[0]


def _linear_tensors(
    graph: onnx.GraphProto, model: nn.Module, linears: Mapping[str, GraphLinear]
) -> Iterator[_Place]:
    """Input and output of every linear layer; the output is the product, before a bias is added."""
    nodes = {node.name: node for node in graph.node}
    for path in linear_modules(model):
        place = linears.get(path)
        node = nodes.get(f"{node_name(path)}/MatMul")
        if place is not None:
            yield place.input, path, "input", None
            yield place.output, path, "output", place.columns
        elif node is not None:
            yield node.input[0], path, "input", None
            yield node.output[0], path, "output", None


def _cache_tensors(graph: onnx.GraphProto, model: nn.Module) -> Iterator[_Place]:
    blocks = row_of(model).blocks
    for output in graph.output:
        parts = output.name.split(".")
        if len(parts) == 3 and parts[0] == "present":
            yield output.name, f"{blocks}.{parts[1]}", f"{parts[2]} cache", None


def _comparable(points: list[Checkpoint], graph: onnx.GraphProto, mask: Tensor) -> list[Checkpoint]:
    """Without the keys that a graph rotates by place, padding counted, where torch leaves padding out.

    Attention sees only how far two tokens are apart, so that both are right.
    """
    by_place = "position_ids" not in {item.name for item in graph.input}
    if not by_place or bool((mask == 1).all()):
        return points
    return [point for point in points if point.side != "key cache"]


def _trunk(points: Sequence[Checkpoint], model: nn.Module) -> list[Checkpoint]:
    """The first checkpoint of every block, and all that are in none."""
    prefix = row_of(model).blocks + "."
    seen: set[str] = set()
    chosen = []
    for point in points:
        inside = point.module.startswith(prefix)
        block = point.module[len(prefix) :].split(".")[0] if inside else ""
        if not inside or block not in seen:
            chosen.append(point)
        seen.add(block)
    return chosen


def written_linears(folder: Path) -> dict[str, GraphLinear]:
    """Where the export.json in a folder says that the linear layers are; empty without one."""
    try:
        entries = json.loads((folder / REPORT).read_text(encoding="utf-8"))["modules"]
    except (OSError, ValueError, KeyError):
        return {}
    return {path: GraphLinear(**_with_tuples(entry)) for path, entry in entries.items()}


def _with_tuples(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}


@dataclass(frozen=True)
class _Probe:
    """Both models on the same tokens, with some of their inner values shown."""

    graph: Path
    model: onnx.ModelProto
    source: SourceModel
    ids: Tensor
    mask: Tensor
    cached_tokens: int

    def gaps(self, points: Sequence[Checkpoint], atol: float, rtol: float) -> list[_Gap]:
        """How far each checkpoint is from torch; those that cannot be laid side by side are left out."""
        expected = self._torch_values(points)
        found = self._graph_values({point.tensor for point in points})
        gaps = []
        for point in points:
            torch_value = expected.get((point.module, point.side))
            pair = None if torch_value is None else self._pair(torch_value, found[point.tensor], point)
            if pair is not None:
                gap = np.abs(pair[0].astype(np.float64) - pair[1])
                gaps.append(_Gap(point, float(gap.max()), atol + rtol * float(np.abs(pair[0]).max())))
        return gaps

    def _pair(
        self, expected: Tensor, found: NDArray[Any], point: Checkpoint
    ) -> tuple[Values, Values] | None:
        """Both values as [token that is not padding, channel]; None where their layouts differ."""
        if point.side.endswith("cache"):
            return self._cache_pair(expected.numpy(), found)
        if point.columns is not None:
            found = found[..., slice(*point.columns)]
        shown = self.mask[:, self.cached_tokens :].numpy() == 1
        pair = (_rows(expected.numpy(), shown.shape), _rows(found, shown.shape))
        if pair[0] is None or pair[1] is None or pair[0].shape != pair[1].shape:
            return None
        return pair[0][shown], pair[1][shown]

    def _cache_pair(self, expected: Values, found: Values) -> tuple[Values, Values]:
        """Of the cached tokens that both hold: torch forgets what a sliding window left behind."""
        count = min(expected.shape[2], found.shape[2])
        shown = self.mask[:, self.mask.shape[1] - count :].numpy() == 1
        pair = (value[:, :, value.shape[2] - count :].swapaxes(1, 2) for value in (expected, found))
        a, b = (value.reshape(*value.shape[:2], -1)[shown] for value in pair)
        return a, b

    @torch.inference_mode()
    def _torch_values(self, points: Sequence[Checkpoint]) -> dict[tuple[str, str], Tensor]:
        model, split = self.source.model, self.cached_tokens
        cache = DynamicCache(config=model.config)
        if split:
            torch_step(model, self.ids[:, :split], self.mask[:, :split], cache)
        values: dict[tuple[str, str], Tensor] = {}
        with ExitStack() as hooks:
            for point in points:
                for handle in _hooks(model, point, values):
                    hooks.callback(handle.remove)
            values["", "logits"] = torch_step(model, self.ids[:, split:], self.mask, cache)
        for point in points:
            if point.side.endswith("cache"):
                layer = cache.layers[int(point.module.rpartition(".")[2])]
                values[point.module, point.side] = layer.keys if point.side[0] == "k" else layer.values
        return values

    def _graph_values(self, tensors: set[str]) -> dict[str, NDArray[Any]]:
        decoder, split = _exposed(self.graph, self.model, tensors), self.cached_tokens
        cache: Cache = decoder.empty_cache(self.ids.shape[0])
        if split:
            _, cache = decoder.step(self.ids[:, :split], self.mask[:, :split], cache)
        return decoder.values(self.ids[:, split:], self.mask, cache, sorted(tensors))


def _rows(value: NDArray[Any], shape: tuple[int, ...]) -> Values | None:
    """A value of every token as [row, token, channel]; None where it is laid out in another way."""
    rows, tokens = shape
    if value.shape[:1] == (1,) and rows > 1:
        value = np.broadcast_to(value, (rows, *value.shape[1:]))
    if value.shape[:2] == shape or value.shape[0] % (rows * tokens) == 0:
        return value.reshape(rows, tokens, -1)
    return None


def _hooks(
    model: nn.Module, point: Checkpoint, values: dict[tuple[str, str], Tensor]
) -> Iterator[torch.utils.hooks.RemovableHandle]:
    """A hook that puts the checkpoint's value into `values`; none for what is no module's."""
    key = (point.module, point.side)
    kind, _, index = point.side.partition(" ")
    if not point.module or point.side.endswith("cache"):
        return
    module = model.get_submodule(point.module)
    if kind == "input":
        yield module.register_forward_pre_hook(_taker(values, key, lambda args: args[0]))
        return

    def output(module: nn.Module, args: Any, result: Any) -> None:
        value = result[int(index)] if index else result
        values[key] = value - module.bias if _has_bias(module) else value

    yield module.register_forward_hook(output)


def _taker(
    values: dict[tuple[str, str], Tensor], key: tuple[str, str], pick: Callable[[Any], Tensor]
) -> Callable[[nn.Module, Any], None]:
    def take(module: nn.Module, args: Any) -> None:
        values[key] = pick(args)

    return take


def _has_bias(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module.bias is not None


def _exposed(graph: Path, model: onnx.ModelProto, tensors: set[str]) -> GraphDecoder:
    """The graph with some tensors as further outputs; weights in other files stay in them."""
    outputs = model.graph.output
    own = len(outputs)
    present = {output.name for output in outputs}
    outputs.extend(onnx.ValueInfoProto(name=name) for name in sorted(tensors - present))
    content = model.SerializeToString()
    del outputs[own:]
    options = session_options(lean=True)
    options.add_session_config_entry(DATA_FOLDER, str(graph.parent))
    return decoder_of(load_session(content, graph, options), graph)


def _report(graph: onnx.GraphProto, gap: _Gap, before: set[str], agreed: Sequence[Checkpoint]) -> Departure:
    node = graph.node[gap.point.index]
    return Departure(
        node=node.name,
        operator=node.op_type,
        module=str(gap.point),
        tensor=gap.point.tensor,
        max_abs=gap.max_abs,
        allowed=gap.allowed,
        agreed=str(agreed[0]) if agreed else None,
        region=_region(graph, gap.point.tensor, before),
    )


def _region(graph: onnx.GraphProto, tensor: str, agreed: set[str]) -> tuple[str, ...]:
    """Names of the nodes from values that agree to `tensor`, in the graph's order; no constants."""
    producers = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    pending, inside = [tensor], set()
    while pending:
        index = producers.get(pending.pop())
        if index is None or index in inside:
            continue
        inside.add(index)
        pending += [name for name in graph.node[index].input if name not in agreed]
    return tuple(
        graph.node[index].name for index in sorted(inside) if graph.node[index].op_type != "Constant"
    )
