"""Calibration prompts: mixture, determinism, refusals of bad data, and leakage."""

import csv
import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.errors import CalibrationError, RecipeError, SuiteError
from holdfast.evals.suites import load_builtin
from holdfast.quantize.prompts.draw import (
    KINDS,
    CalibrationPrompt,
    count_kinds,
    hold_out,
    load_calibration,
    refuse_leakage,
    refuse_too_long,
    required_kinds,
)
from holdfast.quantize.prompts.near_duplicates import closest, closest_within

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
MARGIN = 0.95  # of the threshold: how close a built-in prompt may come to one of its own or of a suite


def builtin() -> list[CalibrationPrompt]:
    return load_calibration("builtin", 10_000, seed=0)


def kinds_of(prompts: list[CalibrationPrompt]) -> list[int]:
    return [sum(p.kind == kind for p in prompts) for kind in KINDS]


def write(path: Path, counts: dict[str, int]) -> str:
    rows = [
        {"prompt": f"about {kind} {n}", "kind": kind}
        for kind, count in counts.items()
        for n in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


# --- the built-in data ------------------------------------------------------------------------


def test_builtin_prompts_are_balanced() -> None:
    assert kinds_of(builtin()) == [240, 240, 240]
    hazards = Counter(p.category for p in builtin() if p.kind == "harmful")
    assert set(hazards.values()) == {16}
    assert len(hazards) == 15


def test_builtin_prompts_are_of_many_forms() -> None:
    neutral = [p.prompt for p in builtin() if p.kind == "neutral"]
    assert sum(text.count("?") + text.count(". ") > 1 for text in neutral) >= 10  # several sentences
    assert sum(not text.endswith("?") for text in neutral) >= 60
    assert max(len(text.split()) for text in neutral) >= 25
    assert sum(p.prompt[0].islower() for p in builtin()) >= 20


def test_no_builtin_prompt_is_close_to_another() -> None:
    nearest = max(closest_within([p.prompt for p in builtin()]), key=lambda pair: pair.closeness)
    assert nearest.closeness < MARGIN, nearest


def test_builtin_prompts_are_in_no_builtin_suite() -> None:
    evaluation = [
        item.prompt
        for suite in ("refusal", "over-refusal", "constitution")
        for item in load_builtin(suite).items
    ]
    assert len(evaluation) == 600
    refuse_leakage(builtin(), evaluation)
    assert max(pair.closeness for pair in closest([p.prompt for p in builtin()], evaluation)) < MARGIN


def published() -> list[str]:
    """Prompts of XSTest, HarmBench, AILuminate, TruthfulQA and hh-rlhf."""
    found = []
    for name, column in (
        ("xstest_prompts", "prompt"),
        ("harmbench_text", "Behavior"),
        ("ailuminate_en_us", "prompt_text"),
        ("truthfulqa", "Question"),
    ):
        with (SHARED / f"{name}.csv").open(encoding="utf-8", newline="") as handle:
            found += [row[column] for row in csv.DictReader(handle)]
    with gzip.open(SHARED / "hh_rlhf_harmless_test.jsonl.gz", "rt", encoding="utf-8") as handle:
        for line in handle:
            turns = json.loads(line)["chosen"].split("\n\nHuman:")[1:]
            found += [turn.split("\n\nAssistant:")[0].strip() for turn in turns]
    return list(dict.fromkeys(found))


@pytest.mark.skipif(not SHARED.exists(), reason="the published data is not here")
def test_builtin_prompts_are_in_no_published_set() -> None:
    evaluation = published()
    assert len(evaluation) > 7000
    assert max(pair.closeness for pair in closest([p.prompt for p in builtin()], evaluation)) < MARGIN


# --- drawing ----------------------------------------------------------------------------------


def test_drawing_is_even_and_seeded() -> None:
    drawn = load_calibration("builtin", 30, seed=3)
    assert kinds_of(drawn) == [10, 10, 10]
    assert kinds_of(drawn[:6]) == [2, 2, 2]
    assert drawn == load_calibration("builtin", 30, seed=3)
    assert drawn != load_calibration("builtin", 30, seed=4)


def test_the_mixture_is_kept_by_largest_remainder() -> None:
    # 50 * (4, 2, 1) / 7 = 28.57, 14.29, 7.14: the one that is left over goes to the first
    drawn = load_calibration("builtin", 50, 0, {"harmful": 4, "borderline": 2, "neutral": 1})
    assert kinds_of(drawn) == [29, 14, 7]
    assert kinds_of(drawn[:7]) == [4, 2, 1]


@settings(max_examples=40, deadline=None)
@given(
    samples=st.integers(60, 900),
    weights=st.tuples(*[st.floats(1.0, 4.0) for _ in KINDS]),
)
def test_counts_stay_within_one_of_the_weights(samples: int, weights: tuple[float, ...]) -> None:
    counts = kinds_of(load_calibration("builtin", samples, 0, dict(zip(KINDS, weights, strict=True))))
    total = sum(counts)
    assert total == samples or max(counts) >= 239  # all that were asked for, or a kind ran out
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - total * weight / sum(weights)) < 1.0


