"""Recovery: what it gains, what it may not touch, what it restores, what it refuses."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from msgspec import structs
from torch import Tensor, nn

from holdfast.chat import user
from holdfast.cli import run_cli
from holdfast.errors import CalibrationError, PruneError
from holdfast.exporter.architectures import ROWS, block_linear_modules, block_paths
from holdfast.exporter.source import SourceModel, load_source, save_source
from holdfast.prune.apply import prune_model
from holdfast.prune.heads import attention_output, attention_output_path, query_heads
from holdfast.prune.recovery.heads import head_weights
from holdfast.prune.recovery.hidden import hidden_loss
from holdfast.prune.recovery.recover import Recovered, learning_rate, recover, total_steps
from holdfast.prune.recovery.restore import restorable
from holdfast.prune.scores.ships import head_channels
from holdfast.prune.structured.prune import prune_structures
from holdfast.quantize.learning.trained_weights import LORA_ALPHA, TrainedWeight, TrainedWeights
from holdfast.quantize.prompts.draw import CalibrationPrompt, load_calibration
from holdfast.quantize.prompts.sequences import chat_prompts
from holdfast.recipe import CalibrateConfig, PruneConfig, RecoverConfig, StructuredConfig
from tests.tiny import tiny_llama, tiny_model

LESSON = CalibrateConfig(top_k=50, held_out_frac=0.25)
QUICK = RecoverConfig(steps=6, batch_size=64, response_tokens=4, alphas=(), lr=2.5e-4, safety_heads=2)
CASES = {
    "full": QUICK,
    "lora": structs.replace(QUICK, lora_rank=2, lr=1.25e-3),
    "push": structs.replace(QUICK, alphas=(0.3,)),
    "dpo": structs.replace(QUICK, objective="dpo", lr=1.25e-4),
    "heads": structs.replace(QUICK, trained="safety-heads", lr=6e-4),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Of an aligned, an unaligned and a pruned tiny model."""
    root = tmp_path_factory.mktemp("models")
    folders = tiny_llama(root / "aligned", seed=0), tiny_llama(root / "base", seed=1), root / "pruned"
    source = load_source(folders[0])
    prune_model(source, [], PruneConfig(method="magnitude", sparsity_frac=0.6))
    save_source(source, folders[2])
    return folders


@pytest.fixture(scope="module")
def models(folders: tuple[Path, Path, Path]) -> tuple[SourceModel, SourceModel, SourceModel]:
    return load_source(folders[0]), load_source(folders[1]), load_source(folders[2])


@pytest.fixture(scope="module")
def prompts() -> list[CalibrationPrompt]:
    return load_calibration("builtin", 12, seed=0)


@pytest.fixture(scope="module")
def recovered(
    models: tuple[SourceModel, SourceModel, SourceModel], prompts: list[CalibrationPrompt]
) -> dict[str, Recovered]:
    """Labels of tiny models' noise are noise: candidates are chosen by their divergence alone."""
    aligned, base, pruned = models
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("holdfast.quantize.learning.held_out.count_flips", lambda *_: (0, 0, 0))
        patch.setattr("holdfast.quantize.learning.candidates._flips_more", lambda *_: False)
        return {
            name: recover(pruned, aligned, base.model, config, LESSON, prompts=prompts, seed=0)
            for name, config in CASES.items()
        }


def weights(source: SourceModel) -> dict[str, Tensor]:
    return {path: linear.weight for path, linear in block_linear_modules(source.model).items()}


@pytest.mark.parametrize("name", ["full", "lora", "push", "heads"])
def test_training_brings_the_model_nearer(name: str, recovered: dict[str, Recovered]) -> None:
    record = recovered[name].record
    assert record.after.steps == 6
    assert record.after.losses[-1] < record.after.losses[0]
    assert record.after.divergence < record.before.divergence


def test_a_preference_is_learned_as_well(recovered: dict[str, Recovered]) -> None:
    losses = recovered["dpo"].record.candidates[0].losses
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", CASES)
def test_zeros_stay_and_nothing_outside_the_blocks_changes(
    name: str, recovered: dict[str, Recovered], models: tuple[SourceModel, ...]
) -> None:
    pruned, done = models[2], recovered[name]
    before, after = weights(pruned), weights(done.source)
    assert all(bool((after[path][before[path] == 0] == 0).all()) for path in before)
    assert (
        done.record.zeros_before
        <= done.record.zeros_after
        == sum(int((w == 0).sum()) for w in after.values())
    )
    inside = {f"{path}.weight" for path in before}
    kept = {n: p for n, p in done.source.model.state_dict().items() if n not in inside}
    assert all(torch.equal(value, pruned.model.state_dict()[n]) for n, value in kept.items())
    assert not any(p.requires_grad for p in done.source.model.parameters())


