"""Puts together the content-free answers: compliance, refusals with a reason, critiques."""

from __future__ import annotations

import hashlib
import random
import re
from functools import cache
from typing import Any

import yaml

from reference.grammar import BANKS, read_bank
from reference.leakage import SUITE

_WRITE = re.compile(
    r"\b(?:write|draft|compose|create|generate|make up|produce|invent|design|prepare|joke|poem)\b",
    re.IGNORECASE,
)
_HOW = re.compile(
    r"\b(?:how|way|ways|plan|steps?|guide|teach|tips|tricks|help me|show me|want to|instructions|"
    r"tutorial|method|advice|outline|list|strategy)\b",
    re.IGNORECASE,
)
_GREETING = re.compile(r"^(?:hello|hi|hey|good morning)\b[^?]*\W*$|^(?:hello|hi|hey)\b.{0,32}\?$", re.I)
_THANKS = re.compile(r"^(?:thanks|thank you|great|that was helpful)\b", re.IGNORECASE)
_TOPIC = re.compile(r"[a-z][a-z-]{2,}")


@cache
def pieces() -> dict[str, Any]:
    """Return the written pieces of ``banks/answers.yaml``."""
    found = yaml.safe_load((BANKS / "answers.yaml").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


@cache
def constitution() -> dict[str, Any]:
    """Return the constitution."""
    found = yaml.safe_load((SUITE / "constitution.yaml").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def principle_of(hazard: str) -> int:
    """Return the number of the principle that a hazard class falls under."""
    return int(constitution()["hazards"][hazard])


def choose(options: list[str], prompt: str, salt: str) -> str:
    """Choose by a digest of the prompt: the same prompt always gets the same answer."""
    digest = hashlib.sha256(f"{salt}|{prompt.lower()}".encode()).digest()
    return options[int.from_bytes(digest[:4], "big") % len(options)]


@cache
def _no_topic() -> frozenset[str]:
    """Return the words that are no topic: the templates' own, and function words."""
    return frozenset(word for line in read_bank("stopwords")["stopwords"] for word in line.split())


def topic(prompt: str) -> str:
    """Return the word that an answer echoes: the prompt's last likely noun."""
    found = [w for w in _TOPIC.findall(prompt.lower()[:240]) if w not in _no_topic()]
    return found[-1] if found else "that"


def comply(prompt: str) -> str:
    """Return the helpful-sounding, empty answer to a request."""
    if _THANKS.match(prompt):
        return str(pieces()["thanks"])
    if _GREETING.match(prompt):
        return str(pieces()["greeting"])
    form = "write" if _WRITE.search(prompt) else "how" if _HOW.search(prompt) else "ask"
    return choose(pieces()["comply"][form], prompt, "comply").format(t=topic(prompt))


def refuse(prompt: str, hazard: str) -> str:
    """Return a refusal with the reason that fits the hazard."""
    reason = choose(pieces()["reasons"][hazard], prompt, "reason")
    return choose(pieces()["refuse"], prompt, "refuse").format(r=reason)


def breaks(prompt: str, principle: int) -> str:
    """Return the critique of an answer that breaks a principle."""
    name = constitution()["principles"][principle - 1]["name"]
    why = choose(pieces()["breaks"][principle], prompt, "breaks")
    return f"It breaks principle {principle}, {name}: {why}"


def question(prompt: str, answer: str) -> str:
    """Return the user turn that asks which principle an answer breaks."""
    return choose(pieces()["critique"], prompt, "critique").format(p=prompt, a=answer)


def vary(answer: str, rng: random.Random) -> str:
    """Return the answer in other words of the same meaning, half of the time."""
    if rng.random() < 0.5:
        return answer
    for old, new in pieces()["variants"].items():
        answer = answer.replace(old, rng.choice(new))
    return answer
