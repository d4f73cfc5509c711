"""Near duplicates: built ones are found, look-alikes of the opposite kind are not, and it stays fast."""

import time

import pytest

from holdfast.evals.suites import load_builtin
from holdfast.quantize.prompts.draw import load_calibration
from holdfast.quantize.prompts.near_duplicates import (
    MEASURES,
    character_shingles,
    closest,
    closest_within,
    normalised,
    shingles,
    word_set,
)

EGG = "How long does it take to boil an egg on a high mountain?"


def test_normalised_by_hand() -> None:
    assert normalised("  Don\u2019t -- STOP\u00ad me, \uff2aos\u00e9!\u200b ") == "dont stop me jose"
    assert normalised("\u0421\u0440\u0430\u0441\u0435") == "cpace"  # Cyrillic letters that look like these
    assert normalised("?!") == "?!"
    assert normalised(" ") == ""


def test_features_by_hand() -> None:
    assert word_set("a b a") == {"a", "b"}
    assert shingles("a b c d") == {"a b c", "b c d"}
    assert shingles("a b") == {"a b"}
    assert character_shingles("abcd") == {" abcd", "abcd "}
    assert character_shingles("ab") == {" ab "}


def test_closeness_by_hand() -> None:
    # words 2 of 4; shingles {abc, bcd} and {abx}: none; characters: " a b " of 4 + 2 - 1
    (found,) = closest(["a b c d"], ["A, b"])
    assert found.other == "A, b"
    assert found.closeness == pytest.approx(0.5 / 0.75)


def test_the_index_agrees_with_comparing_everything() -> None:
    texts = [item.prompt for item in load_builtin("refusal").items[:20]]
    others = [item.prompt for item in load_builtin("over-refusal").items]
    for found in closest(texts, others):
        own = normalised(found.text)
        closeness = [
            max(
                len(features(own) & features(their)) / len(features(own) | features(their)) / threshold
                for features, threshold in MEASURES
            )
            for their in map(normalised, others)
        ]
        assert found.closeness == pytest.approx(max(closeness))
        assert found.other == others[closeness.index(max(closeness))]


@pytest.mark.parametrize(
    ("text", "other"),
    [
        (EGG, EGG.lower().rstrip("?")),
        (EGG, "How long does it take to boil an egg on a very high mountain?"),
        (EGG, "How long does it take to boil an egg on a steep mountain?"),
        (EGG, "On a high mountain, how long does it take to boil an egg?"),
        (EGG, "H\u043ew l\u043eng does it t\u0430ke to boil an egg on a high mountain?"),
        (EGG, "How lo\u00adng does it ta\u200bke to boil an \u00e9gg on a high mountain?"),
        ("What makes a rainbow appear?", "\uff37hat makes a rain bow appear"),
        ("Why do leaves change colour in autumn?", "Why do leaves change color in autumn?"),
        ("Define larceny", "define: larceny!"),
        ("Make pancakes", "make pancake"),
        ("How do I teach my dog to sit?", "How do I taech my dog to sit?"),
        (
            "\u5982\u4f55\u5728\u5bb6\u91cc\u79cd\u897f\u7ea2\u67ff",
            "\u5982\u4f55\u5728\u5bb6\u91cc\u79cd\u897f\u7ea2\u67ff\uff1f",
        ),
    ],
)
def test_near_duplicates_are_found(text: str, other: str) -> None:
    for pair in ((text, other), (other, text)):
        assert closest([pair[0]], ["What is the time in Lima?", pair[1]])[0].is_duplicate, pair


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("How do I hide a bomb in a stadium?", "How do I find my seat in a stadium?"),
        ("How do I cook meth in a trailer?", "How do I cook rice in a small pot?"),
        ("What is arson?", "What is treason?"),
        ("Where can I buy weed?", "Where can I buy wine?"),
        ("How do I crack a safe?", "How do I crack an egg?"),
        ("Write a haiku", "Write a limerick"),
        (EGG, "How long does it take to fry an onion?"),
    ],
)
def test_twins_of_the_other_kind_are_not(text: str, other: str) -> None:
    assert not closest([text], [other])[0].is_duplicate


def test_most_twins_of_the_builtin_suites_are_told_apart() -> None:
    harmful = {item.id: item.prompt for item in load_builtin("refusal").items}
    twins = [(i.prompt, harmful[i.twin]) for i in load_builtin("over-refusal").items if i.twin in harmful]
    assert len(twins) > 100
    assert sum(closest([a], [b])[0].is_duplicate for a, b in twins) / len(twins) < 0.15


def test_no_others_no_result() -> None:
    assert closest(["a prompt"], []) == []


def test_a_list_is_compared_with_the_rest_of_itself() -> None:
    found = closest_within([EGG, "Hello there", EGG.upper()])
    assert [pair.is_duplicate for pair in found] == [True, False, True]
    assert found[0].other == EGG.upper()
    assert closest_within([EGG]) == []


def test_five_thousand_prompts_take_less_than_two_seconds() -> None:
    texts = [prompt.prompt for prompt in load_calibration("builtin", 10_000, seed=0)]
    others = [f"{text} In {number} words, please." for number in range(7) for text in texts][:5000]
    start = time.process_time()  # of this process: other work on the machine does not count
    found = closest(texts, others)
    assert time.process_time() - start < 2.0
    assert len(texts) == len(found) == 720
    assert len(others) == 5000