@pytest.mark.parametrize("name", ["full", "lora"])
def test_every_linear_is_trained(
    name: str, recovered: dict[str, Recovered], models: tuple[SourceModel, ...]
) -> None:
    before, after = weights(models[2]), weights(recovered[name].source)
    assert not any(torch.equal(before[path], after[path]) for path in before)


def test_only_the_safety_heads_are_trained(
    recovered: dict[str, Recovered], models: tuple[SourceModel, ...]
) -> None:
    done = recovered["heads"]
    masks = head_weights(done.source.model, done.record.safety_heads)
    before, after = weights(models[2]), weights(done.source)
    assert len(done.record.safety_heads) == 2
    for path in before:
        free = masks.get(path, torch.zeros_like(before[path], dtype=torch.bool))
        assert torch.equal(before[path][~free], after[path][~free])
    assert any(not torch.equal(before[path], after[path]) for path in masks)


def test_the_same_seed_gives_the_same_weights(
    recovered: dict[str, Recovered], models: tuple[SourceModel, ...], prompts: list[CalibrationPrompt]
) -> None:
    aligned, base, pruned = models
    config = CASES["lora"]
    again = recover(pruned, aligned, base.model, config, LESSON, prompts=prompts, seed=0)
    losses = [done.record.candidates[0].losses for done in (again, recovered["lora"])]
    assert losses[0] == losses[1]
    other = recover(pruned, aligned, base.model, config, LESSON, prompts=prompts, seed=1)
    assert other.record.candidates[0].losses != losses[0]


def test_progress_counts_what_total_steps_says(
    models: tuple[SourceModel, ...], prompts: list[CalibrationPrompt]
) -> None:
    aligned, base, pruned = models
    for name in ("push", "dpo"):
        counted: list[int] = []
        config = CASES[name]
        recover(
            pruned, aligned, base.model, config, LESSON, prompts=prompts, seed=0, on_step=counted.append
        )
        assert sum(counted) == total_steps(config, LESSON)
    assert total_steps(structs.replace(QUICK, objective="safety-heads"), LESSON) == 0


def test_the_learning_rate_falls_with_the_width(models: tuple[SourceModel, ...]) -> None:
    model = copy.deepcopy(models[0].model)
    model.config.hidden_size = 1024
    assert learning_rate(structs.replace(QUICK, lr=2e-3), model) == pytest.approx(5e-4)


def test_nothing_better_leaves_the_model_as_it_was(
    models: tuple[SourceModel, ...], prompts: list[CalibrationPrompt]
) -> None:
    aligned, base, pruned = models
    wild = structs.replace(QUICK, lr=0.06)
    done = recover(pruned, aligned, base.model, wild, LESSON, prompts=prompts, seed=0)
    assert done.record.after.steps == 0
    before, after = weights(pruned), weights(done.source)
    assert all(torch.equal(before[path], after[path]) for path in before)


def test_a_learning_rate_that_leaves_the_numbers_is_one_sentence(
    models: tuple[SourceModel, ...], prompts: list[CalibrationPrompt]
) -> None:
    aligned, base, pruned = models
    with pytest.raises(CalibrationError, match="no longer in numbers"):
        recover(
            pruned,
            aligned,
            base.model,
            structs.replace(QUICK, lr=1e30, steps=8),
            LESSON,
            prompts=prompts,
            seed=0,
        )


# --- the weights in training ------------------------------------------------------------------


def test_adapters_add_what_pefts_do() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4, bias=False))
    weight = model[0].weight.detach().clone()
    config = peft.LoraConfig(r=2, lora_alpha=LORA_ALPHA, target_modules=["0"], lora_dropout=0.0)
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    own = TrainedWeight(weight, 2, torch.Generator().manual_seed(0))
    assert own.down is not None and own.up is not None
    with torch.no_grad():
        own.up.normal_()
        layer = adapted.base_model.model[0]
        layer.lora_A["default"].weight.copy_(own.down)
        layer.lora_B["default"].weight.copy_(own.up)
    merged = adapted.merge_and_unload()[0].weight
    torch.testing.assert_close(own(weight), merged)


def test_what_may_not_change_keeps_its_value_and_zeros_stay() -> None:
    linear = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 0.0, 2.0], [3.0, 4.0, 0.0]]))
    chosen = {"x": torch.tensor([[True, True, False], [False, True, False]])}
    trained = TrainedWeights({"x": linear}, 0, 0, chosen)
    with torch.no_grad():
        trained.parameters()["x.weight"].add_(10.0)
    assert linear.weight.tolist() == [[11.0, 0.0, 2.0], [3.0, 14.0, 0.0]]
    trained.close()
    assert linear.weight.tolist() == [[11.0, 0.0, 2.0], [3.0, 14.0, 0.0]]
    assert not linear.weight.requires_grad


