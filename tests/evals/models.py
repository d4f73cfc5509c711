"""Language models whose behaviour is known in advance, with a real tokenizer and no framework."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from holdfast.chat import ChatTokenizer
from holdfast.evals.suites import Suite, SuiteItem, make_suite
from holdfast.language_model import OnDone

SPECIAL = ("<|user|>", "<|assistant|>", "<|end|>")
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
REFUSAL = "I'm sorry, but I can't help with that."
COMPLIANCE = "Sure, here is a short plan: begin early and take notes."
GARBAGE = "the the the the the the the the"


def byte_tokenizer(template: str = TEMPLATE) -> ChatTokenizer:
    """One token a byte, and the three special tokens of the template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    end = tokenizer.token_to_id("<|end|>")
    return ChatTokenizer(tokenizer, template, {"eos_token": "<|end|>"}, (end,), end, Path("bytes"))


class ScriptedModel:
    """Answers each prompt by a function of its text; likes a continuation by another."""

    def __init__(
        self,
        name: str,
        answer: Callable[[str], str],
        likes: Callable[[str, str], float] = lambda prompt, text: -1.0,
        tokenizer: ChatTokenizer | None = None,
    ) -> None:
        self.name = name
        self.tokenizer = tokenizer or byte_tokenizer()
        self._answer = answer
        self._likes = likes

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, on_done: OnDone | None = None
    ) -> list[list[int]]:
        answers = []
        for prompt in prompts:
            text = self._answer(self.tokenizer.decode(prompt))
            answers.append(self.tokenizer.encode(text)[:max_new_tokens])
            if on_done:
                on_done(1)
        return answers

    def token_logprobs(
        self,
        prompts: Sequence[Sequence[int]],
        continuations: Sequence[Sequence[int]],
        *,
        on_done: OnDone | None = None,
    ) -> list[NDArray[np.float32]]:
        scores = []
        for prompt, ids in zip(prompts, continuations, strict=True):
            level = self._likes(self.tokenizer.decode(prompt), self.tokenizer.decode(ids))
            scores.append(np.full(len(ids), level, dtype=np.float32))
            if on_done:
                on_done(1)
        return scores

    def next_token_logits(
        self, prompts: Sequence[Sequence[int]], *, on_done: OnDone | None = None
    ) -> NDArray[np.float32]:
        return np.zeros((len(prompts), self.tokenizer.vocabulary_size), dtype=np.float32)


def chance(text: str, salt: str = "") -> float:
    """A number in [0, 1) that depends on the text alone."""
    digest = hashlib.sha256(f"{salt}|{text}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def refuser(harmful_share: float, harmless_share: float, salt: str = "") -> Callable[[str], str]:
    """Refuses these shares of the prompts of `suites`, always the same ones for one salt."""

    def answer(prompt: str) -> str:
        share = harmful_share if prompt.startswith("harmful") else harmless_share
        return REFUSAL if chance(prompt, salt) < share else COMPLIANCE

    return answer


def prefers(share: float) -> Callable[[str, str], float]:
    """Prefers the text "good" on this share of the prompts."""

    def likes(prompt: str, text: str) -> float:
        good_is_better = chance(prompt, "pair") < share
        return -1.0 if (text == "good") == good_is_better else -2.0

    return likes


def suites(n: int = 200, pairs: int = 120) -> list[Suite]:
    """A refusal, an over-refusal and a pair suite with neutral placeholder prompts."""
    return [
        _suite("refusal", "refusal", [SuiteItem(f"r-{i}", f"harmful {i}", f"h{i % 4}") for i in range(n)]),
        _suite(
            "over-refusal",
            "over-refusal",
            [SuiteItem(f"o-{i}", f"harmless {i}", f"k{i % 3}") for i in range(n)],
        ),
        _suite(
            "constitution",
            "pairs",
            [SuiteItem(f"c-{i}", f"pair {i}", "Life", None, "good", "bad") for i in range(pairs)],
        ),
    ]


def _suite(name: str, kind: str, items: list[SuiteItem]) -> Suite:
    return make_suite(name, kind, items, source="test", licence="none")  # type: ignore[arg-type]


def aligned(name: str = "aligned") -> ScriptedModel:
    """Refuses nine in ten harmful prompts and one in twenty harmless ones."""
    return ScriptedModel(name, refuser(0.9, 0.05), prefers(0.9))


def unaligned(name: str = "twin") -> ScriptedModel:
    """Refuses almost nothing."""
    return ScriptedModel(name, refuser(0.02, 0.01), prefers(0.4))
