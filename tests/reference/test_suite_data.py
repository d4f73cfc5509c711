"""The built-in suite as data: format, balance, twins, constitution."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
import yaml

from reference.leakage import SUITE, similarity, words

CONSTITUTION = yaml.safe_load((SUITE / "constitution.yaml").read_text(encoding="utf-8"))


def rows(name: str) -> list[dict[str, Any]]:
    """Read one suite file."""
    return [json.loads(line) for line in (SUITE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("name", "count"), [("refusal", 240), ("over_refusal", 240), ("constitution_pairs", 120)]
)
def test_counts_and_uniqueness(name: str, count: int) -> None:
    found = rows(name)
    assert len(found) == count
    assert len({r["id"] for r in found}) == count
    assert len({r["prompt"].lower() for r in found}) == count
    assert all(r["prompt"] == r["prompt"].strip() and 3 <= len(r["prompt"].split()) <= 30 for r in found)


def test_hazards_are_balanced_and_belong_to_a_principle() -> None:
    counts = Counter(r["hazard"] for r in rows("refusal"))
    assert set(counts) == set(CONSTITUTION["hazards"])
    assert max(counts.values()) - min(counts.values()) <= 2


def test_kinds() -> None:
    counts = Counter(r["kind"] for r in rows("over_refusal"))
    assert counts["benign"] == 80
    assert sum(counts.values()) - counts["benign"] == 160
    assert {"homonym", "figurative", "safe_target", "safe_context", "definition"} <= set(counts)


def test_twins_point_at_each_other_and_share_words() -> None:
    harmful = {r["id"]: r for r in rows("refusal")}
    harmless = {r["id"]: r for r in rows("over_refusal")}
    paired = [r for r in harmful.values() if r["twin"]]
    assert len(paired) == 160
    for row in paired:
        twin = harmless[row["twin"]]
        assert twin["twin"] == row["id"]
        assert similarity(words(row["prompt"]), words(twin["prompt"])) >= 0.1


def test_no_two_suite_prompts_are_the_same_request() -> None:
    for name in ("refusal", "over_refusal"):
        sets = [words(r["prompt"]) for r in rows(name)]
        assert all(similarity(a, b) < 0.8 for i, a in enumerate(sets) for b in sets[:i])


def test_constitution() -> None:
    principles = CONSTITUTION["principles"]
    assert CONSTITUTION["version"] == 1
    assert [p["id"] for p in principles] == list(range(1, len(principles) + 1))
    assert len(principles) >= 12
    assert all(p["name"] and p["text"].endswith(".") for p in principles)
    assert set(CONSTITUTION["hazards"].values()) <= {p["id"] for p in principles}


def test_pairs_cover_every_principle_from_both_sides() -> None:
    found = rows("constitution_pairs")
    counts = Counter(r["principle"] for r in found)
    assert counts == {p["id"]: 10 for p in CONSTITUTION["principles"]}
    assert Counter(r["kind"] for r in found)["harmless"] >= 40
    assert all(r["chosen"] and r["rejected"] and r["chosen"] != r["rejected"] for r in found)


def test_answers_hold_no_operational_detail() -> None:
    # The pairs' answers are boilerplate: no digits, no lists, and never long.
    for row in rows("constitution_pairs"):
        for side in ("chosen", "rejected"):
            assert len(row[side].split()) <= 40
            assert not any(c.isdigit() or c == "\n" for c in row[side])
