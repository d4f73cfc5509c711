"""The proof of an export: a graph computes what torch does, on real prompts, however it is called.

Two checks hold the graph against torch: the logits of every position of a prompt, and cached greedy
decoding. The others hold the graph against itself, where a single prompt without padding and without
a cache (which the first check has compared with torch) says what should come: batches, padding on
either side, the cache filled token by token or in pieces. What cannot be asked of a graph or a model
is recorded as not applicable, with the reason.

Greedy decoding follows torch's tokens on both sides, so that every step is compared, whatever came
before. Where the graph would have chosen another token, the gap is how much torch prefers its own. Two
graphs whose logits are within `atol` of torch's can choose differently only at a gap of `2 * atol` or
less: up to there a difference is a tie, counted and not a failure.

Both models are compared prompt by prompt, so that no more than one prompt's logits are held twice.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from holdfast.errors import ParityError
from holdfast.exporter.departure import Departure, first_departure
from holdfast.exporter.graph import GraphLinear
from holdfast.exporter.parity import (
    Divergence,
    GraphDecoder,
    Logits,
    compare_distributions,
    open_decoder,
    pooled,
    torch_step,
)
from holdfast.exporter.proof_prompts import (
    GREEDY_TOKENS,
    context_tokens,
    effort_for,
    parameter_count,
    sliding_window,
)
from holdfast.exporter.proof_report import DEPART_ATOL, DEPART_RTOL, Check, Effort, Proof, Status, sentence
from holdfast.exporter.source import SourceModel

PADDING = 3  # columns of padding beside the longest row: every row is padded
LOGITS_BYTES = 512 << 20  # largest block of logits that one run may return
LEAN_BYTES = 1 << 30  # a larger model is opened without packing its weights; see `open_session`

OnCheck = Callable[[Check], None]
"""Called with each check as it ends; drives progress lines."""


def prove(
    graph: Path,
    source: SourceModel,
    prompts: Sequence[Sequence[int]],
    *,
    atol: float,
    seed: int,
    greedy_tokens: int = GREEDY_TOKENS,
    effort: Effort | None = None,
    linears: Mapping[str, GraphLinear] | None = None,
    on_check: OnCheck | None = None,
) -> Proof:
    """Hold a graph against its torch model, and against itself.

    Arguments:
        prompts: token ids, for example those of `proof_prompts`.
        atol: largest absolute difference of a logit that passes.
        seed: draws the ids that are written into padding.
        greedy_tokens: tokens of each greedy answer.
        effort: how much to compare; what the model's size allows if None. `greedy_tokens` counts
            for either.
        linears: where the linear layers are in the graph, for naming a node; see `first_departure`.

    Raises:
        ParityError: a check failed, or the logits are not finite; the message names the check and the
            first node whose value departs from torch's.
        ExecutionError: ONNX Runtime refuses the graph, or fails.
    """
    proof, cases = _examined(graph, source, prompts, atol, seed, greedy_tokens, effort, on_check)
    if proof.failed:
        check = proof.failed[0]
        case = cases.get(check.name)
        where = None if case is None else _departure(graph, source, case, linears)
        raise ParityError(sentence(proof, check, where, searched=case is not None))
    return proof


def examine(
    graph: Path,
    source: SourceModel,
    prompts: Sequence[Sequence[int]],
    *,
    atol: float,
    seed: int,
    greedy_tokens: int = GREEDY_TOKENS,
    effort: Effort | None = None,
    on_check: OnCheck | None = None,
) -> Proof:
    """`prove` without a verdict: failed checks are in the result.

    Raises:
        ParityError: no prompt, or logits of the torch model that are not finite.
        ExecutionError: ONNX Runtime refuses the graph, or fails.
    """
    return _examined(graph, source, prompts, atol, seed, greedy_tokens, effort, on_check)[0]


@dataclass(frozen=True)
class _Case:
    """One run: the tokens up to it, and how many of their columns were in the cache."""

    ids: Tensor
    mask: Tensor
    cached_tokens: int = 0


@dataclass(frozen=True)
class _Gap:
    """How far the logits of one run are from what they should be."""

    max_abs: float
    positions: int
    case: _Case | None


@dataclass(frozen=True)
class _Finding:
    check: Check
    case: _Case | None = None


@dataclass(frozen=True)
class _Lab:
    """The two models, and what the checks need to know of them.

    Attributes:
        window: see `sliding_window`.
        fills_padding: whether the graph counts tokens row by row, so that a row's next token takes the
            place of its padding. GroupQueryAttention does.
    """

    decoder: GraphDecoder
    source: SourceModel
    atol: float
    seed: int
    window: int | None
    fills_padding: bool

    def alone(self, row: Sequence[int]) -> Logits:
        """The graph's logits of one row, without padding and cache, float32 [token, vocabulary]."""
        ids = _tensor([row])
        logits, _ = self.decoder.step(ids, torch.ones_like(ids), self.decoder.empty_cache(1))
        row_logits: Logits = logits[0]
        return row_logits

    @torch.inference_mode()
    def torch_alone(self, row: Sequence[int]) -> Logits:
        """Torch's logits of one row, as `alone`."""
        ids = _tensor([row])
        logits: Logits = torch_step(self.source.model, ids, torch.ones_like(ids))[0].numpy()
        return logits


