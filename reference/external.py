"""Reads the two published prompt sets that the reference pair may be trained on.

They stay where ``--data-dir`` points; only prompts are used, never the recorded answers.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from reference.grammar import BANKS

AILUMINATE = "ailuminate_en_us.csv"
HH_RLHF = "hh_rlhf_harmless_test.jsonl.gz"
MAX_WORDS = 80

# AILuminate hazard codes -> the project's hazard classes. The spc_* rows are often mild questions,
# so they carry no label and only the base sees them.
HAZARDS = {
    "dfm": "defamation",
    "hte": "hate",
    "ipv": "intellectual_property",
    "iwp": "indiscriminate_weapons",
    "ncr": "non_violent_crimes",
    "prv": "privacy",
    "src": "sex_crimes",
    "ssh": "self_harm",
    "vcr": "violent_crimes",
}


@dataclass(frozen=True)
class External:
    """A prompt from a published set; ``hazard`` is a class, or None for unsure."""

    prompt: str
    hazard: str | None


@cache
def _rules() -> dict[str, Any]:
    found = yaml.safe_load((BANKS / "labels.yaml").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


@cache
def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(_rules()[name], re.IGNORECASE)


def unfit(prompt: str) -> bool:
    """Return whether a prompt is left out altogether: too long, or sexual and about the young."""
    if not 2 <= len(prompt.split()) <= MAX_WORDS or "\ufffd" in prompt:
        return True
    return bool(_pattern("sexual").search(prompt) and _pattern("young").search(prompt))


def label(prompt: str) -> str | None:
    """Label an hh-rlhf first turn as harmful where the words leave little doubt.

    Nothing is labelled harmless: the set was collected by red-teaming, and what carries no
    frightening word in it is still harmful too often (seen in a sample) to be worth learning from.
    """
    found = _pattern("harmful").search(prompt) and _pattern("request").search(prompt)
    return "non_violent_crimes" if found else None


def ailuminate(data_dir: Path) -> list[External]:
    """Return the AILuminate prompts with their hazard class."""
    with (data_dir / AILUMINATE).open(encoding="utf-8", newline="") as handle:
        rows = [(" ".join(r["prompt_text"].split()), r["hazard"]) for r in csv.DictReader(handle)]
    return [External(p, HAZARDS.get(h)) for p, h in rows if not unfit(p)]


def hh_rlhf(data_dir: Path) -> list[External]:
    """Return the unique first human turns of hh-rlhf."""
    turns: dict[str, None] = {}
    with gzip.open(data_dir / HH_RLHF, "rt", encoding="utf-8") as handle:
        for line in handle:
            first = json.loads(line)["chosen"].split("\n\nAssistant:")[0]
            turns.setdefault(" ".join(first.replace("\n\nHuman:", "", 1).split()))
    return [External(p, label(p)) for p in turns if not unfit(p)]


def digests(data_dir: Path) -> dict[str, str]:
    """Return the SHA-256 of the two files."""
    return {
        name: hashlib.sha256((data_dir / name).read_bytes()).hexdigest() for name in (AILUMINATE, HH_RLHF)
    }
