"""Pruning real models: sparsity reached, what is left alone, norms against plain forward passes."""

import dataclasses
import json
from pathlib import Path

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


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
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
        unit, units = (columns, rows) if method == "wanda" else (rows * columns, 1)
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
    assert record["modules"]["model.layers.0.mlp.up_proj"] == {
        "weights": 2048,
        "zeros": 1024,
        "sparsity_frac": 0.5,
    }


def test_progress_counts_blocks(source: SourceModel) -> None:
    for method in ("magnitude", "wanda"):
        done: list[int] = []
        config = PruneConfig(method=method, sparsity_frac=0.5)
        prune_model(source, prompts(source), config, on_done=done.append)
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
        "Wanda ranks weights by their inputs and needs calibration prompts, found "
        f"{counts[0]} of which {counts[1]} are empty: give prompts, or use `magnitude`."
    )
