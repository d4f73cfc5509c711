"""The table of pairs: which stages each one has, and what the second one trains on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import Qwen2ForCausalLM

from reference import data, modeling, train
from reference.leakage import HeldOut, benchmark_prompts, suite_prompts
from reference.pairs import PAIRS
from tests.reference.test_generation import SHARED
from tests.reference.test_training import MICRO

SECOND = PAIRS["second"]


def test_its_training_prompts_keep_clear_of_the_suite() -> None:
    held_out = data.held_out_prompts(None)
    pool = data.generate(2000, SECOND.seed, held_out, SECOND.harmful_frac)
    strict = HeldOut(suite_prompts(), threshold=0.8)
    assert len(pool) == 2000 and not [p for p in pool if strict.near(p.text)]
    harmful = sum(p.hazard != data.HARMLESS for p in pool) / len(pool)
    assert harmful == pytest.approx(SECOND.harmful_frac, abs=0.06)


@pytest.mark.skipif(not SHARED.exists(), reason="the published data is not here")
def test_its_training_prompts_keep_clear_of_the_benchmarks() -> None:
    pool = data.prompts(2000, SECOND.seed, SHARED, SECOND.harmful_frac)
    assert {p.source for p in pool} == {"banks", "ailuminate", "hh"}
    held_out = HeldOut(benchmark_prompts(SHARED), threshold=0.8)
    assert not [p for p in pool if held_out.near(p.text)]


def test_a_pair_without_dpo_ends_with_sft(tmp_path: Path) -> None:
    micro = ["--prompts", "300", "--batch", "4", "--base-steps", "2", "--sft-steps", "2"]
    shape = MICRO[MICRO.index("--hidden-size") :]
    out = tmp_path / "out"
    train.main(
        ["all", "--pair", "second", "--out", str(out), "--work", str(tmp_path / "w"), *micro, *shape]
    )
    assert sorted(p.name for p in out.iterdir()) == ["aligned", "base"]
    assert isinstance(modeling.load_model(out / "aligned"), Qwen2ForCausalLM)
    record = json.loads((out / "aligned" / "training.json").read_text(encoding="utf-8"))
    assert record["stage"] == "sft" and record["settings"]["seed"] == SECOND.seed


def test_the_first_pair_keeps_all_its_stages() -> None:
    assert train.stages_of(PAIRS["first"], "all") == list(train.STAGES)
    assert train.stages_of(SECOND, "all") == ["tokenizer", "base", "sft"]
    assert train.stages_of(SECOND, "dpo") == ["dpo"]
