"""Puts together the content-free answers: compliance, refusals with a reason, critiques."""

from __future__ import annotations

import hashlib
import random
import re
from functools import cache
from typing import Any

import yaml

from reference.grammar import BANKS
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
# Words that are no topic: the templates' own and the commonest verbs, adverbs and function words.
_NO_TOPIC = frozenset(
    """about able above advice after again all also always and another answer answers any anyone are
    around ask asked assistant author away bad because been before beginner being best better between
    blog boring brief brother but came can caught checklist class come coach compose could create curious
    decide decided describe design detailed develop did directions does doing done draft each easiest
    easy else enough ever every everyone example expert explain explains failed fast fastest few find
    first follow for friend from generate get getting gets give going good guide had has have hello help
    helpful helps her here him his home how idea ideas imagine important including instructions into
    invent its just kind know last learn let lets like list little look made make makes making manual many
    mean means method methods mistakes money more most much must name need needed needs never new next
    not noticed noticing now off okay once one only other our out outline own people person persuasive
    plan please point possible prepare pretend produce provide question questions quick quickest quickly
    real really request right safe safely safest said same say saying says sentences shall she short
    should show shows simple simply some someone something soon sound sounds start step step-by-step
    steps strategy such suggest sure tell text than that the their them then there these they thing
    things think this those tips today told tomorrow too tools trick tricks trying tutorial two use used
    uses using very walk want wants warning was way ways weekend were what when where which while who
    whole why will with without wonder work works would write writer writing year yes you your yourself
    """.split()
)


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


def topic(prompt: str) -> str:
    """Return the word that an answer echoes: the prompt's last likely noun."""
    found = [w for w in _TOPIC.findall(prompt.lower()[:240]) if w not in _NO_TOPIC]
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
