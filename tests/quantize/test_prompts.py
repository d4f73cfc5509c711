"""Calibration prompts: balance, determinism, refusals of bad data, and leakage."""

import json
from pathlib import Path

import pytest

from holdfast.errors import CalibrationError, SuiteError
from holdfast.evals.suites import load_builtin
from holdfast.quantize.prompts import (
    KINDS,
    CalibrationPrompt,
    hold_out,
    jaccard,
    load_calibration,
    refuse_leakage,
    shingles,
)


def test_builtin_prompts_are_balanced_and_distinct() -> None:
    prompts = load_calibration("builtin", 10_000, seed=0)
    assert len({prompt.prompt for prompt in prompts}) == len(prompts)
    assert [sum(p.kind == kind for p in prompts) for kind in KINDS] == [96, 96, 96]


def test_drawing_is_even_and_seeded() -> None:
    drawn = load_calibration("builtin", 30, seed=3)
    assert [sum(p.kind == kind for p in drawn) for kind in KINDS] == [10, 10, 10]
    assert drawn == load_calibration("builtin", 30, seed=3)
    assert drawn != load_calibration("builtin", 30, seed=4)


def test_hold_out_is_a_split_by_kind() -> None:
    prompts = load_calibration("builtin", 48, seed=0)
    learn_from, held_out = hold_out(prompts, 0.25, seed=0)
    assert len(learn_from) == 36
    assert {p.prompt for p in learn_from}.isdisjoint(p.prompt for p in held_out)
    assert [sum(p.kind == kind for p in held_out) for kind in KINDS] == [4, 4, 4]
    with pytest.raises(CalibrationError, match="too few"):
        hold_out(prompts[:3], 0.25, seed=0)


def test_own_file(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    rows = [{"prompt": f"about {kind}", "kind": kind} for kind in KINDS]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert {p.kind for p in load_calibration(str(path), 9, seed=0)} == set(KINDS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no harmful and no borderline and no neutral prompts"),
        ('{"prompt": "x", "kind": "rude"}', "line 1: expected an object"),
        ("not json", "line 1"),
        ('{"prompt": "x", "kind": "neutral"}', "no harmful and no borderline"),
    ],
)
def test_bad_data_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SuiteError, match=message):
        load_calibration(str(path), 9, seed=0)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match="not readable"):
        load_calibration(str(tmp_path / "none.jsonl"), 9, seed=0)


def test_jaccard_by_hand() -> None:
    # {abc, bcd} and {abc, bcx}: one of three shared
    assert jaccard(shingles("a b c d"), shingles("A, b c x!")) == pytest.approx(1 / 3)


def test_leaking_prompts_are_refused() -> None:
    prompt = CalibrationPrompt(
        prompt="How long does it take to boil an egg on a high mountain?", kind="neutral"
    )
    refuse_leakage([prompt], ["How long does it take to fry an onion?"])
    for same in (
        "how long does it take to boil an egg on a high mountain",
        "How long does it take to boil an egg on a very high mountain?",
    ):
        with pytest.raises(SuiteError, match="1 calibration prompts are in an evaluation suite"):
            refuse_leakage([prompt], [same])


def test_builtin_prompts_are_in_no_builtin_suite() -> None:
    evaluation = [
        item.prompt
        for suite in ("refusal", "over-refusal", "constitution")
        for item in load_builtin(suite).items
    ]
    assert len(evaluation) > 100
    refuse_leakage(load_calibration("builtin", 10_000, seed=0), evaluation)
