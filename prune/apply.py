"""Pruning a loaded model in place, and the record of what was reached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from holdfast.errors import PruneError
from holdfast.exporter.architectures import block_linear_modules, block_paths
from holdfast.exporter.source import SourceModel
from holdfast.exporter.walk import advance
from holdfast.prune.activations import first_block_batches, input_norms
from holdfast.prune.magnitude import magnitude_mask
from holdfast.prune.wanda import wanda_mask
from holdfast.recipe import PruneConfig

BATCH_SIZE = 16

OnDone = Callable[[int], None]
"""Called with the number of decoder blocks just pruned; drives progress bars."""


@dataclass(frozen=True)
class Sparsity:
    """Zeros of one linear layer.

    Attributes:
        weights: number of weights.
        zeros: how many of them are zero now, those that were zero before among them.
        sparsity_frac: zeros / weights.
    """

    weights: int
    zeros: int
    sparsity_frac: float


@dataclass(frozen=True)
class PruneReport:
    """What pruning did.

    Attributes:
        method: `none`, `magnitude` or `wanda`.
        asked_frac: the share asked for.
        reached_frac: zeros / weights over all pruned layers; 0 for `none`.
        modules: module path -> sparsity; empty for `none`.
        calibration_rows, calibration_tokens: what Wanda's input norms were taken over.
    """

    method: str
    asked_frac: float
    reached_frac: float
    modules: dict[str, Sparsity]
    calibration_rows: int
    calibration_tokens: int


def prune_model(
    source: SourceModel,
    token_ids: Sequence[Sequence[int]],
    config: PruneConfig,
    *,
    on_done: OnDone | None = None,
) -> PruneReport:
    """Set weights of the linear layers inside the decoder blocks to zero, in place.

    Embedding, norms, biases and head are left alone.

    Arguments:
        token_ids: calibration rows (chat-templated prompts); read by `wanda` only.

    Raises:
        PruneError: weights or activations that are not finite, no calibration rows for `wanda`.
    """
    linears = {} if config.method == "none" else block_linear_modules(source.model)
    _check_weights(linears)
    rows = token_ids if config.method == "wanda" else ()
    if config.method == "wanda":
        _check_rows(rows)
        _prune_wanda(source, rows, config.sparsity_frac, on_done)
    elif config.method == "magnitude":
        _prune_magnitude(source.model, config.sparsity_frac, on_done)
    return _report(config, linears, rows)


@torch.inference_mode()
def _prune_magnitude(model: nn.Module, sparsity_frac: float, on_done: OnDone | None) -> None:
    linears = block_linear_modules(model)
    for block in block_paths(model):
        for module in _inside(block, linears).values():
            _drop(module, magnitude_mask(module.weight, sparsity_frac))
        if on_done is not None:
            on_done(1)


@torch.inference_mode()
def _prune_wanda(
    source: SourceModel, rows: Sequence[Sequence[int]], sparsity_frac: float, on_done: OnDone | None
) -> None:
    """Block by block: norms on the pruned blocks' output, masks for the whole block, onwards."""
    model = source.model
    linears = block_linear_modules(model)
    batches = first_block_batches(model, rows, pad_id=source.tokenizer.pad_id, batch_size=BATCH_SIZE)
    for index, path in enumerate(block_paths(model)):
        block = model.get_submodule(path)
        inside = _inside(path, linears)
        norms = input_norms(block, inside, batches, index)
        for name, module in inside.items():
            _check_norms(name, norms[name])
            _drop(module, wanda_mask(module.weight, norms[name], sparsity_frac))
        advance(block, batches, index)
        if on_done is not None:
            on_done(1)


def _inside(block: str, linears: dict[str, nn.Linear]) -> dict[str, nn.Linear]:
    return {path: module for path, module in linears.items() if path.startswith(f"{block}.")}


def _drop(module: nn.Linear, keep: Tensor) -> None:
    module.weight.masked_fill_(~keep, 0.0)


def _check_weights(linears: dict[str, nn.Linear]) -> None:
    for path, module in linears.items():
        if not torch.isfinite(module.weight).all():
            raise PruneError(
                f"The weights of `{path}` hold NaN or infinity and cannot be ranked: "
                "start from an intact checkpoint."
            )


def _check_rows(rows: Sequence[Sequence[int]]) -> None:
    if not rows or not all(rows):
        raise PruneError(
            f"Wanda ranks weights by their inputs and needs calibration prompts, found {len(rows)} "
            f"of which {sum(not row for row in rows)} are empty: give prompts, or use `magnitude`."
        )


def _check_norms(path: str, norms: Tensor) -> None:
    if not torch.isfinite(norms).all():
        raise PruneError(
            f"The inputs of `{path}` are NaN or infinite on the calibration prompts: "
            "start from an intact checkpoint."
        )


def _report(
    config: PruneConfig, linears: dict[str, nn.Linear], rows: Sequence[Sequence[int]]
) -> PruneReport:
    modules = {path: _sparsity(module.weight) for path, module in linears.items()}
    weights = sum(entry.weights for entry in modules.values())
    zeros = sum(entry.zeros for entry in modules.values())
    return PruneReport(
        method=config.method,
        asked_frac=config.sparsity_frac,
        reached_frac=zeros / weights if weights else 0.0,
        modules=modules,
        calibration_rows=len(rows),
        calibration_tokens=sum(len(row) for row in rows),
    )


def _sparsity(weight: Tensor) -> Sparsity:
    zeros = int((weight == 0).sum())
    return Sparsity(weight.numel(), zeros, zeros / weight.numel())
