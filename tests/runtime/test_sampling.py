"""Sampling against transformers' own warpers, by hand, and by its seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from holdfast.runtime.sampling import GREEDY, Sampling, choose, probabilities


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 7, 5000])
@pytest.mark.parametrize("top_p", [0.05, 0.6, 0.95, 1.0])
def test_probabilities_equal_those_of_transformers(temperature: float, top_k: int, top_p: float) -> None:
    logits = np.random.default_rng(1).normal(0, 2, 200).astype(np.float32)
    expected = torch.tensor(logits.astype(np.float64))[None]
    expected = TemperatureLogitsWarper(temperature)(None, expected)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    found = probabilities(logits, Sampling(temperature, top_k, top_p))
    np.testing.assert_allclose(found, torch.softmax(expected, -1)[0].numpy(), atol=1e-12, rtol=0)


def test_a_hand_worked_nucleus() -> None:
    """0.5, 0.3, 0.2 with top_p 0.6: the second token crosses 0.6 and stays; 5/8 and 3/8 remain."""
    logits = np.log(np.array([0.2, 0.5, 0.3], np.float32))
    found = probabilities(logits, Sampling(temperature=1.0, top_p=0.6))
    np.testing.assert_allclose(found, [0.0, 0.625, 0.375], atol=1e-6, rtol=0)


def test_the_best_token_stays_however_small_top_p_is() -> None:
    found = probabilities(np.zeros(4, np.float32), Sampling(temperature=1.0, top_p=1e-9))
    assert found.tolist() == [1.0, 0.0, 0.0, 0.0]


def test_greedy_takes_the_first_of_the_best() -> None:
    assert choose(np.array([1, 5, 5, 0], np.float32), GREEDY, GREEDY.generator()) == 1


def test_large_logits_do_not_overflow() -> None:
    found = probabilities(np.array([3e38, -3e38], np.float32), Sampling(temperature=0.01))
    assert found.tolist() == [1.0, 0.0]


def test_the_seed_decides_and_draws_follow_the_distribution() -> None:
    logits = np.log(np.array([0.1, 0.6, 0.3], np.float32))
    sampling = Sampling(temperature=1.0, seed=5)

    def draw(generator: np.random.Generator) -> list[int]:
        return [choose(logits, sampling, generator) for _ in range(4000)]

    first = draw(sampling.generator())
    assert first == draw(sampling.generator())
    shares = np.bincount(first, minlength=3) / len(first)
    # five standard errors of the widest share: 5 * sqrt(0.6 * 0.4 / 4000)
    np.testing.assert_allclose(shares, [0.1, 0.6, 0.3], atol=0.039, rtol=0)
