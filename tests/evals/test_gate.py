"""The gate against built counter-examples: it finds real damage and does not cry wolf."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest

from holdfast.errors import ExitCode, SuiteError
from holdfast.evals.gate import MetricVerdict, Retention, Verdict, decide
from holdfast.evals.run import SuiteAnswers, run_suite
from holdfast.evals.suites import Suite
from holdfast.recipe import EvaluateConfig
from tests.evals.models import (
    COMPLIANCE,
    GARBAGE,
    REFUSAL,
    ScriptedModel,
    aligned,
    byte_tokenizer,
    chance,
    prefers,
    refuser,
    suites,
    unaligned,
)

CONFIG = EvaluateConfig(max_new_tokens=64)


def run(model: ScriptedModel, data: Sequence[Suite], config: EvaluateConfig = CONFIG) -> list[SuiteAnswers]:
    return [run_suite(model, suite, config) for suite in data]


def verdict_on(candidate: ScriptedModel, data: Sequence[Suite] | None = None, **changes: object) -> Verdict:
    data = suites() if data is None else data
    return decide(
        run(aligned(), data), run(candidate, data), CONFIG, twin=run(unaligned(), data), **changes
    )  # type: ignore[arg-type]


def by_name(verdict: Verdict) -> dict[str, MetricVerdict]:
    return {metric.metric: metric for metric in verdict.metrics}


def test_identical_answers_pass() -> None:
    verdict = verdict_on(aligned("copy"))
    assert verdict.outcome == "PASS"
    assert verdict.exit_code == ExitCode.VERIFIED
    assert list(by_name(verdict)) == [
        "refusal:refusal",
        "over-refusal:over-refusal",
        "preference:constitution",
        "coherence",
    ]
    for metric in verdict.metrics:
        assert (metric.paired.gained, metric.paired.lost) == (0, 0)
        assert metric.p_damage == 1.0
    refusal = by_name(verdict)["refusal:refusal"]
    assert refusal.separates
    assert refusal.retention == Retention(1.0, None, None)


def test_a_model_that_refuses_everything_fails_on_helpfulness_only() -> None:
    verdict = verdict_on(ScriptedModel("mute", lambda _: REFUSAL, prefers(0.9)))
    outcomes = {name: metric.outcome for name, metric in by_name(verdict).items()}
    assert verdict.outcome == "FAIL"
    assert verdict.exit_code == ExitCode.VERIFICATION_FAILED
    assert outcomes == {
        "refusal:refusal": "PASS",
        "over-refusal:over-refusal": "FAIL",
        "preference:constitution": "PASS",
        "coherence": "PASS",
    }
    assert "Lost: answers to harmless requests (over-refusal), " in verdict.summary


def test_a_model_that_complies_with_everything_fails_on_refusal() -> None:
    verdict = verdict_on(ScriptedModel("eager", lambda _: COMPLIANCE, prefers(0.9)))
    metrics = by_name(verdict)
    assert verdict.outcome == "FAIL"
    assert metrics["refusal:refusal"].outcome == "FAIL"
    assert metrics["refusal:refusal"].candidate.frac == 0.0
    assert metrics["over-refusal:over-refusal"].outcome == "PASS"


def test_a_looping_model_fails_on_coherence_and_earns_no_refusals() -> None:
    verdict = verdict_on(ScriptedModel("loop", lambda _: "I cannot " * 12, prefers(0.9)))
    metrics = by_name(verdict)
    assert metrics["coherence"].outcome == "FAIL"
    assert metrics["coherence"].candidate.safe == 0
    assert metrics["refusal:refusal"].candidate.safe == 0
    assert metrics["refusal:refusal"].outcome == "FAIL"


def test_a_model_that_breaks_on_a_tenth_of_its_answers_fails_on_coherence() -> None:
    sound = refuser(0.9, 0.05)
    verdict = verdict_on(
        ScriptedModel("worn", lambda p: GARBAGE if chance(p, "break") < 0.1 else sound(p), prefers(0.9))
    )
    assert by_name(verdict)["coherence"].outcome == "FAIL"


def test_lost_preferences_fail() -> None:
    verdict = verdict_on(ScriptedModel("turned", refuser(0.9, 0.05), prefers(0.6)))
    assert [m.metric for m in verdict.metrics if m.outcome == "FAIL"] == ["preference:constitution"]


def test_a_moderate_slide_towards_the_base_fails() -> None:
    verdict = verdict_on(ScriptedModel("slid", refuser(0.75, 0.03), prefers(0.9)))
    refusal = by_name(verdict)["refusal:refusal"]
    assert refusal.outcome == "FAIL"
    assert refusal.p_damage_holm <= 0.05
    assert refusal.retention is not None
    assert refusal.retention.high is not None
    assert refusal.retention.high < 1.0


def test_noise_of_a_lossless_rerun_passes() -> None:
    """2 % of the answers flip either way: no damage, and no cry of wolf."""
    sound = refuser(0.9, 0.05)

    def rerun(prompt: str) -> str:
        answer = sound(prompt)
        flipped = {REFUSAL: COMPLIANCE, COMPLIANCE: REFUSAL}[answer]
        return flipped if chance(prompt, "noise") < 0.01 else answer

    verdict = verdict_on(ScriptedModel("rerun", rerun, prefers(0.9)), suites(400))
    assert verdict.outcome == "PASS", verdict.summary


def test_tiny_samples_are_inconclusive_and_say_what_they_could_have_shown() -> None:
    verdict = verdict_on(aligned("copy"), suites(20, 20))
    assert verdict.outcome == "INCONCLUSIVE"
    assert verdict.exit_code == ExitCode.INCONCLUSIVE
    refusal = by_name(verdict)["refusal:refusal"]
    assert refusal.detectable_frac is not None
    assert f"{100 * refusal.detectable_frac:.1f} points" in refusal.reason
    assert "52 prompts would pass" in refusal.reason  # z^2 (1 - m) / m = 51.4 at m = 5 %


def test_one_lost_refusal_in_a_tiny_sample_is_no_damage() -> None:
    data = suites(20, 60)
    first = next(item.prompt for item in data[0].items if refuser(0.9, 0.05)(item.prompt) == REFUSAL)
    sound = refuser(0.9, 0.05)
    one_lost = ScriptedModel("one", lambda p: COMPLIANCE if p == first else sound(p), prefers(0.9))
    metric = by_name(verdict_on(one_lost, data))["refusal:refusal"]
    assert metric.paired.lost == 1
    assert metric.paired.delta_frac == -metric.margin_frac
    assert metric.outcome == "INCONCLUSIVE"


def test_three_prompts_can_show_nothing_at_all() -> None:
    metric = by_name(verdict_on(aligned("copy"), suites(3, 3)))["refusal:refusal"]
    assert metric.outcome == "INCONCLUSIVE"
    assert metric.detectable_frac is None
    assert "no loss at all would be detected" in metric.reason


def test_a_twin_that_refuses_as_often_cannot_certify() -> None:
    data = suites()
    verdict = decide(
        run(aligned(), data), run(aligned("copy"), data), CONFIG, twin=run(aligned("twin"), data)
    )
    refusal = by_name(verdict)["refusal:refusal"]
    assert verdict.outcome == "INCONCLUSIVE"
    assert (refusal.outcome, refusal.separates, refusal.retention) == ("INCONCLUSIVE", False, None)
    assert "does not tell them apart" in refusal.reason


def test_without_a_twin_no_safety_metric_passes() -> None:
    data = suites()
    verdict = decide(run(aligned(), data), run(aligned("copy"), data), CONFIG)
    metrics = by_name(verdict)
    assert verdict.outcome == "INCONCLUSIVE"
    assert "No unaligned twin" in metrics["refusal:refusal"].reason
    assert metrics["over-refusal:over-refusal"].outcome == "PASS"


def test_an_aligned_model_with_nothing_to_lose_cannot_certify() -> None:
    """A reference that refuses everything would let a mute candidate through."""
    data = suites()
    mute = ScriptedModel("mute", lambda _: REFUSAL, prefers(0.9))
    verdict = decide(run(mute, data), run(mute, data), CONFIG, twin=run(unaligned(), data))
    over_refusal = by_name(verdict)["over-refusal:over-refusal"]
    assert over_refusal.outcome == "INCONCLUSIVE"
    assert "losing all of them" in over_refusal.reason


@pytest.mark.parametrize("missing", ["refusal", "over-refusal"])
def test_a_verdict_that_looked_at_one_side_only_is_no_pass(missing: str) -> None:
    data = [suite for suite in suites() if suite.kind != missing]
    verdict = verdict_on(aligned("copy"), data)
    assert verdict.outcome == "INCONCLUSIVE"
    assert any(f"No {missing} suite" in gap for gap in verdict.gaps)


def test_the_noise_floor_is_reported_beside_the_candidate() -> None:
    data = suites()
    verdict = verdict_on(aligned("copy"), data, noise=run(aligned("fp32 graph"), data))
    for metric in verdict.metrics:
        assert metric.noise is not None
        assert (metric.noise.gained, metric.noise.lost) == (0, 0)
        assert metric.noise_rate == metric.baseline


def test_published_suites_are_gated_like_the_others() -> None:
    data = suites(100)
    renamed = [replace(data[0], name="harmbench"), replace(data[1], name="xstest-safe")]
    verdict = verdict_on(aligned("copy"), renamed)
    assert list(by_name(verdict)) == ["refusal:harmbench", "over-refusal:xstest-safe", "coherence"]
    assert verdict.outcome == "PASS"


def test_order_of_the_suites_does_not_matter() -> None:
    data = suites(60)
    straight = decide(run(aligned(), data), run(aligned("copy"), data), CONFIG, twin=run(unaligned(), data))
    turned = decide(
        run(aligned(), data), run(aligned("copy"), data[::-1]), CONFIG, twin=run(unaligned(), data[::-1])
    )
    assert straight == turned


def test_the_verdict_is_plain_data() -> None:
    data = verdict_on(aligned("copy")).to_dict()
    assert data["outcome"] == "PASS"
    assert data["metrics"][0]["paired"]["lost"] == 0


# --- what cannot be compared ------------------------------------------------------------------


def test_no_suites_is_an_error() -> None:
    with pytest.raises(SuiteError, match="no data is not a score"):
        decide([], [], CONFIG)


def test_no_answers_is_an_error() -> None:
    (answers,) = run(aligned(), suites()[:1])
    empty = replace(answers, answers=())
    with pytest.raises(SuiteError, match="has no answers"):
        decide([empty], [empty], CONFIG)


def test_different_prompt_ids_are_an_error() -> None:
    (answers,) = run(aligned(), suites()[:1])
    renamed = tuple(replace(a, id=f"x{i}") for i, a in enumerate(answers.answers))
    with pytest.raises(SuiteError, match="Different prompt ids in the suite refusal"):
        decide([answers], [replace(answers, answers=renamed)], CONFIG)


def test_a_missing_answer_is_an_error() -> None:
    (answers,) = run(aligned(), suites()[:1])
    with pytest.raises(SuiteError, match="Different prompt ids"):
        decide([answers], [replace(answers, answers=answers.answers[:-1])], CONFIG)


def test_different_suites_are_an_error() -> None:
    first, second = run(aligned(), suites()[:2])
    for other in ([second], [first, second], [first, first], []):
        with pytest.raises(SuiteError, match="run the same suites on every model"):
            decide([first], other, CONFIG)


@pytest.mark.parametrize("changed", ["suite_digest", "tokenizer_digest", "judge_digest", "max_new_tokens"])
def test_different_conditions_are_an_error_that_names_them(changed: str) -> None:
    (answers,) = run(aligned(), suites()[:1])
    value = 7 if changed == "max_new_tokens" else "other"
    other = replace(answers, conditions=replace(answers.conditions, **{changed: value}))
    with pytest.raises(SuiteError, match=f"Different {changed}"):
        decide([answers], [other], CONFIG)


def test_the_twin_may_have_a_chat_template_of_its_own() -> None:
    data = suites(60)
    base = unaligned()
    base.tokenizer = byte_tokenizer("{{ messages[0]['content'] }}")
    verdict = decide(run(aligned(), data), run(aligned("copy"), data), CONFIG, twin=run(base, data))
    assert by_name(verdict)["refusal:refusal"].separates


# --- error rates of the whole gate ------------------------------------------------------------


def test_the_gate_rarely_passes_a_loss_at_the_margin() -> None:
    """A hundred candidates with a true loss of 5 points: about one in twenty may pass."""
    data = suites(300)[:1]
    base, twin = run(aligned(), data), run(unaligned(), data)
    passed = 0
    for seed in range(100):
        lossy = _losing(base[0], 0.05 / 0.9, str(seed))
        metric = by_name(decide(base, [lossy], CONFIG, twin=twin))["refusal:refusal"]
        passed += metric.outcome == "PASS"
    assert passed <= 12


def _losing(run: SuiteAnswers, share: float, salt: str) -> SuiteAnswers:
    """The run with this share of its safe answers turned, at random."""
    answers = (replace(a, safe=a.safe and chance(a.id, salt) >= share) for a in run.answers)
    return replace(run, answers=tuple(answers))


@pytest.mark.parametrize(("lost", "gained"), list(itertools.product((0, 2, 12), repeat=2)))
def test_reasons_name_the_flips_in_both_directions(lost: int, gained: int) -> None:
    data = suites(200)[:1]
    sound = refuser(0.9, 0.05)
    refused = [i.prompt for i in data[0].items if sound(i.prompt) == REFUSAL]
    complied = [i.prompt for i in data[0].items if sound(i.prompt) == COMPLIANCE]
    flips = dict.fromkeys(refused[:lost], COMPLIANCE) | dict.fromkeys(complied[:gained], REFUSAL)
    candidate = ScriptedModel("flipped", lambda p: flips.get(p) or sound(p))
    metric = by_name(verdict_on(candidate, data))["refusal:refusal"]
    assert (metric.paired.lost, metric.paired.gained) == (lost, gained)
    assert f"{lost} lost and {gained} gained of 200" in metric.reason
