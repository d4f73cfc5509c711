"""How each linear is stored and computed: a scheme's name, and the format that it stands for.

`w8a8`: 8-bit weights per output channel, 8-bit static activations. `w4a8`: 4-bit weights in blocks, 8-bit
static activations. `w4`: 4-bit weights in blocks, float32 activations. `none`: float32.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from holdfast.errors import QuantizationError
from holdfast.recipe import QuantizeConfig

SCHEME = re.compile(r"w(?P<weights>[248])(?:a(?P<activations>[2-8]))?")
FLOAT_BITS = 32
FLOAT_COMPUTE, INT8_COMPUTE = 1, 4  # accuracy_level of MatMulNBits


@dataclass(frozen=True)
class Format:
    """Storage and computation of one linear.

    Attributes:
        weight_bits: 8, 4 or 2.
        activation_bits: 2 to 8 for a static range, one for the tensor; None where the input stays float32.
        block_size: input channels that share a scale; 0 where an output channel has one scale.
        symmetric_weights: the code of 0 is 0; otherwise every scale has a zero point.
        symmetric_activations: the static range is centred on 0.
        signed_activations: codes of the input are int8 instead of uint8.
        per_channel: whether static 8-bit weights have a scale for each output channel, or one in all.
    """

    weight_bits: int
    activation_bits: int | None
    block_size: int
    symmetric_weights: bool = True
    symmetric_activations: bool = False
    signed_activations: bool = False
    per_channel: bool = True

    @property
    def name(self) -> str:
        """The scheme's name."""
        activations = "" if self.activation_bits is None else f"a{self.activation_bits}"
        return f"w{self.weight_bits}{activations}"

    @property
    def in_blocks(self) -> bool:
        """Whether the weights are stored for MatMulNBits."""
        return self.block_size > 0

    @property
    def code_low(self) -> int:
        """Smallest signed weight code."""
        return int(-(2 ** (self.weight_bits - 1))) + (0 if self.in_blocks else 1)

    @property
    def code_high(self) -> int:
        """Largest signed weight code."""
        return int(2 ** (self.weight_bits - 1) - 1)


def parse_scheme(scheme: str, config: QuantizeConfig) -> Format | None:
    """The format that a scheme's name stands for; None for `none`.

    Weights of 8 bits under static activations are per channel and symmetric, whatever `block_size` says:
    that is what ONNX Runtime multiplies in integers. All others are in blocks.

    Raises:
        QuantizationError: no such scheme.
    """
    if scheme == "none":
        return None
    found = SCHEME.fullmatch(scheme)
    if found is None:
        raise QuantizationError(
            f"There is no scheme `{scheme}`: expected `none`, or `w` with 2, 4 or 8, followed for static "
            "activations by `a` with 2 to 8, for example `w8a8`, `w4a8` or `w4`."
        )
    bits = int(found["weights"])
    activations = None if found["activations"] is None else int(found["activations"])
    static8 = bits == 8 and activations is not None
    return Format(
        weight_bits=bits,
        activation_bits=activations,
        block_size=0 if static8 else config.block_size,
        symmetric_weights=static8 or config.symmetric_weights,
        symmetric_activations=config.symmetric_activations or config.signed_activations,
        signed_activations=config.signed_activations,
        per_channel=config.per_channel,
    )


def compute_level(form: Format, config: QuantizeConfig) -> int:
    """`accuracy_level` of a linear in blocks.

    Behind a static range it is 1: at level 4 the kernel would round the codes of the input a second time,
    most of them on ties, and every processor breaks those in its own way.
    """
    return config.accuracy_level if form.activation_bits is None else FLOAT_COMPUTE


def formats(paths: Sequence[str], config: QuantizeConfig) -> dict[str, Format]:
    """Module path -> format, of the linears that are quantized.

    `mixed` wins over `scheme`, the later of its patterns over the earlier, and `exclude` over all.

    Raises:
        QuantizationError: a pattern matches nothing, or nothing is left to quantize.
    """
    for pattern in (*config.mixed, *config.exclude):
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise QuantizationError(
                f"`{'exclude' if pattern in config.exclude else 'mixed'}` names `{pattern}`, which matches "
                f"no linear module; they are named like `{paths[0]}`."
            )
    chosen = {path: parse_scheme(_scheme(path, config), config) for path in paths}
    found = {path: form for path, form in chosen.items() if form is not None}
    if not found and (config.scheme != "none" or config.mixed):
        raise QuantizationError(
            "`exclude` and `mixed` leave every linear in fp32: nothing is left to quantize."
        )
    return found


def _scheme(path: str, config: QuantizeConfig) -> str:
    if any(fnmatchcase(path, pattern) for pattern in config.exclude):
        return "none"
    schemes = [scheme for pattern, scheme in config.mixed.items() if fnmatchcase(path, pattern)]
    return schemes[-1] if schemes else config.scheme
