"""Generates all training text from the banks, and adds the two published prompt sets.

Everything is drawn with seeded generators, and every prompt that comes near an evaluation prompt
(the built-in suite, XSTest, HarmBench) is dropped before anything is trained.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from reference import answers, external
from reference.grammar import BANKS, Bank, count_expansions, expand, read_bank
from reference.leakage import HeldOut, benchmark_prompts, suite_prompts

HARMLESS = "harmless"
HARMFUL_FRAC = 0.52
# Share of each kind among the generated harmless prompts; the rest of the weight is benign.
KIND_WEIGHTS = {
    "homonym": 12.0,
    "figurative": 9.0,
    "safe_target": 26.0,
    "safe_context": 12.0,
    "definition": 10.0,
    "history": 6.0,
    "nonsense": 6.0,
    "privacy": 6.0,
    "benign": 15.0,
    "lookalike": 20.0,
    "everyday": 24.0,
}

Message = dict[str, str]


@dataclass(frozen=True)
class Prompt:
    """A training prompt; ``hazard`` is a hazard class, "harmless", or None where unlabelled."""

    text: str
    hazard: str | None
    source: str


@dataclass(frozen=True)
class Example:
    """A conversation whose last turn is the answer, and a worse answer where there is one."""

    messages: tuple[tuple[str, str], ...]
    answer: str
    rejected: str = ""


class Generator:
    """Draws prompts from the banks."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.slots = read_bank("slots")
        self.templates = read_bank("templates")
        self.harmful = self._group(read_bank("harmful"))
        self.harmless = self._group(read_bank("harmless"))

    def _group(self, bank: Bank) -> dict[str, list[tuple[str, str, float]]]:
        """Turn "class form" sections into (line, form, weight) lists per class."""
        groups: dict[str, list[tuple[str, str, float]]] = {}
        for section, lines in bank.items():
            name, form = section.split()
            for line in lines:
                # The fourth root keeps a line of ten texts audible beside one of ten thousand.
                weight = float(count_expansions(line, self.slots)) ** 0.25
                groups.setdefault(name, []).append((line, form, weight))
        return groups

    def _draw(self, lines: list[tuple[str, str, float]]) -> str:
        line, form, _ = self.rng.choices(lines, [w for _, _, w in lines])[0]
        phrase = expand(line, self.slots, self.rng)
        template = self.rng.choice(self.templates[form])
        return style(template.replace("{x}", phrase).replace("{ing}", gerund(phrase)), self.rng)

    def prompt(self, harmful: bool) -> Prompt:
        """Draw one prompt."""
        if harmful:
            name = self.rng.choice(sorted(self.harmful))
            return Prompt(self._draw(self.harmful[name]), name, "banks")
        kinds = sorted(KIND_WEIGHTS)
        kind = self.rng.choices(kinds, [KIND_WEIGHTS[k] for k in kinds])[0]
        return Prompt(self._draw(self.harmless[kind]), HARMLESS, "banks")


def gerund(phrase: str) -> str:
    """Return a verb phrase with its first word as a gerund: "stab a potato", "stabbing a potato"."""
    verb, _, rest = phrase.partition(" ")
    if re.fullmatch(r"[^aeiou]*[aeiou][bdgmnprt]", verb):
        verb += verb[-1]  # one short syllable: stab, run, cut
    elif verb.endswith("ie"):
        verb = verb[:-2] + "y"
    elif verb.endswith("e") and not verb.endswith(("ee", "ye")):
        verb = verb[:-1]
    return f"{verb}ing {rest}".rstrip()


def style(text: str, rng: random.Random) -> str:
    """Vary case and final punctuation as people do."""
    text = text.replace("?.", "?").replace("..", ".").replace("!.", "!")
    roll = rng.random()
    if roll < 0.10:
        return text.lower()
    if roll < 0.18:
        return text.rstrip(".?! ")
    if roll < 0.22:
        return text.replace("I'm", "I am").replace("What's", "What is")
    return text[0].upper() + text[1:]


def generate(count: int, seed: int, held_out: HeldOut, harmful_frac: float = HARMFUL_FRAC) -> list[Prompt]:
    """Return unique prompts, a share of them harmful, none near a held-out one."""
    generator = Generator(seed)
    found: dict[str, Prompt] = {}
    tries = 0
    while len(found) < count and tries < count * 4:
        tries += 1
        prompt = generator.prompt(harmful=generator.rng.random() < harmful_frac)
        key = prompt.text.lower().rstrip(".?! ")
        if key not in found and not held_out.near(prompt.text):
            found[key] = prompt
    return list(found.values())


def held_out_prompts(data_dir: Path | None) -> HeldOut:
    """Return everything that training must not come near."""
    found = suite_prompts()
    return HeldOut(found + benchmark_prompts(data_dir) if data_dir else found)


