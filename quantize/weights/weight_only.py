"""Weight-only baselines over a whole model: rounding to nearest, HQQ, GPTQ and AWQ.

GPTQ and AWQ walk through the decoder block by block, and each block reads what the quantized blocks before
it give. The algorithms themselves are in files of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.errors import QuantizationError
from holdfast.exporter.architectures import row_of
from holdfast.exporter.walk import BlockBatch, last_logits, run_block
from holdfast.quantize.folding import fold_scales
from holdfast.quantize.formats import Format
from holdfast.quantize.plan import InputGroup, input_groups
from holdfast.quantize.prompts.sequences import Batch
from holdfast.quantize.walk import Decoder, WholeModel, first_inputs, walk_blocks
from holdfast.quantize.weights.awq import search_clip, search_scales
from holdfast.quantize.weights.codes import WeightCodes
from holdfast.quantize.weights.gptq import Carried, gptq, gptq_carried, hessian_update
from holdfast.quantize.weights.rtn import require_finite, rtn

SAMPLED_ROWS = 512
"""Tokens of each input that AWQ measures errors on."""

Quantizer = Callable[[Tensor, Format], WeightCodes]
OnDone = Callable[[int], None]
"""Called with the number of linears just done; drives progress bars."""
Codes = dict[str, WeightCodes]
Passes = Callable[[], Iterator[Tensor]]
"""Runs part of the model batch by batch; yields which positions were tokens, bool [row, token]."""


@dataclass(frozen=True)
class _Stage:
    """Linears that are quantized while one part of the model is in memory.

    Attributes:
        groups: in order of computation; each has a linear with a format.
        passes: runs that part.
        followed: whether later parts read what this one gives.
    """

    groups: list[InputGroup]
    passes: Passes
    followed: bool


def rounded_codes(
    decoder: Decoder, formats: dict[str, Format], quantizer: Quantizer, *, on_done: OnDone | None = None
) -> Codes:
    """Codes of an algorithm that needs no calibration data, `rtn.rtn` or `hqq.hqq`.

    Arguments:
        formats: module path -> format of the linears that are quantized.

    Raises:
        QuantizationError: the quantizer refuses a weight; the message names its module.
    """
    parts = [decoder.outside(), *(decoder.block(index) for index in range(len(decoder.blocks)))]
    inside = tuple(f"{block}." for block in decoder.blocks)
    owners = ["", *(f"{block}." for block in decoder.blocks)]
    codes: Codes = {}
    for owner, part in zip(owners, parts, strict=True):
        with part, torch.no_grad():
            for path, form in formats.items():
                if path.startswith(owner) if owner else not path.startswith(inside):
                    with _named(path):
                        codes[path] = quantizer(_linear(decoder.model, path).weight, form)
                    _report(on_done)
    return {path: codes[path] for path in formats}


@torch.no_grad()
def gptq_codes(
    decoder: Decoder,
    batches: Sequence[Batch],
    formats: dict[str, Format],
    *,
    damp_frac: float = 0.01,
    act_order: bool = False,
    on_done: OnDone | None = None,
) -> Codes:
    """GPTQ, one group of linears that share an input after the other; see `gptq.gptq`.

    The linears of a block read what those before them in the block give once quantized.

    Arguments:
        batches: calibration sequences.
        formats: module path -> format of the linears that are quantized.

    Returns:
        module path -> codes. The model's own weights are as they were.

    Raises:
        QuantizationError: a weight or its Hessian cannot be used; the message names the module.
        CalibrationError: a block's output is not finite.
    """

    def solve(path: str, weight: Tensor, hessian: Tensor) -> WeightCodes:
        return gptq(weight, hessian, formats[path], damp_frac=damp_frac, act_order=act_order)

    return _by_hessian(decoder, batches, formats, solve, on_done)


@torch.no_grad()
def gptq_starts(
    model: Any, batches: Sequence[Batch], formats: dict[str, Format], fixed: Collection[str]
) -> dict[str, Carried]:
    """Where GPTQ would start the rounding of each weight, see `gptq.gptq_carried`.

    Arguments:
        fixed: module paths whose weights have to stay as they are.

    Returns:
        module path -> weight and shift. The model's own weights are as they were.

    Raises:
        QuantizationError, CalibrationError: as `gptq_codes`.
    """
    starts: dict[str, Carried] = {}

    def solve(path: str, weight: Tensor, hessian: Tensor) -> WeightCodes:
        starts[path] = gptq_carried(weight, hessian, formats[path], fixed=path in fixed)
        return starts[path].codes

    _by_hessian(WholeModel(model), batches, formats, solve, None)
    return starts


def _by_hessian(
    decoder: Decoder,
    batches: Sequence[Batch],
    formats: dict[str, Format],
    solve: Callable[[str, Tensor, Tensor], WeightCodes],
    on_done: OnDone | None,
) -> Codes:
    """Module path -> codes, of a function of (module path, weight, Hessian)."""
    codes: Codes = {}
    with _replaced_weights() as replace_weight:
        for stage in _stages(decoder, batches, formats, replace_weight.put_back):
            for group in stage.groups:
                hessian = _hessian(decoder.model.get_submodule(group.name), stage.passes)
                for path in _quantized(group, formats):
                    linear = _linear(decoder.model, path)
                    with _named(path):
                        codes[path] = solve(path, linear.weight, hessian)
                    if stage.followed:
                        replace_weight(linear, codes[path].dequantized())
                    _report(on_done)
    return {path: codes[path] for path in formats}


@torch.no_grad()
def awq_codes(
    model: Any,
    batches: Sequence[Batch],
    formats: dict[str, Format],
    *,
    grid: int = 20,
    clip: bool = True,
    on_done: OnDone | None = None,
) -> Codes:
    """AWQ: channel scales where they can be folded, then clips; see `awq`.

    The scales are folded into `model`, which computes the same function afterwards; the codes belong to the
    folded weights.

    Arguments:
        model: transformers model, whole in memory.
        batches, formats, on_done: as in `gptq_codes`.
        grid: steps of alpha that are tried.
        clip: whether ranges are searched for as well.

    Raises:
        QuantizationError, CalibrationError: as `gptq_codes`.
    """
    codes: Codes = {}
    with _replaced_weights() as replace_weight:
        for stage in _stages(WholeModel(model), batches, formats, replace_weight.put_back):
            samples = _samples(model, stage)
            for group, sample in zip(stage.groups, samples, strict=True):
                if group.producer is not None:
                    sample.inputs /= _fold_best_scales(model, group, sample, formats, grid)
            for group, sample in zip(stage.groups, samples, strict=True):
                for path in _quantized(group, formats):
                    linear, form = _linear(model, path), formats[path]
                    with _named(path):
                        kept = search_clip(linear.weight, sample.inputs, form) if clip else None
                        codes[path] = rtn(linear.weight, form, kept)
                    if stage.followed:
                        replace_weight(linear, codes[path].dequantized())
                    _report(on_done)
    return {path: codes[path] for path in formats}


def _fold_best_scales(
    model: nn.Module, group: InputGroup, sample: _Sample, formats: dict[str, Format], grid: int
) -> Tensor:
    """Search a group's scales and fold them; returns them for each input channel, float32 [in]."""
    paths = _quantized(group, formats)
    for path in paths:
        with _named(path):
            require_finite(_linear(model, path).weight, "weight")
    produced = int(group.channel_map.max()) + 1
    means = torch.zeros(produced).scatter_reduce(
        0, group.channel_map, sample.mean_abs, "mean", include_self=False
    )
    weights, forms = [_linear(model, path).weight for path in paths], [formats[path] for path in paths]
    with _named(group.name):
        scales = search_scales(weights, sample.inputs, means[group.channel_map], forms, grid)
    fold_scales(model, group, torch.ones(produced).scatter(0, group.channel_map, scales))
    return scales