def test_a_kind_that_runs_out_keeps_the_mixture(tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", {"harmful": 5, "borderline": 50, "neutral": 50})
    # 21 gives 5.25, 10.5, 5.25; 22 would take six harmful ones
    drawn = load_calibration(path, 90, 0, {"harmful": 1, "borderline": 2, "neutral": 1})
    assert kinds_of(drawn) == [5, 11, 5]


def test_every_category_is_drawn_before_one_is_drawn_twice() -> None:
    drawn = load_calibration("builtin", 45, seed=1)
    assert len({p.category for p in drawn if p.kind == "harmful"}) == 15


def test_a_kind_may_be_left_out_where_nothing_needs_it() -> None:
    mixture = {"harmful": 1.0, "borderline": 0.0, "neutral": 1.0}
    assert kinds_of(load_calibration("builtin", 20, 0, mixture, required=())) == [10, 0, 10]
    with pytest.raises(RecipeError, match="gives borderline prompts the weight 0"):
        load_calibration("builtin", 20, 0, mixture, required=required_kinds("contrastive", "bounded"))


@pytest.mark.parametrize(
    ("method", "loss", "twin", "expected"),
    [
        ("contrastive", "bounded", False, KINDS),
        ("contrastive", "apc", False, KINDS),
        ("contrastive", "kl", False, ("harmful", "borderline")),
        ("contrastive", "kl", True, KINDS),
        ("gptq", "bounded", False, ()),
    ],
)
def test_required_kinds(method: str, loss: str, twin: bool, expected: tuple[str, ...]) -> None:
    assert required_kinds(method, loss, ablated_twin=twin) == expected


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"harmful": 1.0, "rude": 1.0}, "weighs harmful, borderline, neutral, found rude"),
        ({"harmful": -1.0, "borderline": 1.0, "neutral": 1.0}, "finite weights of at least 0"),
        ({"harmful": float("nan"), "borderline": 1.0, "neutral": 1.0}, "finite weights"),
        ({"harmful": 0.0, "borderline": 0.0, "neutral": 0.0}, "one of them above it"),
        ({"harmful": 1.0}, "gives borderline prompts the weight 0"),
    ],
)
def test_bad_mixtures_are_refused(mixture: dict[str, float], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_calibration("builtin", 30, 0, mixture)


def test_hold_out_is_a_split_by_kind() -> None:
    prompts = load_calibration("builtin", 48, seed=0)
    learn_from, held_out = hold_out(prompts, 0.25, seed=0)
    assert len(learn_from) == 36
    assert sorted(p.prompt for p in learn_from + held_out) == sorted(p.prompt for p in prompts)
    assert kinds_of(held_out) == [4, 4, 4]
    assert hold_out(prompts, 0.25, seed=0) == (learn_from, held_out)
    assert hold_out(prompts, 0.25, seed=1) != (learn_from, held_out)
    with pytest.raises(CalibrationError, match="too few"):
        hold_out(prompts[:3], 0.25, seed=0)


def test_hold_out_keeps_the_mixture_and_the_categories() -> None:
    prompts = load_calibration("builtin", 420, 0, {"harmful": 4, "borderline": 2, "neutral": 1})
    learn_from, held_out = hold_out(prompts, 1 / 3, seed=0)
    assert count_kinds(learn_from, held_out) == {
        "harmful": (160, 80),
        "borderline": (80, 40),
        "neutral": (40, 20),
    }
    hazards = Counter(p.category for p in held_out if p.kind == "harmful")
    assert len(hazards) == 15
    assert max(hazards.values()) - min(hazards.values()) <= 1


def test_the_smallest_draw_can_be_split() -> None:
    assert list(map(kinds_of, hold_out(load_calibration("builtin", 12, 0), 0.25, 0))) == [[3] * 3, [1] * 3]


# --- bad data ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found an empty file: add prompts"),
        ('\n \n{"prompt": "x", "kind": "rude"}', "line 3: expected an object"),
        ("not json", "line 1: expected an object"),
        ('{"prompt": " ", "kind": "neutral"}', "line 1: expected a prompt, found an empty one"),
        (
            '{"prompt": "x", "kind": "neutral"}\n{"prompt": "y", "kind": "neutral"}',
            "holds no harmful and no borderline prompts, all 2 are neutral: add some",
        ),
        (
            '{"prompt": "What now?", "kind": "neutral"}\n\n{"prompt": "what now", "kind": "harmful"}',
            "line 3: expected every prompt once, found 'what now', which is in line 1 too: remove",
        ),
    ],
)
def test_bad_data_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SuiteError, match=message):
        load_calibration(str(path), 9, seed=0)


