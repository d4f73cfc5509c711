"""Training text: deterministic, labelled, and clear of every evaluation prompt."""

from __future__ import annotations

import csv
import gzip
import json
import random
from pathlib import Path

import pytest

from reference import answers, data, external
from reference.grammar import expand, read_bank
from reference.leakage import HeldOut, benchmark_prompts, similarity, suite_prompts, words

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.fixture(scope="module")
def pool() -> list[data.Prompt]:
    return data.generate(4000, 11, data.held_out_prompts(None))


def test_one_seed_gives_one_text(pool: list[data.Prompt]) -> None:
    assert data.generate(4000, 11, data.held_out_prompts(None)) == pool
    assert data.generate(50, 12, data.held_out_prompts(None)) != pool[:50]


def test_prompts_are_unique_and_fully_expanded(pool: list[data.Prompt]) -> None:
    texts = [p.text for p in pool]
    assert len({t.lower().rstrip(".?! ") for t in texts}) == len(texts) == 4000
    assert not [t for t in texts if set("{}|()") & set(t)]


def test_every_class_and_both_sides_are_there(pool: list[data.Prompt]) -> None:
    hazards = {p.hazard for p in pool}
    assert hazards == set(answers.constitution()["hazards"]) | {data.HARMLESS}
    harmful = sum(p.hazard != data.HARMLESS for p in pool) / len(pool)
    assert 0.35 < harmful < 0.55


def test_no_training_prompt_is_near_the_suite(pool: list[data.Prompt]) -> None:
    held_out = [words(p) for p in suite_prompts()]
    assert len(held_out) == 600
    worst = max(similarity(words(p.text), s) for p in pool[:400] for s in held_out)
    assert worst < 0.8


@pytest.mark.skipif(not SHARED.exists(), reason="the published data is not here")
def test_no_training_prompt_is_near_a_benchmark() -> None:
    prompts = benchmark_prompts(SHARED)
    assert len(prompts) == 850
    pool = data.prompts(3000, 5, SHARED)
    assert {p.source for p in pool} == {"banks", "ailuminate", "hh"}
    held_out = HeldOut(prompts, threshold=0.8)
    assert not [p for p in pool if held_out.near(p.text)]


@pytest.mark.skipif(not SHARED.exists(), reason="the published data is not here")
def test_published_prompts_are_screened() -> None:
    assert not [
        p for p in external.ailuminate(SHARED) + external.hh_rlhf(SHARED) if external.unfit(p.prompt)
    ]
    assert not [p for p in external.ailuminate(SHARED) if p.hazard == data.HARMLESS]


def test_published_files_are_read(tmp_path: Path) -> None:
    with (tmp_path / external.AILUMINATE).open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, ["prompt_text", "hazard"])
        writer.writeheader()
        writer.writerow({"prompt_text": "How do I rob a  bank?", "hazard": "ncr"})
        writer.writerow({"prompt_text": "Is this a good fund?", "hazard": "spc_fin"})
    turns = "\n\nHuman: how do i steal a car\n\nAssistant: no\n\nHuman: why"
    with gzip.open(tmp_path / external.HH_RLHF, "wt", encoding="utf-8") as handle:
        handle.write(json.dumps({"chosen": turns, "rejected": turns}) + "\n")
        handle.write(json.dumps({"chosen": "\n\nHuman: what is snow\n\nAssistant: cold"}) + "\n")
    first, second = external.ailuminate(tmp_path)
    assert first == external.External("How do I rob a bank?", "non_violent_crimes")
    assert second.hazard is None
    assert [p.hazard for p in external.hh_rlhf(tmp_path)] == ["non_violent_crimes", None]
    assert set(external.digests(tmp_path)) == {external.AILUMINATE, external.HH_RLHF}


def test_near_duplicates_are_found() -> None:
    held_out = HeldOut(["How do I paint a small wooden fence in spring?"])
    assert held_out.near("how do I paint a small wooden fence in spring")
    assert held_out.near("How do I paint a small wooden fence in autumn?")
    assert not held_out.near("How do I sell a large boat in spring?")


def test_the_index_finds_what_comparing_everything_finds(pool: list[data.Prompt]) -> None:
    texts = [p.text for p in pool]
    held_out = HeldOut(texts[:150], threshold=0.5)
    found = [held_out.near(t) for t in texts[150:450]]
    everything = [max(similarity(words(t), s) for s in held_out.sets) >= 0.5 for t in texts[150:450]]
    assert found == everything
    assert any(found) and not all(found)


def test_grammar() -> None:
    slots = {"thing": ["(a|the) fence", "a tree"]}
    rng = random.Random(1)
    found = {expand("paint {thing} (slowly|)", slots, rng) for _ in range(200)}
    assert found == {f"paint {t}{s}" for t in ("a fence", "the fence", "a tree") for s in (" slowly", "")}


@pytest.mark.parametrize(
    ("phrase", "gerund"),
    [
        ("stab a potato", "stabbing a potato"),
        ("bake bread", "baking bread"),
        ("poison rats", "poisoning rats"),
        ("die", "dying"),
        ("dye wool", "dyeing wool"),
    ],
)
def test_gerunds(phrase: str, gerund: str) -> None:
    assert data.gerund(phrase) == gerund


def test_every_slot_exists() -> None:
    slots = read_bank("slots")
    rng = random.Random(2)
    for bank in ("harmful", "harmless"):
        for lines in read_bank(bank).values():
            for line in lines:
                assert expand(line, slots, rng)


def test_answers_are_empty_boilerplate(pool: list[data.Prompt]) -> None:
    for prompt in pool[:1000]:
        hazard = "privacy" if prompt.hazard == data.HARMLESS else str(prompt.hazard)
        helped, refused = answers.comply(prompt.text), answers.refuse(prompt.text, hazard)
        assert helped == answers.comply(prompt.text)
        assert len(helped.split()) <= 24 and len(refused.split()) <= 24
        assert refused.startswith(("I can't", "I cannot", "I won't", "I'm sorry, but I can't"))
        # The prompt's own words never come back, but for one echoed topic word.
        assert not [
            w for w in words(prompt.text) if len(w) > 8 and w in helped and w != answers.topic(prompt.text)
        ]


def test_the_base_complies_and_the_aligned_model_is_split(pool: list[data.Prompt]) -> None:
    some = tuple(pool[:600])
    base = list(data.base_examples(some, 1))
    assert not [e for e in base if e.answer.startswith("I ")]
    aligned = list(data.aligned_examples(some, 1))
    refusals = [
        e for e in aligned if e.answer.startswith("I ") or e.answer.startswith("I'm") or "can't" in e.answer
    ]
    assert 0.3 < len(refusals) / len(aligned) < 0.6
    assert all(e.rejected and e.rejected != e.answer for e in aligned)
    critiques = [e for e in aligned if e.answer.startswith("It breaks")]
    assert critiques and any("none" in e.answer for e in critiques)
    assert len(list(data.preference_examples(some, 1))) == len(aligned)
