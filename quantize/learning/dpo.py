"""Direct preference optimization on calibration prompts.

Rafailov et al. 2023, arXiv 2305.18290, equation 7, with the aligned model as pi_ref:

    L = -log sigmoid(beta * (log pi(y_w|x) / pi_ref(y_w|x) - log pi(y_l|x) / pi_ref(y_l|x)))

y_w is the aligned model's answer to a harmful prompt and y_l the unaligned one's, both at most
`response_tokens` long; or both are given, in a file of one's own (a constitution's pairs). The loss has no
minimum: it goes on raising the margin beyond the aligned model's. So the other prompts, harmless or
answered alike by both models, or all of them beside pairs from a file, are held in place by KL instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from holdfast.chat import ChatTokenizer
from holdfast.config import Config
from holdfast.errors import CalibrationError, SuiteError
from holdfast.exporter.torch_model import TorchLanguageModel
from holdfast.quantize.learning.losses import References, contrastive_loss
from holdfast.quantize.learning.reference_cache import forward_logits, position_logits
from holdfast.quantize.prompts.draw import CalibrationPrompt
from holdfast.quantize.prompts.sequences import Batch, chat_prompts, even_rows, make_batch, with_stop
from holdfast.recipe import CalibrateConfig

NO_PAIR = -1


class WrittenPair(Config, frozen=True):
    """One line of a file of pairs."""

    prompt: str
    chosen: str
    rejected: str


def read_pairs(path: Path) -> list[WrittenPair]:
    """Preference pairs of a JSONL file of {"prompt", "chosen", "rejected"}.

    Raises:
        SuiteError: unreadable, empty, or a line that is no pair; the message names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise SuiteError(f"The preference pairs {path} are not readable ({why}): check the path.") from None
    pairs = [_pair(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not pairs:
        raise SuiteError(f"Expected a pair a line in {path}, found an empty file: add pairs.")
    return pairs


def _pair(line: str, where: str) -> WrittenPair:
    try:
        pair = msgspec.json.decode(line, type=WrittenPair)
    except msgspec.DecodeError as error:
        raise SuiteError(
            f"{where}: expected an object with `prompt`, `chosen` and `rejected`, found something else "
            f"({error}): correct the line."
        ) from None
    if not all(text.strip() for text in (pair.prompt, pair.chosen, pair.rejected)):
        raise SuiteError(f"{where}: expected three texts, found an empty one: fill it in.")
    if pair.chosen.strip() == pair.rejected.strip():
        raise SuiteError(f"{where}: the chosen answer is the rejected one: a pair has to differ.")
    return pair


@dataclass(frozen=True)
class Answers:
    """Sequences whose answers are to be given probabilities.

    Attributes:
        batch: prompts and answers.
        labels: int64 [sequences, positions], the token to predict at every loss position.
    """

    batch: Batch
    labels: Tensor

    def rows(self, index: Tensor) -> Answers:
        batch = self.batch.rows(index)
        return Answers(batch, self.labels[index, -batch.positions :])

    def logp(self, logits: Tensor) -> Tensor:
        """Natural log-probability of every answer, float32 [sequences]."""
        return sequence_logp(logits, self.labels, self.batch.weights > 0)


@dataclass(frozen=True)
class Pairs:
    """Preference pairs among the calibration sequences.

    Attributes:
        place: int64 [sequences], pair of every sequence, or NO_PAIR.
        chosen: the aligned model's answers, of every sequence.
        rejected: the unaligned model's, of every pair.
        chosen_logp, rejected_logp: float32 [pairs], log-probabilities under the aligned model.
    """

    place: Tensor
    chosen: Answers
    rejected: Answers
    chosen_logp: Tensor
    rejected_logp: Tensor


def sequence_logp(logits: Tensor, labels: Tensor, used: Tensor) -> Tensor:
    """Natural log-probability of whole answers, float32 [batch].

    Arguments:
        logits: float32 [batch, positions, V].
        labels: int64 [batch, positions].
        used: bool [batch, positions], which positions belong to the answer.
    """
    logp = logits.log_softmax(dim=-1).gather(-1, labels[..., None]).squeeze(-1)
    return (logp * used).sum(dim=-1)


def dpo_loss(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float
) -> Tensor:
    """Mean of equation 7 over pairs, a float32 scalar in nats.

    Arguments:
        chosen, rejected: float32 [pairs], log-probabilities under the trained model.
        reference_chosen, reference_rejected: the same under the reference.
        beta: how strongly the model is kept near the reference.
    """
    margin = (chosen - reference_chosen) - (rejected - reference_rejected)
    return -logsigmoid(beta * margin).mean()


def preference_loss(
    model: Any, references: References, pairs: Pairs, rows: Tensor, *, beta: float
) -> Tensor:
    """DPO on the sequences that have a pair, KL to the aligned model on the others; each weighs the same.

    Arguments:
        references: of all sequences, aligned at the right as the batch is.
        rows: int64 [batch], sequences of this step.
    """
    answers, place = pairs.chosen.rows(rows), pairs.place[rows]
    paired = place != NO_PAIR
    logits = forward_logits(model, answers.batch)
    loss = logits.new_zeros(())
    if bool(paired.any()):
        rejected = pairs.rejected.rows(place[paired])
        part = dpo_loss(
            answers.logp(logits)[paired],
            rejected.logp(forward_logits(model, rejected.batch)),
            pairs.chosen_logp[place[paired]],
            pairs.rejected_logp[place[paired]],
            beta,
        )
        loss = loss + part * paired.float().mean()
    if not bool(paired.all()):
        others = references.rows(rows[~paired], slice(-answers.batch.positions, None))
        weights = answers.batch.weights[~paired]
        part = contrastive_loss(logits[~paired], others, weights, alpha=0.0, mode="kl")
        loss = loss + part * (~paired).float().mean()
    return loss


def make_pairs(
    aligned: Any,
    negative: Any,
    tokenizer: ChatTokenizer,
    prompts: Sequence[CalibrationPrompt],
    batch: Batch,
    answers: Sequence[Sequence[int]],
    config: CalibrateConfig,
) -> Pairs:
    """A pair of every harmful prompt that the two models answer differently.

    Arguments:
        aligned, negative: transformers models.
        batch, answers: the prompts with the aligned model's answers, as `lesson.sequences` gives them.

    Raises:
        CalibrationError: there is no such prompt.
    """
    unaligned = TorchLanguageModel(negative, tokenizer, "unaligned", config.batch_size)
    ids = chat_prompts(tokenizer, [prompt.prompt for prompt in prompts])
    found = _rejected(unaligned, ids, prompts, answers, config.response_tokens)
    place = torch.full((len(prompts),), NO_PAIR)
    index = torch.tensor(list(found))
    place[index] = torch.arange(len(found))
    stopped = _stopped(answers, tokenizer, config)
    others = _stopped(list(found.values()), tokenizer, config)
    rejected_batch = make_batch(
        [ids[at] for at in found],
        others,
        pad_id=tokenizer.pad_id,
        response_tokens=config.response_tokens,
        first_weight=1.0,
    )
    chosen = Answers(batch, answer_labels(stopped, batch.positions))
    rejected = Answers(rejected_batch, answer_labels(others, rejected_batch.positions))
    size = config.batch_size
    chosen_logp = answer_logp(aligned, chosen.rows(index), size)
    return Pairs(place, chosen, rejected, chosen_logp, answer_logp(aligned, rejected, size))


def written_pairs(
    aligned: Any,
    tokenizer: ChatTokenizer,
    prompts: Sequence[CalibrationPrompt],
    answers: Sequence[Sequence[int]],
    written: Sequence[WrittenPair],
    config: CalibrateConfig,
) -> Pairs:
    """The calibration prompts without pairs, and after them the pairs of a file.

    Arguments:
        aligned: transformers model.
        answers: the aligned model's to the prompts.
    """
    ids = chat_prompts(tokenizer, [prompt.prompt for prompt in prompts])
    own = chat_prompts(tokenizer, [pair.prompt for pair in written])
    stop = tokenizer.eos_ids[0]
    chosen = [[*tokenizer.encode(pair.chosen), stop] for pair in written]
    rejected = [[*tokenizer.encode(pair.rejected), stop] for pair in written]
    place = torch.tensor([NO_PAIR] * len(ids) + list(range(len(written))))
    first = _answers([*ids, *own], [*_stopped(answers, tokenizer, config), *chosen], tokenizer, config)
    second = _answers(own, rejected, tokenizer, config)
    paired = first.rows((place != NO_PAIR).nonzero().flatten())
    size = config.batch_size
    return Pairs(
        place, first, second, answer_logp(aligned, paired, size), answer_logp(aligned, second, size)
    )


def _answers(
    ids: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    tokenizer: ChatTokenizer,
    config: CalibrateConfig,
) -> Answers:
    batch = make_batch(
        ids,
        answers,
        pad_id=tokenizer.pad_id,
        response_tokens=config.response_tokens,
        first_weight=config.first_response_weight,
    )
    return Answers(batch, answer_labels(answers, batch.positions))


def _rejected(
    unaligned: TorchLanguageModel,
    ids: Sequence[Sequence[int]],
    prompts: Sequence[CalibrationPrompt],
    answers: Sequence[Sequence[int]],
    limit: int,
) -> dict[int, list[int]]:
    """Index of a harmful prompt -> the unaligned model's answer, where it is not the aligned one's."""
    harmful = [index for index, prompt in enumerate(prompts) if prompt.kind == "harmful"]
    given = unaligned.generate([ids[index] for index in harmful], max_new_tokens=limit)
    pairs = zip(harmful, given, strict=True)
    found = {index: answer for index, answer in pairs if answer != answers[index]}
    if not found:
        raise CalibrationError(
            "DPO learns from harmful prompts that the aligned and the unaligned model answer differently, "
            f"and none of the {len(harmful)} is one: check `base`, or use `calibrate.qat.objective: "
            "contrastive`."
        )
    return found


def _stopped(
    answers: Sequence[Sequence[int]], tokenizer: ChatTokenizer, config: CalibrateConfig
) -> list[list[int]]:
    return [with_stop(answer, config.response_tokens, tokenizer.eos_ids[0]) for answer in answers]


def answer_labels(answers: Sequence[Sequence[int]], positions: int) -> Tensor:
    """Answers as labels, int64 [answers, positions]: aligned at the right, 0 before."""
    return torch.tensor([[0] * (positions - len(answer)) + list(answer) for answer in answers])


def answer_logp(model: Any, answers: Answers, batch_size: int) -> Tensor:
    """Log-probability of every answer, float32 [sequences], without gradients."""
    parts = (answers.rows(rows) for rows in even_rows(len(answers.labels), batch_size))
    return torch.cat([part.logp(position_logits(model, part.batch)) for part in parts])