def _stages(
    decoder: Decoder, batches: Sequence[Batch], formats: dict[str, Format], put_back: Callable[[], None]
) -> Iterator[_Stage]:
    """The parts of the model in order of computation; `put_back` is called once a block has moved on."""
    groups = [group for group in input_groups(decoder.model) if _quantized(group, formats)]
    inside = tuple(f"{block}." for block in decoder.blocks)
    before = [g for g in groups if g.name in row_of(decoder.model).before]
    after = [g for g in groups if not g.name.startswith(inside) and g not in before]
    with decoder.outside():
        if before:
            yield _Stage(before, lambda: _entry_passes(decoder, batches), followed=True)
        states = first_inputs(decoder, batches)
        put_back()
    for index, block in walk_blocks(decoder, states):
        put_back()
        own = [group for group in groups if group.name.startswith(f"{decoder.blocks[index]}.")]
        yield _Stage(own, _block_passes(block, states, index), followed=True)
    put_back()
    if after:
        with decoder.outside():
            yield _Stage(after, lambda: _exit_passes(decoder, batches, states), followed=len(after) > 1)


def _entry_passes(decoder: Decoder, batches: Sequence[Batch]) -> Iterator[Tensor]:
    for batch in batches:
        yield first_inputs(decoder, [batch])[0].shown


