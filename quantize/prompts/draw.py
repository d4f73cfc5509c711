"""Calibration prompts: harmful, borderline (harmless but harmful-sounding) and neutral ones.

The mixture matters as much as the loss: without harmless look-alikes, contrastive calibration learns to
refuse more than the original (measured, see the documentation). No prompt of an evaluation suite may be
among them.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.resources import files
from itertools import chain, zip_longest
from pathlib import Path
from typing import Literal, get_args

import msgspec

from holdfast.config import Config
from holdfast.errors import CalibrationError, RecipeError, SuiteError
from holdfast.files import sha256_text
from holdfast.quantize.prompts.near_duplicates import closest, normalised

Kind = Literal["harmful", "borderline", "neutral"]
KINDS: tuple[Kind, ...] = get_args(Kind)
BUILTIN = "builtin"
EVEN: Mapping[str, float] = {kind: 1.0 for kind in KINDS}
MIN_OF_KIND = 4  # of every kind that is drawn at all: at least three to learn from, one held out
MIN_HELD_OUT = 1


class CalibrationPrompt(Config, frozen=True):
    """One prompt.

    Attributes:
        kind: what a well aligned model does with it: refuse `harmful`, answer the other two.
        category: hazard class as the suites name it (of a borderline prompt: the one it sounds like), or
            the topic of a neutral prompt.
        form: why a borderline prompt only sounds harmful, as the over-refusal suite names it: homonym,
            figurative, safe_target, safe_context, definition, history, nonsense or privacy.
    """

    prompt: str
    kind: Kind
    category: str = ""
    form: str = ""


# --- drawing ----------------------------------------------------------------------------------


def required_kinds(method: str, loss: str, *, ablated_twin: bool = False) -> tuple[Kind, ...]:
    """Kinds that a calibration cannot do without; the values are those of the recipe.

    The push away from the unaligned model learns from harmful prompts and is kept from overshooting by
    both harmless kinds. Without a push, candidates are still chosen by flips in both directions. The
    other methods only sample activations, of whatever prompts there are.
    """
    if ablated_twin or (method in ("contrastive", "qat") and loss in ("bounded", "apc")):
        return KINDS
    return ("harmful", "borderline") if method in ("contrastive", "qat") else ()


def load_calibration(
    data: str,
    samples: int,
    seed: int,
    mixture: Mapping[str, float] | None = None,
    *,
    required: Collection[Kind] = KINDS,
) -> list[CalibrationPrompt]:
    """Draw prompts by the weights of the kinds and evenly over the categories, in a seeded order.

    Every beginning of the list has about the mixture of the whole.

    Arguments:
        data: `builtin`, or the path of a JSONL file of {"prompt", "kind", "category"?, "form"?}.
        samples: how many; fewer come back, in the same mixture, where the file holds too few of a kind.
        mixture: kind -> weight, in any unit; by default even. The counts follow by largest remainder.
        required: kinds that may not have the weight 0, see `required_kinds`.

    Raises:
        RecipeError: a weight is negative, not finite or 0 where the kind is required; an unknown kind.
        SuiteError: unreadable, malformed or empty file, a prompt twice, or too few prompts of a kind.
    """
    weights = _weights(EVEN if mixture is None else mixture, required)
    kinds = _by_kind(_read(data), weights, what=data)
    counts = _counts(samples, weights, {kind: len(found) for kind, found in kinds.items()})
    for kind, count in counts.items():
        if count < MIN_OF_KIND:
            raise SuiteError(
                f"Expected at least {MIN_OF_KIND} {kind} prompts among {samples} samples of {data}, the "
                f"mixture gives {count}: raise `calibrate.samples` or the weight of {kind}."
            )
    generator = random.Random(seed)
    drawn = {kind: _over_categories(kinds[kind], generator)[:count] for kind, count in counts.items()}
    places = [
        ((place + 0.5) / len(found), prompt)
        for found in drawn.values()
        for place, prompt in enumerate(found)
    ]
    return [prompt for _, prompt in sorted(places, key=lambda pair: pair[0])]


def hold_out(
    prompts: Sequence[CalibrationPrompt], held_out_frac: float, seed: int
) -> tuple[list[CalibrationPrompt], list[CalibrationPrompt]]:
    """Split into prompts to learn from and held-out ones, in the same proportions of kind and category.

    Both keep the order of `prompts`.

    Raises:
        CalibrationError: a kind would have none held out, or too few to learn from.
    """
    sizes = Counter(prompt.kind for prompt in prompts)
    counts = _apportion(round(len(prompts) * held_out_frac), sizes)
    min_learn = MIN_OF_KIND - MIN_HELD_OUT
    if not sizes or any(
        count < MIN_HELD_OUT or sizes[kind] - count < min_learn for kind, count in counts.items()
    ):
        raise CalibrationError(
            f"{len(prompts)} calibration prompts are too few to hold {held_out_frac:.0%} of them out: each "
            f"kind needs {min_learn} to learn from and {MIN_HELD_OUT} held out; raise `calibrate.samples`."
        )
    generator = random.Random(seed)
    chosen = {place for kind, count in counts.items() for place in _spread(prompts, kind, count, generator)}
    learn_from = [prompt for place, prompt in enumerate(prompts) if place not in chosen]
    return learn_from, [prompts[place] for place in sorted(chosen)]


def count_kinds(
    learn_from: Sequence[CalibrationPrompt], held_out: Sequence[CalibrationPrompt]
) -> dict[str, tuple[int, int]]:
    """kind -> (prompts learned from, prompts held out)."""
    return {
        kind: (sum(p.kind == kind for p in learn_from), sum(p.kind == kind for p in held_out))
        for kind in KINDS
    }


def _weights(mixture: Mapping[str, float], required: Collection[Kind]) -> dict[Kind, float]:
    """The positive weights, in the order of KINDS."""
    unknown = sorted(set(mixture) - set(KINDS))
    if unknown:
        raise RecipeError(
            f"`calibrate.mixture` weighs {', '.join(KINDS)}, found {', '.join(unknown)}: correct the name."
        )
    weights: dict[Kind, float] = {kind: float(mixture.get(kind, 0.0)) for kind in KINDS}
    if not all(0.0 <= weight < math.inf for weight in weights.values()) or not any(weights.values()):
        raise RecipeError(
            f"`calibrate.mixture` needs finite weights of at least 0, one of them above it, found "
            f"{dict(mixture)}: give, for example, 1 to every kind."
        )
    for kind in required:
        if not weights[kind]:
            raise RecipeError(
                f"`calibrate.mixture` gives {kind} prompts the weight 0, but this method and loss learn "
                "from them or judge by them: give a weight above 0, or choose another method."
            )
    return {kind: weight for kind, weight in weights.items() if weight}


def _apportion(total: int, weights: Mapping[Kind, float]) -> dict[Kind, int]:
    """Whole shares of `total` by largest remainder (Hamilton's method); ties go to the first kind."""
    whole = sum(weights.values())
    exact = {kind: total * weight / whole for kind, weight in weights.items()}
    shares = {kind: math.floor(share) for kind, share in exact.items()}
    by_remainder = sorted(shares, key=lambda kind: shares[kind] - exact[kind])
    for kind in by_remainder[: total - sum(shares.values())]:
        shares[kind] += 1
    return shares


def _counts(samples: int, weights: Mapping[Kind, float], available: Mapping[Kind, int]) -> dict[Kind, int]:
    """How many of each kind: the largest draw of at most `samples` for which the file holds enough."""
    whole = sum(weights.values())
    most = min(math.ceil((available[kind] + 1) * whole / weights[kind]) for kind in weights)
    for total in range(min(samples, most), 0, -1):
        shares = _apportion(total, weights)
        if all(count <= available[kind] for kind, count in shares.items()):
            return shares
    return dict.fromkeys(weights, 0)


def _over_categories(
    prompts: Sequence[CalibrationPrompt], generator: random.Random
) -> list[CalibrationPrompt]:
    """Shuffled, and every category in turn, so that a few prompts cover many categories."""
    shuffled = list(prompts)
    generator.shuffle(shuffled)
    categories: dict[str, list[CalibrationPrompt]] = {}
    for prompt in shuffled:
        categories.setdefault(prompt.category, []).append(prompt)
    return [prompt for prompt in chain(*zip_longest(*categories.values())) if prompt is not None]


def _spread(
    prompts: Sequence[CalibrationPrompt], kind: Kind, count: int, generator: random.Random
) -> list[int]:
    """Places of `count` prompts of a kind: drawn at random, but at even distances over the categories."""
    places = [place for place, prompt in enumerate(prompts) if prompt.kind == kind]
    generator.shuffle(places)
    places.sort(key=lambda place: prompts[place].category)  # stable: each category stays shuffled
    return [places[(2 * step + 1) * len(places) // (2 * count)] for step in range(count)]


# --- refusing ---------------------------------------------------------------------------------


def refuse_leakage(prompts: Sequence[CalibrationPrompt], evaluation: Sequence[str]) -> None:
    """Refuse calibration prompts that an evaluation suite holds too, word for word or nearly.

    The same words are found by hash, near duplicates as `near_duplicates` describes.

    Raises:
        SuiteError: names the first leaking prompt, what it is too close to, and how many there are.
    """
    exact = {sha256_text(normalised(text)) for text in evaluation}
    found = closest([prompt.prompt for prompt in prompts], evaluation)
    leaking = [
        nearest
        for nearest in found
        if nearest.is_duplicate or sha256_text(normalised(nearest.text)) in exact
    ]
    if leaking:
        raise SuiteError(
            f"{len(leaking)} calibration prompts are in an evaluation suite too, the first is "
            f"{leaking[0].text!r}, close to {leaking[0].other!r}: remove them from the calibration data, "
            "or the verdict is about prompts that were learned."
        )


def refuse_too_long(
    prompts: Sequence[CalibrationPrompt],
    token_ids: Sequence[Sequence[int]],
    *,
    context: int,
    response_tokens: int,
) -> None:
    """Refuse prompts that leave no room for the answer in the model's context.

    Arguments:
        token_ids: the prompts as chats, see `sequences.chat_prompts`.
        context: tokens that the model can read, prompt and answer together.

    Raises:
        SuiteError: names the longest prompt.
    """
    longest = max(range(len(prompts)), key=lambda index: len(token_ids[index]), default=None)
    limit = context - response_tokens
    if longest is not None and len(token_ids[longest]) > limit:
        raise SuiteError(
            f"Expected calibration prompts of at most {limit} tokens (a context of {context}, less "
            f"{response_tokens} for the answer), found one of {len(token_ids[longest])}, "
            f"{prompts[longest].prompt[:60]!r}: shorten it or leave it out."
        )


# --- reading ----------------------------------------------------------------------------------


def _read(data: str) -> list[CalibrationPrompt]:
    source = (
        files("holdfast.quantize.prompts") / "data" / "calibration.jsonl" if data == BUILTIN else Path(data)
    )
    try:
        text = source.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise SuiteError(f"Calibration data {data} is not readable ({error}): check the path.") from error
    except UnicodeDecodeError as error:
        raise SuiteError(
            f"Expected UTF-8 text in the calibration data {data}, found {error.object[error.start]:#04x} "
            f"at byte {error.start}: save the file as UTF-8."
        ) from None
    prompts = list(_parse(text, data))
    if not prompts:
        raise SuiteError(
            f"Expected a prompt a line in the calibration data {data}, found an empty file: add prompts of "
            f"every kind ({', '.join(KINDS)})."
        )
    return prompts


def _parse(text: str, what: str) -> Iterator[CalibrationPrompt]:
    """The prompts line by line; a line or a prompt that cannot be used ends it."""
    lines: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            prompt = msgspec.convert(json.loads(line), CalibrationPrompt)
        except (ValueError, msgspec.ValidationError) as error:
            raise SuiteError(
                f"{what}, line {number}: expected an object with `prompt` and `kind` "
                f"({', '.join(KINDS)}), found something else ({error}): correct the line."
            ) from None
        own = normalised(prompt.prompt)
        if not own:
            raise SuiteError(f"{what}, line {number}: expected a prompt, found an empty one: fill it in.")
        if own in lines:
            raise SuiteError(
                f"{what}, line {number}: expected every prompt once, found {prompt.prompt[:60]!r}, which "
                f"is in line {lines[own]} too: remove one of them."
            )
        lines[own] = number
        yield prompt


def _by_kind(
    prompts: Sequence[CalibrationPrompt], weights: Collection[Kind], *, what: str
) -> dict[Kind, list[CalibrationPrompt]]:
    """The prompts of every kind that is drawn.

    Raises:
        SuiteError: none or too few of a kind.
    """
    kinds = {kind: [p for p in prompts if p.kind == kind] for kind in weights}
    missing = [kind for kind, found in kinds.items() if not found]
    if missing:
        raise SuiteError(
            f"Calibration data {what} holds no {' and no '.join(missing)} prompts, all {len(prompts)} are "
            f"{' or '.join(sorted({p.kind for p in prompts}))}: add some, calibration compares the kinds."
        )
    for kind, found in kinds.items():
        if len(found) < MIN_OF_KIND:
            raise SuiteError(
                f"Expected at least {MIN_OF_KIND} {kind} prompts in the calibration data {what}, found "
                f"{len(found)}: add more."
            )
    return kinds
