"""Linears that transformers calls with [row * token, channel], exported as the others are.

A product of two matrices and a bias becomes one Gemm with a weight [out, in]; with a leading axis it
is MatMul and Add, which the map of the graph, pruning and every quantizer expect.
"""

from __future__ import annotations

from torch import Tensor, nn


class FlattenedLinear(nn.Linear):
    """`nn.Linear` that multiplies with a leading axis of 1, and takes it off again."""

    def forward(self, input: Tensor) -> Tensor:
        """float32 [tokens, in] to [tokens, out]."""
        return super().forward(input[None])[0]


def replace_flattened(model: nn.Module, linears: dict[str, nn.Linear]) -> None:
    """Put a `FlattenedLinear` with the same parameters in the place of each linear, by module path."""
    for path, linear in linears.items():
        flattened = FlattenedLinear(linear.in_features, linear.out_features, device="meta")
        flattened.weight, flattened.bias = linear.weight, linear.bias
        model.set_submodule(path, flattened)
