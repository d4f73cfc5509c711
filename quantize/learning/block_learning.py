"""Learning one decoder block: its quantized output is brought to what its full-precision self gave.

A block learns on the hidden states that the quantized blocks before it give; its targets are those of the
full-precision walk, so that later blocks make up for what earlier ones lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from holdfast.errors import CalibrationError
from holdfast.exporter.walk import BlockBatch, advance, run_block
from holdfast.quantize.learning.block_losses import Probe, alignment_loss, block_error, fit_probe
from holdfast.quantize.learning.learnable import Learnables
from holdfast.quantize.learning.start import LAST_LR_FRAC, learning, parameter_groups
from holdfast.quantize.prompts.sequences import Batch, even_rows, shuffled_rows
from holdfast.quantize.walk import require_finite
from holdfast.recipe import CalibrateConfig

OnStep = Callable[[int], None]
"""Called with the number of optimizer steps just done; drives progress bars."""

ALIGNMENT_WEIGHT = 0.1


@dataclass(frozen=True)
class BlockResult:
    """What learning did to one block.

    Attributes:
        path: module path of the block.
        part: its quantizers as they were learned.
        start_loss, loss: mean loss over all sequences before and after; without an alignment term the
            relative squared error of its output.
    """

    path: str
    part: Learnables
    start_loss: float
    loss: float


@dataclass(frozen=True)
class Lesson:
    """What every block learns on.

    Attributes:
        batches: the sequences.
        harmful: bool [row] for each batch, whose prompts are harmful; None: no alignment term.
        alignment_weight: of the alignment term, relative to the squared error.
    """

    batches: tuple[Batch, ...]
    harmful: tuple[Tensor, ...] | None
    config: CalibrateConfig
    generator: torch.Generator
    on_step: OnStep
    alignment_weight: float = ALIGNMENT_WEIGHT


@dataclass
class Streams:
    """Two walks through the blocks side by side.

    Attributes:
        aligned: states of the full-precision model.
        quantized: states of the model whose blocks so far compute as the artifact will.
    """

    aligned: list[BlockBatch]
    quantized: list[BlockBatch]


@dataclass(frozen=True)
class Aim:
    """What one batch should come to in a block.

    Attributes:
        target: full-precision output, float32 [row, token, channel].
        weights: float32 [row, token].
        last: int64 [row], column of the last prompt token.
        harmful: bool [row].
        probe: of the block; None without an alignment term.
    """

    target: Tensor
    weights: Tensor
    last: Tensor
    harmful: Tensor
    probe: Probe | None

    def loss(self, output: Tensor, alignment_weight: float) -> Tensor:
        """The block's loss on its output, float32 [row, token, channel]; a scalar."""
        loss = block_error(output, self.target, self.weights)
        if self.probe is None or not self.harmful.any():
            return loss
        states = (at_column(hidden, self.last)[self.harmful] for hidden in (output, self.target))
        margin, reference = map(self.probe.margin, states)
        return loss + alignment_weight * alignment_loss(margin, reference)