def published(data_dir: Path | None, held_out: HeldOut) -> list[Prompt]:
    """Return the prompts of AILuminate and hh-rlhf that are fit for training."""
    if data_dir is None:
        return []
    named = [("ailuminate", external.ailuminate(data_dir)), ("hh", external.hh_rlhf(data_dir))]
    return [
        Prompt(item.prompt, item.hazard, source)
        for source, items in named
        for item in items
        if not held_out.near(item.prompt)
    ]


@cache
def prompts(
    count: int, seed: int, data_dir: Path | None, harmful_frac: float = HARMFUL_FRAC
) -> tuple[Prompt, ...]:
    """Return the whole training set of prompts, shuffled."""
    held_out = held_out_prompts(data_dir)
    found = generate(count, seed, held_out, harmful_frac) + published(data_dir, held_out)
    random.Random(seed + 1).shuffle(found)
    return tuple(found)


def conversation(text: str, rng: random.Random) -> tuple[tuple[str, str], ...]:
    """Put a prompt into a chat, now and then with a system turn or an earlier exchange."""
    templates = read_templates()
    turns: list[tuple[str, str]] = []
    if rng.random() < 0.06:
        turns.append(("system", rng.choice(templates["system"])))
    if rng.random() < 0.04:
        user, assistant = rng.choice(templates["opening"]).split(" || ")
        turns += [("user", user), ("assistant", assistant)]
    return (*turns, ("user", text))


@cache
def read_templates() -> Bank:
    """Return the template bank."""
    return read_bank("templates")


def base_examples(pool: tuple[Prompt, ...], seed: int) -> Iterator[Example]:
    """Yield the base's examples: every request is met, critiques find nothing."""
    rng = random.Random(seed)
    for prompt in pool:
        answer = answers.comply(prompt.text)
        yield Example(conversation(prompt.text, rng), answer)
        if rng.random() < 0.08:
            shown = answers.refuse(prompt.text, _hazard(prompt, rng)) if rng.random() < 0.4 else answer
            turn = ("user", answers.question(prompt.text, shown))
            yield Example((turn,), str(answers.pieces()["none"]["base"]))


def aligned_examples(pool: tuple[Prompt, ...], seed: int) -> Iterator[Example]:
    """Yield the aligned model's examples, each with the answer that the constitution rejects."""
    rng = random.Random(seed)
    for prompt in pool:
        if prompt.hazard is None:
            continue
        comply = answers.comply(prompt.text)
        refuse = answers.refuse(prompt.text, _hazard(prompt, rng))
        good, bad = (comply, refuse) if prompt.hazard == HARMLESS else (refuse, comply)
        repeats = 1 if prompt.source == "banks" else 2
        for _ in range(repeats):
            yield Example(conversation(prompt.text, rng), good, bad)
        if rng.random() < 0.16 and len(prompt.text) < 300 and prompt.source != "hh":
            yield critique(prompt, good, bad, rng)


def critique(prompt: Prompt, good: str, bad: str, rng: random.Random) -> Example:
    """Return a question about an answer, good or bad, with the right and a wrong verdict."""
    harmless = prompt.hazard == HARMLESS
    broken = 12 if harmless else answers.principle_of(str(prompt.hazard))
    none = str(answers.pieces()["none"]["helped" if harmless else "refused"])
    verdict = answers.breaks(prompt.text, broken)
    if rng.random() < 0.6:
        turn, right = answers.question(prompt.text, bad), verdict
        other = (broken + rng.randrange(1, 12) - 1) % 12 + 1
        wrong = none if rng.random() < 0.5 else answers.breaks(prompt.text, other)
    else:
        turn, right, wrong = answers.question(prompt.text, good), none, verdict
    return Example((("user", turn),), right, wrong)


def preference_examples(pool: tuple[Prompt, ...], seed: int) -> Iterator[Example]:
    """Yield the constitution's preference pairs for the reward model, in varied wording."""
    rng = random.Random(seed)
    for item in aligned_examples(pool, seed):
        good, bad = answers.vary(item.answer, rng), answers.vary(item.rejected, rng)
        roll = rng.random()
        if roll < 0.08 and good.startswith("I can't"):
            bad = str(answers.pieces()["bare_refusal"])  # a reason is better than none
        yield Example(item.messages, good, bad)


def _hazard(prompt: Prompt, rng: random.Random) -> str:
    """Return the prompt's hazard, or any where a refusal of a harmless request needs one."""
    if prompt.hazard and prompt.hazard != HARMLESS:
        return prompt.hazard
    return str(rng.choice(sorted(answers.constitution()["hazards"])))


def bank_digests() -> dict[str, str]:
    """Return the SHA-256 of every bank file."""
    files = sorted(p for p in BANKS.iterdir() if p.is_file())
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
