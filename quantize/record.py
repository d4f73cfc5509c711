"""What a calibration decided, as a folder: the folded model and calibration.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from holdfast.config import Config
from holdfast.errors import CalibrationError
from holdfast.files import write_text
from holdfast.quantize.fakequant import activation_codes, activation_parameters
from holdfast.quantize.formats import Format

CALIBRATION_FILE = "calibration.json"


class ActivationRange(Config, frozen=True):
    """Static range of one linear's input and the parameters that follow from it.

    Attributes:
        low, high: ends of the range; float32 values, `low <= 0 <= high`.
        scale: float32 value of the graph's scale initializer.
        zero_point: code of the value 0.
    """

    low: float
    high: float
    scale: float
    zero_point: int


class Candidate(Config, frozen=True):
    """One learned setting, judged on the held-out prompts against the aligned model.

    Attributes:
        alpha: weight of the push term.
        mixture: shares of the kinds among the batches, where they were not as drawn.
        steps: optimizer steps; 0 is where learning started.
        flips_lost: the aligned model refused, this one does not.
        flips_gained: the aligned model did not refuse, this one does.
        flips_other: other changes of label, for example to incoherence.
        flipped: which held-out prompts these are, counted from 0.
        changed_tokens_frac: share of answer positions with another likeliest token.
        divergence: weighted mean KL from the aligned model on S_top, nats.
        losses: training loss of every step, nats.
    """

    alpha: float
    steps: int
    flips_lost: int
    flips_gained: int
    flips_other: int
    changed_tokens_frac: float
    divergence: float
    flipped: tuple[int, ...] = ()
    mixture: dict[str, float] | None = None
    losses: tuple[float, ...] = ()

    @property
    def flips(self) -> int:
        return self.flips_lost + self.flips_gained + self.flips_other


class CalibrationRecord(Config, frozen=True):
    """Everything in calibration.json.

    Attributes:
        method: of `calibrate.method`, or `none` where nothing is quantized.
        formats: module path -> scheme that its range and codes were made for.
        layout: settings of the quantization that decide what a scheme's name means.
        coded: whether codes.safetensors beside the record holds the integer codes of every such linear.
        activation_ranges: module path -> range of its input; linears that share an input share it.
        candidates: every alpha that was tried, and where learning started (steps 0).
        chosen_alpha, chosen_steps: the candidate that was kept.
        smooth_frac: SmoothQuant strength that learning started from.
        kept_frac: module path -> mean share of the weights' absmax that the clips keep.
        rounded_away_frac: module path -> share of the weights that are not rounded to the nearest code.
        coverage: category of the suites -> calibration prompts of it.
        prompts: kind -> [prompts learned from, prompts held out].
        settings: calibrate section of the recipe, as it was used.
        held_out: number of held-out prompts.
    """

    method: str
    formats: dict[str, str]
    layout: dict[str, Any]
    seed: int
    coded: bool = False
    activation_ranges: dict[str, ActivationRange] = {}
    candidates: tuple[Candidate, ...] = ()
    chosen_alpha: float | None = None
    chosen_steps: int = 0
    smooth_frac: float | None = None
    kept_frac: dict[str, float] = {}
    rounded_away_frac: dict[str, float] = {}
    coverage: dict[str, int] = {}
    prompts: dict[str, tuple[int, int]] = {}
    settings: dict[str, Any] = {}
    held_out: int = 0
    version: int = 2


def activation_range(low: float, high: float, form: Format) -> ActivationRange:
    """A range with the scale and zero point that ONNX Runtime derives from it."""
    assert form.activation_bits is not None
    ends = torch.tensor(low, dtype=torch.float32), torch.tensor(high, dtype=torch.float32)
    symmetric, signed = form.symmetric_activations, form.signed_activations
    scale, zero_point = activation_parameters(
        *ends, form.activation_bits, symmetric=symmetric, signed=signed
    )
    return ActivationRange(
        low=float(np.float32(low)),
        high=float(np.float32(high)),
        scale=float(scale),
        zero_point=int(zero_point),
    )


def range_of_parameters(
    scale: float, zero_point: int, bits: int, *, signed: bool = False
) -> ActivationRange:
    """The range that a scale and a zero point stand for."""
    low, high = ((code - zero_point) * scale for code in activation_codes(bits, signed=signed))
    return ActivationRange(low=low, high=high, scale=scale, zero_point=zero_point)


def write_record(record: CalibrationRecord, folder: Path) -> None:
    """Write calibration.json; floats are printed so that they read back bit for bit."""
    text = msgspec.json.format(msgspec.json.encode(record, order="sorted"), indent=2)
    write_text(folder / CALIBRATION_FILE, text.decode("utf-8") + "\n")


def read_record(folder: Path) -> CalibrationRecord:
    """Read calibration.json of a calibration folder.

    Raises:
        CalibrationError: missing, not JSON, or not a calibration record.
    """
    path = folder / CALIBRATION_FILE
    if not path.is_file():
        raise CalibrationError(
            f"{folder} holds no {CALIBRATION_FILE}: give the folder that `holdfast calibrate` wrote."
        )
    try:
        return msgspec.json.decode(path.read_bytes(), type=CalibrationRecord)
    except (OSError, msgspec.DecodeError) as error:
        raise CalibrationError(f"{path} is not a calibration record ({error}): calibrate again.") from None