def make_lesson(
    batch: Batch, harmful: Tensor | None, config: CalibrateConfig, seed: int, on_step: OnStep
) -> Lesson:
    """All sequences in seeded batches, which stay the same for every block.

    Arguments:
        harmful: bool [row]; None leaves the alignment term out.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(batch.ids), generator=generator)
    parts = [order[rows] for rows in even_rows(len(order), config.batch_size)]
    flags = None if harmful is None else tuple(harmful[rows] for rows in parts)
    return Lesson(tuple(batch.rows(rows) for rows in parts), flags, config, generator, on_step)


def learn_block(
    block: nn.Module,
    parts: Sequence[Learnables],
    index: int,
    path: str,
    streams: Streams,
    lesson: Lesson,
) -> BlockResult:
    """Learn one block in place and move both walks past it; where nothing is gained, nothing is changed.

    Arguments:
        block: decoder block number `index`, in full precision and in memory.
        parts: its quantizers at different starts, not attached; the best of them is learned.
        path: the block's module path.

    Raises:
        CalibrationError: NaN in its output or its loss.
    """
    _move(block, index, path, streams.aligned)
    aims = make_aims([batch.hidden for batch in streams.aligned], lesson)

    def loss_of(part: Learnables) -> float:
        with part.attached():
            return _mean_loss(block, part, index, streams, aims, lesson)

    losses = [loss_of(part) for part in parts]
    loss = start = min(losses)
    part = parts[losses.index(start)]
    with part.attached():
        start_state = part.state()
        if lesson.config.block_steps:
            _train(block, part, index, path, streams, aims, lesson)
            loss = _mean_loss(block, part, index, streams, aims, lesson)
        if not loss < start:
            part.load(start_state)
            loss = start
        with part.frozen():
            _move(block, index, path, streams.quantized)
    return BlockResult(path, part, start, loss)


def make_aims(targets: Sequence[Tensor], lesson: Lesson) -> list[Aim]:
    """The aims of a block whose full-precision outputs are `targets`, one for each batch."""
    lasts = [last_prompt_column(batch) for batch in lesson.batches]
    flags = lesson.harmful or tuple(torch.zeros(len(last), dtype=torch.bool) for last in lasts)
    probe = None if lesson.harmful is None else _probe(targets, lasts, flags)
    return [
        Aim(target, token_weights(batch), last, harmful, probe)
        for target, batch, last, harmful in zip(targets, lesson.batches, lasts, flags, strict=True)
    ]


def token_weights(batch: Batch) -> Tensor:
    """Weight of every position, float32 [row, token]: that of the loss, 1 before the answer, 0 at padding.

    Earlier positions count as well, because later blocks attend to them.
    """
    weights = batch.mask.float()
    answer = weights[:, -batch.positions :]
    weights[:, -batch.positions :] = torch.maximum(answer, batch.weights)
    return weights


def last_prompt_column(batch: Batch) -> Tensor:
    """Column of the last prompt token, int64 [row]: the first position with a loss weight."""
    return batch.ids.shape[1] - (batch.weights > 0).sum(dim=1)


def at_column(hidden: Tensor, columns: Tensor) -> Tensor:
    """float32 [row, token, channel] to the state at one column of each row, [row, channel]."""
    return hidden[torch.arange(len(columns)), columns]


def _probe(targets: Sequence[Tensor], lasts: Sequence[Tensor], flags: Sequence[Tensor]) -> Probe:
    states = torch.cat([at_column(target, last) for target, last in zip(targets, lasts, strict=True)])
    harmful = torch.cat(list(flags))
    return fit_probe(states[harmful], states[~harmful])


def _move(block: nn.Module, index: int, path: str, batches: Sequence[BlockBatch]) -> None:
    advance(block, batches, index)
    for batch in batches:
        require_finite(path, batch.hidden, batch.shown)


def _mean_loss(
    block: nn.Module, part: Learnables, index: int, streams: Streams, aims: Sequence[Aim], lesson: Lesson
) -> float:
    with part.frozen():
        outputs = (run_block(block, batch.hidden, batch.arguments[index]) for batch in streams.quantized)
        losses = [
            float(aim.loss(output, lesson.alignment_weight))
            for aim, output in zip(aims, outputs, strict=True)
        ]
    return sum(losses) / len(losses)


def _train(
    block: nn.Module,
    part: Learnables,
    index: int,
    path: str,
    streams: Streams,
    aims: Sequence[Aim],
    lesson: Lesson,
) -> None:
    """Adam on what the settings allow, one batch a step."""
    steps = lesson.config.block_steps
    chosen = shuffled_rows(len(aims), 1, lesson.generator)
    with learning(parameter_groups(part.model, part, lesson.config)) as optimizer:
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, LAST_LR_FRAC, total_iters=steps)
        for _ in range(steps):
            which = int(next(chosen))
            batch = streams.quantized[which]
            optimizer.zero_grad(set_to_none=True)
            output = run_block(block, batch.hidden, batch.arguments[index])
            loss = aims[which].loss(output, lesson.alignment_weight)
            loss.backward()  # type: ignore[no-untyped-call]
            _require_number(path, loss.detach())
            optimizer.step()
            decay.step()
            part.project()
            lesson.on_step(1)


def _require_number(path: str, loss: Tensor) -> None:
    if not loss.isfinite():
        raise CalibrationError(
            f"The loss of `{path}` is {float(loss)} and no longer a number: lower the learning rates."
        )
