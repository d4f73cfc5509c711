"""The command line as its user meets it: exit codes, one sentence for bad input, help that is true."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from holdfast.cli import COMMANDS, run_cli
from holdfast.cli.help_page import help_page
from tests.core.conftest import long_llama, write_recipe
from tests.tiny import tiny_llama

ROOT = Path(__file__).resolve().parents[2]
Pair = tuple[Path, Path]
Capture = pytest.CaptureFixture[str]


def fails(capsys: Capture, arguments: list[str], code: int) -> str:
    """Run a command that must fail with `code`; returns its one sentence."""
    assert run_cli(arguments) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert captured.out == ""
    sentence = captured.err.strip().splitlines()[-1]
    assert sentence.startswith(("holdfast: ", "Error: "))
    return sentence


def test_the_help_page_is_what_the_program_says() -> None:
    assert (ROOT / "docs" / "help.md").read_text() == help_page()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: Capture) -> None:
    assert run_cli([name, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"Usage: holdfast {name}")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["sweep"], "No such command 'sweep'"),
        (["run"], "Missing argument 'SOURCE'"),
        (["run", "m", "--bakend", "ort"], "No such option"),
        (["run", "m", "--backend", "tvm"], "'tvm' is not one of 'ort', 'inc'"),
        (["run", "m", "--sparsity", "2"], "`prune.sparsity_frac` is 2.0: expected a number below 1.0."),
        (["run", "m", "--suite", "=x"], "--suite expects NAME or NAME=PATH"),
        (["quantize", "m"], "Missing option '--out'"),
        (["bench"], "Missing argument 'ARTIFACTS...'"),
    ],
)
def test_usage_errors_exit_with_2(arguments: list[str], sentence: str, capsys: Capture) -> None:
    assert sentence in fails(capsys, arguments, 2)


def test_a_recipe_with_a_typo(tmp_path: Path, tiny_pair: Pair, capsys: Capture) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", tiny_pair, "prun: {method: wanda}\n")
    sentence = fails(capsys, ["run", str(recipe), "--out", str(tmp_path / "b")], 2)
    assert "unknown key `prun`; did you mean `prune`?" in sentence


@pytest.mark.parametrize("command", ["run", "export", "prune", "calibrate", "quantize"])
def test_a_missing_model(command: str, tmp_path: Path, capsys: Capture) -> None:
    sentence = fails(capsys, [command, str(tmp_path / "none"), "--out", str(tmp_path / "b")], 1)
    assert "none" in sentence
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("command", ["run", "export", "prune", "calibrate", "quantize"])
def test_an_existing_folder_is_refused_first(command: str, tmp_path: Path, capsys: Capture) -> None:
    """Before hours of work, and even before the model is looked for."""
    sentence = fails(capsys, [command, str(tmp_path / "none"), "--out", str(tmp_path)], 1)
    assert f"{tmp_path} exists already: choose another --out, or pass --overwrite" in sentence


@pytest.mark.parametrize("command", ["verify", "serve", "inspect"])
def test_no_bundle_there(command: str, tmp_path: Path, capsys: Capture) -> None:
    assert "is not a Holdfast bundle" in fails(capsys, [command, str(tmp_path)], 1)


def test_a_base_with_another_vocabulary(tmp_path: Path, tiny_pair: Pair, capsys: Capture) -> None:
    other = tiny_llama(tmp_path / "other", vocab=290)
    arguments = ["run", str(tiny_pair[0]), "--base", str(other), "--out", str(tmp_path / "b")]
    assert "do not share a vocabulary" in fails(capsys, arguments, 1)


def test_a_tokenizer_without_a_chat_template(tmp_path: Path, tiny_pair: Pair, capsys: Capture) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_pair[0], model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    arguments = ["run", str(model), "--base", str(tiny_pair[1]), "--out", str(tmp_path / "b")]
    assert "has no chat template" in fails(capsys, arguments, 1)


def test_an_unsupported_architecture(tmp_path: Path, tiny_pair: Pair, capsys: Capture) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_pair[0], model)
    config = json.loads((model / "config.json").read_text()) | {"architectures": ["BloomForCausalLM"]}
    (model / "config.json").write_text(json.dumps(config))
    sentence = fails(capsys, ["export", str(model), "--out", str(tmp_path / "b")], 1)
    assert "`BloomForCausalLM` is not supported: expected one of LlamaForCausalLM" in sentence


def test_an_unknown_suite_and_a_missing_file(tmp_path: Path, tiny_pair: Pair, capsys: Capture) -> None:
    base = ["run", str(tiny_pair[0]), "--base", str(tiny_pair[1]), "--out", str(tmp_path / "b")]
    assert "Unknown suite `xtest`; did you mean `xstest`?" in fails(capsys, [*base, "--suite", "xtest"], 1)
    missing = fails(capsys, [*base, "--suite", f"xstest={tmp_path / 'x.csv'}"], 1)
    assert "x.csv is not a readable CSV file" in missing


def test_calibration_data_that_leaks_is_refused(tmp_path: Path, tiny_pair: Pair, capsys: Capture) -> None:
    suite = (ROOT / "evals" / "data" / "refusal.jsonl").read_text().splitlines()
    leaked = json.loads(suite[0])["prompt"]
    kinds = ("harmful", "borderline", "neutral")
    lines = [
        json.dumps({"prompt": f"A prompt of our own about {i} gardens", "kind": k})
        for i, k in enumerate(kinds)
    ]
    lines.append(json.dumps({"prompt": leaked.upper(), "kind": "harmful"}))
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    recipe = write_recipe(tmp_path / "r.yaml", tiny_pair)
    arguments = [
        "run",
        str(recipe),
        "--out",
        str(tmp_path / "b"),
        "--calibration-data",
        str(tmp_path / "c.jsonl"),
    ]
    assert "calibration" in fails(capsys, arguments, 1).lower()


@pytest.mark.parametrize("command", ["verify", "serve", "inspect"])
def test_a_truncated_weight_file(command: str, tiny_bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    content = (bundle / "model.onnx").read_bytes()
    (bundle / "model.onnx").write_bytes(content[: len(content) // 2])
    sentence = fails(capsys, [command, str(bundle)], 1)
    assert f"expected {len(content)} bytes, found {len(content) // 2}" in sentence


def test_serve_refuses_what_is_not_verified(tiny_bundle: Path, capsys: Capture) -> None:
    sentence = fails(capsys, ["serve", str(tiny_bundle)], 3)
    assert "expected PASS" in sentence
    assert "--serve-unverified-model" in sentence


def test_verify_of_an_inconclusive_bundle_exits_with_4(tiny_bundle: Path, capsys: Capture) -> None:
    code = run_cli(["verify", str(tiny_bundle), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (code, report["verdict"]["outcome"]) in {(3, "FAIL"), (4, "INCONCLUSIVE")}


@pytest.mark.parametrize(
    ("arguments", "package", "command"),
    [
        (["export", "m", "--out", "o"], "torch", "pip install 'holdfast[export]'"),
        (["run", "m", "--backend", "inc"], "neural_compressor", "pip install 'holdfast[inc]'"),
    ],
)
def test_a_missing_extra_names_the_install_command(
    arguments: list[str], package: str, command: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    found = importlib.util.find_spec

    def absent(name: str, *rest: Any) -> Any:
        return None if name == package else found(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", absent)
    sentence = fails(capsys, arguments, 1)
    assert f"needs {package}" in sentence
    assert command in sentence


def test_inspect_suites_and_bench_speak_json(tiny_bundle: Path, capsys: Capture) -> None:
    quick = ["--prompt-tokens", "8", "--new-tokens", "4", "--repeats", "1"]
    for arguments in (["inspect", str(tiny_bundle)], ["suites"], ["bench", str(tiny_bundle), *quick]):
        assert run_cli([*arguments, "--json"]) == 0
        assert isinstance(json.loads(capsys.readouterr().out), dict)


def test_the_steps_one_by_one(tmp_path: Path, tiny_pair: Pair, capsys: Capture) -> None:
    """prune -> calibrate -> export -> quantize by hand gives an artifact that runs."""
    pruned, calibrated, exported, artifact = (tmp_path / name for name in "pceq")
    aligned, base = map(str, tiny_pair)
    assert run_cli(["prune", aligned, "--out", str(pruned), "--sparsity", "0.25"]) == 0
    calibrate = [
        "calibrate",
        str(pruned),
        "--aligned",
        aligned,
        "--base",
        base,
        "--steps",
        "1",
        "--alpha",
        "0",
    ]
    assert run_cli([*calibrate, "--out", str(calibrated)]) == 0
    assert run_cli(["export", str(calibrated), "--out", str(exported)]) == 0
    quantize = [
        "quantize",
        str(exported),
        "--calibration",
        str(calibrated),
        "--out",
        str(artifact),
        "--json",
    ]
    capsys.readouterr()
    assert run_cli(quantize) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ranges_from"] == "calibration"
    quick = ["--prompt-tokens", "8", "--new-tokens", "4", "--repeats", "1"]
    assert run_cli(["bench", str(artifact), str(exported), *quick]) == 0
    out = capsys.readouterr().out
    assert "against" in out


def test_a_model_whose_context_is_too_short_is_refused(tmp_path: Path, capsys: Capture) -> None:
    short = tiny_llama(tmp_path / "short")
    arguments = [
        "run",
        str(short),
        "--base",
        str(long_llama(tmp_path / "b", seed=1)),
        "--out",
        str(tmp_path / "o"),
    ]
    assert "context holds 128" in fails(capsys, arguments, 1)
