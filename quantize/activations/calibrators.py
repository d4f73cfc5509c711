"""Static activation ranges by what ONNX Runtime offers: min-max, percentile, entropy; and least squares.

They are the baselines where no calibration learned the ranges. The prompts are run through the exported
graph itself, twice for every method but min-max: first for the extremes of every tensor, then for its
histogram between them. So the bins do not depend on the order of the prompts, and what is kept is one
histogram a tensor, however many prompts there are. ONNX Runtime's own calibrators copy the model, weights
and all, and hold every activation of a call; of them only the search on a histogram is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from holdfast.errors import QuantizationError
from holdfast.exporter.departure import DATA_FOLDER
from holdfast.exporter.graph import GraphLinear
from holdfast.exporter.parity import GraphDecoder, decoder_of, load_session, session_options
from holdfast.quantize.activations.thresholds import (
    LARGEST_BINS,
    Ends,
    Histogram,
    centred,
    entropy_ends,
    mse_ends,
    percentile_ends,
)

Method = Literal["minmax", "percentile", "entropy", "mse"]
OnDone = Callable[[int], None]

TOKENS_PER_RUN = 512  # prompts of one length run together, up to this many tokens


def calibrated_ranges(
    graph: Path,
    modules: dict[str, GraphLinear],
    prompts: Sequence[Sequence[int]],
    *,
    method: Method,
    bits: int,
    symmetric: bool,
    percentile: float = 99.99,
    bins: int = 2048,
    on_done: OnDone | None = None,
) -> dict[str, Ends]:
    """Range of what each linear reads, over all tokens of the prompts.

    Arguments:
        graph: the exported float graph; weights in a file beside it are mapped, not loaded.
        modules: module path -> where the linear is.
        prompts: token ids; only prompts of equal length share a run, so that no padding is seen.
        method: `minmax`; `percentile`, `entropy`, `mse`: see `thresholds`.
        bits: width of the codes that the range is for, 2 to 8.
        symmetric: centre the range on 0.
        percentile: share of the values inside the range, in percent.
        bins: bins of a histogram.
        on_done: told how many prompts were run; each counts once a pass, see `passes`.

    Returns:
        module path -> (low, high), float32 values. The range need not hold 0: the quantizer widens it.

    Raises:
        QuantizationError: no prompt, a setting out of range, or an input that is not finite.
        ExecutionError: ONNX Runtime failed.
    """
    _check_settings(prompts, method, bits, percentile, bins)
    watch = _watch(graph, modules, prompts, on_done)
    extremes = watch.extremes()
    if method == "minmax":
        ends = {name: centred(pair) if symmetric else pair for name, pair in extremes.items()}
    else:
        absolute = method == "percentile" and symmetric
        spans = {name: _span(pair, method, absolute=absolute) for name, pair in extremes.items()}
        found = watch.histograms(spans, extremes, bins, absolute=absolute)
        ends = {name: _ends(h, method, bits, symmetric, percentile) for name, h in found.items()}
    return {path: ends[linear.input] for path, linear in modules.items()}


def passes(method: Method) -> int:
    """How many times the prompts are run."""
    return 1 if method == "minmax" else 2


@dataclass(frozen=True)
class _Watch:
    """The graph with the tensors of interest as outputs, and the prompts to run it on.

    Attributes:
        names: tensor -> linear that is blamed for it; in the order of computation.
    """

    decoder: GraphDecoder
    names: dict[str, str]
    prompts: Sequence[Sequence[int]]
    on_done: OnDone | None

    def extremes(self) -> dict[str, Ends]:
        """Tensor -> smallest and largest value."""
        lows, highs = dict.fromkeys(self.names, np.inf), dict.fromkeys(self.names, -np.inf)
        for rows, values in self.runs():
            for name, array in values.items():
                low, high = float(array.min()), float(array.max())
                if not np.isfinite([low, high]).all():  # both are NaN where one value is
                    self.blame(name, rows, array)
                lows[name], highs[name] = min(lows[name], low), max(highs[name], high)
        return {name: (lows[name], highs[name]) for name in self.names}

    def histograms(
        self, spans: dict[str, Ends], extremes: dict[str, Ends], bins: int, *, absolute: bool
    ) -> dict[str, Histogram]:
        """Tensor -> histogram over its span.

        Arguments:
            absolute: count absolute values.
        """
        counts = {name: np.zeros(bins, np.int64) for name in self.names}
        for _, values in self.runs():
            for name, array in values.items():
                counts[name] += _counts(np.abs(array) if absolute else array, spans[name], bins)
        return {
            name: Histogram(counts[name], *map(np.float32, (*spans[name], *extremes[name])))
            for name in self.names
        }

    def runs(self) -> Iterator[tuple[list[int], dict[str, NDArray[Any]]]]:
        """Indices of the prompts in a run, and tensor -> float32 [prompt, token, channel]."""
        for rows in equal_lengths([len(prompt) for prompt in self.prompts]):
            ids = torch.tensor([list(self.prompts[row]) for row in rows], dtype=torch.int64)
            cache = self.decoder.empty_cache(len(rows))
            yield rows, self.decoder.values(ids, torch.ones_like(ids), cache, list(self.names))
            if self.on_done is not None:
                self.on_done(len(rows))

    def blame(self, name: str, rows: list[int], array: NDArray[Any]) -> None:
        finite = np.isfinite(array).all(axis=tuple(range(1, array.ndim)))
        number = rows[int(np.argmin(finite))] + 1
        raise QuantizationError(
            f"`{self.names[name]}` reads NaN or infinity on calibration prompt {number} of "
            f"{len(self.prompts)}: check the model's weights, or leave that prompt out."
        )


def equal_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Indices in groups of one length, at most TOKENS_PER_RUN tokens or a single prompt each."""
    same: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        same.setdefault(length, []).append(index)
    groups = []
    for length, indices in same.items():
        size = max(1, TOKENS_PER_RUN // length)
        groups += [indices[start : start + size] for start in range(0, len(indices), size)]
    return groups


def _check_settings(
    prompts: Sequence[Sequence[int]], method: str, bits: int, percentile: float, bins: int
) -> None:
    if not prompts or not all(prompts):
        raise QuantizationError(
            "Expected calibration prompts of at least one token, found none or an empty one."
        )
    if not 0.0 < percentile <= 100.0:
        raise QuantizationError(f"Expected a percentile above 0 and up to 100, found {percentile:g}.")
    if method != "minmax" and not 2**bits <= bins <= LARGEST_BINS:
        raise QuantizationError(
            f"Expected {2**bits} to {LARGEST_BINS} bins for the `{method}` ranges of {bits}-bit codes, "
            f"found {bins}."
        )


def _watch(
    graph: Path, modules: dict[str, GraphLinear], prompts: Sequence[Sequence[int]], on_done: OnDone | None
) -> _Watch:
    """Open the graph with further outputs; weights in other files stay there."""
    model = onnx.load(graph, load_external_data=False)
    readers = {linear.input: path for path, linear in modules.items()}
    names = {name: readers[name] for node in model.graph.node for name in node.output if name in readers}
    known = {value.name for value in model.graph.output}
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in names
        if name not in known
    )
    options = session_options(lean=True)
    options.add_session_config_entry(DATA_FOLDER, str(graph.parent))
    decoder = decoder_of(load_session(model.SerializeToString(), graph, options), graph)
    return _Watch(decoder, names, prompts, on_done)


def _span(extremes: Ends, method: Method, *, absolute: bool) -> Ends:
    """From where to where the bins go."""
    low, high = extremes
    if method == "mse":
        return min(low, 0.0), max(high, 0.0)
    low, high = centred(extremes)
    return 0.0 if absolute else low, high


def _ends(histogram: Histogram, method: Method, bits: int, symmetric: bool, percentile: float) -> Ends:
    if histogram.low == histogram.high:  # one value: nothing to cut, and ONNX Runtime finds high below low
        only = float(histogram.low), float(histogram.high)
        return centred(only) if symmetric else only
    if method == "percentile":
        return percentile_ends(histogram, percentile, symmetric=symmetric)
    if method == "entropy":
        return entropy_ends(histogram, bits, symmetric=symmetric)
    return mse_ends(histogram, bits, symmetric=symmetric)


def _counts(array: NDArray[Any], span: Ends, bins: int) -> NDArray[np.int64]:
    first, last = (float(np.float32(end)) for end in span)
    if first == last:
        return np.zeros(bins, np.int64)
    counts, _ = np.histogram(np.clip(array, first, last), bins, range=(first, last))
    return counts.astype(np.int64)