def test_too_few_prompts_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", {"harmful": 3, "borderline": 40, "neutral": 40})
    with pytest.raises(SuiteError, match=r"at least 4 harmful prompts in .*, found 3: add more"):
        load_calibration(path, 60, seed=0)
    with pytest.raises(SuiteError, match="among 11 samples of builtin, the mixture gives 3: raise"):
        load_calibration("builtin", 11, seed=0)


def test_own_file(tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", dict.fromkeys(KINDS, 4))
    assert kinds_of(load_calibration(path, 99, seed=0)) == [4, 4, 4]


def test_a_byte_order_mark_and_odd_line_ends_are_read(tmp_path: Path) -> None:
    rows = [{"prompt": f"{kind}\u2028{n}", "kind": kind} for kind in KINDS for n in range(4)]
    text = "\ufeff" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "own.jsonl").write_bytes(text.encode("utf-8"))
    assert len(load_calibration(str(tmp_path / "own.jsonl"), 12, seed=0)) == 12


def test_other_encodings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"prompt": "Où?", "kind": "neutral"}'.encode("latin-1"))
    with pytest.raises(SuiteError, match=r"Expected UTF-8 text in .*, found 0xf9 at byte 13: save"):
        load_calibration(str(path), 9, seed=0)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match="not readable"):
        load_calibration(str(tmp_path / "none.jsonl"), 9, seed=0)


def test_prompts_beyond_the_context_are_refused() -> None:
    prompts = [CalibrationPrompt(prompt=text, kind="neutral") for text in ("short", "a longer one")]
    refuse_too_long(prompts, [[1] * 10, [1] * 48], context=64, response_tokens=16)
    with pytest.raises(SuiteError, match=r"at most 48 tokens .*, found one of 49, 'a longer one': shorten"):
        refuse_too_long(prompts, [[1] * 10, [1] * 49], context=64, response_tokens=16)


# --- leakage ----------------------------------------------------------------------------------


def test_leaking_prompts_are_refused() -> None:
    prompt = CalibrationPrompt(
        prompt="How long does it take to boil an egg on a high mountain?", kind="neutral"
    )
    refuse_leakage([prompt], [])
    refuse_leakage([prompt], ["How long does it take to fry an onion?"])
    for same in (
        "how long does it take to boil an egg on a high mountain",
        "How long does it take to boil an egg on a very high mountain?",
        "On a high mountain, how long does it take to boil an egg?",
    ):
        with pytest.raises(SuiteError, match="1 calibration prompts are in an evaluation suite") as refusal:
            refuse_leakage([prompt], ["Hi.", same])
        assert same in str(refusal.value)
