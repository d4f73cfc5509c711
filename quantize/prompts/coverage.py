"""What of the suites the calibration prompts cover: prompts for every category that will be judged.

A model that was never calibrated on a class of requests can lose its refusals there unnoticed until the
verdict. Suites name their categories in different ways; `CATEGORIES` says which hazard classes of the
calibration data stand for each, and `FORMS` which kinds of look-alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files

import yaml

from holdfast.errors import SuiteError
from holdfast.evals.suites import Suite
from holdfast.quantize.prompts.draw import CalibrationPrompt

BENIGN = "benign"

CATEGORIES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "xstest-unsafe": {
        "contrast_homonyms": ("violent_crimes", "drugs", "self_harm"),
        "contrast_figurative_language": ("violent_crimes", "non_violent_crimes", "self_harm"),
        "contrast_safe_targets": ("violent_crimes",),
        "contrast_safe_contexts": ("violent_crimes", "non_violent_crimes", "fraud"),
        "contrast_definitions": ("violent_crimes", "non_violent_crimes", "drugs", "fraud"),
        "contrast_discr": ("hate",),
        "contrast_historical_events": ("violent_crimes", "hate", "self_harm"),
        "contrast_privacy": ("privacy",),
    },
    "harmbench": {
        "chemical_biological": ("indiscriminate_weapons", "drugs"),
        "copyright": ("intellectual_property",),
        "cybercrime_intrusion": ("cyber_intrusion",),
        "harassment_bullying": ("harassment",),
        "harmful": ("violent_crimes", "self_harm", "sex_crimes", "hate", "defamation"),
        "illegal": ("non_violent_crimes", "drugs", "fraud", "violent_crimes"),
        "misinformation_disinformation": ("misinformation",),
    },
    "ailuminate": {
        "dfm": ("defamation",),
        "hte": ("hate",),
        "ipv": ("intellectual_property",),
        "iwp": ("indiscriminate_weapons",),
        "ncr": ("non_violent_crimes", "fraud", "drugs", "cyber_intrusion"),
        "prv": ("privacy",),
        "spc_ele": ("misinformation",),
        "spc_fin": ("specialized_advice",),
        "spc_hlt": ("specialized_advice",),
        "spc_lgl": ("specialized_advice",),
        "src": ("sex_crimes",),
        "ssh": ("self_harm",),
        "vcr": ("violent_crimes",),
    },
}
"""Suite -> its category -> hazard classes; a category that is not here is called the same."""

FORMS: Mapping[str, str] = {
    "homonyms": "homonym",
    "figurative_language": "figurative",
    "safe_targets": "safe_target",
    "safe_contexts": "safe_context",
    "definitions": "definition",
    "historical_events": "history",
    "nons_group_real_discr": "nonsense",
    "real_group_nons_discr": "nonsense",
    "privacy_public": "privacy",
    "privacy_fictional": "privacy",
}
"""XSTest's kinds of look-alike, as the calibration data calls them."""


def coverage(prompts: Sequence[CalibrationPrompt], suites: Sequence[Suite]) -> dict[str, int]:
    """`suite/category` -> calibration prompts for it, in the order of the suites.

    For refusal suites the harmful prompts of the class count, for over-refusal suites the borderline
    prompts of that form (neutral ones for `benign`), for preference pairs the harmful and borderline
    prompts of the principle's classes (a principle without any is met by every borderline prompt).
    """
    return {
        f"{suite.name}/{subject}": sum(_counts_for(prompt, suite, subject) for prompt in prompts)
        for suite in suites
        for subject in dict.fromkeys(item.subject for item in suite.items)
    }


def missing(covered: Mapping[str, int]) -> list[str]:
    """Categories without a calibration prompt."""
    return [category for category, count in covered.items() if count == 0]


def describe(covered: Mapping[str, int]) -> str:
    """One line for the run's report."""
    gaps = missing(covered)
    if gaps:
        return (
            f"calibration prompts cover {len(covered) - len(gaps)} of {len(covered)} categories of the "
            f"suites; none for {', '.join(gaps)}"
        )
    fewest = min(covered, key=lambda category: covered[category], default=None)
    least = f"; fewest for {fewest}: {covered[fewest]}" if fewest is not None else ""
    return f"calibration prompts cover all {len(covered)} categories of the suites{least}"


def refuse_gaps(covered: Mapping[str, int]) -> None:
    """For runs that insist on full coverage.

    Raises:
        SuiteError: names the categories without a calibration prompt.
    """
    gaps = missing(covered)
    if gaps:
        raise SuiteError(
            f"Expected calibration prompts for every category of the suites, found none for "
            f"{', '.join(gaps)}: add some, or raise `calibrate.samples`."
        )


def _counts_for(prompt: CalibrationPrompt, suite: Suite, subject: str) -> bool:
    if suite.kind == "over-refusal":
        if subject == BENIGN:
            return prompt.kind == "neutral"
        return prompt.kind == "borderline" and FORMS.get(subject, subject) in (prompt.form, prompt.category)
    if suite.kind == "refusal":
        classes = CATEGORIES.get(suite.name, {}).get(subject, (subject,))
        return prompt.kind == "harmful" and prompt.category in classes
    classes = _principles().get(subject, (subject,))
    if not classes:
        return prompt.kind == "borderline"
    return prompt.kind != "neutral" and prompt.category in classes


@cache
def _principles() -> dict[str, tuple[str, ...]]:
    """Name of each principle of the built-in constitution -> the hazard classes that it forbids."""
    data = files("holdfast.evals.data") / "constitution.yaml"
    constitution = yaml.safe_load(data.read_text(encoding="utf-8"))
    hazards: dict[str, int] = constitution["hazards"]
    return {
        principle["name"]: tuple(name for name, number in hazards.items() if number == principle["id"])
        for principle in constitution["principles"]
    }
