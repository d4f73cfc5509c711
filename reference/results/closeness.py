"""How close an artifact's next-token distributions are to the fp32 graph's, on text of the aligned model.

The text is the fp32 graph's own greedy answers to evaluation prompts, which nothing was calibrated on. At
every answer position (the stop token is one), both graphs read the same prompt and answer so far:

    KL          = mean over positions of  sum_y p_fp32(y) (log p_fp32(y) - log p(y))        nats
    perplexity  = exp(- mean over positions of  log p(next token of the answer))

so that fp32's own perplexity is the floor that the others are read against.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from holdfast.chat import user
from holdfast.errors import SuiteError
from holdfast.evals.suites import Suite
from holdfast.files import write_json
from holdfast.language_model import LanguageModel
from holdfast.runtime.padding import left_pad
from holdfast.runtime.session import OnnxLanguageModel, require_numbers

BATCH = 16
PASSAGES_A_SUITE = 48

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Passage:
    """Token ids of a chat prompt and of the answer to it, the stop token included where it was reached."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Closeness:
    """An artifact against the fp32 graph.

    Attributes:
        kl_nats, perplexity: see the module.
        same_top_frac: share of positions with the same likeliest token.
        positions: answer tokens that were read.
    """

    kl_nats: float
    perplexity: float
    same_top_frac: float
    positions: int


def write_passages(model: OnnxLanguageModel, suites: Sequence[Suite], tokens: int, path: Path) -> None:
    """The text to compare on: `model`'s answers to prompts taken evenly over the suites of open answers.

    Arguments:
        tokens: longest answer.

    Raises:
        SuiteError: every suite is of pairs.
    """
    items = [
        item for suite in suites if suite.kind != "pairs" for item in suite.limited(PASSAGES_A_SUITE).items
    ]
    if not items:
        raise SuiteError(
            "Expected a suite of open answers to compare distributions on, found none: add one."
        )
    prompts = [model.tokenizer.encode_chat(user(item.prompt)) for item in items]
    answers = model.generate(prompts, max_new_tokens=tokens)
    stop = model.tokenizer.eos_ids[0]
    ended = [[*answer, stop] if len(answer) < tokens else answer for answer in answers]
    passages = [Passage(prompt, answer) for prompt, answer in zip(prompts, ended, strict=True)]
    write_json(path, [asdict(passage) for passage in passages])


def read_passages(path: Path) -> list[Passage]:
    """What `write_passages` wrote."""
    return [Passage(**row) for row in json.loads(path.read_text(encoding="utf-8"))]


def compare(
    reference: OnnxLanguageModel, model: OnnxLanguageModel, passages: Sequence[Passage]
) -> Closeness:
    """`model` against `reference`, which may be the same graph."""
    divergence = surprise = same = positions = 0.0
    pairs = zip(_distributions(reference, passages), _distributions(model, passages), strict=True)
    for passage, (wanted, found) in zip(passages, pairs, strict=True):
        divergence += float((np.exp(wanted) * (wanted - found)).sum())
        surprise -= float(found[np.arange(len(passage.answer)), passage.answer].sum())
        same += float((wanted.argmax(axis=-1) == found.argmax(axis=-1)).sum())
        positions += len(passage.answer)
    return Closeness(
        kl_nats=divergence / positions,
        perplexity=math.exp(surprise / positions),
        same_top_frac=same / positions,
        positions=int(positions),
    )


def perplexity(model: LanguageModel, passages: Sequence[Passage]) -> float:
    """`model`'s perplexity on the answers, in torch or in the runtime; what `compare` says of it too."""
    prompts, answers = [p.prompt for p in passages], [p.answer for p in passages]
    surprise = np.concatenate(model.token_logprobs(prompts, answers)).astype(np.float64)
    return math.exp(-float(surprise.mean()))


def _distributions(model: OnnxLanguageModel, passages: Sequence[Passage]) -> Iterator[Floats]:
    """Natural-log probabilities [answer token, vocabulary] of each passage."""
    for start in range(0, len(passages), BATCH):
        batch = passages[start : start + BATCH]
        read = [[*passage.prompt, *passage.answer][:-1] for passage in batch]
        longest = max(len(passage.answer) for passage in batch)
        ids, mask = left_pad(read, model.tokenizer.pad_id)
        logits = require_numbers(model.graph.logits(ids, mask, keep=longest), model.name)
        for row, passage in enumerate(batch):
            yield log_softmax(logits[row, -len(passage.answer) :].astype(np.float64))


def log_softmax(logits: Floats) -> Floats:
    """Natural-log probabilities of logits [..., vocabulary]."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result
