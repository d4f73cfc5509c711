"""Where a graph is to run: what differs between targets is a row, never a branch."""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.errors import ExportError
from holdfast.exporter.operators import TARGETS as OPERATOR_SETS
from holdfast.exporter.operators import OperatorSet


@dataclass(frozen=True)
class Target:
    """One place to run.

    Attributes:
        fused: whether attention may be one operator of ONNX Runtime's own.
        opset: ONNX opset, where the user does not choose one.
        ort_format: also write ONNX Runtime's own format with the list of operators that it needs, for a
            runtime built with those alone.
        why: what the row rests on, in a sentence.
    """

    name: str
    fused: bool
    opset: int
    ort_format: bool
    why: str

    @property
    def operators(self) -> OperatorSet:
        """What a graph for this target may use."""
        return OPERATOR_SETS[self.name]


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("cpu-x86", True, 21, False, "ONNX Runtime on x86-64."),
        Target("cpu-arm64", True, 21, False, "ONNX Runtime on AArch64: the same kernels by name."),
        Target("web", True, 21, False, "onnxruntime-web: the CPU provider compiled to WebAssembly."),
        Target("mobile", True, 21, True, "ONNX Runtime's mobile packages read the ORT format."),
        Target("portable", False, 17, False, "ONNX's own operators alone, for any runtime."),
    )
}


def lookup_target(name: str) -> Target:
    """The row of a target.

    Raises:
        ExportError: no such row.
    """
    if name not in TARGETS:
        raise ExportError(f"There is no target `{name}`: expected one of {', '.join(TARGETS)}.")
    return TARGETS[name]