def _examined(
    graph: Path,
    source: SourceModel,
    prompts: Sequence[Sequence[int]],
    atol: float,
    seed: int,
    greedy_tokens: int,
    effort: Effort | None,
    on_check: OnCheck | None,
) -> tuple[Proof, dict[str, _Case]]:
    """The proof, and the run that shows it for each check that failed."""
    if not prompts or not all(prompts):
        raise ParityError("Expected prompts of at least one token to compare, found none or an empty one.")
    count = parameter_count(source.model)
    effort = replace(effort or effort_for(count), greedy_tokens=greedy_tokens)
    lean = 4 * count > LEAN_BYTES
    lab = _Lab(
        decoder=open_decoder(graph, lean=lean),
        source=source,
        atol=atol,
        seed=seed,
        window=sliding_window(source.model),
        fills_padding=_mentions(graph, b"GroupQueryAttention"),
    )
    chosen = _chosen(lab, prompts, effort)
    checks, cases = [], {}
    for finding in _findings(lab, chosen, effort):
        checks.append(finding.check)
        if finding.check.status == "failed" and finding.case is not None:
            cases[finding.check.name] = finding.case
        if on_check is not None:
            on_check(finding.check)
    proof = Proof(
        checks=tuple(checks),
        effort=effort,
        prompt_tokens=tuple(len(row) for row in chosen),
        parameters=count,
        packed=not lean,
        atol=atol,
        seed=seed,
    )
    return proof, cases


def _chosen(lab: _Lab, prompts: Sequence[Sequence[int]], effort: Effort) -> list[list[int]]:
    """The prompts that the effort allows, cut; one that outgrows the sliding window is kept among them."""
    positions = LOGITS_BYTES // (4 * lab.source.model.config.vocab_size)
    longest = min(effort.longest_tokens, context_tokens(lab.source.model), max(1, positions))
    rows = [list(prompt[:longest]) for prompt in prompts]
    chosen = rows[: effort.prompts]
    long = _outgrown(lab, rows)
    return chosen if not long or _outgrown(lab, chosen) else [*chosen[:-1], long[0]]


def _outgrown(lab: _Lab, rows: Sequence[list[int]]) -> list[list[int]]:
    """The rows that are longer than the sliding window; none where there is no window."""
    return [row for row in rows if lab.window is not None and len(row) > lab.window]


def _findings(lab: _Lab, prompts: list[list[int]], effort: Effort) -> Iterator[_Finding]:
    yield from _prefill(lab, prompts)
    long = _outgrown(lab, prompts)[:1]
    kept = max(0, effort.greedy_prompts - len(long))
    answered = [row for row in prompts if row not in long][:kept] + long
    yield from _greedy(lab, answered, effort.greedy_tokens)
    rows = _batch(lab, prompts, effort)
    alone = [lab.alone(row) for row in rows]
    steps = min(effort.padded_steps, min(map(len, rows)) - 1)
    yield _batched(lab, rows, alone)
    yield from _left_padded(lab, rows, alone, steps)
    yield from _right_padded(lab, rows, alone, steps)
    yield _one_by_one(lab, rows[0][: effort.step_tokens], alone[0])
    yield _continued(lab, [*zip(rows, alone, strict=True), *((row, lab.alone(row)) for row in long)])
    yield _last_logits(lab, rows[0], alone[0])


