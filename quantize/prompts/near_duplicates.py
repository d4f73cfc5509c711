"""Near-duplicate prompts: which of two lists of texts say the same, whatever the spelling or order.

Three Jaccard indices are compared, each with its own threshold: of the words (catches another order), of
three-word shingles (one changed word in a long text) and of five-character shingles (another ending, a
typing error, two words written as one, scripts without spaces). Texts are normalised first, so that case,
punctuation, accents, compatibility characters and look-alike letters of other alphabets make no
difference. Shingling and the resemblance of shingle sets: Broder 1997, "On the resemblance and
containment of documents".
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SHINGLE_WORDS = 3
SHINGLE_CHARACTERS = 5
_WORD = re.compile(r"[^\W_]+")
_APOSTROPHES = re.compile("['\u2018\u2019\u02bc`\u00b4]")
# Cyrillic and Greek letters that look like a Latin one, after case folding.
_LOOK_ALIKES = str.maketrans("авеѕіјкмнорстухԁԛԝһαβεικνορτυχ", "abesijkmhopctyxdqwhabeikvoptux")

Features = frozenset[str]


def normalised(text: str) -> str:
    """Lower-case words with one space between them; what has no word is only folded and stripped."""
    plain = text.casefold() if text.isascii() else _plain(text)
    return " ".join(_WORD.findall(_APOSTROPHES.sub("", plain))) or plain.strip()


def _plain(text: str) -> str:
    """Folded text without accents, invisible characters and look-alike letters."""
    decomposed = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).casefold())
    kept = "".join(c for c in decomposed if unicodedata.category(c) not in ("Mn", "Cf"))
    return unicodedata.normalize("NFKC", kept).translate(_LOOK_ALIKES)


def word_set(text: str) -> Features:
    """Words of a normalised text."""
    return frozenset(text.split())


def shingles(text: str) -> Features:
    """Overlapping three-word sequences of a normalised text; a shorter text is one of its own."""
    parts = text.split()
    count = max(1, len(parts) - SHINGLE_WORDS + 1)
    return frozenset(" ".join(parts[start : start + SHINGLE_WORDS]) for start in range(count))


def character_shingles(text: str) -> Features:
    """Overlapping five-character sequences of a normalised text with a space at either end."""
    padded = f" {text} "
    count = max(1, len(padded) - SHINGLE_CHARACTERS + 1)
    return frozenset(padded[start : start + SHINGLE_CHARACTERS] for start in range(count))


MEASURES: tuple[tuple[Callable[[str], Features], float], ...] = (
    (word_set, 0.75),
    (shingles, 0.6),
    (character_shingles, 0.7),
)
"""What is compared, and from which Jaccard index on two texts count as near duplicates."""


@dataclass(frozen=True)
class Closest:
    """The text of the other list that a text comes closest to.

    Attributes:
        closeness: largest of the three Jaccard indices by its threshold; near duplicates have 1 or more.
    """

    text: str
    other: str
    closeness: float

    @property
    def is_duplicate(self) -> bool:
        return self.closeness >= 1.0


def closest(texts: Sequence[str], others: Sequence[str]) -> list[Closest]:
    """For every text the nearest of the others, in the order of `texts`; no others, no result."""
    if not others:
        return []
    rows = _closeness(texts, others)
    return [_nearest(text, others, row) for text, row in zip(texts, rows, strict=True)]


def closest_within(texts: Sequence[str]) -> list[Closest]:
    """For every text the nearest of the rest of the list; nothing for fewer than two texts."""
    found = []
    for place, row in enumerate(_closeness(texts, texts) if len(texts) > 1 else ()):
        row[place] = -1.0  # itself
        found.append(_nearest(texts[place], texts, row))
    return found


def _nearest(text: str, others: Sequence[str], closeness: NDArray[np.float64]) -> Closest:
    best = int(closeness.argmax())
    return Closest(text, others[best], float(closeness[best]))


def _closeness(texts: Sequence[str], others: Sequence[str]) -> Iterator[NDArray[np.float64]]:
    """For every text, float64 [others]: the largest Jaccard index by its threshold."""
    theirs = [normalised(other) for other in others]
    indices = [_Index(map(features, theirs), len(theirs)) for features, _ in MEASURES]
    for text in texts:
        own = normalised(text)
        yield np.max(
            [
                index.jaccard(features(own)) / threshold
                for index, (features, threshold) in zip(indices, MEASURES, strict=True)
            ],
            axis=0,
        )


class _Index:
    """Feature -> numbers of the texts that hold it, so that only what is shared costs time."""

    def __init__(self, texts: Iterable[Features], count: int) -> None:
        postings: dict[str, list[int]] = {}
        self.sizes = np.zeros(count)
        for number, features in enumerate(texts):
            self.sizes[number] = len(features)
            for feature in features:
                postings.setdefault(feature, []).append(number)
        self.postings = {feature: np.array(found) for feature, found in postings.items()}

    def jaccard(self, features: Features) -> NDArray[np.float64]:
        """Jaccard index with every text, float64 [texts]."""
        shared = [self.postings[feature] for feature in features if feature in self.postings]
        if not shared:
            return np.zeros_like(self.sizes)
        common = np.bincount(np.concatenate(shared), minlength=len(self.sizes))
        return common / (self.sizes + len(features) - common)