# --- hidden states ----------------------------------------------------------------------------


def test_hidden_states_are_compared_by_their_size() -> None:
    """Block 1: errors 1 and 0 over squares 4 and 16; block 2: all 3 off where they are 3."""
    wanted = [torch.tensor([[[2.0], [4.0], [9.0]]]), torch.full((1, 3, 1), 3.0)]
    found = [torch.tensor([[[3.0], [4.0], [0.0]]]), torch.full((1, 3, 1), 6.0)]
    shown = torch.tensor([[True, True, False]])
    assert float(hidden_loss(wanted, found, shown)) == pytest.approx((1 / 20 + 1.0) / 2)
    assert float(hidden_loss(wanted, found[1:], shown)) == pytest.approx(1.0)  # a block is gone


def test_hidden_states_come_nearer_with_a_weight(
    models: tuple[SourceModel, ...], prompts: list[CalibrationPrompt]
) -> None:
    aligned, base, pruned = models
    ids = torch.tensor([aligned.tokenizer.encode_chat(user("What is the capital?"))])

    def away(source: SourceModel) -> float:
        seen = [m.model(ids, output_hidden_states=True).hidden_states for m in (aligned, source)]
        return float(hidden_loss(seen[0][1:], seen[1][1:], torch.ones_like(ids, dtype=torch.bool)))

    def recovered_with(weight: float) -> SourceModel:
        config = structs.replace(QUICK, hidden_weight=weight, steps=20)
        return recover(pruned, aligned, base.model, config, LESSON, prompts=prompts, seed=0).source

    plain, matched = away(recovered_with(0.0)), away(recovered_with(10.0))
    assert matched < plain
    assert matched < away(pruned)


# --- restoring --------------------------------------------------------------------------------


def test_restored_is_what_both_rank_high_and_pruning_took() -> None:
    """Eight weights of the heads: the top half in safety, the top three quarters in utility."""
    safety = torch.tensor([[9.0, 8.0, 7.0, 6.0, 99.0], [5.0, 4.0, 3.0, 2.0, 99.0]])
    utility = torch.tensor([[1.0, 2.0, 6.0, 7.0, 99.0], [5.0, 4.0, 8.0, 3.0, 99.0]])
    inside = torch.tensor([[True] * 4 + [False]] * 2)
    pruned = torch.tensor([[True, True, True, False, True], [True, True, False, True, True]])
    found = restorable(safety, utility, pruned, inside, safety_top_frac=0.5, utility_top_frac=0.75)
    assert found.tolist() == [[False, False, True, False, False], [False] * 5]
    # the first two are of the lowest quarter in utility; the fourth was not pruned


def test_nothing_inside_restores_nothing() -> None:
    one = torch.ones(2, 2)
    none = torch.zeros(2, 2, dtype=torch.bool)
    found = restorable(one, one, ~none, none, safety_top_frac=0.5, utility_top_frac=0.5)
    assert not found.any()


def test_restoring_takes_the_aligned_models_values_in_the_heads_alone(
    models: tuple[SourceModel, ...], prompts: list[CalibrationPrompt]
) -> None:
    aligned, base, pruned = models
    config = structs.replace(QUICK, objective="safety-heads", safety_top_frac=0.9, utility_top_frac=0.9)
    done = recover(pruned, aligned, base.model, config, LESSON, prompts=prompts, seed=0)
    record, masks = done.record, head_weights(aligned.model, done.record.safety_heads)
    old, before, after = weights(aligned), weights(pruned), weights(done.source)
    changed = {path: before[path] != after[path] for path in before}
    assert {path: int(mask.sum()) for path, mask in changed.items() if mask.any()} == {
        path: count for path, count in record.restored.items() if count
    }
    assert sum(record.restored.values()) == record.zeros_before - record.zeros_after
    for path, mask in changed.items():
        assert torch.equal(after[path][mask], old[path][mask])
        assert not (mask & ~masks.get(path, torch.zeros_like(mask))).any()
    if record.restored:
        assert record.after.divergence <= record.before.divergence
    else:
        assert record.after == record.before


@pytest.mark.parametrize("architecture", sorted(ROWS))
def test_weights_of_a_head_are_all_that_it_says(architecture: str, tmp_path: Path) -> None:
    """Without the columns that it writes through, the attention gives what it gives without the head."""
    source = load_source(tiny_model(tmp_path / "model", architecture))
    head = query_heads(source.model) - 1
    masks = head_weights(source.model, [(1, head)])
    path, output = attention_output_path(source.model, 1), attention_output(source.model, 1)
    part = head_channels(head, query_heads(source.model), output.in_features)
    silenced = torch.randn(3, output.in_features, generator=torch.Generator().manual_seed(0))
    expected = output(silenced.clone().index_fill_(1, torch.arange(part.start, part.stop), 0.0))
    with torch.no_grad():
        output.weight.masked_fill_(masks[path], 0.0)
    torch.testing.assert_close(output(silenced), expected)
    linears = block_linear_modules(source.model)
    assert all(name.startswith(f"{block_paths(source.model)[1]}.") for name in masks)
    assert all(mask.shape == linears[name].weight.shape for name, mask in masks.items())