def _prefill(lab: _Lab, prompts: Sequence[list[int]]) -> Iterator[_Finding]:
    """Every position of every prompt against torch; again, those beyond the sliding window alone."""
    parts: list[Divergence] = []
    beyond: list[Divergence] = []
    gaps: list[_Gap] = []
    for row in prompts:
        expected, found = lab.torch_alone(row), lab.alone(row)
        parts.append(compare_distributions(expected, found))
        gaps.append(_Gap(parts[-1].max_abs, len(row), _whole(_tensor([row]))))
        if lab.window is not None and len(row) > lab.window:
            beyond.append(compare_distributions(expected[lab.window :], found[lab.window :]))
    yield _finding(lab, "prefill", gaps, _figures(pooled(parts)))
    name = "sliding window"
    if beyond:
        yield _finding(lab, name, gaps, _figures(pooled(beyond)))
    elif lab.window is None:
        yield _not_applicable(name, "the model has none")
    else:
        longest = max(map(len, prompts))
        yield _not_applicable(
            name, f"it holds {lab.window} tokens, and the longest prompt of this proof has {longest}"
        )


@torch.inference_mode()
def _greedy(lab: _Lab, prompts: Sequence[list[int]], tokens: int) -> Iterator[_Finding]:
    """Cached decoding on both sides, along torch's tokens."""
    parts: list[Divergence] = []
    gaps: list[_Gap] = []
    choices: list[_Choice] = []
    for row in prompts:
        for step in _decoding(lab, row, tokens):
            parts.append(step.divergence)
            gaps.append(_Gap(step.divergence.max_abs, 1, step.case))
            choices.append(step.choice)
    names = ("cached steps", "greedy tokens")
    if not parts:
        for name in names:
            yield _not_applicable(name, "the prompts leave no room for an answer in the model's context")
        return
    yield _finding(lab, names[0], gaps, _figures(pooled(parts)))
    yield _greedy_finding(lab, names[1], choices)


@dataclass(frozen=True)
class _Choice:
    """The next token by both sides; `gap` is torch's logit of its own minus that of the graph's."""

    step: int
    gap: float
    differs: bool
    case: _Case


@dataclass(frozen=True)
class _Step:
    divergence: Divergence
    choice: _Choice
    case: _Case


def _decoding(lab: _Lab, row: list[int], tokens: int) -> Iterator[_Step]:
    """One greedy answer: the prompt's last position, then one cached step a token."""
    room = context_tokens(lab.source.model) - len(row)
    ids = _tensor([row])
    torch_cache = DynamicCache(config=lab.source.model.config)
    cache = lab.decoder.empty_cache(1)
    cached = 0
    for step in range(min(tokens, room)):
        mask = torch.ones_like(ids)
        new = ids[:, cached:]
        expected: Logits = torch_step(lab.source.model, new, mask, torch_cache)[0, -1:].numpy()
        logits, cache = lab.decoder.step(new, mask, cache)
        found = logits[0, -1:]
        case = _Case(ids, mask, cached)
        top = int(expected[0].argmax())
        gap = float(expected[0, top]) - float(expected[0, found[0].argmax()])
        choice = _Choice(step, gap, int(found[0].argmax()) != top, case)
        yield _Step(compare_distributions(expected, found), choice, case)
        cached = ids.shape[1]
        ids = torch.cat([ids, _tensor([[top]])], dim=1)


def _greedy_finding(lab: _Lab, name: str, choices: Sequence[_Choice]) -> _Finding:
    """Fails on a token that torch prefers its own to by more than a tie."""
    allowed = 2 * lab.atol
    differing = [choice for choice in choices if choice.differs]
    wrong = [choice for choice in differing if choice.gap > allowed]
    shown = (wrong or differing)[:1]
    figures = {
        "gap": max((choice.gap for choice in differing), default=0.0),
        "tokens": len(choices),
        "equal": len(choices) - len(differing),
        "ties": len(differing) - len(wrong),
    }
    note = "".join(f"first difference at step {choice.step}, gap {choice.gap:.3g}" for choice in shown)
    status: Status = "failed" if wrong else "ok"
    check = Check(name, status, "gap", figures["gap"], allowed, figures, note)
    return _Finding(check, wrong[0].case if wrong else None)


def _batch(lab: _Lab, prompts: Sequence[list[int]], effort: Effort) -> list[list[int]]:
    """Rows of unequal length whose logits fit into one run; a single prompt is repeated, shorter."""
    count = effort.batch_rows
    room = context_tokens(lab.source.model) - PADDING
    positions = LOGITS_BYTES // (4 * lab.source.model.config.vocab_size * count) - PADDING
    longest = max(1, min(room, positions))
    rows = [prompts[index % len(prompts)][:longest] for index in range(count)]
    if len({len(row) for row in rows}) == 1:
        rows = [row[: max(1, len(row) - index)] for index, row in enumerate(rows)]
    return rows


