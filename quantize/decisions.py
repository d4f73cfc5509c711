"""What is decided for every linear before a graph is written: format, input range, integer codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from holdfast.errors import QuantizationError
from holdfast.quantize.formats import Format, formats
from holdfast.quantize.record import ActivationRange, CalibrationRecord, read_record
from holdfast.quantize.weights.codes import WeightCodes, load_codes
from holdfast.recipe import QuantizeConfig

LAYOUT = ("block_size", "symmetric_weights", "symmetric_activations", "signed_activations", "per_channel")
"""Settings of the quantization that decide what a scheme's name means."""


@dataclass(frozen=True)
class Decisions:
    """What the artifact has to hold.

    Attributes:
        formats: module path -> format of every quantized linear.
        ranges: module path -> static range of its input, where it is decided.
        codes: module path -> integer codes of its weight, where they are decided; others are rounded to
            nearest.
        origin: `calibration.method`, or `none` where nothing was calibrated.
    """

    formats: dict[str, Format]
    ranges: dict[str, ActivationRange] = field(default_factory=dict)
    codes: dict[str, WeightCodes] = field(default_factory=dict, repr=False)
    origin: str = "none"

    def without(self, paths: Sequence[str]) -> Decisions:
        """The same, with some linears left in float32."""
        kept = {path: form for path, form in self.formats.items() if path not in set(paths)}
        return replace(self, formats=kept)

    @property
    def static(self) -> list[str]:
        """Paths whose input has a static range."""
        return [path for path, form in self.formats.items() if form.activation_bits is not None]


def layout(config: QuantizeConfig) -> dict[str, Any]:
    """The settings of `LAYOUT`."""
    return {name: getattr(config, name) for name in LAYOUT}


def read_decisions(folder: Path, paths: Sequence[str], config: QuantizeConfig) -> Decisions:
    """What the calibration in `folder` decided, for the linears at `paths`.

    Raises:
        QuantizationError: it was made for other formats, or holds nothing for one of the linears.
        CalibrationError: damaged files.
    """
    record = read_record(folder)
    chosen = formats(paths, config)
    _check(record, chosen, config)
    codes = load_codes(folder) if record.coded else {}
    if record.coded:
        _require_all(codes, chosen, "integer codes")
    static = {path: form for path, form in chosen.items() if form.activation_bits is not None}
    if record.activation_ranges:
        _require_all(record.activation_ranges, static, "range")
    ranges = {path: record.activation_ranges[path] for path in static if path in record.activation_ranges}
    return Decisions(chosen, ranges, {path: codes[path] for path in chosen if path in codes}, record.method)


def _check(record: CalibrationRecord, chosen: dict[str, Format], config: QuantizeConfig) -> None:
    """Ranges and codes hold for the settings they were made for, and no others."""
    for name, value in layout(config).items():
        if record.layout.get(name) != value:
            raise QuantizationError(
                f"The calibration was made for {name} {record.layout.get(name)!r}, and {value!r} is asked "
                "for: calibrate again with the settings of the quantization."
            )
    asked = {path: form.name for path, form in chosen.items()}
    for path in sorted(set(asked) | set(record.formats)):
        made, wanted = record.formats.get(path, "none"), asked.get(path, "none")
        if made != wanted:
            raise QuantizationError(
                f"The calibration was made for `{path}` in {made}, and {wanted} is asked for: calibrate "
                "again with the settings of the quantization."
            )


def _require_all(found: Mapping[str, object], wanted: Mapping[str, object], what: str) -> None:
    missing = [path for path in wanted if path not in found]
    if missing:
        raise QuantizationError(f"The calibration has no {what} for `{missing[0]}`: calibrate again.")
