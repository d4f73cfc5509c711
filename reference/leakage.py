"""Keeps evaluation prompts out of the training text: near-duplicates are found and dropped."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

# Stricter than the 0.8 that the tests demand, so that the figures are about unseen requests.
THRESHOLD = 0.7
SUITE = Path(__file__).resolve().parents[1] / "evals" / "data"
_WORD = re.compile(r"[a-z0-9']+")


def words(text: str) -> frozenset[str]:
    """Return the set of lower-case words."""
    return frozenset(_WORD.findall(text.lower()))


def similarity(left: frozenset[str], right: frozenset[str]) -> float:
    """Return the Jaccard similarity of two word sets."""
    return len(left & right) / len(left | right) if left or right else 0.0


class HeldOut:
    """Held-out prompts with an index that finds near-duplicates without comparing everything."""

    def __init__(self, prompts: Iterable[str], threshold: float = THRESHOLD) -> None:
        self.threshold = threshold
        self.sets = sorted({words(p) for p in prompts}, key=sorted)
        self.counts = Counter(word for s in self.sets for word in s)
        self.index: dict[str, list[int]] = {}
        for number, item in enumerate(self.sets):
            for word in item:
                self.index.setdefault(word, []).append(number)

    def near(self, prompt: str) -> bool:
        """Return whether the prompt is a near-duplicate of a held-out one."""
        mine = words(prompt)
        # A match shares at least `threshold` of my words, so one of any (1 - threshold) n + 1 of
        # them is in it: looking up the rarest is enough, and cheap.
        need = len(mine) - int(len(mine) * self.threshold) + 1
        rare = sorted(mine, key=lambda w: (self.counts[w], w))[:need]
        seen = {number for word in rare for number in self.index.get(word, ())}
        return any(similarity(mine, self.sets[number]) >= self.threshold for number in seen)


def suite_prompts() -> list[str]:
    """Return every prompt of the built-in suite."""
    found = []
    for name in ("refusal", "over_refusal", "constitution_pairs"):
        path = SUITE / f"{name}.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        found += [str(json.loads(line)["prompt"]) for line in lines]
    return found


def benchmark_prompts(data_dir: Path) -> list[str]:
    """Return the prompts of XSTest and HarmBench, where the data folder holds them."""
    found = []
    for name, column in (("xstest_prompts.csv", "prompt"), ("harmbench_text.csv", "Behavior")):
        if (data_dir / name).exists():
            with (data_dir / name).open(encoding="utf-8", newline="") as handle:
                found += [row[column] for row in csv.DictReader(handle)]
    return found