def _block_passes(block: nn.Module, states: Sequence[BlockBatch], index: int) -> Passes:
    def passes() -> Iterator[Tensor]:
        for state in states:
            run_block(block, state.hidden, state.arguments[index])
            yield state.shown

    return passes


def _exit_passes(
    decoder: Decoder, batches: Sequence[Batch], states: Sequence[BlockBatch]
) -> Iterator[Tensor]:
    """From the last block's output to the head, which is called and computes nothing: logits are wide."""
    head = decoder.model.get_submodule(row_of(decoder.model).head)
    vars(head)["forward"] = lambda hidden: hidden[..., :1]
    try:
        for batch, state in zip(batches, states, strict=True):
            last_logits(decoder.model, batch.inputs(), state.hidden, keep=batch.ids.shape[1])
            yield state.shown
    finally:
        del vars(head)["forward"]


def _tokens(modules: Sequence[nn.Module], passes: Passes) -> Iterator[list[Tensor]]:
    """What each module reads at shown positions, float32 [tokens, in], batch after batch."""
    seen: dict[nn.Module, Tensor] = {}
    with ExitStack() as hooks:
        for module in modules:
            handle = module.register_forward_pre_hook(lambda m, args: seen.__setitem__(m, args[0]))
            hooks.callback(handle.remove)
        for shown in passes():
            yield [seen[module].reshape(*shown.shape, -1)[shown] for module in modules]


def _hessian(module: nn.Module, passes: Passes) -> Tensor:
    """float64 [in, in]"""
    width = module.in_features
    assert isinstance(width, int)
    hessian = torch.zeros(width, width, dtype=torch.float64)
    for (inputs,) in _tokens([module], passes):
        hessian_update(hessian, inputs)
    return hessian


@dataclass
class _Sample:
    """A group's inputs: float32 [at most SAMPLED_ROWS, in], and the mean |x| of all, float32 [in]."""

    inputs: Tensor
    mean_abs: Tensor


def _samples(model: nn.Module, stage: _Stage) -> list[_Sample]:
    """One pass; tokens evenly over all of them."""
    modules = [model.get_submodule(group.name) for group in stage.groups]
    parts: list[list[Tensor]] = [[] for _ in modules]
    for tokens in _tokens(modules, stage.passes):
        for part, inputs in zip(parts, tokens, strict=True):
            part.append(inputs)
    samples = []
    for part in parts:
        rows = torch.cat(part)
        stride = -(-len(rows) // SAMPLED_ROWS)
        samples.append(_Sample(rows[::stride].clone(), rows.abs().mean(dim=0)))
    return samples


class _Replacements:
    """Linears that hold other weights than their own for a while.

    The parameters are kept, not the linears, which may have given theirs up when they left memory.
    """

    def __init__(self) -> None:
        self._own: list[tuple[Tensor, Tensor]] = []

    def __call__(self, linear: nn.Linear, weight: Tensor) -> None:
        self._own.append((linear.weight, linear.weight.data))
        linear.weight.data = weight

    def put_back(self) -> None:
        while self._own:
            parameter, weight = self._own.pop()
            parameter.data = weight


@contextmanager
def _replaced_weights() -> Iterator[_Replacements]:
    """Every linear has its own weights again afterwards."""
    replacements = _Replacements()
    try:
        yield replacements
    finally:
        replacements.put_back()


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Errors inside say which module they are about."""
    try:
        yield
    except QuantizationError as error:
        raise QuantizationError(f"`{path}`: {error}") from error


def _quantized(group: InputGroup, formats: dict[str, Format]) -> list[str]:
    return [path for path in group.consumers if path in formats]


def _linear(model: Any, path: str) -> nn.Linear:
    module = model.get_submodule(path)
    assert isinstance(module, nn.Linear)
    return module


def _report(on_done: OnDone | None) -> None:
    if on_done is not None:
        on_done(1)
