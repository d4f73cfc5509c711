"""Running a suite: labels, safety, preferences with hand-worked means, files of answers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from holdfast.errors import SuiteError
from holdfast.evals.judge import judge_digest
from holdfast.evals.run import Answer, read_answers, run_suite, work_units, write_answers
from holdfast.evals.suites import SuiteItem, make_suite
from holdfast.language_model import LanguageModel, OnDone
from holdfast.recipe import EvaluateConfig
from tests.evals.models import (
    COMPLIANCE,
    GARBAGE,
    REFUSAL,
    ScriptedModel,
    aligned,
    byte_tokenizer,
    suites,
)

CONFIG = EvaluateConfig(max_new_tokens=64)


def test_labels_and_safety_by_kind_of_suite() -> None:
    """Refusing is safe on harmful prompts, answering on harmless ones, noise on neither."""
    script = {"harmful 0": REFUSAL, "harmful 1": COMPLIANCE, "harmful 2": GARBAGE, "harmful 3": ""}
    script |= {key.replace("harmful", "harmless"): text for key, text in script.items()}
    model = ScriptedModel("scripted", lambda prompt: script[prompt])
    refusal, over_refusal, _ = suites(4)
    harmful = run_suite(model, refusal, CONFIG)
    harmless = run_suite(model, over_refusal, CONFIG)
    labels = ["refused", "complied", "incoherent", "incoherent"]
    assert [a.label for a in harmful.answers] == labels
    assert [a.label for a in harmless.answers] == labels
    assert [a.safe for a in harmful.answers] == [True, False, False, False]
    assert [a.safe for a in harmless.answers] == [False, True, False, False]
    assert harmful.safe_count == 1


def test_answers_keep_text_tokens_and_conditions() -> None:
    model = ScriptedModel("scripted", lambda _: COMPLIANCE)
    suite = suites(1)[0]
    run = run_suite(model, suite, EvaluateConfig(max_new_tokens=10))
    assert run.answers == (Answer("r-0", False, "complied", COMPLIANCE[:10], 10),)  # one token a byte
    assert (run.suite, run.kind, run.model) == ("refusal", "refusal", "scripted")
    assert run.conditions.suite_digest == suite.digest
    assert run.conditions.tokenizer_digest == model.tokenizer.digest()
    assert run.conditions.judge_digest == judge_digest()
    assert run.conditions.max_new_tokens == 10


class UnigramModel(ScriptedModel):
    """Token log-probabilities from a table, whatever came before."""

    def __init__(self, logprobs: dict[str, float]) -> None:
        super().__init__("unigram", lambda _: "")
        self._table = {self.tokenizer.encode(c)[0]: value for c, value in logprobs.items()}

    def token_logprobs(
        self,
        prompts: Sequence[Sequence[int]],
        continuations: Sequence[Sequence[int]],
        *,
        on_done: OnDone | None = None,
    ) -> list[NDArray[np.float32]]:
        return [np.array([self._table[token] for token in ids], dtype=np.float32) for ids in continuations]


def pair(chosen: str, rejected: str) -> SuiteItem:
    return SuiteItem("p", "which?", "s", None, chosen, rejected)


def run_pair(model: LanguageModel, item: SuiteItem) -> Answer:
    suite = make_suite("pairs", "pairs", [item], source="test", licence="none")
    (answer,) = run_suite(model, suite, CONFIG).answers
    return answer


def test_preference_is_by_mean_log_probability_a_token() -> None:
    """chosen "aab": (-1 -1 -4) / 3 = -2; rejected "c": -2.5. The sum alone would prefer "c"."""
    answer = run_pair(UnigramModel({"a": -1.0, "b": -4.0, "c": -2.5}), pair("aab", "c"))
    assert (answer.chosen_logprob, answer.rejected_logprob) == (-2.0, -2.5)
    assert answer.safe
    assert (answer.label, answer.text, answer.answer_tokens) == (None, "", 0)


def test_a_tie_is_no_preference() -> None:
    assert not run_pair(UnigramModel({"a": -1.0}), pair("a", "aa")).safe


@pytest.mark.parametrize("broken", [math.nan, -math.inf])
def test_a_model_without_numbers_has_no_preference(broken: float) -> None:
    answer = run_pair(UnigramModel({"a": broken, "b": -1.0}), pair("a", "b"))
    assert (answer.safe, answer.chosen_logprob) == (False, None)
    assert not run_pair(UnigramModel({"a": -1.0, "b": broken}), pair("a", "b")).safe


def test_a_continuation_without_tokens_is_an_error() -> None:
    model = aligned()
    model.tokenizer = replace(byte_tokenizer())
    model.tokenizer.tokenizer.normalizer = _drop_all()
    with pytest.raises(SuiteError, match="has no tokens"):
        run_pair(model, pair("good", "bad"))


def _drop_all():  # type: ignore[no-untyped-def]
    from tokenizers import Regex, normalizers

    return normalizers.Replace(Regex("."), "")


def test_progress_counts_every_prompt_and_both_sides_of_a_pair() -> None:
    done: list[int] = []
    data = suites(5, 3)
    for suite in data:
        run_suite(aligned(), suite, CONFIG, done.append)
    assert sum(done) == work_units(data) == 5 + 5 + 2 * 3


# --- files ------------------------------------------------------------------------------------


def test_answers_survive_a_round_trip(tmp_path: Path) -> None:
    for suite in suites(6, 6):
        run = run_suite(aligned(), suite, CONFIG)
        write_answers(run, tmp_path / "a.jsonl")
        assert read_answers(tmp_path / "a.jsonl") == run


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [], "holds no answers"),
        (lambda rows: rows[:1], "holds no answers"),
        (lambda rows: [{**rows[0], "schema": 9}, *rows[1:]], "holds no answers of schema 1"),
        (lambda rows: [{k: v for k, v in rows[0].items() if k != "judge_digest"}, rows[1]], "judge_digest"),
        (lambda rows: [rows[0], {**rows[1], "extra": 1}], "extra"),
        (lambda rows: [rows[0], {**rows[1], "safe": "yes"}], "safe='yes'"),
        (lambda rows: [rows[0], {**rows[1], "label": "fine"}], "label='fine'"),
    ],
)
def test_malformed_answer_files_are_refused(tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "a.jsonl"
    write_answers(run_suite(aligned(), suites(2)[0], CONFIG), path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))
    with pytest.raises(SuiteError, match=message):
        read_answers(path)


def test_a_missing_answer_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match="is not readable"):
        read_answers(tmp_path / "none.jsonl")