def _batched(lab: _Lab, rows: list[list[int]], alone: Sequence[Logits]) -> _Finding:
    """Rows cut to one length, in one run, without any padding."""
    length = min(map(len, rows))
    ids = _tensor([row[:length] for row in rows])
    mask = torch.ones_like(ids)
    logits, _ = lab.decoder.step(ids, mask, lab.decoder.empty_cache(len(rows)))
    gaps = [_gap(alone[index][:length], logits[index], _Case(ids, mask)) for index in range(len(rows))]
    return _finding(lab, "batch", gaps)


def _left_padded(
    lab: _Lab, rows: list[list[int]], alone: Sequence[Logits], steps: int
) -> Iterator[_Finding]:
    """A batch padded on the left, and cached steps after it."""
    heads = [row[: len(row) - steps] for row in rows]
    ids, mask = _pad(lab, heads, left=True)
    width = ids.shape[1]
    logits, cache = lab.decoder.step(ids, mask, lab.decoder.empty_cache(len(rows)))
    gaps = [
        _gap(alone[index][: len(head)], logits[index, width - len(head) :], _Case(ids, mask))
        for index, head in enumerate(heads)
    ]
    yield _finding(lab, "left padding", gaps)
    masks = [torch.cat([mask, mask.new_ones(len(rows), step + 1)], dim=1) for step in range(steps)]
    name = "steps after left padding"
    if steps:
        yield _finding(lab, name, _padded_steps(lab, rows, alone, ids, cache, masks))
    else:
        yield _not_applicable(name, "the shortest prompt has a single token")


def _right_padded(
    lab: _Lab, rows: list[list[int]], alone: Sequence[Logits], steps: int
) -> Iterator[_Finding]:
    """A batch padded on the right; cached steps behind the padding, and in its place."""
    heads = [row[: len(row) - steps] for row in rows]
    ids, mask = _pad(lab, heads, left=False)
    width = ids.shape[1]
    logits, cache = lab.decoder.step(ids, mask, lab.decoder.empty_cache(len(rows)))
    gaps = [
        _gap(alone[index][: len(head)], logits[index, : len(head)], _Case(ids, mask))
        for index, head in enumerate(heads)
    ]
    yield _finding(lab, "right padding", gaps)
    behind, inside = "steps behind right padding", "steps in place of right padding"
    if not steps:
        for name in (behind, inside):
            yield _not_applicable(name, "the shortest prompt has a single token")
        return
    why_not = _not_behind(lab, width + steps)
    if why_not:
        yield _not_applicable(behind, why_not)
    else:
        masks = [torch.cat([mask, mask.new_ones(len(rows), step + 1)], dim=1) for step in range(steps)]
        yield _finding(lab, behind, _padded_steps(lab, rows, alone, ids, cache, masks))
    if not lab.fills_padding:
        yield _not_applicable(inside, "the graph appends every token to the end of its cache")
        return
    ends = mask.sum(dim=1, keepdim=True)
    masks = [(torch.arange(width + step + 1) < ends + step + 1).long() for step in range(steps)]
    gaps = _padded_steps(lab, rows, alone, ids, cache, masks)
    # torch appends too, and has no such run to search for a departure
    yield _finding(lab, inside, [replace(gap, case=None) for gap in gaps])


def _not_behind(lab: _Lab, tokens: int) -> str:
    """Why a row may not go on behind its padding; empty where it may."""
    if lab.fills_padding:
        return ""
    if lab.window is not None and tokens > lab.window:
        return f"the padding would take up room in the sliding window of {lab.window} tokens"
    rotary = any("Rotary" in type(module).__name__ for module in lab.source.model.modules())
    if rotary and "position_ids" not in lab.decoder.inputs:
        return "without `position_ids` the graph counts the padding as tokens between a row's own"
    return ""


def _padded_steps(
    lab: _Lab,
    rows: list[list[int]],
    alone: Sequence[Logits],
    ids: Tensor,
    cache: dict[str, Any],
    masks: Sequence[Tensor],
) -> list[_Gap]:
    """The last tokens of the rows, one a step, after a padded prefill that left `cache`."""
    steps = len(masks)
    gaps = []
    for step, mask in enumerate(masks):
        new = _tensor([[row[len(row) - steps + step]] for row in rows])
        ids = torch.cat([ids, new], dim=1)
        logits, cache = lab.decoder.step(new, mask, cache)
        case = _Case(ids, mask, ids.shape[1] - 1)
        gaps += [
            _gap(alone[index][len(row) - steps + step][None], logits[index], case)
            for index, row in enumerate(rows)
        ]
    return gaps


