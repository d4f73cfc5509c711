"""Pruning in a run: rounds, recovery, the gate after it, and what the bundle says of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from holdfast.bundle import open_bundle
from holdfast.cli import run_cli
from holdfast.errors import RecipeError
from holdfast.exporter.architectures import block_linear_modules
from holdfast.exporter.source import load_source
from holdfast.job import prepare_data
from holdfast.pruning import check_pruning, sparsity_at, step_count
from holdfast.recipe import make_recipe
from tests.core.conftest import write_recipe

ROOT = Path(__file__).resolve().parents[2]
Pair = tuple[Path, Path]
Capture = pytest.CaptureFixture[str]
RECOVER = "recover: {steps: 2, batch_size: 6, response_tokens: 3, alphas: [], lr: 0.001}\n"
LENIENT = (  # so few prompts settle nothing at an ordinary margin
    "model: {root}/aligned\nbase: {root}/base\n"
    "calibrate: {{samples: 48, method: rtn}}\n"
    "recover: {{steps: 2, batch_size: 16, response_tokens: 8, alphas: []}}\n"
    "quantize: {{scheme: none}}\n"
    "evaluate: {{limit: 24, max_new_tokens: 12, margin_frac: {margin}, "
    "suites: [{{name: refusal}}, {{name: over-refusal}}]}}\n"
    "prune: {{method: magnitude, sparsity_frac: {sparsity}, rounds: {rounds}}}\n"
)


def reference_run(folder: Path, capsys: Capture, **settings: object) -> tuple[int, dict[str, Any], Path]:
    recipe, out = folder / "r.yaml", folder / "bundle"
    recipe.write_text(LENIENT.format(root=ROOT / "reference", **settings))
    code = run_cli(["run", str(recipe), "--out", str(out), "--work", str(folder / "work"), "--json"])
    return code, json.loads(capsys.readouterr().out), out


def test_rounds_rise_cubically_to_the_target() -> None:
    assert [sparsity_at(0.8, number, 4) for number in range(5)] == pytest.approx(
        [0.0, 0.4625, 0.7, 0.7875, 0.8]
    )
    assert sparsity_at(0.7, 3, 3) == 0.7


def test_rounds_reach_the_target_while_the_gate_passes(tmp_path: Path, capsys: Capture) -> None:
    code, printed, out = reference_run(tmp_path, capsys, margin=0.4, sparsity=0.4, rounds=2)
    assert code == 0
    results = {step["name"]: step["result"] for step in printed["steps"]}
    rounds = [name for name in results if name.split("-")[0] in ("prune", "recover", "gate")]
    assert rounds == ["prune-1", "recover-1", "gate-pruned-1", "prune-2", "recover-2", "gate-pruned-2"]
    assert results["prune-1"]["sparsity_frac"] == pytest.approx(0.35, abs=1e-3)
    assert results["prune-2"]["sparsity_frac"] == pytest.approx(0.4, abs=1e-3)
    assert {results[f"gate-pruned-{number}"]["verdict"] for number in (1, 2)} == {"PASS"}
    assert printed["step_at_fault"] is None
    zeros = json.loads((out / "steps" / "prune.json").read_text())["reached_frac"]
    assert zeros == pytest.approx(0.4, abs=1e-3)
    assert json.loads((out / "steps" / "gate-pruned.json").read_text())["outcome"] == "PASS"
    assert open_bundle(out).report()["sections"]["After pruning"]["verdict"] == "PASS"
    assert (out / "alignment" / "answers" / "pruned" / "refusal.jsonl").is_file()
    # what is recovered is what is calibrated, with the zeros of the pruning
    kept = block_linear_modules(load_source(tmp_path / "work" / "recover-2" / "model").model)
    share = sum(int((m.weight == 0).sum()) for m in kept.values()) / sum(
        m.weight.numel() for m in kept.values()
    )
    assert share >= zeros


def test_the_round_that_does_not_pass_is_the_last(tmp_path: Path, capsys: Capture) -> None:
    """99.9 % of the weights are too many at any margin; 87 % in the first of two rounds too."""
    code, printed, out = reference_run(tmp_path, capsys, margin=0.2, sparsity=0.999, rounds=2)
    assert code == 0
    results = {step["name"]: step["result"] for step in printed["steps"]}
    assert results["gate-pruned-1"]["verdict"] != "PASS"
    assert "prune-2" not in results
    assert results["prune-0"]["sparsity_frac"] == 0.0
    assert json.loads((out / "steps" / "prune.json").read_text())["reached_frac"] == 0.0
    assert printed["verdict"]["outcome"] == "PASS"


def test_the_step_at_fault_is_named(tiny_pair: Pair, tmp_path: Path, capsys: Capture) -> None:
    """A random pair separates nothing, so that neither gate passes."""
    more = "prune: {method: magnitude, sparsity_frac: 0.5}\n" + RECOVER
    recipe, out = write_recipe(tmp_path / "r.yaml", tiny_pair, more), tmp_path / "bundle"
    assert run_cli(["run", str(recipe), "--out", str(out)]) in (3, 4)
    said = capsys.readouterr().out
    assert said.startswith("after pruning: ")
    assert "  at fault: pruning (the pruned model does not pass either)" in said
    steps = [step.name for step in open_bundle(out).manifest.steps]
    assert steps[2:5] == ["prune", "recover", "gate-pruned"]
    pruned = open_bundle(out).manifest.steps[2].result
    assert pruned["only_compresses"] == "50.0% zeros"
    assert "runtime_uses" not in pruned


def test_removed_structures_are_what_the_runtime_uses(
    tiny_pair: Pair, tmp_path: Path, capsys: Capture
) -> None:
    more = "prune: {structured: {kinds: [channels], sparsity_frac: 0.3, channel_multiple: 16}}\n"
    recipe, out = write_recipe(tmp_path / "r.yaml", tiny_pair, more), tmp_path / "bundle"
    assert run_cli(["run", str(recipe), "--out", str(out)]) in (3, 4)
    pruned = open_bundle(out).manifest.steps[2].result
    assert pruned["runtime_uses"].endswith("of the decoder blocks' weights removed")
    assert "only_compresses" not in pruned


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"recover": {}}, "`recover` repairs what pruning broke, and nothing is pruned"),
        ({"prune": {"rounds": 3}}, "`prune.rounds` is 3 and nothing is pruned"),
        (
            {"prune": {"method": "wanda", "pattern": "2:4", "rounds": 2}},
            "The pattern 2:4 has one sparsity and cannot be reached in 2 rounds",
        ),
    ],
)
def test_what_has_nothing_to_do_is_refused(data: dict[str, Any], said: str) -> None:
    recipe = make_recipe({"model": "m", **data}, {}, what="r")
    with pytest.raises(RecipeError) as error:
        check_pruning(recipe)
    assert said in str(error.value)


def test_flags_of_a_run_set_rounds_and_recovery() -> None:
    recipe = make_recipe(
        {"model": "m", "recover": None, "prune": {"method": "wanda"}},
        {"recover.objective": "dpo", "prune.rounds": 3},
        what="r",
    )
    assert recipe.recover is not None
    assert (recipe.recover.objective, recipe.prune.rounds) == ("dpo", 3)
    assert step_count(recipe) == 9


def test_recovery_needs_the_prompts_that_it_learns_from_whatever_calibrates() -> None:
    data = {"model": "m", "base": "b", "calibrate": {"method": "rtn", "mixture": {"harmful": 0.0}}}
    prepare_data(make_recipe(data, {}, what="r"))
    pruned = {"prune": {"method": "wanda"}, "recover": {"objective": "safety-heads"}}
    with pytest.raises(RecipeError, match="gives harmful prompts the weight 0"):
        prepare_data(make_recipe(data | pruned, {}, what="r"))
