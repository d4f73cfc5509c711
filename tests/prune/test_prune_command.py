"""`holdfast prune`: every option reaches the model, and contradictions are refused before any work."""

import json
from pathlib import Path
from typing import Any

import pytest

from holdfast.cli import run_cli
from holdfast.exporter.architectures import block_linear_modules
from holdfast.exporter.source import load_source
from tests.tiny import tiny_model

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("models")
    folders = [
        tiny_model(root / str(seed), "LlamaForCausalLM", seed=seed, max_position_embeddings=512)
        for seed in (0, 1)
    ]
    return str(folders[0]), str(folders[1])


def prune(model: str, out: Path, *options: str) -> dict[str, Any]:
    few = ["--samples", "12", "--response-tokens", "2"]
    assert run_cli(["prune", model, "--out", str(out), *few, *options, "--json"]) == 0
    record: dict[str, Any] = json.loads((out / "prune.json").read_text())
    return record


def test_options_reach_the_model(models: tuple[str, str], tmp_path: Path, capsys: Capture) -> None:
    options = "--method set-difference --pattern 2:4 --rest sparsegpt --safety-heads 1 --safety-top 0.3"
    contrast = ["--safety-loss", "contrastive", "--base", models[1]]
    record = prune(models[0], tmp_path / "a", *options.split(), *contrast)
    assert (record["method"], record["pattern"], record["reached_frac"]) == ("set-difference", "2:4", 0.5)
    assert (record["safety_rows"], record["utility_rows"]) == (4, 8)
    assert len(record["safety_heads"]) == 1
    assert json.loads(capsys.readouterr().out) == record
    for name, module in block_linear_modules(load_source(tmp_path / "a").model).items():
        assert int((module.weight == 0).sum()) == record["modules"][name]["zeros"]


def test_the_sparsity_follows_the_pattern(models: tuple[str, str], tmp_path: Path) -> None:
    record = prune(models[0], tmp_path / "a", "--method", "magnitude", "--pattern", "1:4")
    assert record["asked_frac"] == record["reached_frac"] == 0.75


def test_pruning_further(models: tuple[str, str], tmp_path: Path) -> None:
    prune(models[0], tmp_path / "a", "--method", "magnitude", "--sparsity", "0.25")
    again = prune(str(tmp_path / "a"), tmp_path / "b", "--method", "magnitude", "--allow-zeros")
    assert again["reached_frac"] == 0.5


def test_structures_are_removed_for_real(models: tuple[str, str], tmp_path: Path) -> None:
    record = prune(models[0], tmp_path / "a", "--remove", "channels, blocks", "--remove-frac", "0.5")
    removed = record["structured"]
    assert (record["method"], record["reached_frac"]) == ("none", 0.0)
    assert 0.0 < removed["reached_frac"] <= 0.5
    sizes = [
        sum(parameter.numel() for parameter in load_source(Path(folder)).model.parameters())
        for folder in (models[0], tmp_path / "a")
    ]
    assert sizes == [removed["before"]["parameters"], removed["after"]["parameters"]]
    assert sizes[1] < sizes[0]


def test_zeros_after_structures(models: tuple[str, str], tmp_path: Path) -> None:
    options = ["--remove", "blocks", "--remove-frac", "0.5", "--method", "magnitude", "--sparsity", "0.5"]
    record = prune(models[0], tmp_path / "a", *options)
    assert record["reached_frac"] == 0.5
    assert len(record["structured"]["removed_blocks"]) == 1
    for name, module in block_linear_modules(load_source(tmp_path / "a").model).items():
        assert module.weight.numel() == record["modules"][name]["weights"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--sparsity", "1"], "Invalid value for '--sparsity': 1.0 is not in the range 0.0<=x<1.0."),
        (
            ["--remove", "heads", "--remove-frac", "1"],
            "'--remove-frac': 1.0 is not in the range 0.0<x<1.0.",
        ),
        (["--safety-heads", "-1"], "'--safety-heads': -1 is not in the range x>=0."),
        (["--remove-frac", "0.5"], "--remove-frac is the share of what --remove names"),
        (
            ["--remove", "heads,layers"],
            "`structured.kinds[1]` is 'layers': expected `heads`, `channels` or `blocks`.",
        ),
        (["--pattern", "two"], "`pattern` is 'two': expected `unstructured`, or n:m such as 2:4."),
        (["--lambda", "-1"], "'--lambda': -1.0 is not in the range x>=0.0."),
        (["--base", "x"], "--safety-loss contrastive and --base go together: give both, or neither."),
        (["--safety-loss", "contrastive"], "--safety-loss contrastive and --base go together"),
    ],
)
def test_what_is_refused(
    models: tuple[str, str], tmp_path: Path, capsys: Capture, options: list[str], sentence: str
) -> None:
    assert run_cli(["prune", models[0], "--out", str(tmp_path / "a"), *options]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--pattern", "4:2", "--remove", "blocks"], "The pattern 4:2 drops nothing"),
        (["--pattern", "3:7"], "The pattern 3:7 needs input channels in whole groups of 7"),
        (["--remove", "heads", "--remove-frac", "0.9"], "Removing heads takes at most"),
        (["--safety-heads", "4000"], "Expected at most 8 safety heads"),
        (["--calibration-data", "{harmless}", "--method", "set-difference"], "holds no harmful"),
    ],
)
def test_what_the_model_cannot_give_is_refused_before_it_is_measured(
    models: tuple[str, str],
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    sentence: str,
) -> None:
    for name in (
        "prune.structured.prune.measure_structures",
        "prune.apply.head_scores",
        "prune.apply.own_answers",
        "prune.apply.first_block_batches",
    ):
        monkeypatch.setattr(f"holdfast.{name}", None)  # nothing is measured
    harmless = tmp_path / "harmless.jsonl"
    lines = [json.dumps({"prompt": f"Name river number {n}.", "kind": "neutral"}) for n in range(12)]
    harmless.write_text("\n".join(lines))
    options = [option.format(harmless=harmless) for option in options]
    assert run_cli(["prune", models[0], "--out", str(tmp_path / "a"), "--samples", "12", *options]) == 1
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
