"""Runs that share a beginning, and which of them is kept."""

from __future__ import annotations

import copy

import pytest
import torch
from msgspec import structs

from holdfast.errors import CalibrationError
from holdfast.exporter.architectures import linear_modules
from holdfast.exporter.source import SourceModel
from holdfast.quantize.formats import formats
from holdfast.quantize.learning.candidates import (
    Course,
    Trials,
    best,
    branching_runs,
    contrastive_trials,
)
from holdfast.quantize.learning.held_out import distance
from holdfast.quantize.learning.learnable import Learnables
from holdfast.quantize.learning.lesson import references_of, sequences
from holdfast.quantize.learning.start import nearest_start, optimizer_of, strengths, watched_inputs
from holdfast.quantize.prompts.draw import CalibrationPrompt
from holdfast.quantize.record import Candidate
from holdfast.recipe import CalibrateConfig, QuantizeConfig
from tests.quantize.conftest import SHORT

Prompts = list[CalibrationPrompt]


def candidate(flipped: range, divergence: float, alpha: float = 0.0) -> Candidate:
    return Candidate(
        alpha=alpha,
        steps=1,
        flips_lost=len(flipped),
        flips_gained=0,
        flips_other=0,
        changed_tokens_frac=0.0,
        divergence=divergence,
        flipped=tuple(flipped),
    )


# --- choosing ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flipped", "divergences", "kept"),
    [
        ((range(3), range(2)), (0.1, 0.2), 0),  # a flip more is noise: the nearer one
        ((range(24), range(4)), (0.1, 0.2), 1),  # twenty are not
        ((range(5), range(0)), (0.1, 0.2), 1),  # 1 in 32
        ((range(4), range(0)), (0.1, 0.2), 0),  # 1 in 16
        ((range(0, 5), range(5, 9)), (0.2, 0.1), 1),  # other prompts altogether
    ],
)
def test_flips_decide_where_they_can_be_told_apart(
    flipped: tuple[range, ...], divergences: tuple[float, ...], kept: int
) -> None:
    found = [candidate(*pair) for pair in zip(flipped, divergences, strict=True)]
    assert best(found) == kept


def test_a_preference_moves_away_on_purpose() -> None:
    """The first is kept, unless its flips say otherwise."""
    assert best([candidate(range(3), 0.2), candidate(range(0), 0.1)], nearest=False) == 0
    assert best([candidate(range(9), 0.2), candidate(range(0), 0.1)], nearest=False) == 1


# --- branching --------------------------------------------------------------------------------


class Counter:
    """Learnables of one number, and what moved it."""

    def __init__(self) -> None:
        self.value = torch.nn.Parameter(torch.zeros(1))

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {"value": self.value}

    def state(self) -> dict[str, torch.Tensor]:
        return {"value": self.value.detach().clone()}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            self.value.copy_(state["value"])

    def project(self) -> None:
        pass


def course(steps: int, seen: list[tuple[int, float]]) -> tuple[Counter, Course]:
    """Adam towards 1 without a push and towards -1 with one."""
    learned = Counter()
    rows = [torch.tensor([step]) for step in range(steps)]

    def update(which: torch.Tensor, alpha: float) -> float:
        seen.append((int(which), alpha))
        loss = (learned.value - (1.0 if alpha == 0.0 else -1.0)).square().sum()
        loss.backward()
        return float(loss.detach())

    optimizer = torch.optim.Adam([learned.value], lr=0.1)
    return learned, Course(learned, optimizer, rows, update)  # type: ignore[arg-type]


def test_a_branch_goes_on_from_the_middle() -> None:
    """Each branch ends where a run of its own, with its first half without a push, would have ended."""
    seen: list[tuple[int, float]] = []
    learned, run = course(6, seen)
    ends = {}
    trials = Trials(alphas=(0.0, 0.1, 0.3), mixtures=(None,), steps=6)
    for alpha, _, losses in branching_runs(trials, lambda _: run):
        ends[alpha] = float(learned.value.detach())
        assert len(losses) == 6
    assert len(seen) == trials.total_steps == 12
    assert [which for which, alpha in seen if alpha == 0.3] == [3, 4, 5]
    for alpha, end in ends.items():
        alone, other = course(6, [])
        other.run(0, 3, 0.0)
        other.run(3, 6, alpha)
        assert float(alone.value.detach()) == end
    assert ends[0.1] == ends[0.3] < ends[0.0]


def test_the_papers_loss_is_tried_as_it_is() -> None:
    """No plain KL and no start beside it; without steps there is the start alone."""
    paper = contrastive_trials(CalibrateConfig(loss="apc", alphas=(0.75,)), 8)
    assert (paper.alphas, paper.shared_steps, paper.total_steps, paper.with_start) == ((0.75,), 0, 8, False)
    ours = contrastive_trials(CalibrateConfig(alphas=(0.75,)), 8)
    assert (ours.alphas, ours.shared_steps, ours.total_steps, ours.with_start) == ((0.0, 0.75), 4, 12, True)
    without = contrastive_trials(CalibrateConfig(loss="apc", alphas=()), 8)
    assert (without.total_steps, without.with_start) == (0, True)
    nothing = contrastive_trials(CalibrateConfig(loss="apc"), 0)
    assert (nothing.alphas, nothing.total_steps, nothing.with_start) == ((), 0, True)


# --- where learning starts --------------------------------------------------------------------


def test_learning_starts_at_the_strength_nearest_to_the_aligned_model(
    aligned: SourceModel, negative: SourceModel, prompts: Prompts
) -> None:
    """A channel of one norm made large is what channel scales are for: strength 0 cannot be the nearest."""
    model = copy.deepcopy(aligned.model)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] *= 50.0
        for name in "qkv":
            getattr(model.model.layers[0].self_attn, f"{name}_proj").weight[:, 3] /= 50.0
    config = SHORT
    batch, _ = sequences(aligned, prompts[:8], config)
    references = references_of(aligned, negative.model, batch, config)
    chosen = formats(list(linear_modules(model)), QuantizeConfig(scheme="w8a4"))
    inputs = watched_inputs(model, batch, config.batch_size)
    away = {}
    for frac in (0.0, 0.5, 0.9):
        starts = inputs.starts(chosen, config, frac)
        learned = Learnables(model, inputs.groups, starts, chosen, rounding=False)
        with learned.attached(), learned.frozen():
            away[frac] = distance(model, batch, references, config.batch_size)[1]
    config = structs.replace(config, smooth_fracs=tuple(away))
    _, taken = nearest_start(inputs, batch, references, config, chosen, Learnables)
    assert away[taken] == min(away.values()) < away[0.0]


def test_weights_alone_have_nothing_to_scale(aligned: SourceModel) -> None:
    paths = list(linear_modules(aligned.model))
    config = CalibrateConfig()
    assert strengths(config, formats(paths, QuantizeConfig(scheme="w4"))) == (0.0,)
    assert strengths(config, formats(paths, QuantizeConfig(scheme="w4a8"))) == config.smooth_fracs


def test_nothing_to_learn_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="Nothing is left to learn: set one of"):
        optimizer_of([])
