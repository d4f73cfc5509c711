"""Calibration block by block: before end-to-end learning, or alone for models that do not fit.

Alone (`calibrate.scope: blocks`) it reads a model folder, keeps one decoder block in memory at a time, and
writes what it learned as it goes. Q-realign's alignment term (see `block_losses`) takes the place of the
contrastive one, which would need the logits of two whole models.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from holdfast.errors import CalibrationError
from holdfast.exporter.architectures import linear_modules, present, row_of
from holdfast.exporter.streamed import ShardWriter, StreamedModel
from holdfast.exporter.walk import BlockBatch, last_logits, run_block
from holdfast.quantize.activations.ranges import Run, watch_inputs
from holdfast.quantize.decisions import layout
from holdfast.quantize.fakequant import round_weight
from holdfast.quantize.folding import fold
from holdfast.quantize.formats import Format, formats
from holdfast.quantize.learning.block_learning import (
    BlockResult,
    Lesson,
    OnStep,
    Streams,
    learn_block,
    make_lesson,
)
from holdfast.quantize.learning.learnable import Learnables
from holdfast.quantize.learning.start import Inputs, strengths
from holdfast.quantize.plan import InputGroup, input_groups
from holdfast.quantize.prompts.draw import CalibrationPrompt, count_kinds
from holdfast.quantize.prompts.sequences import Batch, chat_prompts, make_batch, with_stop
from holdfast.quantize.record import ActivationRange, CalibrationRecord, activation_range, write_record
from holdfast.quantize.walk import Decoder, WholeModel, first_inputs, greedy_answers
from holdfast.quantize.weights.codes_parts import CodesParts
from holdfast.recipe import CalibrateConfig, QuantizeConfig


def warm_start(
    working_model: Any,
    learned: Learnables,
    batch: Batch,
    config: CalibrateConfig,
    *,
    seed: int,
    on_step: OnStep | None = None,
) -> list[BlockResult]:
    """Learn every block in place, by squared error alone, before end-to-end learning.

    Arguments:
        working_model: full-precision transformers model, with `learned` made for it and not attached.
        batch: all sequences, with the weights of their positions.
        config: `block_steps` steps a block.

    Raises:
        CalibrationError: NaN in a block's output, or nothing to learn.
    """
    decoder = WholeModel(working_model)
    lesson = make_lesson(batch, None, config, seed, on_step or (lambda _: None))
    streams = _first_streams(decoder, outside_part(learned, decoder.blocks), lesson.batches)
    return [
        learn_block(
            working_model.get_submodule(path), [block_part(learned, path)], index, path, streams, lesson
        )
        for index, path in enumerate(decoder.blocks)
    ]


def calibrate_folder(
    model_folder: Path,
    out_folder: Path,
    config: CalibrateConfig,
    quantize: QuantizeConfig,
    prompts: Sequence[CalibrationPrompt],
    *,
    seed: int,
    on_step: OnStep | None = None,
) -> CalibrationRecord:
    """Calibrate a model on disk; peak memory is a few decoder blocks and the sequences' hidden states.

    Arguments:
        model_folder: read part by part.
        out_folder: empty; gets the folded model in one file a block, calibration.json and the codes, as
            `Calibration.save` writes them.
        prompts: harmful and harmless ones; all are learned from, none is held out.
        seed: decides the batches and their order.

    Raises:
        CalibrationError: prompts of one kind only, or NaN in a block's output (which is named).
        ModelSourceError: what cannot be read part by part, see `StreamedModel`.
        DiskFullError: no space left.
    """
    decoder = StreamedModel(model_folder)
    chosen = formats(list(linear_modules(decoder.model)), quantize)
    _require_both_kinds(prompts)
    batch = _sequences(decoder, prompts, config)
    harmful = torch.tensor([prompt.kind == "harmful" for prompt in prompts])
    lesson = make_lesson(batch, harmful, config, seed, on_step or (lambda _: None))
    work = _Work(decoder, chosen, lesson, out_folder)
    work.run()
    record = CalibrationRecord(
        method=config.method,
        formats={path: form.name for path, form in chosen.items()},
        layout=layout(quantize),
        seed=seed,
        coded=True,
        activation_ranges=work.ranges,
        kept_frac=work.kept_frac,
        rounded_away_frac=work.rounded_away_frac,
        prompts=count_kinds(prompts, []),
        settings=msgspec.json.decode(msgspec.json.encode(config)),  # as it reads back
    )
    write_record(record, out_folder)
    return record


def block_part(learned: Learnables, block: str) -> Learnables:
    """The quantizers of one decoder block alone; they are shared, not copied."""
    return _part(learned, lambda path: path.startswith(f"{block}."))


def outside_part(learned: Learnables, blocks: Sequence[str]) -> Learnables:
    """The quantizers that are in no decoder block."""
    inside = tuple(f"{block}." for block in blocks)
    return _part(learned, lambda path: not path.startswith(inside))


def _part(learned: Learnables, wanted: Callable[[str], bool]) -> Learnables:
    part = copy.copy(learned)
    part.plan = [group for group in learned.plan if wanted(group.name)]
    part.groups = {group.name: learned.groups[group.name] for group in part.plan}
    part.linears = {path: linear for path, linear in learned.linears.items() if wanted(path)}
    return part


def _first_streams(decoder: Decoder, outside: Learnables, batches: Sequence[Batch]) -> Streams:
    """What enters the first block, in full precision and quantized."""
    aligned = first_inputs(decoder, batches)
    with outside.attached(), outside.frozen():
        return Streams(aligned, first_inputs(decoder, batches))


def _require_both_kinds(prompts: Sequence[CalibrationPrompt]) -> None:
    harmful = sum(prompt.kind == "harmful" for prompt in prompts)
    if not 0 < harmful < len(prompts):
        raise CalibrationError(
            f"Block-wise calibration tells harmful prompts from harmless ones, and {harmful} of "
            f"{len(prompts)} calibration prompts are harmful: give both kinds."
        )


def _sequences(
    decoder: StreamedModel, prompts: Sequence[CalibrationPrompt], config: CalibrateConfig
) -> Batch:
    """The prompts with the model's own greedy answers."""
    tokenizer, limit = decoder.tokenizer, config.response_tokens
    ids = chat_prompts(tokenizer, [prompt.prompt for prompt in prompts])
    answers = greedy_answers(
        decoder,
        ids,
        max_new_tokens=limit,
        eos_ids=tokenizer.eos_ids,
        pad_id=tokenizer.pad_id,
        batch_size=config.batch_size,
    )
    return make_batch(
        ids,
        [with_stop(answer, limit, tokenizer.eos_ids[0]) for answer in answers],
        pad_id=tokenizer.pad_id,
        response_tokens=limit,
        first_weight=config.first_response_weight,
    )


