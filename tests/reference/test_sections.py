"""Two commands, one page: each replaces its own part and leaves the other's as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.errors import UsageError
from reference.results.sections import HEAD, PARTS, PRUNING, QUANTIZATION, with_section, write_section

ROOT = Path(__file__).resolve().parent.parent.parent


def test_a_part_is_written_to_an_empty_page_with_its_head() -> None:
    assert with_section("", PRUNING, "## Pruning\n\n") == (
        f"{HEAD}\n<!-- pruning: begin -->\n## Pruning\n<!-- pruning: end -->\n"
    )


def test_parts_keep_their_order_and_leave_each_other_alone() -> None:
    page = with_section(with_section("", PRUNING, "p\n| 1 |"), QUANTIZATION, "q")
    assert page == (
        f"{HEAD}\n<!-- quantization: begin -->\nq\n<!-- quantization: end -->\n"
        "\n<!-- pruning: begin -->\np\n| 1 |\n<!-- pruning: end -->\n"
    )
    again = with_section(page, QUANTIZATION, r"q \1 {2}")
    assert again == page.replace("\nq\n", "\nq \\1 {2}\n")
    assert with_section(again, QUANTIZATION, "q") == page
    assert with_section(page, PRUNING, "p\n| 1 |") == page


def test_a_page_of_somebody_else_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("# Notes\n", encoding="utf-8")
    with pytest.raises(UsageError, match="Expected a page with parts between markers"):
        write_section(path, PRUNING, "p")
    assert path.read_text(encoding="utf-8") == "# Notes\n"


def test_a_page_grows_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    write_section(path, QUANTIZATION, "q")
    write_section(path, PRUNING, "p")
    text = path.read_text(encoding="utf-8")
    assert "\nq\n" in text and "\np\n" in text


def test_the_page_of_the_repository_says_who_prints_what() -> None:
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert text.startswith(HEAD)
    assert any(f"<!-- {part}: begin -->" in text for part in PARTS)
