"""Reads the phrase banks and expands their little grammar.

A bank line is text with alternatives ``(a|b|)`` (not nested) and slots ``{name}``; slot lines may
again hold alternatives and slots. Expansion is a seeded random walk, so one seed gives one text.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

BANKS = Path(__file__).parent / "banks"
_ALTERNATIVES = re.compile(r"\(([^()]*)\)")
_SLOT = re.compile(r"\{(\w+)\}")
_SPACES = re.compile(r"\s+")
_SPACE_BEFORE = re.compile(r"\s+([,.?!])")

Bank = dict[str, list[str]]


def read_bank(name: str) -> Bank:
    """Read ``banks/<name>.txt``: ``# section`` headings, one phrase per line."""
    bank: Bank = {}
    section = ""
    for raw in (BANKS / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        line = raw.strip()
        if line.startswith("# "):
            section = line[2:]
            bank.setdefault(section, [])
        elif line:
            bank[section].append(line)
    return bank


def count_expansions(line: str, slots: Bank) -> int:
    """Return how many texts the line can make (an upper bound: duplicates count)."""
    total = 1
    for group in _ALTERNATIVES.findall(line):
        total *= sum(count_expansions(part, slots) for part in group.split("|"))
    for slot in _SLOT.findall(_ALTERNATIVES.sub("", line)):
        total *= sum(count_expansions(option, slots) for option in slots[slot])
    return total


def expand(line: str, slots: Bank, rng: random.Random) -> str:
    """Make one text from a bank line."""
    while True:
        # Alternatives first: a slot in an option that was not chosen is never drawn.
        text = _ALTERNATIVES.sub(lambda m: rng.choice(m.group(1).split("|")), line)
        text = _SLOT.sub(lambda m: _draw(slots[m.group(1)], slots, rng), text)
        if text == line:
            break
        line = text
    return _SPACE_BEFORE.sub(r"\1", _SPACES.sub(" ", text)).strip()


def _draw(options: list[str], slots: Bank, rng: random.Random) -> str:
    weights = [count_expansions(option, slots) for option in options]
    return rng.choices(options, weights)[0]
