"""A whole run on a tiny pair: the bundle, its recipe run again, interruptions, a full disk."""

import errno
import filecmp
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from holdfast import assemble, job, pipeline, pruning
from holdfast.bundle import open_bundle
from holdfast.cli import run_cli
from tests.core.conftest import write_recipe

Pair = tuple[Path, Path]
STEPS = ["baseline", "reference-export", "prune", "calibrate", "export", "quantize", "evaluate"]

# step -> the function that the step works with, and the module that it looks it up in
WORKERS: dict[str, tuple[ModuleType, str]] = {
    "baseline": (pipeline, "save_suites"),
    "reference-export": (pipeline, "export_source"),
    "prune": (pruning, "save_source"),
    "calibrate": (job, "calibrate"),
    "quantize": (pipeline, "quantize_bundle"),
    "evaluate": (pipeline, "answer_suites"),
    "bundle": (assemble, "write_json"),
}


def test_the_bundle_holds_what_the_format_says(tiny_bundle: Path) -> None:
    opened = open_bundle(tiny_bundle)
    manifest = opened.manifest
    names = set(manifest.files)
    assert {"model.onnx", "config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert {"generation_config.json", "recipe.yaml", "steps/calibration.json"} <= names
    assert {"alignment/report.json", "alignment/report.html"} <= names
    assert {f"alignment/suites/{n}.jsonl" for n in opened.suite_names} <= names
    assert [step.name for step in manifest.steps] == STEPS
    assert set(manifest.model.files) >= {"config.json", "model.safetensors"}
    assert opened.report()["verdict"]["outcome"] == manifest.verdict


def test_the_bundles_own_recipe_gives_the_same_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    run_cli(["run", str(tiny_bundle / "recipe.yaml"), "--out", str(again)])
    first, second = open_bundle(tiny_bundle).manifest, open_bundle(again).manifest
    assert first.files == second.files
    assert not filecmp.dircmp(tiny_bundle, again).diff_files


def test_a_finished_run_leaves_only_the_bundle(tiny_bundle: Path) -> None:
    assert sorted(path.name for path in tiny_bundle.parent.iterdir()) == ["bundle", "r.yaml"]


def test_an_existing_bundle_is_not_overwritten(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_bundle.parent / "r.yaml"
    assert run_cli(["run", str(recipe), "--out", str(tiny_bundle)]) == 1
    assert "exists already: choose another --out, or pass --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize("step", [step for step in WORKERS if step != "bundle"])
def test_ctrl_c_in_each_step_keeps_what_is_done_and_resumes(
    step: str,
    tiny_pair: Pair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe, out = write_recipe(tmp_path / "r.yaml", tiny_pair), tmp_path / "bundle"
    command = ["run", str(recipe), "--out", str(out)]

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        original = getattr(*WORKERS[step])
        calls = iter(range(100))
        skip = 3 if step == "evaluate" else 0  # answer_suites works in two steps before

        def worker(*args: object, **kwargs: object) -> object:
            return interrupt() if next(calls) >= skip else original(*args, **kwargs)

        patched.setattr(*WORKERS[step], worker)
        assert run_cli(command) == 130
    message = capsys.readouterr().err
    assert f"Interrupted in step {step}: finished steps are kept in {out}.work" in message
    assert not out.exists()
    done = STEPS[: STEPS.index(step)]
    assert sorted(path.name for path in Path(f"{out}.work").iterdir()) == sorted(done)

    assert run_cli([*command, "--json"]) in (3, 4)
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert [s["name"] for s in steps if s["resumed"]] == done
    open_bundle(out)


@pytest.mark.parametrize("step", ["calibrate", "quantize", "bundle"])
def test_a_full_disk_is_one_sentence_and_loses_nothing(
    step: str,
    tiny_pair: Pair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe, out = write_recipe(tmp_path / "r.yaml", tiny_pair), tmp_path / "bundle"

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(*WORKERS[step], full)
        assert run_cli(["run", str(recipe), "--out", str(out)]) == 1
    assert "is full: free some space and run the same command again" in capsys.readouterr().err
    assert not out.exists()
    assert run_cli(["run", str(recipe), "--out", str(out)]) in (3, 4)


def test_a_real_sigint_ends_with_130_and_no_traceback(tiny_pair: Pair, tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path / "r.yaml", tiny_pair), tmp_path / "bundle"
    code = (  # a shell that runs the tests in the background has its children ignore SIGINT
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from holdfast.cli import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "run", str(recipe), "--out", str(out)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "bundle.work" / "baseline").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.strip().splitlines()[-1].startswith("holdfast: Interrupted")
    assert not out.exists()
    assert (tmp_path / "bundle.work" / "baseline").exists()


def test_a_kept_work_folder_is_shared_by_backends(
    tiny_pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, work = write_recipe(tmp_path / "r.yaml", tiny_pair), tmp_path / "work"
    base = ["run", str(recipe), "--work", str(work), "--json"]
    run_cli([*base, "--out", str(tmp_path / "a")])
    capsys.readouterr()
    run_cli([*base, "--out", str(tmp_path / "b"), "--scheme", "none"])
    steps = {s["name"]: s["resumed"] for s in json.loads(capsys.readouterr().out)["steps"]}
    assert steps["baseline"]
    assert steps["prune"]
    assert not steps["calibrate"]