@dataclass
class _Work:
    """One calibration of a model on disk, with what it decided so far.

    Attributes:
        ranges, kept_frac, rounded_away_frac: as in `CalibrationRecord`.
    """

    decoder: StreamedModel
    chosen: dict[str, Format]
    lesson: Lesson
    out: Path
    ranges: dict[str, ActivationRange] = field(default_factory=dict)
    kept_frac: dict[str, float] = field(default_factory=dict)
    rounded_away_frac: dict[str, float] = field(default_factory=dict)

    def run(self) -> None:
        """Learn and write every part of the model, in order."""
        decoder, groups = self.decoder, input_groups(self.decoder.model)
        names = present(decoder.model, row_of(decoder.model).before)
        shards = ShardWriter(self.out, len(decoder.blocks) + 1)
        with CodesParts(self.out) as codes:
            with decoder.outside():
                before, *_ = self._attach(
                    [group for group in groups if group.name in names], self._first_runs()
                )
                streams = _first_streams(decoder, before, self.lesson.batches)
            for index, path in enumerate(decoder.blocks):
                inside = [group for group in groups if group.name.startswith(f"{path}.")]
                with decoder.block(index) as block:
                    parts = self._attach(inside, _block_runs(block, index, streams.quantized))
                    result = learn_block(block, parts, index, path, streams, self.lesson)
                    self._keep(result.part, codes)
                    del parts, result  # or this block stays in memory beside the next
                    shards.write(decoder.stored(decoder.block_names(index)))
            inside_paths = tuple(f"{path}." for path in decoder.blocks)
            after = [g for g in groups if g.name not in names and not g.name.startswith(inside_paths)]
            with decoder.outside():
                self._keep(before, codes)
                last, *_ = self._attach(after, self._last_runs(streams))
                self._keep(last, codes)
                shards.write(decoder.stored(decoder.outside_names()))
        shards.finish(decoder)

    def _first_runs(self) -> list[Run]:
        """The model up to its blocks."""
        return [
            (batch.mask.bool(), partial(first_inputs, self.decoder, [batch]))
            for batch in self.lesson.batches
        ]

    def _last_runs(self, streams: Streams) -> list[Run]:
        """The model past its blocks, row by row: logits of a whole batch could be larger than a block."""
        model, pairs = self.decoder.model, zip(self.lesson.batches, streams.quantized, strict=True)
        return [
            (row["attention_mask"].bool(), partial(last_logits, model, row, state, state.shape[1]))
            for batch, stream in pairs
            for row, state in _rows(batch, stream)
        ]

    def _attach(self, groups: Sequence[InputGroup], runs: Sequence[Run]) -> list[Learnables]:
        """Quantizers of some groups, starting from what `runs` shows of their inputs, at each strength."""
        model, config = self.decoder.model, self.lesson.config
        inputs = Inputs(model, list(groups), watch_inputs(model, groups, runs))
        rounding = config.learn_rounding
        return [
            Learnables(
                model, groups, inputs.starts(self.chosen, config, frac), self.chosen, rounding=rounding
            )
            for frac in strengths(config, self.chosen)
        ]

    def _keep(self, part: Learnables, codes: CodesParts) -> None:
        """Fold what was learned into the weights in memory, and note ranges and codes."""
        ranges = part.ranges()
        self.ranges |= {p: activation_range(*ends, self.chosen[p]) for p, ends in ranges.items()}
        fold(part)
        found = part.folded_codes()
        codes.add(found)
        for path, weight in found.items():
            linear = part.linears[path]
            nearest = round_weight(linear.weight, self.chosen[path]).codes
            self.kept_frac[path] = float(linear.clip_frac.detach().mean())
            self.rounded_away_frac[path] = float((weight.codes != nearest).float().mean())


def _block_runs(block: nn.Module, index: int, batches: Sequence[BlockBatch]) -> list[Run]:
    """One block on all its inputs."""
    return [
        (batch.shown, partial(run_block, block, batch.hidden, batch.arguments[index])) for batch in batches
    ]


def _rows(batch: Batch, stream: BlockBatch) -> list[tuple[dict[str, Tensor], Tensor]]:
    """(inputs of the model, last hidden state) of each row alone, without its padding."""
    rows = []
    for row in range(len(batch.ids)):
        alone = batch.rows(torch.tensor([row]))
        rows.append((alone.inputs(), stream.hidden[row : row + 1, -alone.ids.shape[1] :]))
    return rows