def _one_by_one(lab: _Lab, row: list[int], alone: Logits) -> _Finding:
    """One row through the cache, a token a run."""
    ids = _tensor([row])
    mask = torch.ones_like(ids)
    cache = lab.decoder.empty_cache(1)
    gaps = []
    for index in range(len(row)):
        end = index + 1
        logits, cache = lab.decoder.step(ids[:, index:end], mask[:, :end], cache)
        case = _Case(ids[:, :end], mask[:, :end], index)
        gaps.append(_gap(alone[index][None], logits[0], case))
    return _finding(lab, "token by token", gaps)


def _continued(lab: _Lab, rows: Sequence[tuple[list[int], Logits]]) -> _Finding:
    """Each row in two pieces, the second on the first one's cache, against the row in one."""
    name = "continued from a cache"
    gaps = []
    for row, alone in rows:
        half = len(row) // 2
        if half == 0:
            continue
        ids = _tensor([row])
        mask = torch.ones_like(ids)
        first, cache = lab.decoder.step(ids[:, :half], mask[:, :half], lab.decoder.empty_cache(1))
        second, _ = lab.decoder.step(ids[:, half:], mask, cache)
        gaps.append(_gap(alone[:half], first[0], _Case(ids[:, :half], mask[:, :half])))
        gaps.append(_gap(alone[half:], second[0], _Case(ids, mask, half)))
    if not gaps:
        return _not_applicable(name, "every prompt has a single token")
    return _finding(lab, name, gaps)


def _last_logits(lab: _Lab, row: list[int], alone: Logits) -> _Finding:
    """The logits of the last token alone, where the graph can leave the others out."""
    name = "last logits alone"
    if lab.decoder.keep is None:
        return _not_applicable(name, "the graph always gives every position")
    ids = _tensor([row])
    mask = torch.ones_like(ids)
    logits, _ = lab.decoder.step(ids, mask, lab.decoder.empty_cache(1), keep=1)
    return _finding(lab, name, [_gap(alone[-1:], logits[0], None)])


# --- measuring --------------------------------------------------------------------------------


def _gap(expected: Logits, found: Logits, case: _Case | None) -> _Gap:
    """Another shape, or a value that is not finite, is infinitely far."""
    if expected.shape != found.shape or not np.isfinite(found).all():
        return _Gap(math.inf, len(expected), case)
    return _Gap(float(np.abs(expected - found).max()), len(expected), case)


def _finding(
    lab: _Lab, name: str, gaps: Sequence[_Gap], figures: dict[str, float] | None = None
) -> _Finding:
    """A check of logits; its case is the first run that is too far off."""
    if figures is None:
        figures = {
            "max_abs": max(gap.max_abs for gap in gaps),
            "positions": sum(gap.positions for gap in gaps),
        }
    passed = figures["max_abs"] <= lab.atol
    check = Check(name, "ok" if passed else "failed", "max_abs", figures["max_abs"], lab.atol, figures)
    far = [gap.case for gap in gaps if not gap.max_abs <= lab.atol]
    return _Finding(check, far[0] if far else None)


def _not_applicable(name: str, why: str) -> _Finding:
    return _Finding(Check(name, "not applicable", note=why))


def _figures(divergence: Divergence) -> dict[str, float]:
    return asdict(divergence)


def _tensor(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([list(row) for row in rows], dtype=torch.int64)


def _whole(ids: Tensor) -> _Case:
    return _Case(ids, torch.ones_like(ids))


def _pad(lab: _Lab, rows: Sequence[list[int]], *, left: bool) -> tuple[Tensor, Tensor]:
    """Rows as (ids, mask), int64 [row, longest + PADDING]; the padding holds tokens drawn at random."""
    width = max(map(len, rows)) + PADDING
    generator = torch.Generator().manual_seed(lab.seed)
    size = lab.source.tokenizer.vocabulary_size
    ids = torch.randint(size, (len(rows), width), generator=generator)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, place] = torch.tensor(row)
        mask[index, place] = 1
    return ids, mask


def _mentions(graph: Path, operator: bytes) -> bool:
    """Whether the bytes of a graph hold the name of an operator; its weights are not read into memory."""
    with graph.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(operator) >= 0


def _departure(
    graph: Path, source: SourceModel, case: _Case, linears: Mapping[str, GraphLinear] | None
) -> Departure | None:
    return first_departure(
        graph,
        source,
        case.ids,
        case.mask,
        atol=DEPART_ATOL,
        rtol=DEPART_RTOL,
        cached_tokens=case.cached_tokens,
        linears=linears,
    )
