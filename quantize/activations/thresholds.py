"""Ends of a static activation range, from a histogram of the values: percentile, entropy, least squares."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxruntime.quantization.calibrate import HistogramCollector, entropy
from onnxruntime.quantization.quant_utils import smooth_distribution

Ends = tuple[float, float]

LARGEST_BINS = 8192  # ONNX Runtime's smoothing of a histogram fails where nearly all of its bins are empty
KEPT = np.linspace(1.0, 0.04, 25)  # shares of each end that the search for the least error tries


@dataclass(frozen=True)
class Histogram:
    """How often one tensor took which values.

    Attributes:
        counts: int64 [bins], equally wide bins from `first` to `last`.
        first, last: ends of the bins.
        low, high: smallest and largest value.
    """

    counts: NDArray[np.int64]
    first: np.float32
    last: np.float32
    low: np.float32
    high: np.float32

    @property
    def edges(self) -> NDArray[np.float32]:
        """float32 [bins + 1]."""
        return np.linspace(self.first, self.last, len(self.counts) + 1, dtype=np.float32)


def percentile_ends(histogram: Histogram, percentile: float, *, symmetric: bool) -> Ends:
    """Range that leaves `100 - percentile` percent of the values out, half of them at each end.

    ONNX Runtime's `compute_percentile`: each end is the left edge of the bin with the quantile in it, and
    never beyond the extremes.

    Arguments:
        histogram: of the absolute values where `symmetric`, which then leaves all of them out at one end.
    """
    collector = HistogramCollector(
        method="percentile",
        symmetric=symmetric,
        num_bins=len(histogram.counts),
        num_quantized_bins=0,  # of entropy alone, as `scenario` is of another method
        percentile=percentile,
        scenario="same",
    )
    collector.get_histogram_dict()["tensor"] = (
        histogram.counts,
        histogram.edges,
        histogram.low,
        histogram.high,
    )
    with redirect_stdout(io.StringIO()):  # it prints
        low, high, *_ = collector.compute_percentile()["tensor"]
    return centred((float(low), float(high))) if symmetric else (float(low), float(high))


def entropy_ends(histogram: Histogram, bits: int, *, symmetric: bool) -> Ends:
    """Range whose 2^bits equal steps keep the distribution closest, by Kullback-Leibler divergence.

    ONNX Runtime's `get_entropy_threshold` (after Migacz, 8-bit inference with TensorRT, GTC 2017), with as
    many merged bins as there are codes, and with array operations instead of its loops, which take seconds
    a tensor. By its own default of 128 bins and 128 merged bins it has one candidate, the whole range.
    Candidates are centred on 0 whether or not the values are: a range is lopsided only where it is cut to
    the extremes, and one-sided values are judged at half the steps.

    Arguments:
        histogram: from -absmax to absmax, with 2^bits bins or more.
    """
    middle, bins = len(histogram.counts) // 2, len(histogram.counts)
    windows = [(middle - i, min(middle + i + 1, bins)) for i in range(2**bits // 2, middle + 1)]
    found = [window_divergence(histogram.counts, *window, merged=2**bits) for window in windows]
    start, end = windows[int(np.argmin(found))]
    low = float(max(histogram.edges[start], histogram.low))
    high = float(min(histogram.edges[end], histogram.high))
    return centred((low, high)) if symmetric else (low, high)


def window_divergence(counts: NDArray[np.int64], start: int, end: int, *, merged: int) -> float:
    """KL divergence of a window of the histogram, and of the same in `merged` steps, in nats.

    Values outside the window count at its ends. As in ONNX Runtime, bins that are left over by equal steps
    count in the last one and are not given back to their places, and parts of a count are dropped.

    Returns:
        infinity where the window is empty.
    """
    inside = counts[start:end]
    clipped = inside.copy()
    clipped[0] += counts[:start].sum()
    clipped[-1] += counts[end:].sum()
    step = len(inside) // merged
    whole = merged * step
    sums = inside[:whole].reshape(merged, step).sum(axis=1)
    sums[-1] += inside[whole:].sum()
    filled = (clipped != 0)[:whole].reshape(merged, step).sum(axis=1)
    spread = np.zeros_like(clipped)
    spread[:whole] = np.repeat(np.where(filled > 0, sums // np.maximum(filled, 1), 0), step)
    smooth = smooth_distribution(clipped), smooth_distribution(spread)
    return float("inf") if any(part is None for part in smooth) else float(entropy(*smooth))


def mse_ends(histogram: Histogram, bits: int, *, symmetric: bool) -> Ends:
    """Range with the least squared quantization error; both ends are searched, each apart.

    Values count as the centre of their bin. Of equal errors the widest range wins.
    """
    low, high = np.minimum(histogram.low, 0.0), np.maximum(histogram.high, 0.0)
    if symmetric:
        highs = np.maximum(-low, high) * KEPT
        lows = -highs
    else:
        pairs = np.meshgrid(_tried(float(low)), _tried(float(high)), indexing="ij")
        lows, highs = (ends.reshape(-1) for ends in pairs)
    best = int(np.argmin(quantization_errors(histogram, lows, highs, bits)))
    return float(np.float32(lows[best])), float(np.float32(highs[best]))


def quantization_errors(
    histogram: Histogram, lows: NDArray[Any], highs: NDArray[Any], bits: int
) -> NDArray[np.float64]:
    """Squared error of every range, summed over the values of the histogram.

    Codes are 0..2^bits - 1, the zero point is rounded, as `fakequant.activation_parameters` has them.

    Arguments:
        lows, highs: [ranges], `low <= 0 <= high`, not both 0.

    Returns:
        float64 [ranges].
    """
    edges = histogram.edges.astype(np.float64)
    taken = histogram.counts > 0
    centres, counts = ((edges[:-1] + edges[1:]) / 2)[taken], histogram.counts[taken]
    most = 2**bits - 1
    errors = np.empty(len(lows))
    for index, (low, high) in enumerate(zip(lows, highs, strict=True)):
        scale = (high - low) / most
        zero_point = np.rint(-low / scale)
        codes = np.clip(np.rint(centres / scale) + zero_point, 0, most)
        errors[index] = ((codes - zero_point) * scale - centres) ** 2 @ counts
    return errors


def centred(ends: Ends) -> Ends:
    limit = max(abs(ends[0]), abs(ends[1]))
    return -limit, limit


def _tried(end: float) -> NDArray[np.float64]:
    """Ends of candidate ranges, the widest first."""
    return end * KEPT if end else np.zeros(1)
