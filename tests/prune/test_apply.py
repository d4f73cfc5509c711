"""Pruning real models: sparsity reached, what is left alone, norms against plain forward passes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from holdfast.chat import user
from holdfast.errors import PruneError
from holdfast.exporter.architectures import ROWS, block_linear_modules, block_paths
from holdfast.exporter.export import export_model
from holdfast.exporter.source import SourceModel, load_source, save_source
from holdfast.exporter.walk import advance
from holdfast.files import to_json
from holdfast.prune.activations import first_block_batches, input_norms
from holdfast.prune.apply import prune_model
from holdfast.prune.block_scores import snip_of
from holdfast.prune.gradients import answer_batches, own_answers
from holdfast.prune.scores.set_difference import top
from holdfast.prune.scores.ships import head_channels
from holdfast.recipe import ExportConfig, PruneConfig
from tests.tiny import LINES, tiny_llama, tiny_model

HALF = PruneConfig(method="wanda", sparsity_frac=0.5)


@pytest.fixture
def source(tmp_path: Path) -> SourceModel:
    return load_source(tiny_llama(tmp_path / "model"))


def prompts(source: SourceModel) -> list[list[int]]:
    return [source.tokenizer.encode_chat(user(line)) for line in LINES]


@torch.inference_mode()
def plain_norms(source: SourceModel, paths: list[str]) -> dict[str, np.ndarray]:
    """||X_j||_2 of linears over the prompts, each run alone: no padding, no batches."""
    seen: dict[str, list[np.ndarray]] = {path: [] for path in paths}
    handles = [
        source.model.get_submodule(path).register_forward_pre_hook(
            lambda module, args, path=path: seen[path].append(args[0].double().flatten(0, -2).numpy())
        )
        for path in paths
    ]
    for ids in prompts(source):
        source.model(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return {path: np.sqrt(np.square(np.concatenate(rows)).sum(axis=0)) for path, rows in seen.items()}


@pytest.mark.parametrize("architecture", sorted(ROWS))
def test_norms_of_padded_batches_are_those_of_single_rows(tmp_path: Path, architecture: str) -> None:
    source = load_source(tiny_model(tmp_path, architecture))
    batches = first_block_batches(source.model, prompts(source), pad_id=0, batch_size=4)
    linears = block_linear_modules(source.model)
    expected = plain_norms(source, list(linears))
    for index, path in enumerate(block_paths(source.model)):
        inside = {name: module for name, module in linears.items() if name.startswith(path)}
        block = source.model.get_submodule(path)
        found = input_norms(block, inside, batches, index)
        assert set(found) == set(inside)
        for name, norms in found.items():
            np.testing.assert_allclose(norms.numpy(), expected[name], rtol=1e-4, atol=1e-5)
        advance(block, batches, index)


def test_wanda_looks_at_the_pruned_blocks_before(source: SourceModel) -> None:
    """The masks of the last block follow from norms taken after the first one was pruned."""
    dense = {name: module.weight.clone() for name, module in block_linear_modules(source.model).items()}
    prune_model(source, prompts(source), HALF)
    name = "model.layers.1.self_attn.q_proj"
    norms = plain_norms(source, [name])[name].astype(np.float32)
    scores = dense[name].abs().numpy() * norms
    dropped = source.model.get_submodule(name).weight.numpy() == 0
    for row_scores, row_dropped in zip(scores, dropped, strict=True):
        assert row_scores[row_dropped].max() <= row_scores[~row_dropped].min() * (1 + 1e-5)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("sparsity_frac", [0.0, 0.1, 0.5, 0.77])
def test_the_sparsity_reached(tmp_path: Path, method: str, sparsity_frac: float) -> None:
    """33 hidden channels, 24 in the attention and 45 in the MLP: little divides evenly."""
    settings = {
        "hidden_size": 36,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "intermediate_size": 45,
    }
    source = load_source(tiny_model(tmp_path, "LlamaForCausalLM", **settings))
    config = PruneConfig(method=method, sparsity_frac=sparsity_frac)
    report = prune_model(source, prompts(source), config)
    assert set(report.modules) == set(block_linear_modules(source.model))
    for name, module in block_linear_modules(source.model).items():
        rows, columns = module.weight.shape
        unit, units = (columns, rows) if method == "wanda" else (rows * columns, 1)  # what is counted over
        expected = int(unit * sparsity_frac + 1e-9) * units
        assert report.modules[name].zeros == expected == int((module.weight == 0).sum())
        assert report.modules[name].sparsity_frac == expected / module.weight.numel()
    assert report.reached_frac <= sparsity_frac
    assert report.reached_frac > sparsity_frac - 1 / 24
    assert report.method == method


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_only_block_linears_change_and_survivors_keep_their_value(source: SourceModel, method: str) -> None:
    before = {name: value.clone() for name, value in source.model.state_dict().items()}
    prune_model(source, prompts(source), PruneConfig(method=method, sparsity_frac=0.5))
    linears = {f"{name}.weight" for name in block_linear_modules(source.model)}
    for name, value in source.model.state_dict().items():
        if name in linears:
            kept = value != 0
            assert torch.equal(value[kept], before[name][kept])
            assert not torch.equal(value, before[name])
        else:
            assert torch.equal(value, before[name])


def test_none_leaves_everything(source: SourceModel) -> None:
    before = {name: value.clone() for name, value in source.model.state_dict().items()}
    report = prune_model(source, [], PruneConfig())
    assert all(torch.equal(value, before[name]) for name, value in source.model.state_dict().items())
    assert (report.method, report.reached_frac, report.modules) == ("none", 0.0, {})


def test_pruning_twice_gives_the_same_masks(tmp_path: Path) -> None:
    first, second = (load_source(tiny_llama(tmp_path / name)) for name in ("a", "b"))
    prune_model(first, prompts(first), HALF)
    prune_model(second, list(reversed(prompts(second))), HALF)
    for name, module in block_linear_modules(first.model).items():
        assert torch.equal(module.weight, second.model.get_submodule(name).weight)


def test_wanda_keeps_the_logits_closer_than_magnitude(tmp_path: Path) -> None:
    """Inputs of unequal loudness, as real models have them: that is what Wanda is for."""
    logits = {}
    for method in ("none", "magnitude", "wanda"):
        source = load_source(tiny_llama(tmp_path / method))
        loudness = torch.logspace(-1.5, 1.5, 32)
        for block in source.model.model.layers:
            block.input_layernorm.weight.copy_(loudness)
            block.post_attention_layernorm.weight.copy_(loudness.flip(0))
        prune_model(source, prompts(source), PruneConfig(method=method, sparsity_frac=0.5))
        with torch.inference_mode():
            logits[method] = source.model(torch.tensor([prompts(source)[0]])).logits
    wanda, magnitude = ((logits[method] - logits["none"]).abs().mean() for method in ("wanda", "magnitude"))
    assert wanda < magnitude


def test_masks_survive_saving_loading_and_export(source: SourceModel, tmp_path: Path) -> None:
    report = prune_model(source, prompts(source), HALF)
    save_source(source, tmp_path / "pruned")
    again = load_source(tmp_path / "pruned")
    (tmp_path / "onnx").mkdir()
    exported = export_model(tmp_path / "pruned", tmp_path / "onnx", ExportConfig(atol=2e-5))
    graph = onnx.load(tmp_path / "onnx" / "model.onnx").graph
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for name, module in block_linear_modules(source.model).items():
        assert torch.equal(again.model.get_submodule(name).weight, module.weight)
        place = exported.modules[name]
        found = weights[place.weight][:, slice(*(place.columns or (None,)))]
        assert np.array_equal(found.T, module.weight.numpy())
        assert int((found == 0).sum()) == report.modules[name].zeros


def test_the_record_is_plain_data(source: SourceModel) -> None:
    report = prune_model(source, prompts(source), HALF)
    record = json.loads(to_json(dataclasses.asdict(report)))
    assert record["method"] == "wanda"
    assert record["asked_frac"] == 0.5
    assert record["reached_frac"] == 0.5
    assert record["calibration_rows"] == len(LINES)
    assert record["calibration_tokens"] == sum(len(row) for row in prompts(source))
    assert (record["pattern"], record["allocation"]) == ("unstructured", "uniform")
    assert record["modules"]["model.layers.0.mlp.up_proj"] == {
        "weights": 2048,
        "zeros": 1024,
        "sparsity_frac": 0.5,
        "protected": 0,
        "protected_zeros": 0,
    }


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_progress_counts_blocks(source: SourceModel, method: str) -> None:
    done: list[int] = []
    prune_model(source, prompts(source), PruneConfig(method=method), on_done=done.append)  # type: ignore[arg-type]
    assert done == [1, 1]


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_numbers(source: SourceModel, method: str, value: float) -> None:
    source.model.model.layers[1].mlp.gate_proj.weight[2, 3] = value
    before = source.model.model.layers[0].mlp.up_proj.weight.clone()
    with pytest.raises(PruneError) as caught:
        prune_model(source, prompts(source), PruneConfig(method=method, sparsity_frac=0.5))
    assert str(caught.value) == (
        "The weights of `model.layers.1.mlp.gate_proj` hold NaN or infinity and cannot be ranked: "
        "start from an intact checkpoint."
    )
    assert torch.equal(source.model.model.layers[0].mlp.up_proj.weight, before)


def test_activations_that_are_not_numbers(source: SourceModel) -> None:
    source.model.model.layers[0].input_layernorm.weight[0] = float("inf")
    with pytest.raises(PruneError) as caught:
        prune_model(source, prompts(source), HALF)
    assert str(caught.value) == (
        "The inputs of `model.layers.0.self_attn.q_proj` are NaN or infinite on the calibration prompts: "
        "start from an intact checkpoint."
    )


@pytest.mark.parametrize(("rows", "counts"), [([], (0, 0)), ([[5, 6], []], (2, 1))])
def test_wanda_without_calibration(
    source: SourceModel, rows: list[list[int]], counts: tuple[int, int]
) -> None:
    with pytest.raises(PruneError) as caught:
        prune_model(source, rows, HALF)
    assert str(caught.value) == (
        f"`wanda` ranks weights on calibration prompts, found {counts[0]} of which {counts[1]} are empty: "
        "give prompts, or use `magnitude`."
    )


# --- alignment-aware methods ------------------------------------------------------------------

HARMFUL = [True, False] * 3
ALL = ["magnitude", "wanda", "sparsegpt", "snip", "combined", "set-difference", "aligned-sparsegpt"]


def config_of(method: str, **settings: Any) -> PruneConfig:
    return PruneConfig(method=method, response_tokens=3, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_patterns_are_exact_in_every_layer(source: SourceModel, method: str, pattern: str) -> None:
    config = config_of(method, pattern=pattern, rest="sparsegpt" if pattern == "4:8" else "wanda")
    report = prune_model(source, prompts(source), config, harmful=HARMFUL)
    kept, group = map(int, pattern.split(":"))
    for name, module in block_linear_modules(source.model).items():
        assert ((module.weight.reshape(-1, group) != 0).sum(dim=1) == kept).all()
        assert report.modules[name].sparsity_frac == 0.5
    assert (report.pattern, report.reached_frac) == (pattern, 0.5)


@pytest.mark.parametrize("method", ["snip", "combined", "set-difference"])
def test_methods_by_gradients(source: SourceModel, method: str) -> None:
    report = prune_model(source, prompts(source), config_of(method), harmful=HARMFUL)
    assert report.reached_frac == 0.5
    assert (report.safety_rows, report.utility_rows) == (3, 3)
    protected = sum(entry.protected for entry in report.modules.values())
    assert (protected > 0) == (method == "set-difference")
    # rows where more than half is protected cannot keep all of it
    assert sum(entry.protected_zeros for entry in report.modules.values()) <= 0.05 * protected


@pytest.mark.parametrize("rest", ["wanda", "sparsegpt"])
def test_planted_safety_weights_stay(tmp_path: Path, rest: str) -> None:
    """What the set difference of the unpruned model protects is there afterwards; plain, much is not."""
    kept = {}
    dense = load_source(tiny_llama(tmp_path / "dense"))
    safety = [row for row, h in zip(prompts(dense), HARMFUL, strict=True) if h]
    utility = [row for row, h in zip(prompts(dense), HARMFUL, strict=True) if not h]
    critical = {}
    batches = [answer_batches(dense, rows, own_answers(dense, rows, 3, 16)) for rows in (safety, utility)]
    linears = block_linear_modules(dense.model)
    for index, path in enumerate(block_paths(dense.model)):
        inside = {name: module for name, module in linears.items() if name.startswith(path)}
        scores = [snip_of(dense.model, inside, index, part) for part in batches]
        critical |= {name: top(scores[0][name], 0.2) & ~top(scores[1][name], 0.1) for name in inside}
        for part in batches:
            advance(dense.model.get_submodule(path), [batch.state for batch in part], index)
    for method in (rest, "set-difference"):
        source = load_source(tiny_llama(tmp_path / method))
        prune_model(
            source,
            prompts(source),
            config_of(method, rest=rest, safety_top_frac=0.2, utility_top_frac=0.1),
            harmful=HARMFUL,
        )
        zero = {name: module.weight == 0 for name, module in block_linear_modules(source.model).items()}
        lost = sum(int((zero[name] & mask).sum()) for name, mask in critical.items())
        kept[method] = 1 - lost / sum(int(mask.sum()) for mask in critical.values())
    assert kept["set-difference"] > 0.95  # rows where more than half is protected cannot keep all of it
    assert kept[rest] < kept["set-difference"] - 0.03


@pytest.mark.parametrize("method", ALL)
def test_safety_heads_keep_their_part_of_the_output(source: SourceModel, method: str) -> None:
    config = config_of(method, safety_heads=1, rest="sparsegpt")  # it counts over all rows
    report = prune_model(source, prompts(source), config, harmful=HARMFUL)
    ((block, head),) = report.safety_heads
    name = f"model.layers.{block}.self_attn.o_proj"
    weight = source.model.get_submodule(name).weight
    assert (weight[:, head_channels(head, 4, 64)] != 0).all()
    assert report.modules[name].protected >= 32 * 16
    assert 0.499 < report.reached_frac <= 0.5


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "set-difference"])
def test_allocation_by_sensitivity(source: SourceModel, method: str) -> None:
    """Differs between layers, at a total that is at most what was asked and at least the uniform one."""
    config = config_of(method, allocation="sensitivity", sparsity_frac=0.4)
    report = prune_model(source, prompts(source), config, harmful=HARMFUL)
    fracs = [entry.sparsity_frac for entry in report.modules.values()]
    assert len({round(frac, 2) for frac in fracs}) > 1
    assert all(0.0 <= frac <= 0.96 for frac in fracs)
    assert 0.38 < report.reached_frac <= 0.4


def test_the_contrastive_loss_protects_other_weights(tmp_path: Path) -> None:
    unaligned = load_source(tiny_llama(tmp_path / "base", seed=1)).model
    weights = {}
    for loss in ("nll", "contrastive"):
        source = load_source(tiny_llama(tmp_path / loss))
        config = config_of("set-difference", safety_loss=loss)
        prune_model(source, prompts(source), config, harmful=HARMFUL, negative=unaligned)
        weights[loss] = source.model.model.layers[0].mlp.up_proj.weight
    assert not torch.equal(weights["nll"] == 0, weights["contrastive"] == 0)


def test_wanda_does_not_depend_on_which_rows_are_harmful(tmp_path: Path) -> None:
    first, second = (load_source(tiny_llama(tmp_path / name)) for name in ("a", "b"))
    prune_model(first, prompts(first), HALF)
    prune_model(second, prompts(second), HALF, harmful=HARMFUL)
    for name, module in block_linear_modules(first.model).items():
        assert torch.equal(module.weight, second.model.get_submodule(name).weight)


def test_snip_needs_no_kinds(source: SourceModel) -> None:
    report = prune_model(source, prompts(source), config_of("snip"))
    assert (report.safety_rows, report.utility_rows, report.reached_frac) == (0, 6, 0.5)


def test_gradients_that_are_not_numbers(source: SourceModel) -> None:
    source.model.model.norm.weight[0] = float("inf")
    assert "gradients of `model.layers.0.self_attn.q_proj` are NaN or infinite" in refused(
        source, config_of("snip")
    )


# --- what is refused --------------------------------------------------------------------------


def refused(source: SourceModel, config: PruneConfig, **more: Any) -> str:
    before = {name: value.clone() for name, value in source.model.state_dict().items()}
    with pytest.raises(PruneError) as caught:
        prune_model(source, prompts(source), config, **more)
    assert all(torch.equal(value, before[name]) for name, value in source.model.state_dict().items())
    return str(caught.value)


@pytest.mark.parametrize("sparsity_frac", [-0.1, 1.0, 1.5, float("nan")])
def test_a_sparsity_out_of_range(source: SourceModel, sparsity_frac: float) -> None:
    config = PruneConfig(method="magnitude", sparsity_frac=sparsity_frac)
    assert refused(source, config) == (
        f"Expected a sparsity from 0 to below 1, got {sparsity_frac:g}: 0.5 sets half of the weights to "
        "zero."
    )


def test_a_pattern_that_does_not_divide_a_layer(tmp_path: Path) -> None:
    source = load_source(tiny_model(tmp_path, "LlamaForCausalLM", intermediate_size=44))
    assert refused(source, config_of("magnitude", pattern="4:8")) == (
        "The pattern 4:8 needs input channels in whole groups of 8, and `model.layers.0.mlp.down_proj` has "
        "44: use another pattern."
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "4:4"}, "The pattern 4:4 drops nothing: give n:m with n below m, for example 2:4."),
        (
            {"pattern": "1:4"},
            "The pattern 1:4 sets 75.0% of the weights to zero and the sparsity says 50.0%: make them "
            "agree.",
        ),
        (
            {"pattern": "2:4", "allocation": "sensitivity"},
            "The pattern 2:4 is as sparse in every layer, so that `allocation: sensitivity` has nothing to "
            "decide: use `uniform`, or the pattern `unstructured`.",
        ),
        (
            {"safety_heads": 9},
            "Expected at most 8 safety heads, the attention heads of the model, got 9: lower "
            "`safety_heads`.",
        ),
    ],
)
def test_settings_that_contradict(source: SourceModel, settings: dict[str, Any], message: str) -> None:
    assert refused(source, config_of("magnitude", **settings), harmful=HARMFUL) == message


@pytest.mark.parametrize(
    ("settings", "harmful", "message"),
    [
        ({"method": "combined"}, False, "The safety set is empty: `combined` needs harmful"),
        ({"method": "set-difference"}, True, "The utility set is empty: `set-difference` needs harmless"),
        (
            {"method": "wanda", "allocation": "sensitivity"},
            False,
            "The safety set is empty: `allocation: sensitivity` needs harmful",
        ),
        (
            {"method": "wanda", "safety_heads": 1},
            False,
            "The safety set is empty: `safety_heads` needs harmful",
        ),
    ],
)
def test_an_empty_set(source: SourceModel, settings: dict[str, Any], harmful: bool, message: str) -> None:
    assert refused(source, PruneConfig(**settings), harmful=[harmful] * 6) == (
        f"{message} calibration prompts, and none of the 6 is: add some, or use `wanda` with uniform "
        "allocation."
    )


def test_a_model_that_is_sparse_already(source: SourceModel) -> None:
    prune_model(source, [], PruneConfig(method="magnitude", sparsity_frac=0.25))
    weights = sum(module.weight.numel() for module in block_linear_modules(source.model).values())
    assert refused(source, HALF) == (
        f"Of the {weights:,} weights in the decoder blocks {weights // 4:,} are zero already: start from "
        "the unpruned model, or set `allow_zeros` to count them as pruned."
    )
    before = {name: module.weight == 0 for name, module in block_linear_modules(source.model).items()}
    report = prune_model(source, [], PruneConfig(method="magnitude", sparsity_frac=0.5, allow_zeros=True))
    assert report.reached_frac == 0.5
    for name, module in block_linear_modules(source.model).items():
        assert (module.weight[before[name]] == 0).all()
