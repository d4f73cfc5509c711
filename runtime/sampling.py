"""From logits to the next token: greedy, or drawn with temperature, top-k and top-p.

The order is that of Hugging Face transformers: temperature, then top-k, then top-p (nucleus
sampling, arXiv 1904.09751) on what top-k left.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 is greedy, the decoding that a verdict is about.
        top_k: only the `top_k` likeliest tokens; 0 for all.
        top_p: only the likeliest tokens that together reach this probability, in (0, 1].
        seed: not negative; the same seed gives the same answer. None draws fresh randomness.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def generator(self) -> np.random.Generator:
        """The source of randomness of one answer."""
        return np.random.default_rng(self.seed)


GREEDY = Sampling()


def choose(logits: NDArray[np.float32], sampling: Sampling, generator: np.random.Generator) -> int:
    """The next token id for logits [vocabulary]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    return int(generator.choice(len(logits), p=probabilities(logits, sampling)))


def probabilities(logits: NDArray[np.float32], sampling: Sampling) -> NDArray[np.float64]:
    """Distribution that `choose` draws from, float64 [vocabulary]; `temperature` must not be 0."""
    scaled = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-scaled, kind="stable")  # equal logits: the lower id first
    ranked = softmax(scaled[order])
    if sampling.top_k:
        ranked[sampling.top_k :] = 0.0
        ranked /= ranked.sum()
    before = np.cumsum(ranked) - ranked  # probability of all likelier tokens
    ranked[before >= sampling.top_p] = 0.0
    result = np.empty_like(ranked)
    result[order] = ranked / ranked.sum()
    return result


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    exponentials = np.exp(logits - logits.max())
    return np.asarray(exponentials / exponentials.sum())
