"""`holdfast sensitivity` as its user meets it, on a tiny pair."""

import json
from pathlib import Path

import pytest

from holdfast.cli import run_cli
from holdfast.errors import QuantizationError
from holdfast.exporter.architectures import linear_modules
from holdfast.job import prepare
from holdfast.quantize.formats import formats
from holdfast.recipe import read_recipe
from holdfast.study import first_passing, study_sensitivity
from tests.core.conftest import write_recipe

Pair = tuple[Path, Path]
Capture = pytest.CaptureFixture[str]


def arguments(pair: Pair, *more: str) -> list[str]:
    return ["sensitivity", str(pair[0]), "--base", str(pair[1]), "--samples", "24", *more]


def test_a_budget_gives_a_recipe_table_and_plot(tiny_pair: Pair, tmp_path: Path, capsys: Capture) -> None:
    out, plot = tmp_path / "r.yaml", tmp_path / "layers.png"
    flags = ["--schemes", "w4,w2", "--bits", "4.2", "--candidates", "2", "--validate"]
    code = run_cli(arguments(tiny_pair, *flags, "--out", str(out), "--plot", str(plot), "--json"))
    assert code == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["sensitivity"]) == 9 * 2
    assert [trial["name"] for trial in result["trials"]][-4:] == [
        "random 0",
        "random 1",
        "random 2",
        "last layers",
    ]
    assert all(trial["allocation"]["size_bytes"] <= result["budget_bytes"] for trial in result["trials"])
    assert set(result["rank_correlations"]) == {"safety", "utility"}
    assert plot.read_bytes().startswith(b"\x89PNG")

    recipe = read_recipe(out, {})
    paths = [path for unit in result["units"].values() for path in unit["paths"]]
    chosen = {path: form.name for path, form in formats(paths, recipe.quantize).items()}
    best = result["trials"][0]["allocation"]["schemes"]
    assert chosen == {path: best[name] for name, unit in result["units"].items() for path in unit["paths"]}
    assert {"w2", "w4"} == set(chosen.values())
    assert run_cli(arguments(tiny_pair, *flags, "--out", str(out))) == 1  # it exists


def test_the_table_for_a_person(tiny_pair: Pair, capsys: Capture) -> None:
    assert run_cli(arguments(tiny_pair, "--schemes", "w8a8")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("KL in nats")
    assert len(lines) == 1 + 9
    assert sorted(int(line.split()[-2]) for line in lines[1:]) == list(range(1, 10))


@pytest.mark.parametrize(
    ("flags", "code", "sentence"),
    [
        (["--bits", "4", "--budget-bytes", "9"], 2, "Give a budget once"),
        (["--auto"], 2, "--auto needs the largest budget"),
        (["--out", "r.yaml"], 2, "Without a budget there is no recipe to write"),
        (["--plot", "p.gif"], 2, "--plot expects a file ending in .png"),
        (["--schemes", "w4,w5"], 1, "There is no scheme `w5`"),
        (["--schemes", "w4,w2", "--bits", "2"], 1, "below the smallest possible size"),
        (["--schemes", "w4", "--budget-bytes", "1000"], 1, "of them embeddings, norms and biases"),
        (["--schemes", "w4,w4"], 1, "Expected different schemes to choose among, got w4, w4"),
        (["--block-size", "48"], 2, "`quantize.block_size` is 48: expected `16`, `32`, `64` or `128`."),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(
    flags: list[str],
    code: int,
    sentence: str,
    tiny_pair: Pair,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("holdfast.study.make_exam", None)
    assert run_cli(arguments(tiny_pair, *flags)) == code
    captured = capsys.readouterr()
    assert sentence in captured.err.strip().splitlines()[-1]
    assert captured.out == ""


def test_a_scheme_that_there_is_not_is_refused_before_the_model_is_read(capsys: Capture) -> None:
    assert run_cli(["sensitivity", "nowhere", "--schemes", "w4,w3"]) == 1
    assert "There is no scheme `w3`: expected `none`, or `w` with 2, 4 or 8" in capsys.readouterr().err


def test_auto_says_that_a_random_model_never_passes(tiny_pair: Pair, tmp_path: Path) -> None:
    job = prepare(read_recipe(write_recipe(tmp_path / "r.yaml", tiny_pair), {"calibrate.samples": 24}))
    study = study_sensitivity(job, ["w4", "w2"])
    assert {path for unit in study.units for path in unit.paths} == set(linear_modules(job.aligned.model))
    budget = sum(size for (_, scheme), size in study.sizes.items() if scheme == "w4")
    with pytest.raises(QuantizationError, match=r"No allocation under .* passes the gate"):
        first_passing(study, budget, candidates=1, safety_weight=1.0)
