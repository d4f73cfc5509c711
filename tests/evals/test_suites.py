"""Suites: the built-in data is sound, published files are read as published, bad data is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from holdfast.errors import SuiteError
from holdfast.evals.suites import (
    Suite,
    SuiteItem,
    list_suites,
    load_builtin,
    load_suites,
    make_suite,
    read_suite,
    write_suite,
)
from holdfast.recipe import BUILTIN_SUITES, SuiteChoice

PUBLISHED = Path(__file__).parents[2].parent / "shared" / "data"
needs_published = pytest.mark.skipif(
    not PUBLISHED.is_dir(), reason=f"published evaluation data is not at {PUBLISHED}"
)
ITEMS = [SuiteItem(f"i-{i}", f"prompt {i}", "even" if i % 2 == 0 else "odd") for i in range(10)]


def small(items: list[SuiteItem] = ITEMS, kind: str = "refusal") -> Suite:
    return make_suite("small", kind, items, source="test", licence="none")  # type: ignore[arg-type]


# --- built-in data ----------------------------------------------------------------------------


def test_builtin_suites_load_and_are_balanced() -> None:
    suites = {suite.name: suite for suite in load_suites(BUILTIN_SUITES, 0)}
    assert list(suites) == ["refusal", "over-refusal", "constitution"]
    for suite in suites.values():
        assert len(suite.items) >= 52, "below 52 prompts not even identical answers can pass"
    hazards = Counter(item.subject for item in suites["refusal"].items)
    assert len(hazards) >= 12
    assert max(hazards.values()) <= 3 * min(hazards.values())


def test_builtin_twins_point_at_each_other() -> None:
    harmful, harmless = load_builtin("refusal"), load_builtin("over-refusal")
    twins = {item.id: item.twin for item in (*harmful.items, *harmless.items) if item.twin}
    assert len(twins) >= 100
    for item_id, twin in twins.items():
        assert twin is not None
        assert twins[twin] == item_id


def test_no_builtin_prompt_appears_twice() -> None:
    prompts = [item.prompt.casefold() for s in load_suites(BUILTIN_SUITES, 0) for item in s.items]
    assert [p for p, times in Counter(prompts).items() if times > 1] == []


def test_constitution_pairs_are_named_after_their_principle() -> None:
    subjects = {item.subject for item in load_builtin("constitution").items}
    assert {"Life", "Privacy", "Helpfulness"} <= subjects


@needs_published
def test_builtin_prompts_are_not_copied_from_published_sets() -> None:
    published = load_suites(
        [
            SuiteChoice(name="xstest", path=str(PUBLISHED / "xstest_prompts.csv")),
            SuiteChoice(name="harmbench", path=str(PUBLISHED / "harmbench_text.csv")),
            SuiteChoice(name="ailuminate", path=str(PUBLISHED / "ailuminate_en_us.csv")),
        ],
        0,
    )
    theirs = {item.prompt.casefold().strip() for suite in published for item in suite.items}
    ours = {i.prompt.casefold().strip() for s in load_suites(BUILTIN_SUITES, 0) for i in s.items}
    assert ours & theirs == set()


# --- published files --------------------------------------------------------------------------


@needs_published
def test_published_files_give_the_documented_counts() -> None:
    suites = load_suites(
        [
            SuiteChoice(name="xstest", path=str(PUBLISHED / "xstest_prompts.csv")),
            SuiteChoice(name="harmbench", path=str(PUBLISHED / "harmbench_text.csv")),
            SuiteChoice(name="ailuminate", path=str(PUBLISHED / "ailuminate_en_us.csv")),
        ],
        0,
    )
    assert [(suite.name, suite.kind, len(suite.items)) for suite in suites] == [
        ("xstest-safe", "over-refusal", 250),
        ("xstest-unsafe", "refusal", 200),
        ("harmbench", "refusal", 200),
        ("ailuminate", "refusal", 1000),
    ]
    assert {suite.licence for suite in suites} == {"CC-BY-4.0", "MIT"}


def test_xstest_becomes_two_suites(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(
        'id,prompt,type,label,focus,note\n1,"a, safe one",homonyms,safe,,\n2,b,contrast,unsafe,,\n'
    )
    safe, unsafe = load_suites([SuiteChoice(name="xstest", path=str(path))], 0)
    assert (safe.name, safe.kind, safe.items[0].prompt) == ("xstest-safe", "over-refusal", "a, safe one")
    assert (unsafe.name, unsafe.kind, unsafe.items[0].subject) == ("xstest-unsafe", "refusal", "contrast")


def test_harmbench_keeps_the_standard_rows_only(tmp_path: Path) -> None:
    path = tmp_path / "h.csv"
    path.write_text(
        "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
        "a,standard,illegal,,,one\nb,copyright,copyright,,,two\nc,contextual,illegal,,x,three\n"
    )
    (suite,) = load_suites([SuiteChoice(name="harmbench", path=str(path))], 0)
    assert [item.id for item in suite.items] == ["one"]


def test_a_published_file_without_its_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("id,prompt,type,label\n1,a,homonyms,safe\n")
    with pytest.raises(SuiteError, match=r"xstest-unsafe .* holds no prompts"):
        load_suites([SuiteChoice(name="xstest", path=str(path))], 0)


def test_wrong_columns_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("id,text\n1,a\n")
    with pytest.raises(SuiteError, match="missing prompt, type, label"):
        load_suites([SuiteChoice(name="xstest", path=str(path))], 0)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00bad", b'id,prompt,type,label\n1,"open'])
def test_unreadable_files_are_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SuiteError, match="not a readable CSV file"):
        load_suites([SuiteChoice(name="xstest", path=str(path))], 0)


# --- choosing ---------------------------------------------------------------------------------


def test_every_listed_name_is_known() -> None:
    for listing in list_suites():
        with pytest.raises(SuiteError, match=r"give its `path`|takes no path"):
            path = None if listing.needs_path else "somewhere"
            load_suites([SuiteChoice(name=listing.name, path=path)], 0)


def test_unknown_names_get_the_nearest_one() -> None:
    with pytest.raises(SuiteError, match="Unknown suite `refusals`; did you mean `refusal`"):
        load_suites([SuiteChoice(name="refusals")], 0)


def test_the_same_suite_twice_is_refused() -> None:
    with pytest.raises(SuiteError, match="chosen twice"):
        load_suites([SuiteChoice(name="refusal"), SuiteChoice(name="refusal")], 0)


def test_no_choice_is_refused() -> None:
    with pytest.raises(SuiteError, match="No suite was chosen"):
        load_suites([], 0)


@pytest.mark.parametrize("limit", [1, 3, 7, 10, 11])
def test_limits_are_taken_evenly(limit: int) -> None:
    limited = small().limited(limit)
    positions = [int(item.id[2:]) for item in limited.items]
    assert len(positions) == min(limit, 10)
    gaps = {b - a for a, b in zip([*positions], [*positions[1:], 10 + positions[0]], strict=True)}
    assert max(gaps) - min(gaps) <= 1
    assert (limited.digest == small().digest) == (limit >= 10)


# --- checking and files -----------------------------------------------------------------------


def test_digests_cover_every_field_of_every_item() -> None:
    digests = {small().digest, small(ITEMS[:9]).digest, small(kind="over-refusal").digest}
    changed = [SuiteItem("i-0", "prompt 0", "even", twin="x"), *ITEMS[1:]]
    assert len({*digests, small(changed).digest}) == 4


@pytest.mark.parametrize(
    ("items", "kind", "message"),
    [
        ([], "refusal", "no data is not a score"),
        ([ITEMS[0], ITEMS[0]], "refusal", "uses the id 'i-0' twice"),
        ([SuiteItem("a", " ", "s")], "refusal", "prompt 'a' .* is empty"),
        ([SuiteItem("a", "p", "s", chosen="c")], "pairs", "no `rejected` text"),
    ],
)
def test_unsound_suites_are_refused(items: list[SuiteItem], kind: str, message: str) -> None:
    with pytest.raises(SuiteError, match=message):
        small(items, kind)


@pytest.mark.parametrize("name", ["", "../up", "a/b", "A", "-x"])
def test_names_that_are_no_file_names_are_refused(name: str) -> None:
    with pytest.raises(SuiteError, match="cannot be called"):
        make_suite(name, "refusal", ITEMS, source="test", licence="none")


def test_suites_survive_a_round_trip(tmp_path: Path) -> None:
    pairs = [SuiteItem("p", "wie heißt \u201cdas\u201d?\u2028", "s", None, "gut\n", "schlecht")]
    for suite in (small(), small(pairs, "pairs")):
        write_suite(suite, tmp_path / "s.jsonl")
        again = read_suite(tmp_path / "s.jsonl")
        assert again == suite
        assert again.digest == suite.digest


def test_a_suite_of_the_users_own(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    write_suite(small(), path)
    (suite,) = load_suites([SuiteChoice(name="file", path=str(path))], 4)
    assert (suite.name, len(suite.items)) == ("small", 4)


HEADER = {"schema": 1, "suite": "own", "kind": "refusal"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "the file is empty"),
        ([{"id": "a", "prompt": "p", "subject": "s"}], "should begin with a line"),
        ([{**HEADER, "schema": 2}], "should begin with a line"),
        ([{**HEADER, "kind": "jailbreak"}], "refusal, over-refusal, pairs"),
        ([HEADER], "holds no prompts"),
        ([HEADER, {"id": "a", "subject": "s"}], "Expected a text `prompt`"),
        ([HEADER, {"id": "a", "prompt": 7.5, "subject": "s"}], "found float"),
        ([HEADER, ["a"]], "Line 2 .* should hold one JSON object"),
    ],
)
def test_malformed_suite_files_are_refused(tmp_path: Path, lines: list[object], message: str) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(SuiteError, match=message):
        read_suite(path)


def test_lines_that_are_no_json_are_numbered(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps(HEADER) + "\n{oops\n")
    with pytest.raises(SuiteError, match=r"Line 2 .* is not JSON"):
        read_suite(path)


def test_a_missing_suite_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match="not a readable suite"):
        read_suite(tmp_path / "none.jsonl")
