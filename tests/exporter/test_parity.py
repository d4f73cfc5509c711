"""Comparing logits: hand-worked examples, and what is no comparison at all."""

import numpy as np
import pytest

from holdfast.errors import ParityError
from holdfast.exporter import parity
from holdfast.exporter.parity import (
    Agreement,
    Divergence,
    compare_distributions,
    compare_logits,
    kl_divergence,
    pooled,
    require_agreement,
)


def test_by_hand() -> None:
    """Two positions of two tokens: differences 0, 0.5, 0.25 and 0.25; the second arg-max flips."""
    a = np.array([[1.0, 0.0], [0.25, 0.5]], dtype=np.float32)
    b = np.array([[1.0, 0.5], [0.5, 0.25]], dtype=np.float32)
    assert compare_logits(a, b) == Agreement(max_abs=0.5, mean_abs=0.25, same_top_frac=0.5, positions=2)


def test_equal_logits_agree_exactly() -> None:
    a = np.random.default_rng(0).normal(size=(2, 3, 11)).astype(np.float32)
    assert compare_logits(a, a) == Agreement(max_abs=0.0, mean_abs=0.0, same_top_frac=1.0, positions=6)


@pytest.mark.parametrize(
    ("a", "b", "sentence"),
    [
        (np.zeros((2, 5)), np.zeros((2, 4)), "of one shape, found (2, 5) and (2, 4)."),
        (np.zeros(5), np.zeros(5), "of one shape, found (5,) and (5,)."),
        (np.zeros((0, 5)), np.zeros((0, 5)), "Expected at least one position to compare, found none."),
        (np.full((1, 2), np.nan), np.full((1, 2), np.nan), "The logits hold NaN or infinity"),
        (np.zeros((1, 2)), np.array([[0.0, np.inf]]), "The logits hold NaN or infinity"),
    ],
)
def test_what_is_no_comparison(a: np.ndarray, b: np.ndarray, sentence: str) -> None:
    with pytest.raises(ParityError) as caught:
        compare_logits(a, b)
    assert sentence in str(caught.value)


def test_the_tolerance_is_the_callers() -> None:
    agreement = Agreement(max_abs=0.5, mean_abs=0.25, same_top_frac=0.5, positions=2)
    require_agreement(agreement, what="A and B", atol=0.5, same_top_frac=0.5)
    with pytest.raises(ParityError) as caught:
        require_agreement(agreement, what="A and B", atol=0.4)
    assert str(caught.value) == (
        "A and B differ by up to 0.5 in a logit, and 0.4 is allowed: look for what the tracing lost, "
        "or raise `atol` if the difference is rounding."
    )
    with pytest.raises(ParityError) as caught:
        require_agreement(agreement, what="A and B", atol=1.0, same_top_frac=0.99)
    assert (
        str(caught.value) == "A and B choose the same token at 50.0% of 2 positions, and 99.0% is needed."
    )


def test_kl_by_hand() -> None:
    """p = (1/2, 1/2) and q = (1/4, 3/4): KL(p||q) = ln(2)/2 + ln(2/3)/2 = ln(4/3)/2."""
    p = np.log(np.array([[0.5, 0.5], [0.25, 0.75]]))
    q = np.log(np.array([[0.25, 0.75], [0.25, 0.75]])) + 700.0  # the same distributions, far from 0
    np.testing.assert_allclose(kl_divergence(p, q), [np.log(4 / 3) / 2, 0.0], rtol=1e-12, atol=1e-13)


def test_kl_of_large_logits_is_finite() -> None:
    a = np.array([[1e4, -1e4, 0.0]], dtype=np.float32)
    assert kl_divergence(a, -a)[0] == pytest.approx(2e4)  # all weight on a token that the other denies
    assert kl_divergence(a, a)[0] == 0.0


def test_chunks_do_not_change_a_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    a = draw.normal(size=(2, 5, 7)).astype(np.float32)
    b = a + draw.normal(scale=0.1, size=a.shape).astype(np.float32)
    whole = compare_distributions(a, b)
    monkeypatch.setattr(parity, "CHUNK_VALUES", 3 * 7)
    chunked = compare_distributions(a, b)
    assert whole.positions == chunked.positions == 10
    for name in ("max_abs", "mean_abs", "same_top_frac", "mean_kl_nats", "max_kl_nats"):
        assert getattr(chunked, name) == pytest.approx(getattr(whole, name), rel=1e-12)
    assert compare_logits(a, b) == Agreement(
        whole.max_abs, whole.mean_abs, whole.same_top_frac, whole.positions
    )
    assert 0 < whole.mean_kl_nats < whole.max_kl_nats <= 2 * whole.max_abs


def test_pooling_weighs_by_positions() -> None:
    parts = [Divergence(1.0, 0.4, 1.0, 1, 0.2, 0.2), Divergence(0.5, 0.1, 0.0, 3, 0.0, 0.1)]
    both = pooled(parts)
    assert (both.max_abs, both.positions, both.same_top_frac, both.max_kl_nats) == (1.0, 4, 0.25, 0.2)
    assert (both.mean_abs, both.mean_kl_nats) == (pytest.approx(0.175), pytest.approx(0.05))
    with pytest.raises(ParityError, match="Expected at least one position to compare, found none"):
        pooled([])


@pytest.mark.parametrize("shape", [(0, 5), (5,)])
def test_distributions_of_nothing(shape: tuple[int, ...]) -> None:
    with pytest.raises(ParityError):
        compare_distributions(np.zeros(shape), np.zeros(shape))
