"""The report: complete as data, honest and self-contained as a page."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from holdfast.errors import SuiteError
from holdfast.evals.gate import decide
from holdfast.evals.report import FLIPS_SHOWN, Details, Report, Runs, build_report, render_html
from holdfast.evals.run import SuiteAnswers, run_suite
from holdfast.evals.suites import SuiteItem, make_suite
from holdfast.files import to_json
from holdfast.recipe import EvaluateConfig
from tests.evals.models import (
    COMPLIANCE,
    GARBAGE,
    REFUSAL,
    ScriptedModel,
    aligned,
    prefers,
    refuser,
    suites,
    unaligned,
)

CONFIG = EvaluateConfig(max_new_tokens=64)
DETAILS = Details(
    "tiny model, W8A8", "2026-01-02T03:04:05Z", {"Environment": {"cpu": "test", "threads": 2}}
)
SLID = ScriptedModel("slid", refuser(0.5, 0.05), prefers(0.9))
VOID = {"meta", "br", "hr", "img", "input", "link", "line", "circle", "rect"}


def run(model: ScriptedModel, n: int = 80) -> list[SuiteAnswers]:
    return [run_suite(model, suite, CONFIG) for suite in suites(n, 60)]


def report_on(candidate: ScriptedModel, n: int = 80, *, with_others: bool = True) -> Report:
    base, found = run(aligned(), n), run(candidate, n)
    twin = run(unaligned(), n) if with_others else None
    noise = run(aligned("fp32 graph"), n) if with_others else None
    verdict = decide(base, found, CONFIG, twin=twin, noise=noise)
    return build_report(verdict, suites(n, 60), Runs(base, found, twin, noise), DETAILS)


class Page(HTMLParser):
    """Checks nesting while it reads; collects tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


# --- data -------------------------------------------------------------------------------------


def test_the_report_is_strict_json_with_a_schema_version() -> None:
    report = report_on(SLID)
    assert json.loads(to_json(report)) == json.loads(json.dumps(report))
    assert report["schema"] == 1
    assert report["verdict"]["outcome"] == "FAIL"
    assert report["models"] == {
        "baseline": "aligned",
        "candidate": "slid",
        "twin": "twin",
        "noise": "fp32 graph",
    }
    assert report["conditions"]["max_new_tokens"] == 64


def test_counts_by_label_and_subject_add_up() -> None:
    report = report_on(SLID)
    metrics = {m["metric"]: m for m in report["verdict"]["metrics"]}
    for suite in report["suites"]:
        for role in report["models"]:
            if suite["kind"] != "pairs":
                assert sum(suite["labels"][role].values()) == suite["n"]
            assert sum(row[role]["n"] for row in suite["subjects"]) == suite["n"]
    refusal = report["suites"][0]
    safe = sum(row["candidate"]["safe"] for row in refusal["subjects"])
    assert safe == metrics["refusal:refusal"]["candidate"]["safe"]
    assert refusal["labels"]["candidate"]["refused"] == safe


def test_flips_are_all_there_lost_ones_first() -> None:
    report = report_on(SLID, 200)
    refusal, metric = report["suites"][0], report["verdict"]["metrics"][0]
    directions = [flip["direction"] for flip in refusal["flips"]]
    assert directions.count("lost") == metric["paired"]["lost"] > FLIPS_SHOWN
    assert directions == sorted(directions, key=["lost", "incoherent", "gained"].index)
    assert refusal["flips"][0]["baseline"] == {"label": "refused", "text": REFUSAL}
    assert refusal["flips"][0]["candidate"] == {"label": "complied", "text": COMPLIANCE}


def test_answers_that_turned_to_noise_are_listed_even_where_none_was_safe() -> None:
    sound = refuser(0.9, 0.05)
    broken = ScriptedModel("b", lambda p: GARBAGE if sound(p) == COMPLIANCE else REFUSAL, prefers(0.9))
    flips = report_on(broken)["suites"][0]["flips"]
    assert {flip["direction"] for flip in flips} == {"incoherent"}


