"""Candidates: training runs with and without a push, judged on held-out prompts; one is kept.

The run without a push comes first. Those with one go back to its middle and branch off, so that a push
costs half a run and candidates differ by it alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from holdfast.errors import CalibrationError
from holdfast.evals.statistics import mcnemar_exact
from holdfast.exporter.source import SourceModel
from holdfast.quantize.learning.held_out import HeldOut
from holdfast.quantize.learning.start import LAST_LR_FRAC
from holdfast.quantize.learning.trained_weights import Trainee
from holdfast.quantize.record import Candidate
from holdfast.recipe import CalibrateConfig, Mixture

Losses = tuple[float, ...]
Update = Callable[[Tensor, float], float]
"""(rows of the batch, alpha): leaves gradients, gives the loss in nats."""

APART = 0.05
"""Chance below which flips of two candidates count as different."""


@dataclass(frozen=True)
class Trials:
    """What is tried.

    Attributes:
        alphas: ascending.
        mixtures: of the batches; None: as drawn.
        steps: optimizer steps of each.
        with_start: where learning started is a candidate too.
        nearest: of candidates whose flips cannot be told apart the nearest to the aligned model is kept,
            not the first: a preference moves away from it on purpose.
    """

    alphas: tuple[float, ...]
    mixtures: tuple[Mixture | None, ...]
    steps: int
    with_start: bool = True
    nearest: bool = True

    @property
    def shared_steps(self) -> int:
        """Steps that a run with a push has in common with the one without."""
        return self.steps // 2 if 0.0 in self.alphas else 0

    @property
    def total_steps(self) -> int:
        """Optimizer steps of everything, for progress bars."""
        pushes = sum(alpha > 0.0 for alpha in self.alphas)
        plain = self.steps if 0.0 in self.alphas else 0
        return len(self.mixtures) * (plain + pushes * (self.steps - self.shared_steps))


def contrastive_trials(config: CalibrateConfig, steps: int) -> Trials:
    """What a calibration with the settings' loss tries; the paper's loss is tried as it is."""
    mixtures = tuple(config.mixtures) or (None,)
    alphas = candidate_alphas(config) if steps else ()
    return Trials(alphas, mixtures, steps, with_start=config.loss != "apc" or not alphas)


def candidate_alphas(config: CalibrateConfig) -> tuple[float, ...]:
    """Alphas to try, ascending. Under `bounded`, 0 (no push) is among them; `kl` has 0 alone."""
    if config.loss == "apc":
        return tuple(sorted(set(config.alphas)))
    return (0.0,) if config.loss == "kl" else tuple(sorted({0.0, *config.alphas}))


class Course:
    """One training run, which can go back to where it was.

    Arguments:
        rows: of the batch, for each step.
        update: of one step.
    """

    def __init__(
        self, learned: Trainee, optimizer: torch.optim.Optimizer, rows: Sequence[Tensor], update: Update
    ) -> None:
        self.learned, self.optimizer, self.rows, self.update = learned, optimizer, rows, update
        self.decay = torch.optim.lr_scheduler.LinearLR(
            optimizer, 1.0, LAST_LR_FRAC, total_iters=max(1, len(rows))
        )

    def run(self, first: int, last: int, alpha: float) -> Losses:
        """Take the steps `first` to `last`, which is not taken; the loss of each."""
        losses = []
        for rows in self.rows[first:last]:
            losses.append(_finite(self.update(rows, alpha)))
            self.optimizer.step()
            self.decay.step()
            self.learned.project()
            clear_gradients(self.learned)
        return tuple(losses)

    def state(self) -> dict[str, Any]:
        return {
            "learned": self.learned.state(),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "decay": copy.deepcopy(self.decay.state_dict()),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go back; the state stays as it is."""
        self.learned.load(state["learned"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.decay.load_state_dict(copy.deepcopy(state["decay"]))


def clear_gradients(learned: Trainee) -> None:
    """Also of what is not learned, which collects gradients all the same."""
    for parameter in learned.parameters().values():
        parameter.grad = None


def branching_runs(
    trials: Trials, course_of: Callable[[Mixture | None], Course]
) -> Iterator[tuple[float, Mixture | None, Losses]]:
    """Alpha, mixture and losses of each run, when it has just ended.

    Arguments:
        course_of: a course from the start, with batches of that mixture.
    """
    shared, steps = trials.shared_steps, trials.steps
    for mixture in trials.mixtures if trials.alphas else ():
        course = course_of(mixture)
        beginning = course.run(0, shared, 0.0)
        middle = course.state()
        for alpha in trials.alphas:
            if alpha > 0.0:
                course.load(middle)
            yield alpha, mixture, beginning + course.run(shared, steps, alpha)


def learn_and_choose(
    working: SourceModel,
    learned: Trainee,
    exam: HeldOut,
    trials: Trials,
    course_of: Callable[[Mixture | None], Course],
) -> tuple[list[Candidate], Candidate]:
    """All runs from the same start; `learned` is left in the state of the candidate that `best` names.

    Arguments:
        learned: not attached yet.
        course_of: as in `branching_runs`; `learned` is where it started when it is called.
    """
    start = learned.state()
    states, candidates = [], []

    def from_start(mixture: Mixture | None) -> Course:
        learned.load(start)
        return course_of(mixture)

    with learned.attached():
        for alpha, mixture, losses in branching_runs(trials, from_start):
            states.append(learned.state())
            with learned.frozen():
                candidates.append(exam.judge(working, alpha=alpha, mixture=mixture, losses=losses))
        if trials.with_start:
            learned.load(start)
            states.append(start)
            with learned.frozen():
                candidates.append(exam.judge(working))
    chosen = best(candidates, nearest=trials.nearest)
    learned.load(states[chosen])
    return candidates, candidates[chosen]


def best(candidates: Sequence[Candidate], *, nearest: bool = True) -> int:
    """Which candidate to keep, counted from 0.

    Held-out prompts are few, and a flip more or less says little: of the candidates whose flips, in both
    directions, cannot be told from those of the candidate with the fewest (exact one-sided McNemar on the
    prompts), the nearest to the aligned model is kept, or the first.
    """
    fewest = min(candidates, key=lambda one: (one.flips, one.divergence))
    alike = [i for i, one in enumerate(candidates) if not _flips_more(one, fewest)]
    return min(alike, key=lambda i: candidates[i].divergence) if nearest else alike[0]


def _flips_more(one: Candidate, other: Candidate) -> bool:
    mine, theirs = set(one.flipped), set(other.flipped)
    return mcnemar_exact(len(theirs - mine), len(mine - theirs)) < APART


def _finite(loss: float) -> float:
    if loss != loss or loss in (float("inf"), float("-inf")):
        raise CalibrationError(
            "The calibration loss is no longer a number: lower the learning rates, or use `loss: bounded`."
        )
    return loss
