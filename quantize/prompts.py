"""Calibration prompts: harmful, borderline (harmless but harmful-sounding) and neutral ones.

The mixture matters as much as the loss: without harmless look-alikes, contrastive calibration learns to
refuse more than the original (measured, see the documentation). No prompt of an evaluation suite may be
among them.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from importlib.resources import files
from itertools import chain, zip_longest
from pathlib import Path
from typing import Literal, get_args

import msgspec

from holdfast.config import Config
from holdfast.errors import CalibrationError, SuiteError
from holdfast.files import sha256_text

Kind = Literal["harmful", "borderline", "neutral"]
KINDS: tuple[Kind, ...] = get_args(Kind)
BUILTIN = "builtin"
SHINGLE_WORDS = 3
NEAR_DUPLICATE_JACCARD = 0.6


class CalibrationPrompt(Config, frozen=True):
    """One prompt.

    Attributes:
        kind: what a well aligned model does with it: refuse `harmful`, answer the other two.
        category: hazard of the MLCommons taxonomy, or topic.
    """

    prompt: str
    kind: Kind
    category: str = ""


def load_calibration(data: str, samples: int, seed: int) -> list[CalibrationPrompt]:
    """Draw prompts evenly over the kinds, in a seeded order.

    Arguments:
        data: `builtin`, or the path of a JSONL file of {"prompt", "kind", "category"?}.
        samples: how many; fewer come back where the file holds fewer.

    Raises:
        SuiteError: unreadable, malformed or empty file, or a kind is missing.
    """
    kinds = _by_kind(_read(data), what=data)
    generator = random.Random(seed)
    for prompts in kinds.values():
        generator.shuffle(prompts)
    drawn = [prompt for prompt in chain(*zip_longest(*kinds.values())) if prompt is not None]
    return drawn[:samples]


def hold_out(
    prompts: Sequence[CalibrationPrompt], held_out_frac: float, seed: int
) -> tuple[list[CalibrationPrompt], list[CalibrationPrompt]]:
    """Split into prompts to learn from and held-out ones, in the same proportion for every kind.

    Raises:
        CalibrationError: a side would be empty.
    """
    learn_from: list[CalibrationPrompt] = []
    held_out: list[CalibrationPrompt] = []
    generator = random.Random(seed)
    for kind in KINDS:
        same = [prompt for prompt in prompts if prompt.kind == kind]
        generator.shuffle(same)
        count = round(len(same) * held_out_frac)
        held_out += same[:count]
        learn_from += same[count:]
    if not learn_from or not held_out:
        raise CalibrationError(
            f"{len(prompts)} calibration prompts are too few to hold {held_out_frac:.0%} of them out: "
            "raise `calibrate.samples`."
        )
    return learn_from, held_out


def count_kinds(
    learn_from: Sequence[CalibrationPrompt], held_out: Sequence[CalibrationPrompt]
) -> dict[str, tuple[int, int]]:
    """kind -> (prompts learned from, prompts held out)."""
    return {
        kind: (sum(p.kind == kind for p in learn_from), sum(p.kind == kind for p in held_out))
        for kind in KINDS
    }


def refuse_leakage(prompts: Sequence[CalibrationPrompt], evaluation: Sequence[str]) -> None:
    """Refuse calibration prompts that an evaluation suite holds too, word for word or nearly.

    Near duplicates are found by the Jaccard index of normalised three-word shingles; prompts that share
    no shingle are never compared.

    Raises:
        SuiteError: names the first leaking prompt and how many there are.
    """
    exact = {sha256_text(" ".join(words(text))) for text in evaluation}
    index = _shingle_index(evaluation)
    leaking = [
        prompt.prompt
        for prompt in prompts
        if sha256_text(" ".join(words(prompt.prompt))) in exact
        or _nearest_jaccard(prompt.prompt, index) >= NEAR_DUPLICATE_JACCARD
    ]
    if leaking:
        raise SuiteError(
            f"{len(leaking)} calibration prompts are in an evaluation suite too, the first is "
            f"{leaking[0]!r}: remove them from the calibration data, or the verdict is about "
            "prompts that were learned."
        )


def words(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return re.findall(r"[\w']+", text.lower())


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    """Overlapping three-word sequences; a shorter text is one shingle of its own."""
    parts = words(text)
    count = max(1, len(parts) - SHINGLE_WORDS + 1)
    return frozenset(tuple(parts[start : start + SHINGLE_WORDS]) for start in range(count))


def jaccard(a: frozenset[tuple[str, ...]], b: frozenset[tuple[str, ...]]) -> float:
    """Size of the intersection by size of the union, 0 to 1."""
    return len(a & b) / len(a | b)


_Shingles = frozenset[tuple[str, ...]]


def _shingle_index(texts: Sequence[str]) -> dict[tuple[str, ...], list[_Shingles]]:
    """Shingle -> the shingle sets of the texts that hold it."""
    index: dict[tuple[str, ...], list[_Shingles]] = {}
    for text in texts:
        own = shingles(text)
        for shingle in own:
            index.setdefault(shingle, []).append(own)
    return index


def _nearest_jaccard(text: str, index: dict[tuple[str, ...], list[_Shingles]]) -> float:
    own = shingles(text)
    others = (other for shingle in own for other in index.get(shingle, []))
    return max((jaccard(own, other) for other in others), default=0.0)


def _read(data: str) -> list[CalibrationPrompt]:
    try:
        if data == BUILTIN:
            text = (files("holdfast.quantize") / "data" / "calibration.jsonl").read_text("utf-8")
        else:
            text = Path(data).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SuiteError(f"Calibration data {data} is not readable ({error}).") from error
    return list(_parse(text, data))


def _parse(text: str, what: str) -> Iterator[CalibrationPrompt]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield msgspec.convert(json.loads(line), CalibrationPrompt)
        except (ValueError, msgspec.ValidationError) as error:
            raise SuiteError(
                f"{what}, line {number}: expected an object with `prompt` and `kind` "
                f"({', '.join(KINDS)}), found something else ({error})."
            ) from None


def _by_kind(prompts: Sequence[CalibrationPrompt], *, what: str) -> dict[Kind, list[CalibrationPrompt]]:
    kinds: dict[Kind, list[CalibrationPrompt]] = {
        kind: [p for p in prompts if p.kind == kind] for kind in KINDS
    }
    missing = [kind for kind, found in kinds.items() if not found]
    if missing:
        raise SuiteError(
            f"Calibration data {what} holds no {' and no '.join(missing)} prompts: the push away from "
            "the unaligned model needs all three kinds."
        )
    return kinds
