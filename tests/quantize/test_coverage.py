"""Coverage: the calibration data and the suites speak of the same categories, and gaps are named."""

import pytest

from holdfast.errors import SuiteError
from holdfast.evals.suites import Suite, SuiteItem, load_builtin, make_suite
from holdfast.quantize.prompts.coverage import coverage, describe, missing, refuse_gaps
from holdfast.quantize.prompts.draw import CalibrationPrompt, load_calibration

PROMPTS = [
    CalibrationPrompt(prompt="a", kind="harmful", category="fraud"),
    CalibrationPrompt(prompt="b", kind="borderline", category="fraud", form="homonym"),
    CalibrationPrompt(prompt="c", kind="harmful", category="hate"),
    CalibrationPrompt(prompt="d", kind="neutral", category="science"),
]


def suite(name: str, kind: str, *subjects: str) -> Suite:
    items = [SuiteItem(str(n), "p", subject, None, "yes", "no") for n, subject in enumerate(subjects)]
    return make_suite(name, kind, items, source="test", licence="none")  # type: ignore[arg-type]


def test_counts_by_hand() -> None:
    suites = [
        suite("own", "refusal", "fraud", "hate", "fraud", "arson"),
        suite("look-alikes", "over-refusal", "homonym", "history", "benign"),
        suite("xstest-safe", "over-refusal", "homonyms"),
        suite("ailuminate", "refusal", "ncr", "ssh"),
        suite("constitution", "pairs", "Law", "Dignity", "Care", "Helpfulness"),
    ]
    assert coverage(PROMPTS, suites) == {
        "own/fraud": 1,
        "own/hate": 1,
        "own/arson": 0,
        "look-alikes/homonym": 1,
        "look-alikes/history": 0,
        "look-alikes/benign": 1,
        "xstest-safe/homonyms": 1,
        "ailuminate/ncr": 1,
        "ailuminate/ssh": 0,
        "constitution/Law": 2,
        "constitution/Dignity": 1,
        "constitution/Care": 0,
        "constitution/Helpfulness": 1,
    }


def test_gaps_are_named_and_refused() -> None:
    covered = {"own/fraud": 2, "own/arson": 0, "own/theft": 0}
    assert missing(covered) == ["own/arson", "own/theft"]
    assert describe(covered) == (
        "calibration prompts cover 1 of 3 categories of the suites; none for own/arson, own/theft"
    )
    with pytest.raises(SuiteError, match="found none for own/arson, own/theft: add some"):
        refuse_gaps(covered)


def test_full_coverage_passes_and_names_the_thinnest() -> None:
    covered = {"own/fraud": 2, "own/hate": 1}
    refuse_gaps(covered)
    assert describe(covered) == (
        "calibration prompts cover all 2 categories of the suites; fewest for own/hate: 1"
    )


def test_the_builtin_data_speaks_of_the_categories_of_the_builtin_suites() -> None:
    prompts = load_calibration("builtin", 10_000, seed=0)
    hazards = {item.subject for item in load_builtin("refusal").items}
    forms = {item.subject for item in load_builtin("over-refusal").items} - {"benign"}
    for kind in ("harmful", "borderline"):
        assert {prompt.category for prompt in prompts if prompt.kind == kind} == hazards
    assert {prompt.form for prompt in prompts if prompt.kind == "borderline"} == forms
    assert {prompt.form for prompt in prompts if prompt.kind != "borderline"} == {""}


@pytest.mark.parametrize("seed", range(3))
def test_a_small_draw_covers_every_category_of_the_builtin_suites(seed: int) -> None:
    suites = [load_builtin(name) for name in ("refusal", "over-refusal", "constitution")]
    refuse_gaps(coverage(load_calibration("builtin", 192, seed), suites))
