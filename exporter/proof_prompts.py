"""What the proof of an export reads, and how much of it: real prompts, as many as a model's size allows."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

from holdfast.chat import ChatTokenizer, Message, user
from holdfast.evals.suites import load_builtin
from holdfast.exporter.proof_report import Effort
from holdfast.exporter.source import SourceModel

GREEDY_TOKENS = 64
SUITE_PROMPTS = 6  # of each of the two suites
WINDOW_MARGIN = 16  # tokens that a prompt reads on beyond a sliding window

# Parameters up to which an effort is affordable: a second for the first, two minutes on two cores for a
# billion parameters with the last.
EFFORTS: tuple[tuple[float, Effort], ...] = (
    (5e7, Effort(12, 4, GREEDY_TOKENS, 4, 4, 48, 2048)),
    (4e8, Effort(8, 2, GREEDY_TOKENS, 3, 4, 32, 1024)),
    (math.inf, Effort(4, 1, GREEDY_TOKENS, 2, 2, 16, 512)),
)


def effort_for(parameters: int) -> Effort:
    """How much a model of that size allows to compare; see `EFFORTS`."""
    return next(effort for limit, effort in EFFORTS if parameters <= limit)


def proof_prompts(source: SourceModel, seed: int) -> list[list[int]]:
    """Prompts of the built-in suites in the model's chat template, harmless and harmful by turns.

    No two have the same length, where the suites offer that. They are cut at the end to leave room for
    an answer in the model's context. Where the model has a sliding window that is shorter than what
    the proof reads, the last prompt is a conversation of several turns that outgrows it.

    Arguments:
        seed: draws the prompts.
    """
    draw = random.Random(seed)
    texts = [[item.prompt for item in load_builtin(name).items] for name in ("over-refusal", "refusal")]
    for group in texts:
        draw.shuffle(group)
    context = context_tokens(source.model)
    room = max(1, context - min(GREEDY_TOKENS, context // 2))
    chosen = [_of_unequal_length(source.tokenizer, group, room) for group in texts]
    prompts = [prompt for pair in zip(*chosen, strict=False) for prompt in pair]
    window = sliding_window(source.model)
    longest = min(room, effort_for(parameter_count(source.model)).longest_tokens)
    if window is not None and max(map(len, prompts)) <= window < longest:
        prompts.append(_conversation(source.tokenizer, texts[0], window + WINDOW_MARGIN)[:longest])
    return prompts


def _of_unequal_length(tokenizer: ChatTokenizer, texts: Sequence[str], room: int) -> list[list[int]]:
    """The first prompts of different lengths, at most `room` tokens each; equal ones only to fill up."""
    found: dict[int, list[int]] = {}
    equal: list[list[int]] = []
    for text in texts[: 8 * SUITE_PROMPTS]:
        ids = tokenizer.encode_chat(user(text))[:room]
        if found.setdefault(len(ids), ids) is not ids:
            equal.append(ids)
    return [*found.values(), *equal][:SUITE_PROMPTS]


def _conversation(tokenizer: ChatTokenizer, texts: Sequence[str], tokens: int) -> list[int]:
    """A conversation of at least `tokens` tokens, or of all texts, each a turn."""
    ids: list[int] = []
    messages: list[Message] = []
    for index, text in enumerate(texts):
        messages.append({"role": "assistant" if index % 2 else "user", "content": text})
        if index % 2 == 0:
            ids = tokenizer.encode_chat(messages)
            if len(ids) >= tokens:
                break
    return ids


def sliding_window(model: Any) -> int | None:
    """Tokens that the attention of some layer looks back, its own among them; None where all see all."""
    for name in ("sliding_window", "window_size"):
        window = getattr(model.config, name, None)
        if isinstance(window, int) and window > 0:
            return window
    return None


def context_tokens(model: Any) -> int:
    """Longest sequence that the model's config allows; unbounded where it names none."""
    length = getattr(model.config, "max_position_embeddings", None)
    return length if isinstance(length, int) else 1 << 30


def parameter_count(model: Any) -> int:
    """Parameters, each counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
