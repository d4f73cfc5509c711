"""Comparing logits: a hand-worked example, and what is no comparison at all."""

import numpy as np
import pytest

from holdfast.errors import ParityError
from holdfast.exporter.parity import Agreement, compare_logits, require_agreement


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
