"""SmoothQuant of Intel Neural Compressor, inside the worker: a float graph with smoothed inputs.

`ORTSmoothQuant` is called itself, not through `fit`: it then works on exactly the linears that are asked
for, and what it did can be compared with the float graph before anything is rounded.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import onnx

from holdfast.quantize.backends.inc_samples import SampleLoader, even_length

SEARCH_SAMPLES = 1  # the search opens a session for every linear, strength and sample
SEARCH = {"alpha_min": 0.3, "alpha_max": 0.8, "alpha_step": 0.1}
PERCENTILE = 99.999  # of a channel's magnitudes; its own default


def smooth(
    model: onnx.ModelProto,
    nodes: Collection[str],
    samples: Sequence[Sequence[int]],
    alpha: float | str,
) -> onnx.ModelProto:
    """Scale the input channels of `nodes` down and their weights up; the function stays the same.

    The inverse scales are folded into a norm where its output is read by these linears alone, and are a
    Mul before the linears elsewhere. Linears that read one tensor share their scales.

    Arguments:
        alpha: strength, 0 to 1, or `auto`: for each input the one of least error in the linears' outputs
            after rounding.
    """
    from neural_compressor.adaptor.ox_utils.smooth_quant import ORTSmoothQuant

    class Smoother(ORTSmoothQuant):  # type: ignore[misc]
        """Searches with few samples; all of them take part in the calibration."""

        def _auto_tune_alpha(self, calib_iter: int, **search: Any) -> Any:
            return super()._auto_tune_alpha(min(calib_iter, SEARCH_SAMPLES), **search)

    samples = even_length(samples)
    smoother = Smoother(model, SampleLoader(model.graph, samples))
    _restrict(nodes)
    result = smoother.transform(
        alpha=alpha,
        folding=True,
        percentile=PERCENTILE,
        op_types=["MatMul"],
        scales_per_op=False,
        calib_iter=len(samples),
        auto_alpha_args=SEARCH,
    )
    smoothed: onnx.ModelProto = result.model
    return smoothed


def _restrict(nodes: Collection[str]) -> None:
    """Its calibration takes every MatMul with a constant weight, whatever the configuration says."""
    from neural_compressor.adaptor.ox_utils.calibration import ONNXRTAugment

    every = ONNXRTAugment._get_input_tensor_of_ops

    def asked(self: Any, op_types: list[str]) -> dict[str, list[Any]]:
        found = {
            tensor: [reader for reader in readers if reader[0] in nodes]
            for tensor, readers in every(self, op_types).items()
        }
        return {tensor: readers for tensor, readers in found.items() if readers}

    ONNXRTAugment._get_input_tensor_of_ops = asked
