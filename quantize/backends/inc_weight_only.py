"""RTN, GPTQ and AWQ of Intel Neural Compressor, inside the worker: integer weights for MatMulNBits.

Its algorithms are used, its graph writer is not (3.7.1): it writes MatMulNBits at 4 bits alone and rounded
floats at other widths, packs the zero points of an odd number of blocks across rows, and rounds what GPTQ
chose a second time to another grid, which makes GPTQ worse than round-to-nearest. Its GPTQ also transposes
the Cholesky factor once too often; see `_right_factor`. Its AWQ is taken as it is: the error by which it
chooses channel scales compares a scrambled weight, and its search for clips never applies one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from holdfast.quantize.backends.inc_samples import SampleLoader, even_length

Array = NDArray[Any]
Settings = Mapping[str, Mapping[str, Any]]
"""Node name -> `bits`, `group_size`, `scheme` (`sym` or `asym`)."""


def weight_config(model: onnx.ModelProto, nodes: Settings, method: str) -> dict[str, Any]:
    """Its `weight_config`: settings for each linear, `fp32` for every other MatMul.

    All linears are named, because a setting stays in force until the next one that is named.
    """
    named = [node.name for node in model.graph.node if node.op_type == "MatMul"]
    own = {name: {**settings, "algorithm": method.upper()} for name, settings in nodes.items()}
    return {name: own.get(name, "fp32") for name in named}


def round_to_nearest(
    model: onnx.ModelProto, nodes: Settings, ratios: Mapping[str, float] | None = None
) -> dict[str, dict[str, Array]]:
    """Codes by its own RTN arithmetic.

    Arguments:
        ratios: initializer -> share of the range that is kept; AWQ's clipping.

    Returns:
        node -> `codes` uint8 [out, in padded to whole blocks], `scales` float32 [out, blocks] and, where
        asymmetric, `zero_points` uint8 [out, blocks].
    """
    from neural_compressor.adaptor.ox_utils.weight_only import pad_tensor, quant_tensor

    found = {}
    for name, weight in _weights(model, nodes).items():
        size, scheme = nodes[name]["group_size"], nodes[name]["scheme"]
        blocks = -(-weight.array.shape[0] // size)
        padded = pad_tensor(weight.array, size, blocks)
        ratio = (ratios or {}).get(weight.name, 1)
        codes, scales, zeros = quant_tensor(padded.T, nodes[name]["bits"], size, scheme, "uint", ratio)
        found[name] = {
            "codes": codes.reshape(-1, blocks * size).astype(np.uint8),
            "scales": scales.reshape(-1, blocks).astype(np.float32),
        }
        if scheme == "asym":
            found[name]["zero_points"] = zeros.reshape(-1, blocks).astype(np.uint8)
    return found


def gptq(
    model: onnx.ModelProto, nodes: Settings, samples: Sequence[Sequence[int]], accuracy_level: int
) -> dict[str, dict[str, Array]]:
    """GPTQ's own choice, before its writer rounds it again.

    Returns:
        node -> `grid`, float32 [out, in]: in each block whole multiples of one scale.
    """
    from neural_compressor.adaptor.ox_utils.weight_only import gptq_quantize

    with _no_graph_writer(), _right_factor():
        result = gptq_quantize(
            model,
            SampleLoader(model.graph, samples),
            weight_config=weight_config(model, nodes, "gptq"),
            n_samples=-1,
            accuracy_level=accuracy_level,
        )
    return {name: {"grid": w.array.T.copy()} for name, w in _weights(result.model, nodes).items()}


def awq(
    model: onnx.ModelProto, nodes: Settings, samples: Sequence[Sequence[int]], accuracy_level: int
) -> tuple[onnx.ModelProto, dict[str, dict[str, Array]]]:
    """The graph with AWQ's channel scales in weights, norms and Mul nodes, and codes of the weights."""
    from neural_compressor.adaptor.ox_utils import weight_only

    kept: dict[str, float] = {}

    def remember(scaled: Any, config: Any, bits: int, size: int, scheme: str, ratios: Any, *_: Any) -> Any:
        kept.update(ratios)
        return scaled

    magnitudes = weight_only.get_weight_scale

    def without_zeros(weight: Array, size: int) -> Array:
        """It divides by each row's largest magnitude, and a padding token's row of the head is all 0."""
        scales: Array = magnitudes(weight[np.abs(weight).max(axis=1) > 0], size)
        return scales

    nearest, weight_only.rtn_quantize = weight_only.rtn_quantize, remember
    weight_only.get_weight_scale = without_zeros
    try:
        result = weight_only.awq_quantize(
            model,
            SampleLoader(model.graph, even_length(samples)),
            weight_config=weight_config(model, nodes, "awq"),
            n_samples=-1,
            accuracy_level=accuracy_level,
        )
    finally:
        weight_only.rtn_quantize, weight_only.get_weight_scale = nearest, magnitudes
    result.topological_sort()
    return result.model, round_to_nearest(result.model, nodes, kept)


class _Weight:
    """A linear's initializer: its name, and float32 [in, out]."""

    def __init__(self, tensor: onnx.TensorProto) -> None:
        self.name, self.array = tensor.name, numpy_helper.to_array(tensor)


def _weights(model: onnx.ModelProto, nodes: Settings) -> dict[str, _Weight]:
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    return {n.name: _Weight(tensors[n.input[1]]) for n in model.graph.node if n.name in nodes}


@contextmanager
def _right_factor() -> Iterator[None]:
    """GPTQ's update of the weights that are still to be rounded, which it otherwise leaves out.

    It takes `cholesky(inverse).T`, upper triangular, and reads columns below its diagonal: all zeros, so
    that its result is round-to-nearest to the last bit. With the lower factor these columns are the rows
    of the upper one that the algorithm needs (arXiv 2210.17323, algorithm 1).
    """
    upper = np.linalg.cholesky
    np.linalg.cholesky = lambda matrix: upper(matrix).T  # type: ignore[assignment]
    try:
        yield
    finally:
        np.linalg.cholesky = upper


@contextmanager
def _no_graph_writer() -> Iterator[None]:
    """It then writes rounded floats at 4 bits as well: it compares these with ONNX Runtime's version."""
    from neural_compressor.adaptor.ox_utils import weight_only
    from packaging.version import Version

    before = weight_only.ONNXRT116_VERSION, weight_only.ONNXRT1161_VERSION
    weight_only.ONNXRT116_VERSION = weight_only.ONNXRT1161_VERSION = Version("999")
    try:
        yield
    finally:
        weight_only.ONNXRT116_VERSION, weight_only.ONNXRT1161_VERSION = before
