"""Damage a bundle on purpose, and seal it again: the counter-example that `holdfast verify` must catch.

    python -m reference.damage BUNDLE OUT --bits 2

Every weight matrix of the graph is rounded to `bits` bits with one scale per output channel. The
manifest is written anew, so that the files are "as sealed" and only the alignment suite can tell.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from holdfast.files import atomic_folder
from holdfast.manifest import read_manifest, seal


def round_to_bits(weights: NDArray[Any], bits: int) -> NDArray[Any]:
    """Round a matrix [in, out] to `2**bits - 1` symmetric levels a column; dtype and range are kept.

    int8 codes stay int8 codes: the scales of the graph are left alone.
    """
    values = weights.astype(np.float64)
    absmax = np.abs(values).max(axis=0, keepdims=True)
    step = np.where(absmax > 0, absmax / (2 ** (bits - 1) - 1 or 1), 1.0)
    rounded = np.round(values / step) * step
    damaged: NDArray[Any] = np.round(rounded) if weights.dtype == np.int8 else rounded
    return damaged.astype(weights.dtype)


def damage_graph(path: Path, bits: int) -> int:
    """Round the weight matrices of the graph at `path` in place; returns how many there were."""
    model = onnx.load(path)
    weights = {
        name
        for node in model.graph.node
        for name in node.input
        if node.op_type in ("MatMul", "DequantizeLinear")
    }
    changed = 0
    for tensor in model.graph.initializer:
        if tensor.name in weights and len(tensor.dims) == 2:
            array = round_to_bits(numpy_helper.to_array(tensor), bits)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
            changed += 1
    onnx.save(model, path)
    return changed


def damage_bundle(bundle: Path, out: Path, *, bits: int) -> int:
    """Copy `bundle` to `out` with damaged weights and a fresh manifest; returns matrices changed."""
    with atomic_folder(out) as fresh:
        shutil.copytree(bundle, fresh, dirs_exist_ok=True)
        changed = damage_graph(fresh / "model.onnx", bits)
        if not changed:
            raise click.ClickException(f"{bundle} has no weight matrix to damage.")
        seal(fresh, read_manifest(fresh))
    return changed


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--bits", type=click.IntRange(2, 8), default=2, show_default=True)
def main(bundle: Path, out: Path, bits: int) -> None:
    """Copy BUNDLE to OUT with its weights rounded to BITS bits."""
    changed = damage_bundle(bundle, out, bits=bits)
    click.echo(f"{out}: {changed} weight matrices rounded to {bits} bits")


if __name__ == "__main__":
    main()
