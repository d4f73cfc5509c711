"""Steps appear whole, are reused by content, and survive an interruption of the next one."""

from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import ExitCode, InterruptedRun
from holdfast.steps import StepRunner


def writer(calls: list[str], name: str) -> Any:
    def work(folder: Path) -> dict[str, Any]:
        calls.append(name)
        (folder / "out.txt").write_text(name)
        return {"name": name}

    return work


def test_a_finished_step_is_kept_and_a_changed_one_is_done_again(tmp_path: Path) -> None:
    calls: list[str] = []
    for rate in (1, 1, 2):
        runner = StepRunner(tmp_path, total=2)
        first = runner.run("a", {"rate": rate}, [], writer(calls, "a"))
        second = runner.run("b", {}, [first.key], writer(calls, "b"))
    assert calls == ["a", "b", "a", "b"]
    assert not first.resumed
    assert second.result == {"name": "b"}


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_a_step_that_stops_half_way_leaves_nothing(tmp_path: Path, failure: type[BaseException]) -> None:
    calls: list[str] = []

    def stops(folder: Path) -> dict[str, Any]:
        (folder / "half.txt").write_text("half")
        raise failure

    runner = StepRunner(tmp_path, total=2)
    first = runner.run("a", {}, [], writer(calls, "a"))
    expected = InterruptedRun if failure is KeyboardInterrupt else failure
    with pytest.raises(expected) as caught:
        runner.run("b", {}, [first.key], stops)
    if isinstance(caught.value, InterruptedRun):
        assert caught.value.exit_code == ExitCode.INTERRUPTED
        assert "Interrupted in step b: finished steps are kept" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]

    again = StepRunner(tmp_path, total=2)
    assert again.run("a", {}, [], writer(calls, "a")).resumed
    assert not again.run("b", {}, [first.key], writer(calls, "b")).resumed
    assert calls == ["a", "b"]


def test_a_damaged_record_means_the_step_is_done_again(tmp_path: Path) -> None:
    calls: list[str] = []
    StepRunner(tmp_path, total=1).run("a", {}, [], writer(calls, "a"))
    (tmp_path / "a" / "step.json").write_text("{")
    StepRunner(tmp_path, total=1).run("a", {}, [], writer(calls, "a"))
    assert calls == ["a", "a"]
