"""Direct preference optimization: the loss by hand, and pairs of two tiny models."""

import math
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch

from holdfast.errors import CalibrationError, SuiteError
from holdfast.exporter.source import SourceModel
from holdfast.quantize.learning.dpo import (
    NO_PAIR,
    Pairs,
    WrittenPair,
    answer_labels,
    dpo_loss,
    make_pairs,
    preference_loss,
    read_pairs,
    sequence_logp,
    written_pairs,
)
from holdfast.quantize.learning.lesson import references_of, sequences
from holdfast.quantize.learning.losses import References
from holdfast.quantize.prompts.draw import CalibrationPrompt
from tests.quantize.conftest import SHORT

Prompts = list[CalibrationPrompt]


def test_the_loss_by_hand() -> None:
    """Margins (1 - -1) = 2 and (0 - 1) = -1; at beta 0.5 the losses are softplus(-1) and softplus(0.5)."""
    chosen, rejected = torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -1.0])
    reference = torch.tensor([-2.0, -2.0])
    loss = dpo_loss(chosen, rejected, reference, reference, beta=0.5)
    assert float(loss) == pytest.approx((0.3132617 + 0.9740770) / 2, abs=1e-6)


def test_the_gradient_by_hand() -> None:
    """d loss / d chosen = -beta * sigmoid(-beta * margin), and the opposite for the rejected answer."""
    chosen = torch.tensor([1.0], requires_grad=True)
    rejected = torch.tensor([0.0], requires_grad=True)
    zero = torch.zeros(1)
    dpo_loss(chosen, rejected, zero, zero, beta=2.0).backward()  # type: ignore[no-untyped-call]
    expected = 2.0 / (1.0 + math.exp(2.0))
    assert chosen.grad is not None and rejected.grad is not None
    assert float(chosen.grad) == pytest.approx(-expected, abs=1e-6)
    assert float(rejected.grad) == pytest.approx(expected, abs=1e-6)


def test_answers_by_hand() -> None:
    """Probabilities 1/4 and 3/4; the answer of one token counts its last position alone."""
    logits = torch.tensor([1.0, 3.0]).log().expand(2, 2, 2)
    labels = answer_labels([[1, 0], [1]], positions=2)
    assert labels.tolist() == [[1, 0], [0, 1]]
    used = torch.tensor([[True, True], [False, True]])
    found = sequence_logp(logits, labels, used)
    assert found.tolist() == pytest.approx([math.log(3 / 16), math.log(3 / 4)], abs=1e-6)


@pytest.fixture(scope="module")
def made(aligned: SourceModel, negative: SourceModel, prompts: Prompts) -> tuple[Pairs, References]:
    batch, answers = sequences(aligned, prompts, SHORT)
    pairs = make_pairs(aligned.model, negative.model, aligned.tokenizer, prompts, batch, answers, SHORT)
    return pairs, references_of(aligned, negative.model, batch, SHORT)


def test_only_harmful_prompts_have_pairs(made: tuple[Pairs, References], prompts: Prompts) -> None:
    pairs, _ = made
    places = pairs.place.tolist()
    paired = [prompt.kind for prompt, place in zip(prompts, places, strict=True) if place != NO_PAIR]
    assert set(paired) == {"harmful"}
    assert sorted(place for place in places if place != NO_PAIR) == list(range(len(paired)))
    assert bool((pairs.chosen_logp > pairs.rejected_logp).all())  # greedy answers of the aligned model


def test_labels_are_the_tokens_that_come_next(made: tuple[Pairs, References]) -> None:
    pairs, _ = made
    for answers in (pairs.chosen, pairs.rejected):
        positions = answers.batch.positions
        used = answers.batch.weights[:, :-1] > 0
        coming = answers.batch.ids[:, -positions + 1 :]
        assert torch.equal(answers.labels[:, :-1][used], coming[used])


@torch.no_grad()
def test_the_aligned_model_itself(
    made: tuple[Pairs, References], aligned: SourceModel, negative: SourceModel
) -> None:
    """Its margin to itself is 0, so the loss is log 2 on pairs, and no divergence is left elsewhere.

    The unaligned model prefers the other answers, and is far from it.
    """
    pairs, references = made
    paired = (pairs.place != NO_PAIR).nonzero().flatten()
    others = (pairs.place == NO_PAIR).nonzero().flatten()
    mixed = torch.cat([paired[:2], others[:6]])
    expected = {paired: math.log(2.0), others: 0.0, mixed: 0.25 * math.log(2.0)}
    for rows, loss in expected.items():
        found = preference_loss(aligned.model, references, pairs, rows, beta=0.7)
        assert float(found) == pytest.approx(loss, abs=1e-4)
        assert float(preference_loss(negative.model, references, pairs, rows, beta=0.7)) > loss + 0.1


def test_equal_models_are_refused(aligned: SourceModel, prompts: Prompts) -> None:
    batch, answers = sequences(aligned, prompts, SHORT)
    same = replace(aligned)
    with pytest.raises(CalibrationError, match="answer differently"):
        make_pairs(aligned.model, same.model, aligned.tokenizer, prompts, batch, answers, SHORT)


# --- pairs of a file --------------------------------------------------------------------------

WRITTEN = [
    WrittenPair(prompt="Q one", chosen="no", rejected="yes sure"),
    WrittenPair(prompt="Q two", chosen="never ever", rejected="ok"),
]


@torch.no_grad()
def test_pairs_of_a_file_come_after_the_prompts(aligned: SourceModel, prompts: Prompts) -> None:
    _, answers = sequences(aligned, prompts, SHORT)
    tokenizer = aligned.tokenizer
    pairs = written_pairs(aligned.model, tokenizer, prompts, answers, WRITTEN, SHORT)
    n = len(prompts)
    assert pairs.place.tolist() == [NO_PAIR] * n + [0, 1]
    for row, text in ((n, "no"), (n + 1, "never ever")):
        used = pairs.chosen.batch.weights[row] > 0
        assert pairs.chosen.labels[row][used].tolist() == [*tokenizer.encode(text), tokenizer.eos_ids[0]]
    references = references_of(aligned, aligned.model, pairs.chosen.batch, SHORT)
    for rows, loss in ((torch.tensor([n, n + 1]), math.log(2.0)), (torch.tensor([0, 1]), 0.0)):
        found = preference_loss(aligned.model, references, pairs, rows, beta=0.7)
        assert float(found) == pytest.approx(loss, abs=1e-4)


def test_a_file_of_pairs_is_read(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        "".join(f"{msgspec.json.encode(pair).decode()}\n\n" for pair in WRITTEN), encoding="utf-8"
    )
    assert read_pairs(path) == WRITTEN


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found an empty file"),
        ('{"prompt": "a", "chosen": "b"}', "line 1: expected an object with `prompt`, `chosen`"),
        ('{"prompt": "a", "chosen": "b", "rejected": " "}', "found an empty one"),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "a pair has to differ"),
    ],
)
def test_a_file_that_holds_no_pairs_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SuiteError, match=message):
        read_pairs(path)
    with pytest.raises(SuiteError, match="not readable"):
        read_pairs(tmp_path / "nowhere.jsonl")
