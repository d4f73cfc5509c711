"""Memory of pruning: a run in a process of its own, and what the page says of it."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import prune_memory
from benchmarks.models import checkpoint
from benchmarks.prune_memory import block_bytes, main, memory_table

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="Linux counts the peak of a process"
)
MIB = 1 << 20
RUN = {
    "variant": "wanda",
    "loaded_bytes": 4000 * MIB,
    "loading_peak_bytes": 4001 * MIB,
    "peak_bytes": 4300 * MIB,
    "rows_bytes": 6 * MIB,
    "blocks": 22,
    "seconds": 90.4,
}


@pytest.mark.parametrize(("budget", "answer"), [(4301, "yes"), (4300, "no")])
def test_the_peak_is_held_against_the_weights_and_two_blocks(budget: int, answer: str) -> None:
    header, _, row = memory_table([RUN], budget * MIB).splitlines()
    assert f"under {budget:,} MiB" in header
    assert row == f"| wanda | 4,000 | 300 | 6 | 4,300 | {answer} | 22 | 90 |"


def test_a_peak_while_loading_counts() -> None:
    row = memory_table([RUN | {"loading_peak_bytes": 8000 * MIB}], 4301 * MIB).splitlines()[2]
    assert "| 8,000 | no |" in row


def test_a_block_as_float32(tmp_path: Path) -> None:
    """Hidden 64, FFN 128, 4 heads on 2: q and o, k and v, three matrices of the FFN, two norms."""
    weights = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64
    assert block_bytes(checkpoint("tiny", tmp_path / "tiny")) == 4 * weights


def test_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured in another process, kept, and not measured again."""
    given = ["--work", str(tmp_path), "--out", str(tmp_path / "page.md"), "--size", "tiny", "--blocks", "1"]
    given += ["--prompts", "4", "--prompt-tokens", "6", "--answer-tokens", "2", "--variant", "combined"]
    done = CliRunner().invoke(main, given)
    assert done.exit_code == 0, done.output
    kept = json.loads((tmp_path / "runs" / "combined.json").read_text())
    assert kept["blocks"] == 1 and kept["task"]["prompts"] == 4
    assert kept["rows_bytes"] == 4 * (6 + 1) * 64 * 4  # 4 rows, 64 channels; the last token is not read
    assert 0 < kept["loaded_bytes"] <= kept["peak_bytes"] + MIB
    monkeypatch.setattr(prune_memory.subprocess, "run", None)
    again = CliRunner().invoke(main, given)
    assert again.exit_code == 0, again.output
    assert "| combined |" in (tmp_path / "page.md").read_text()
