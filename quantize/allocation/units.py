"""What can be given a format of its own: the quantizable units of a model, and their stored bytes.

Linears that read one tensor are one unit: they share its static range, and in a fused graph Q, K, V and
gate, up are one MatMul. The head is a unit by itself. In a graph the embedding table is another tensor than
the head even where both are one parameter in torch, so the head's format leaves it as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from holdfast.errors import QuantizationError
from holdfast.exporter.architectures import block_paths, linear_modules, row_of
from holdfast.quantize.formats import Format, parse_scheme
from holdfast.quantize.plan import InputGroup, input_groups
from holdfast.recipe import QuantizeConfig

FLOAT_BYTES, FLOAT_BITS = 4, 32
CODE_BITS = 8  # what an activation's zero point is stored in


@dataclass(frozen=True)
class Unit:
    """Linears that share one format.

    Attributes:
        paths: module paths; the first names the unit.
        shapes: (out, in) of their weights.
        block: index of the decoder block, None outside of them.
    """

    paths: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    block: int | None

    @property
    def name(self) -> str:
        return self.paths[0]

    @property
    def weights(self) -> int:
        """Number of weights, biases left out: they stay float32."""
        return sum(rows * columns for rows, columns in self.shapes)


def quantizable_units(model: nn.Module) -> list[Unit]:
    """The units of a model in the order of computation, the head last."""
    linears = linear_modules(model)
    blocks = {path: index for index, path in enumerate(block_paths(model))}
    return [_unit(group, linears, blocks) for group in input_groups(model)]


def _unit(group: InputGroup, linears: Mapping[str, nn.Linear], blocks: Mapping[str, int]) -> Unit:
    shapes = tuple((linears[path].out_features, linears[path].in_features) for path in group.consumers)
    inside = (index for block, index in blocks.items() if group.name.startswith(f"{block}."))
    return Unit(group.consumers, shapes, next(inside, None))


def unit_bytes(unit: Unit, stored: Format | None) -> int:
    """Bytes of a unit's initializers: codes, scales, zero points, and the input's range.

    Arguments:
        stored: None is float32.

    Counted as ONNX Runtime's quantizers write them. MatMulNBits: packed codes [out, blocks, block], the
    last block padded, float32 scales, and packed zero points where weights are not symmetric. Static
    weights: int8 codes with a float32 scale and an int8 zero point for each output channel. Static
    activations: a float32 scale, an 8-bit zero point, and the two ends of a Clip below 8 bits; one for the
    whole unit.
    """
    if stored is None:
        return FLOAT_BYTES * unit.weights
    weights = sum(_weight_bytes(rows, columns, stored) for rows, columns in unit.shapes)
    return weights + _activation_bytes(stored)


def _weight_bytes(rows: int, columns: int, stored: Format) -> int:
    if not stored.in_blocks:
        channels = rows if stored.per_channel else 1
        return rows * columns + channels * (FLOAT_BYTES + 1)
    blocks = -(-columns // stored.block_size)
    codes = rows * blocks * (stored.block_size * stored.weight_bits // 8)
    zero_points = 0 if stored.symmetric_weights else rows * -(-blocks * stored.weight_bits // 8)
    return codes + rows * blocks * FLOAT_BYTES + zero_points


def _activation_bytes(stored: Format) -> int:
    if stored.activation_bits is None:
        return 0
    clip = 2 * FLOAT_BYTES if stored.activation_bits < CODE_BITS else 0
    return FLOAT_BYTES + 1 + clip


def unit_sizes(
    units: Sequence[Unit], schemes: Sequence[str], config: QuantizeConfig
) -> dict[tuple[str, str], int]:
    """(unit name, scheme) -> bytes, of every combination.

    Raises:
        QuantizationError: no such scheme, the same twice, or none.
    """
    if not schemes or len(set(schemes)) != len(schemes):
        raise QuantizationError(
            f"Expected different schemes to choose among, got {', '.join(schemes) or 'none'}: "
            "name for example w8a8, w4a8."
        )
    known = {scheme: parse_scheme(scheme, config) for scheme in schemes}
    return {(unit.name, scheme): unit_bytes(unit, known[scheme]) for unit in units for scheme in schemes}


def stored_bits(units: Sequence[Unit], total_bytes: int) -> float:
    """Average stored bits a weight: codes, scales and zero points together, over the units' weights."""
    return 8.0 * total_bytes / sum(unit.weights for unit in units)


def budget_from_bits(units: Sequence[Unit], bits: float) -> int:
    """Bytes that an average of `bits` stored bits a weight comes to, rounded down; see `stored_bits`.

    Raises:
        QuantizationError: not between 0 and 32.
    """
    if not 0.0 < bits <= FLOAT_BITS:
        raise QuantizationError(
            f"Expected an average of stored bits a weight above 0 and at most {FLOAT_BITS}, got {bits:g}."
        )
    return int(bits * sum(unit.weights for unit in units) / 8.0)


def other_bytes(model: nn.Module) -> int:
    """Bytes of the parameters that are no unit's weights: embeddings, norms, biases, all float32.

    A tied embedding counts: in the graph it is a table of its own.
    """
    linears = {id(linear.weight) for linear in linear_modules(model).values()}
    others = sum(p.numel() for p in model.parameters() if id(p) not in linears)
    table = model.get_submodule(row_of(model).embedding).get_parameter("weight")
    return FLOAT_BYTES * (others + (table.numel() if id(table) in linears else 0))
