"""ONNX Runtime as the backend: QDQ pairs and MatMulNBits nodes, written from what was decided.

Nothing is calibrated or rounded here that calibration already decided: its scales, zero points and integer
codes are the graph's initializers. Weights without codes are rounded to nearest, as ONNX Runtime's own
quantizers do it (`fakequant.round_weight`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from holdfast.exporter.graph import GraphLinear
from holdfast.quantize.decisions import Decisions
from holdfast.quantize.fakequant import activation_codes, round_weight
from holdfast.quantize.formats import Format, compute_level
from holdfast.quantize.record import ActivationRange
from holdfast.quantize.weights.codes import WeightCodes, pack
from holdfast.recipe import QuantizeConfig

MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Product:
    """One MatMul with the linears that are packed into it, in the order of their columns.

    Attributes:
        paths: module paths.
        columns: (first, after the last) column of each; None where it has all of them.
        place: where the first of them is; node, input and weight are the same for all.
    """

    paths: tuple[str, ...]
    columns: tuple[tuple[int, int] | None, ...]
    place: GraphLinear


def quantize(
    model: onnx.ModelProto, modules: dict[str, GraphLinear], decided: Decisions, config: QuantizeConfig
) -> onnx.ModelProto:
    """Quantize the MatMuls of `modules` and nothing else.

    Inputs with a static range get a QuantizeLinear and DequantizeLinear pair, behind a Clip below 8 bits.
    8-bit weights with one scale a channel get a DequantizeLinear, so that ONNX Runtime fuses
    MatMulIntegerToFloat; weights in blocks make the product a MatMulNBits. Outputs stay float.

    Arguments:
        model: the exported graph; it is changed.
        modules: module path -> where the linear is, of the quantized ones.
    """
    found = {product.place.node: product for product in products(modules)}
    writer = _Writer(model, decided, config)
    nodes: list[onnx.NodeProto] = []
    for node in list(model.graph.node):
        product = found.get(node.name)
        nodes += [node] if product is None else writer.write(node, product)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    _drop_unread(model, {product.place.weight for product in found.values()})
    return model


def products(modules: dict[str, GraphLinear]) -> list[Product]:
    """The MatMuls behind the linears."""
    by_node: dict[str, list[str]] = {}
    for path, linear in modules.items():
        by_node.setdefault(linear.node, []).append(path)
    found = []
    for paths in by_node.values():
        ordered = sorted(paths, key=lambda path: modules[path].columns or (0, 0))
        columns = tuple(modules[path].columns for path in ordered)
        found.append(Product(tuple(ordered), columns, modules[ordered[0]]))
    return found


def join_codes(parts: Sequence[WeightCodes]) -> WeightCodes:
    """Codes of linears that are packed into one product, one below the other."""
    zero_points = [part.zero_points for part in parts]
    known = [zero for zero in zero_points if zero is not None]
    return replace(
        parts[0],
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        zero_points=torch.cat(known) if known else None,
    )


class _Writer:
    """Writes one product after another; inputs that several products read are quantized once."""

    def __init__(self, model: onnx.ModelProto, decided: Decisions, config: QuantizeConfig) -> None:
        self.graph, self.decided, self.config = model.graph, decided, config
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.inputs: dict[tuple[str, ActivationRange, int], str] = {}
        imported = any(opset.domain == MICROSOFT for opset in model.opset_import)
        if not imported and any(form.in_blocks for form in decided.formats.values()):
            model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))

    def write(self, node: onnx.NodeProto, product: Product) -> list[onnx.NodeProto]:
        """The nodes that take the place of `node`."""
        form = self.decided.formats[product.paths[0]]
        codes = self._codes(product, form)
        source: str = node.input[0]
        before: list[onnx.NodeProto] = []
        if form.activation_bits is not None:
            source, before = self._input(source, self.decided.ranges[product.paths[0]], form)
        write = self._in_blocks if form.in_blocks else self._per_channel
        return [*before, *write(node, source, codes, form)]

    def _codes(self, product: Product, form: Format) -> WeightCodes:
        """Decided, or rounded to nearest, linear by linear."""
        decided = [self.decided.codes.get(path) for path in product.paths]
        if any(codes is None for codes in decided):
            weight = numpy_helper.to_array(self.initializers[product.place.weight])
            parts = [weight[:, slice(*columns)] if columns else weight for columns in product.columns]
        return join_codes(
            [
                codes or round_weight(torch.from_numpy(np.ascontiguousarray(parts[index].T)), form)
                for index, codes in enumerate(decided)
            ]
        )

    def _input(self, name: str, learned: ActivationRange, form: Format) -> tuple[str, list[onnx.NodeProto]]:
        """Name of the dequantized input, and the nodes that make it the first time."""
        bits = form.activation_bits or 8
        known = self.inputs.get((name, learned, bits))
        if known is not None:
            return known, []
        stem = f"{name}_{len(self.inputs)}"
        zero_type = np.int8 if form.signed_activations else np.uint8
        scale = self._constant(f"{stem}_scale", np.float32(learned.scale))
        zero = self._constant(f"{stem}_zero_point", zero_type(learned.zero_point))
        nodes, read = [], name
        if bits < 8:
            codes = activation_codes(bits, signed=form.signed_activations)
            ends = [np.float32(code - learned.zero_point) * np.float32(learned.scale) for code in codes]
            limits = [
                self._constant(f"{stem}_clip_{side}", end) for side, end in zip("ab", ends, strict=True)
            ]
            nodes.append(helper.make_node("Clip", [name, *limits], [f"{stem}_clipped"], f"{stem}_Clip"))
            read = f"{stem}_clipped"
        quantized, result = f"{stem}_quantized", f"{stem}_dequantized"
        nodes += [
            helper.make_node("QuantizeLinear", [read, scale, zero], [quantized], f"{stem}_QuantizeLinear"),
            helper.make_node(
                "DequantizeLinear", [quantized, scale, zero], [result], f"{stem}_DequantizeLinear"
            ),
        ]
        self.inputs[name, learned, bits] = result
        return result, nodes

    def _per_channel(
        self, node: onnx.NodeProto, source: str, codes: WeightCodes, _: Format
    ) -> list[onnx.NodeProto]:
        """DequantizeLinear on an int8 weight [in, out], one scale for each output channel."""
        weight = node.input[1]
        scales = codes.scales[:, 0].numpy()
        names = [
            self._constant(f"{weight}_quantized", np.ascontiguousarray(codes.codes.numpy().T)),
            self._constant(f"{weight}_scale", scales),
            self._constant(f"{weight}_zero_point", np.zeros(len(scales), dtype=np.int8)),
        ]
        dequantize = helper.make_node(
            "DequantizeLinear", names, [f"{weight}_dequantized"], f"{weight}_DequantizeLinear", axis=1
        )
        node.input[0], node.input[1] = source, f"{weight}_dequantized"
        return [dequantize, node]

    def _in_blocks(
        self, node: onnx.NodeProto, source: str, codes: WeightCodes, form: Format
    ) -> list[onnx.NodeProto]:
        packed, weight = pack(codes), node.input[1]
        accuracy_level = compute_level(form, self.config)
        names = [
            self._constant(f"{weight}_q{codes.bits}", packed.packed.numpy()),
            self._constant(f"{weight}_scales", packed.scales.numpy()),
        ]
        if packed.zero_points is not None:
            names.append(self._constant(f"{weight}_zero_points", packed.zero_points.numpy()))
        level = {"accuracy_level": accuracy_level} if accuracy_level else {}
        return [
            helper.make_node(
                "MatMulNBits",
                [source, *names],
                list(node.output),
                node.name,
                domain=MICROSOFT,
                K=codes.codes.shape[1],
                N=codes.codes.shape[0],
                bits=codes.bits,
                block_size=codes.block_size,
                **level,
            )
        ]

    def _constant(self, name: str, value: NDArray[np.generic] | np.generic) -> str:
        """A new initializer, or the one of that name, where two products read one weight."""
        if name not in self.initializers:
            self.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
            self.initializers[name] = self.graph.initializer[-1]
        return name


def _drop_unread(model: onnx.ModelProto, weights: set[str]) -> None:
    """Float weights that no node reads any more."""
    read = {name for node in model.graph.node for name in node.input}
    for index in reversed(range(len(model.graph.initializer))):
        name = model.graph.initializer[index].name
        if name in weights and name not in read:
            del model.graph.initializer[index]
