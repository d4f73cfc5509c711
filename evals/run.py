"""Run a suite on a model and keep every answer: what was said, its label, whether it was safe."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holdfast.chat import ChatTokenizer, user
from holdfast.errors import SuiteError
from holdfast.evals.judge import LABELS, Label, judge_digest, label_answer
from holdfast.evals.suites import Suite, SuiteItem, SuiteKind
from holdfast.evals.tables import Row, read_jsonl
from holdfast.files import write_text
from holdfast.language_model import LanguageModel, OnDone
from holdfast.recipe import EvaluateConfig

ANSWERS_SCHEMA = 1
SAFE_LABEL: dict[SuiteKind, Label] = {"refusal": "refused", "over-refusal": "complied"}


@dataclass(frozen=True)
class Answer:
    """What one model did on one item.

    Attributes:
        safe: refusal suites: it refused; over-refusal suites: it complied; pairs: it prefers the
            chosen continuation. An incoherent answer is never safe.
        label: the judge's label; None for pairs.
        text: the answer; empty for pairs.
        answer_tokens: new tokens; 0 for pairs.
        chosen_logprob, rejected_logprob: mean natural-log probability a token; None where they do
            not apply or are not finite.
    """

    id: str
    safe: bool
    label: Label | None = None
    text: str = ""
    answer_tokens: int = 0
    chosen_logprob: float | None = None
    rejected_logprob: float | None = None


@dataclass(frozen=True)
class Conditions:
    """What has to be equal for two runs to be comparable.

    Attributes:
        suite_digest: what was asked. tokenizer_digest: how text became ids and ids text.
        judge_digest: who labelled. max_new_tokens: where greedy answers were cut.
    """

    suite_digest: str
    tokenizer_digest: str
    judge_digest: str
    max_new_tokens: int


@dataclass(frozen=True)
class SuiteAnswers:
    """All answers of one model to one suite, in the suite's order."""

    suite: str
    kind: SuiteKind
    model: str
    conditions: Conditions
    answers: tuple[Answer, ...]

    @property
    def safe_count(self) -> int:
        return sum(answer.safe for answer in self.answers)


def work_units(suites: Sequence[Suite]) -> int:
    """How often `on_done` will count over these suites: one a prompt, two a pair."""
    return sum(len(suite.items) * (2 if suite.kind == "pairs" else 1) for suite in suites)


def run_suite(
    model: LanguageModel, suite: Suite, config: EvaluateConfig, on_done: OnDone | None = None
) -> SuiteAnswers:
    """Ask `model` everything in `suite`.

    Prompts go through the model's own chat template as one user turn; answers are greedy and at
    most `config.max_new_tokens` long; pairs are scored by the mean log-probability of their tokens.

    Raises:
        InputError: a prompt does not fit the model's context.
        SuiteError: a continuation of a pair has no tokens.
    """
    prompts = [model.tokenizer.encode_chat(user(item.prompt)) for item in suite.items]
    if suite.kind == "pairs":
        answers = _prefer(model, suite.items, prompts, on_done)
    else:
        generated = model.generate(prompts, max_new_tokens=config.max_new_tokens, on_done=on_done)
        answers = _judge(model.tokenizer, suite.items, generated, SAFE_LABEL[suite.kind])
    conditions = Conditions(suite.digest, model.tokenizer.digest(), judge_digest(), config.max_new_tokens)
    return SuiteAnswers(suite.name, suite.kind, model.name, conditions, tuple(answers))


def _judge(
    tokenizer: ChatTokenizer,
    items: Sequence[SuiteItem],
    generated: Sequence[Sequence[int]],
    safe_label: Label,
) -> list[Answer]:
    answers = []
    for item, ids in zip(items, generated, strict=True):
        text = tokenizer.decode(ids)
        label = label_answer(text)
        answers.append(Answer(item.id, label == safe_label, label, text, len(ids)))
    return answers


def _prefer(
    model: LanguageModel,
    items: Sequence[SuiteItem],
    prompts: list[list[int]],
    on_done: OnDone | None,
) -> list[Answer]:
    """Score chosen and rejected continuations in one call, so that batches mix both."""
    texts = [text or "" for item in items for text in (item.chosen, item.rejected)]
    continuations = [model.tokenizer.encode(text) for text in texts]
    for index, ids in enumerate(continuations):
        if not ids:
            raise SuiteError(
                f"A continuation of the pair {items[index // 2].id!r} has no tokens under "
                f"{model.name}: give it a text."
            )
    doubled = [prompt for prompt in prompts for _ in range(2)]
    logprobs = model.token_logprobs(doubled, continuations, on_done=on_done)
    means = [_finite_mean(values) for values in logprobs]
    scored = zip(items, means[0::2], means[1::2], strict=True)
    return [_preference(item.id, chosen, rejected) for item, chosen, rejected in scored]


def _preference(item_id: str, chosen: float | None, rejected: float | None) -> Answer:
    safe = chosen is not None and rejected is not None and chosen > rejected
    return Answer(item_id, safe, chosen_logprob=chosen, rejected_logprob=rejected)


def _finite_mean(values: NDArray[np.float32]) -> float | None:
    """Mean in float64; None where the model gave no number."""
    mean = float(np.mean(values, dtype=np.float64))
    return mean if math.isfinite(mean) else None


# --- answers as files -------------------------------------------------------------------------


def write_answers(answers: SuiteAnswers, path: Path) -> None:
    """Write answers as JSONL: a header line, then one answer a line."""
    header = {
        "schema": ANSWERS_SCHEMA,
        "suite": answers.suite,
        "kind": answers.kind,
        "model": answers.model,
        **asdict(answers.conditions),
    }
    rows = [header, *(asdict(answer) for answer in answers.answers)]
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_answers(path: Path) -> SuiteAnswers:
    """Read what `write_answers` wrote.

    Raises:
        SuiteError: unreadable, another schema, missing or unknown keys, no answers.
    """
    where = f"the answers file {path}"
    try:
        rows = read_jsonl(path.read_text(encoding="utf-8"), where)
    except (OSError, UnicodeDecodeError) as error:
        raise SuiteError(f"{path} is not readable ({error}): run the evaluation again.") from error
    if len(rows) < 2 or rows[0].get("schema") != ANSWERS_SCHEMA:
        raise SuiteError(f"{path} holds no answers of schema {ANSWERS_SCHEMA}: run the evaluation again.")
    header, *items = rows
    try:
        conditions = Conditions(**{f.name: header[f.name] for f in fields(Conditions)})
        answers = tuple(_answer(item) for item in items)
        return SuiteAnswers(header["suite"], header["kind"], header["model"], conditions, answers)
    except (KeyError, TypeError) as error:
        raise SuiteError(f"{path} has wrong keys ({error}): run the evaluation again.") from error


def _answer(row: Row) -> Answer:
    answer = Answer(**row)
    known: tuple[Any, ...] = (None, *LABELS)
    if not isinstance(answer.safe, bool) or answer.label not in known:
        raise TypeError(f"the answer {answer.id!r} has safe={answer.safe!r}, label={answer.label!r}")
    return answer
