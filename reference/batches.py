"""Turns conversations into padded batches of similar length."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from reference.data import Example

# The decision to refuse or to help falls on the first token of the answer, one among some twenty
# that are nearly certain: it is weighted up.
FIRST_TOKEN_WEIGHT = 4.0
# Answers that begin so are cut after this many tokens, in this share of the examples. Critiques
# ("It breaks ...") stay whole: everything in them is decisive.
CUTS: tuple[tuple[str, int, float], ...] = (("Sure.", 3, 0.75), ("It breaks", 0, 0.0), ("", 11, 0.4))


@dataclass(frozen=True)
class Encoded:
    """Token ids of a conversation; the answer starts at ``start``."""

    ids: list[int]
    start: int


@dataclass(frozen=True)
class Batch:
    """Right-padded ids, their mask, and the weight of predicting each token (0: not trained)."""

    ids: torch.Tensor
    mask: torch.Tensor
    weights: torch.Tensor


class Encoder:
    """Encodes conversations as the chat template renders them."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, longest: int = 192) -> None:
        self.core = tokenizer.backend_tokenizer
        self.pad = int(tokenizer.convert_tokens_to_ids("<pad>"))
        self.longest = longest

    def encode(self, example: Example, rejected: bool = False) -> Encoded:
        """Encode a conversation with its answer or, where asked, the rejected one."""
        head = "".join(f"<|{role}|>{text}<|end|>" for role, text in example.messages)
        answer = example.rejected if rejected else example.answer
        start = self.core.encode(head + "<|assistant|>").ids
        return Encoded(start + self.core.encode(answer + "<|end|>").ids, len(start))

    def batch(self, items: list[Encoded], prompt_weight: float) -> Batch:
        """Pad encoded conversations to one batch."""
        width = max(len(item.ids) for item in items)
        ids = torch.full((len(items), width), self.pad)
        mask = torch.zeros((len(items), width), dtype=torch.long)
        weights = torch.zeros((len(items), width))
        for row, item in enumerate(items):
            size = len(item.ids)
            ids[row, :size] = torch.tensor(item.ids)
            mask[row, :size] = 1
            weights[row, 1:size] = prompt_weight
            weights[row, item.start : size] = 1.0
            weights[row, item.start] = FIRST_TOKEN_WEIGHT
        return Batch(ids, mask, weights)


def groups(lengths: list[int], size: int, seed: int) -> Iterator[list[int]]:
    """Yield shuffled groups of indices of similar length, for ever, epoch after epoch."""
    rng = random.Random(seed)
    while True:
        order = list(range(len(lengths)))
        rng.shuffle(order)
        found: list[list[int]] = []
        for at in range(0, len(order), size * 64):
            pool = sorted(order[at : at + size * 64], key=lambda i: lengths[i])
            found += [pool[i : i + size] for i in range(0, len(pool), size)]
        rng.shuffle(found)
        yield from found


def encode_all(encoder: Encoder, examples: Iterable[Example], seed: int) -> list[Encoded]:
    """Encode the answers of all examples, leaving out the few that are too long.

    Most answers end in boilerplate that is learned after a few hundred examples. A seeded share of
    them is cut after the decisive beginning, so that more prompts fit into the same time.
    """
    rng = random.Random(seed)
    found = []
    for example in examples:
        item = encoder.encode(example)
        keep, share = next((k, s) for begin, k, s in CUTS if example.answer.startswith(begin))
        if rng.random() < share:
            item = Encoded(item.ids[: item.start + keep], item.start)
        if len(item.ids) <= encoder.longest:
            found.append(item)
    return found


def encode_pairs(encoder: Encoder, examples: Iterable[Example]) -> list[tuple[Encoded, Encoded]]:
    """Encode chosen and rejected answers of all examples that have both."""
    found = ((encoder.encode(e), encoder.encode(e, True)) for e in examples if e.rejected)
    return [pair for pair in found if max(len(p.ids) for p in pair) <= encoder.longest]
