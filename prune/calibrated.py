"""Pruning after calibration: zeros in the integer codes that a calibration decided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from holdfast.errors import PruneError
from holdfast.prune.block_scores import updates
from holdfast.quantize.record import CALIBRATION_FILE, read_record, write_record
from holdfast.quantize.weights.codes import WeightCodes, load_codes, save_codes
from holdfast.recipe import PruneConfig


def is_calibrated(folder: Path) -> bool:
    """Whether `holdfast calibrate` wrote this model folder."""
    return (folder / CALIBRATION_FILE).is_file()


def check_after_calibration(folder: Path, config: PruneConfig) -> None:
    """Refuse what would change weights whose codes are decided already.

    Raises:
        PruneError: structures are to be removed, or SparseGPT is to update the weights that stay.
    """
    if config.structured is not None:
        raise PruneError(
            f"{folder} is calibrated, and its ranges and codes are those of all its structures: remove "
            "structures first, then calibrate."
        )
    if updates(config):
        raise PruneError(
            f"{folder} is calibrated, and `{config.method}` changes the weights that stay, whose codes are "
            "decided: prune first, or use a method that only drops weights, for example `wanda`."
        )


def carry_calibration(folder: Path, out: Path, linears: Mapping[str, nn.Linear]) -> None:
    """Write the calibration of `folder` beside the pruned model in `out`, with the codes of zeros at zero.

    Static ranges stay as they were learned.

    Arguments:
        linears: module path -> pruned linear.

    Raises:
        PruneError: codes in which zero cannot be written.
        CalibrationError: the calibration is damaged.
    """
    record = read_record(folder)
    write_record(record, out)
    if record.coded:
        codes = load_codes(folder)
        for path in codes.keys() & linears.keys():
            codes[path] = with_zeros(path, codes[path], linears[path].weight == 0)
        save_codes(codes, out)


def with_zeros(path: str, weight: WeightCodes, zero: Tensor) -> WeightCodes:
    """The codes with some weights at zero.

    Arguments:
        zero: bool [out, in].

    Raises:
        PruneError: a zero point between two codes.
    """
    middle = torch.zeros_like(weight.codes)
    if weight.zero_points is not None:
        if not torch.equal(weight.zero_points, weight.zero_points.round()):
            raise PruneError(
                f"The codes of `{path}` have zero points between two codes, so that no weight can be zero: "
                "prune first, or calibrate with another method than `hqq`."
            )
        size = weight.block_size or weight.codes.shape[1]
        columns = torch.arange(weight.codes.shape[1]) // size
        middle = weight.zero_points[:, columns].to(torch.int8)
    return replace(weight, codes=torch.where(zero, middle, weight.codes))