def test_heads_of_a_group_share_keys_and_values(tmp_path: Path) -> None:
    source = load_source(tiny_llama(tmp_path / "model"))
    config = source.model.config
    width = config.head_dim
    group = config.num_attention_heads // config.num_key_value_heads
    assert group > 1
    last = config.num_attention_heads - 1
    masks = head_weights(source.model, [(0, last)])
    rows = {path.rpartition(".")[2]: mask for path, mask in masks.items()}
    assert rows["q_proj"][last * width :].all() and not rows["q_proj"][: last * width].any()
    first = (config.num_key_value_heads - 1) * width
    assert rows["k_proj"][first:].all() and not rows["k_proj"][:first].any()
    assert torch.equal(rows["k_proj"], rows["v_proj"])
    assert rows["o_proj"][:, last * width :].all() and not rows["o_proj"][:, : last * width].any()


# --- refusals and the command -----------------------------------------------------------------


def test_safety_heads_of_a_model_that_lost_structures_are_refused(
    models: tuple[SourceModel, ...], prompts: list[CalibrationPrompt]
) -> None:
    aligned, base, _ = models
    ids = chat_prompts(aligned.tokenizer, [prompt.prompt for prompt in prompts])
    harmful = [prompt.kind == "harmful" for prompt in prompts]
    settings = StructuredConfig(kinds=("channels",), channel_multiple=4)
    smaller, _ = prune_structures(aligned, ids, settings, harmful=harmful, response_tokens=4)
    config = structs.replace(QUICK, objective="safety-heads")
    with pytest.raises(PruneError, match="lost structures, so that its heads are others"):
        recover(smaller, aligned, base.model, config, LESSON, prompts=prompts, seed=0)
    done = recover(smaller, aligned, base.model, QUICK, LESSON, prompts=prompts, seed=0)
    assert done.source.model.config.intermediate_size < aligned.model.config.intermediate_size


def test_more_safety_heads_than_there_are_is_one_sentence(
    models: tuple[SourceModel, ...], prompts: list[CalibrationPrompt]
) -> None:
    aligned, base, pruned = models
    config = structs.replace(QUICK, trained="safety-heads", safety_heads=9)
    with pytest.raises(PruneError, match="Expected at most 8 safety heads"):
        recover(pruned, aligned, base.model, config, LESSON, prompts=prompts, seed=0)


def test_the_command_writes_a_model_and_its_record(
    folders: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    few = ["--samples", "24", "--steps", "2", "--response-tokens", "3", "--lr", "1e-4"]
    command = ["recover", str(folders[2]), "--aligned", str(folders[0]), "--base", str(folders[1])]
    assert run_cli([*command, "--out", str(out), *few, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "recover.json").read_text())
    assert printed["settings"]["steps"] == 2
    load_source(out)
    assert run_cli([*command, "--out", str(out), *few]) == 1
    assert "exists already" in capsys.readouterr().err


def test_a_calibrated_folder_is_trained_with_its_quantization(
    folders: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--samples", "24", "--steps", "1"]
    both = ["--aligned", str(folders[0]), "--base", str(folders[1])]
    made, out = tmp_path / "calibrated", tmp_path / "out"
    scheme = ["--scheme", "w4", "--block-size", "16", "--method", "rtn"]
    assert run_cli(["calibrate", str(folders[2]), *both, *scheme, "--out", str(made)]) == 0
    command = ["recover", str(made), *both, *few, "--response-tokens", "3"]
    capsys.readouterr()
    assert run_cli([*command, "--out", str(out), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["method"] == "qat"
    assert set(record["formats"].values()) == {"w4"}
    assert record["layout"]["block_size"] == 16
    zeros = {path: weight == 0 for path, weight in weights(load_source(folders[2])).items()}
    after = weights(load_source(out))
    assert all(bool((after[path][mask] == 0).all()) for path, mask in zeros.items())
    assert run_cli([*command, "--objective", "safety-heads", "--out", str(tmp_path / "x")]) == 2
    assert "is calibrated, and safety heads are restored or trained before" in capsys.readouterr().err


def test_the_aligned_model_is_left_alone(
    models: tuple[SourceModel, ...], prompts: list[CalibrationPrompt]
) -> None:
    aligned, base, pruned = models
    before = replace(aligned, model=copy.deepcopy(aligned.model))
    recover(pruned, aligned, base.model, QUICK, LESSON, prompts=prompts, seed=0)
    state = before.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in aligned.model.state_dict().items())
