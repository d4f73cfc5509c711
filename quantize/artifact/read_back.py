"""Every linear of the artifact, read back from the written graph and compared with what was decided."""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray

from holdfast.config import Config
from holdfast.errors import QuantizationError
from holdfast.exporter.graph import GraphLinear
from holdfast.quantize.backends.ort import join_codes, products
from holdfast.quantize.decisions import Decisions
from holdfast.quantize.formats import Format, compute_level
from holdfast.quantize.graph import Graph, QuantizedInput, histogram, read_blocks, read_input, read_static
from holdfast.quantize.record import ActivationRange
from holdfast.quantize.weights.codes import pack
from holdfast.recipe import QuantizeConfig

STATIC_KERNEL, BLOCK_KERNEL = "MatMulIntegerToFloat", "MatMulNBits"
QUANTIZING = ("uantize", "QLinear", "Integer", "NBits", "QAttention")


class QuantizedTensor(Config, frozen=True):
    """One linear layer in the artifact, as read back from it.

    Attributes:
        scheme: name of its format.
        bits: width of the weights.
        activation_bits: width of the input's codes, or None where the input stays float32.
        scale, zero_point: of the input; None for weight-only quantization.
        weight_scheme: in words.
        block_size: weights that share a scale; 0 is an output channel.
        kernel: operator that ONNX Runtime runs.
    """

    scheme: str
    bits: int
    activation_bits: int | None
    scale: float | None
    zero_point: int | None
    weight_scheme: str
    block_size: int
    kernel: str


def read_back(
    model: onnx.ModelProto, modules: dict[str, GraphLinear], decided: Decisions, config: QuantizeConfig
) -> dict[str, QuantizedTensor]:
    """Module path -> what the graph holds.

    Raises:
        QuantizationError: it is not what was decided, or more than that was quantized.
    """
    graph = Graph(model)
    found: dict[str, QuantizedTensor] = {}
    for product in products(modules):
        path = product.paths[0]
        read = _in_blocks if decided.formats[path].in_blocks else _per_channel
        tensor = read(graph, product.paths, product.place, decided, config)
        found |= dict.fromkeys(product.paths, tensor)
    _check_histogram(histogram(model), [found[product.paths[0]] for product in products(modules)])
    return {path: found[path] for path in modules}


def _per_channel(
    graph: Graph, paths: tuple[str, ...], place: GraphLinear, decided: Decisions, _: QuantizeConfig
) -> QuantizedTensor:
    path = paths[0]
    form = decided.formats[path]
    found = read_static(graph, path, place.output)
    _check_input(graph, found.input, path, place, decided.ranges.get(path), form)
    if all(name in decided.codes for name in paths):
        codes = join_codes([decided.codes[name] for name in paths])
        _require_equal(path, found.weight_codes, codes.codes.numpy().T)
        _require_equal(path, found.weight_scale, codes.scales[:, 0].numpy())
    width = "output channel" if form.per_channel else "tensor"
    return _tensor(form, found.input, f"int8, symmetric, per {width}", STATIC_KERNEL)


def _in_blocks(
    graph: Graph, paths: tuple[str, ...], place: GraphLinear, decided: Decisions, config: QuantizeConfig
) -> QuantizedTensor:
    path = paths[0]
    form = decided.formats[path]
    found = read_blocks(graph, path, place.output)
    codes = [decided.codes[name] for name in paths if name in decided.codes]
    symmetric = codes[0].zero_points is None if codes else form.symmetric_weights
    wanted = (form.weight_bits, form.block_size, compute_level(form, config), symmetric)
    if (found.bits, found.block_size, found.accuracy_level, found.symmetric) != wanted:
        raise QuantizationError(
            f"The artifact holds `{path}` with {found.bits} bits in blocks of {found.block_size} at "
            f"accuracy_level {found.accuracy_level}, and {wanted[:3]} was asked for."
        )
    source = None
    if form.activation_bits is not None:
        source = read_input(graph, path, found.input)
        _check_input(graph, source, path, place, decided.ranges.get(path), form)
    if len(codes) == len(paths):
        packed = pack(join_codes(codes))
        _require_equal(path, found.packed.reshape(packed.packed.shape), packed.packed.numpy())
        _require_equal(path, found.scales.reshape(-1), packed.scales.numpy())
    kind = "symmetric" if found.symmetric else "asymmetric"
    words = f"int{form.weight_bits}, {kind}, per block of input channels"
    return _tensor(form, source, words, BLOCK_KERNEL)


def _check_input(
    graph: Graph,
    found: QuantizedInput,
    path: str,
    place: GraphLinear,
    learned: ActivationRange | None,
    form: Format,
) -> None:
    if not _reads(graph, found.name, place) or (found.clip is not None) != (
        (form.activation_bits or 8) < 8
    ):
        raise QuantizationError(
            f"The artifact does not quantize what `{path}` reads, or not to {form.activation_bits} bits."
        )
    if learned is None:
        return
    if (found.scale, found.zero_point) != (np.float32(learned.scale), learned.zero_point):
        raise QuantizationError(
            f"The artifact quantizes the input of `{path}` with scale {found.scale} and zero point "
            f"{found.zero_point}, and calibration decided {learned.scale} and {learned.zero_point}."
        )


def _reads(graph: Graph, name: str, place: GraphLinear) -> bool:
    """Its input, or that times the constant channel scales that neural-compressor could not fold."""
    node = graph.producers.get(name)
    return name == place.input or (node is not None and node.op_type == "Mul" and place.input in node.input)


def _require_equal(path: str, found: NDArray[np.generic], decided: NDArray[np.generic]) -> None:
    if not np.array_equal(found, decided):
        raise QuantizationError(
            f"The artifact does not hold the codes and scales that were decided for `{path}`: use the "
            "other backend, and report this."
        )


def _tensor(form: Format, source: QuantizedInput | None, words: str, kernel: str) -> QuantizedTensor:
    return QuantizedTensor(
        scheme=form.name,
        bits=form.weight_bits,
        activation_bits=form.activation_bits,
        scale=None if source is None else float(source.scale),
        zero_point=None if source is None else source.zero_point,
        weight_scheme=words,
        block_size=form.block_size,
        kernel=kernel,
    )


def _check_histogram(found: dict[str, int], tensors: list[QuantizedTensor]) -> None:
    """No more was quantized than what was asked for, and with no other operators."""
    quantizing = {name: n for name, n in found.items() if any(part in name for part in QUANTIZING)}
    pairs = quantizing.get("QuantizeLinear", 0)
    blocks = sum(tensor.kernel == BLOCK_KERNEL for tensor in tensors)
    wanted = {
        "GatherBlockQuantized": min(1, quantizing.get("GatherBlockQuantized", 0)),  # the embedding
        "QuantizeLinear": pairs,
        "DequantizeLinear": pairs + len(tensors) - blocks,
        "MatMulNBits": blocks,
    }
    if quantizing != {name: count for name, count in wanted.items() if count}:
        raise QuantizationError(
            f"The backend was asked to quantize {len(tensors)} products and wrote {quantizing}: use the "
            "other backend, and report this."
        )