def test_answers_to_another_version_of_the_suite_are_refused() -> None:
    base = run(aligned())
    verdict = decide(base, base, CONFIG)
    changed = [replace(suite, items=suite.items[::-1]) for suite in suites(80, 60)]
    with pytest.raises(SuiteError, match="not to this version of the suite"):
        build_report(verdict, changed, Runs(base, base), DETAILS)


# --- page -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("candidate", "n", "word"),
    [(aligned("copy"), 80, "Passed"), (SLID, 80, "Failed"), (aligned("copy"), 20, "Inconclusive")],
)
def test_the_verdict_comes_first_and_every_reason_is_shown(
    candidate: ScriptedModel, n: int, word: str
) -> None:
    report = report_on(candidate, n)
    html = render_html(report)
    page = Page(html)
    assert html.startswith("<!doctype html>")
    assert page.open == []
    assert page.text.index(word) < page.text.index("Metrics")
    text = " ".join(page.text.split())
    assert report["verdict"]["summary"] in text
    for metric in report["verdict"]["metrics"]:
        assert " ".join(metric["reason"].split()) in text
        assert f"{100 * metric['candidate']['frac']:.1f} %" in text


def test_the_page_is_self_contained_and_runs_nothing() -> None:
    html = render_html(report_on(SLID))
    page = Page(html)
    assert {"script", "link", "img", "iframe", "form", "object"} & {tag for tag, _ in page.tags} == set()
    names = {name for _, attributes in page.tags for name in attributes}
    assert not [name for name in names if name.startswith("on") or name in ("src", "href", "style")]
    assert not re.search(r"https?://|url\(|@import", html)


def test_the_page_needs_neither_twin_nor_noise() -> None:
    text = Page(render_html(report_on(aligned("copy"), with_others=False))).text
    assert "No unaligned twin was measured" in text
    assert "Unaligned twin" not in text


def test_the_page_can_be_rendered_again_from_the_file() -> None:
    report = report_on(SLID)
    assert render_html(json.loads(to_json(report))) == render_html(report)


def test_the_page_shows_a_part_of_many_flips_and_says_so() -> None:
    report = report_on(SLID, 200)
    flips = len(report["suites"][0]["flips"])
    text = Page(render_html(report)).text
    assert f"{flips - FLIPS_SHOWN} more are in report.json" in text


def test_prompts_and_answers_are_escaped() -> None:
    evil = "<script>alert(1)</script><img src=x onerror=1>"
    items = [SuiteItem(f"r-{i}", f"{evil} {i}", evil) for i in range(60)]
    suite = make_suite("refusal", "refusal", items, source=evil, licence=evil)
    base = [run_suite(ScriptedModel(evil, lambda _: REFUSAL), suite, CONFIG)]
    found = [run_suite(ScriptedModel("x", lambda _: f"Sure: {evil}"), suite, CONFIG)]
    verdict = decide(base, found, CONFIG)
    details = Details(evil, evil, {evil: {evil: evil}})
    page = Page(render_html(build_report(verdict, [suite], Runs(base, found), details)))
    assert {"script", "img"} & {tag for tag, _ in page.tags} == set()
    assert evil in page.text


def test_plots_have_names_for_those_who_cannot_see_them() -> None:
    page = Page(render_html(report_on(SLID)))
    for tag, attributes in page.tags:
        if tag == "svg":
            assert attributes.get("aria-label") or attributes.get("aria-hidden") == "true"


def test_plot_positions_stay_inside_their_track() -> None:
    page = Page(render_html(report_on(SLID)))
    for tag, attributes in page.tags:
        if tag in ("line", "circle", "rect"):
            for name in ("x", "x1", "x2", "cx", "width"):
                value = attributes.get(name) or ""
                if value.endswith("%"):
                    assert 0.0 <= float(value[:-1]) <= 100.0


def test_reports_of_another_schema_are_refused() -> None:
    with pytest.raises(SuiteError, match=r"Expected a report of schema 1, found 99"):
        render_html({**report_on(SLID), "schema": 99})
