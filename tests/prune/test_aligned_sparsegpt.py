"""Aligned SparseGPT: targets and refitting against least squares, models that SparseGPT gets wrong."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from holdfast.chat import user
from holdfast.errors import PruneError
from holdfast.exporter.architectures import ROWS, block_linear_modules
from holdfast.exporter.source import SourceModel, load_source
from holdfast.prune import refit as module
from holdfast.prune.apply import prune_model
from holdfast.prune.dense_target import dense_target, moment_update
from holdfast.prune.refit import refit
from holdfast.prune.sparsegpt import output_error, sparsegpt
from holdfast.recipe import PruneConfig
from tests.tiny import LINES, tiny_llama, tiny_model

HARMFUL = [True, False] * 3


def tokens(seed: int, count: int = 200, width: int = 12) -> Tensor:
    """Inputs that share a few directions, float32 [count, width]."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(count, 4, generator=generator) @ torch.randn(4, width, generator=generator)
    return shared + 0.3 * torch.randn(count, width, generator=generator)


def weight_and_mask(seed: int, rows: int = 7, width: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator)
    return weight, torch.rand(rows, width, generator=generator) < 0.5


def moment_of(weight: Tensor, dense: Tensor, pruned: Tensor) -> Tensor:
    moment = torch.zeros_like(weight)
    for start in range(0, len(dense), 64):
        moment_update(moment, weight, dense[start : start + 64], pruned[start : start + 64])
    return moment


# --- target -----------------------------------------------------------------------------------


def test_target_by_hand() -> None:
    """X = (1, 2) gives (3, 6); X' = (2, 3) comes nearest to it at V = (3*2 + 6*3) / (4 + 9)."""
    weight, dense, pruned = (
        torch.tensor([[3.0]]),
        torch.tensor([[1.0], [2.0]]),
        torch.tensor([[2.0], [3.0]]),
    )
    target = dense_target(weight, moment_of(weight, dense, pruned), pruned.T @ pruned, 0.0)
    torch.testing.assert_close(target, torch.tensor([[24 / 13]]), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("damp_frac", [0.0, 0.01, 1.0])
def test_target_against_least_squares(damp_frac: float) -> None:
    """The ridge is as many more tokens on which the weight's own output is asked for."""
    weight, _ = weight_and_mask(0)
    dense, pruned = tokens(1), tokens(1) + 0.2 * tokens(2)
    hessian = pruned.T @ pruned
    found = dense_target(weight, moment_of(weight, dense, pruned), hessian, damp_frac)
    ridge = np.sqrt(damp_frac * hessian.diagonal().mean().item()) * np.eye(12)
    inputs = np.concatenate([pruned.numpy(), ridge])
    outputs = np.concatenate([dense.numpy(), ridge]) @ weight.numpy().T
    expected = np.linalg.lstsq(inputs, outputs, rcond=None)[0].T
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-3)


def test_target_is_the_weight_where_nothing_before_was_pruned() -> None:
    weight, _ = weight_and_mask(3)
    inputs = tokens(4)
    inputs[:, 5] = 0.0  # a channel that calibration never saw
    found = dense_target(weight, moment_of(weight, inputs, inputs), inputs.T @ inputs, 0.01)
    torch.testing.assert_close(found, weight, rtol=1e-4, atol=1e-4)


def test_a_hessian_that_cannot_be_inverted() -> None:
    with pytest.raises(PruneError) as caught:
        dense_target(torch.ones(1, 2), torch.ones(1, 2), torch.ones(2, 2), 0.0)
    assert str(caught.value) == (
        "The Hessian of `aligned-sparsegpt` cannot be inverted: calibrate with more prompts, or use "
        "`wanda`."
    )


def test_sparsegpt_starts_from_the_target_and_keeps_zeros() -> None:
    weight, _ = weight_and_mask(5)
    weight[:, 3] = 0.0
    inputs = tokens(5)
    target = weight + 0.5 * weight_and_mask(6)[0]
    found, keep = sparsegpt(weight, inputs.T @ inputs, 0.3, target=target)
    assert (found[:, 3] == 0).all()
    assert not keep[:, 3].any()
    own, _ = sparsegpt(weight, inputs.T @ inputs, 0.3)
    assert output_error(found - target, inputs.T @ inputs) < output_error(own - target, inputs.T @ inputs)


def test_rows_by_hand() -> None:
    """Inputs that do not correlate: row 1 has the larger weights, and 2.5 > 1.5^2 turns that around."""
    weight, hessian = torch.tensor([[1.0, 1.0], [1.5, 1.5]]), torch.eye(2)
    _, keep = sparsegpt(weight, hessian, 0.5)
    assert keep.tolist() == [[False, False], [True, True]]
    _, keep = sparsegpt(weight, hessian, 0.5, row_weights=torch.tensor([2.5, 1.0]))
    assert keep.tolist() == [[True, True], [False, False]]


# --- refit ------------------------------------------------------------------------------------


def test_refit_by_hand_where_sparsegpt_stops() -> None:
    """H = (2 1; 1 2), T = (2 1): the second goes, and 2.5 is what the first becomes; SparseGPT leaves 2.

    (d H d' with d = (x, -1) is 2x^2 - 2x + 2, least at x = 1/2.)
    """
    hessian, target = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([[2.0, 1.0]])
    weight, keep = sparsegpt(target, hessian, 0.5, damp_frac=0.0)
    assert weight.tolist() == [[2.0, 0.0]]
    found = refit(weight, keep, target, hessian, 0.0)
    torch.testing.assert_close(found, torch.tensor([[2.5, 0.0]]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("damp_frac", [0.0, 0.05])
def test_refit_against_least_squares_row_by_row(damp_frac: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", 3)  # 7 rows in three parts
    target, keep = weight_and_mask(7)
    keep[2] = False  # nothing is left to fit
    inputs = tokens(8)
    hessian = inputs.T @ inputs
    found = refit(target * keep, keep, target, hessian, damp_frac).numpy()
    ridge = np.sqrt(damp_frac * hessian.diagonal().mean().item()) * np.eye(12)
    rows = np.concatenate([inputs.numpy(), ridge]).astype(np.float64)
    for row, mask, wanted in zip(found, keep.numpy(), target.numpy(), strict=True):
        expected = np.linalg.lstsq(rows[:, mask], rows @ wanted, rcond=None)[0]
        np.testing.assert_allclose(row[mask], expected, rtol=1e-2, atol=1e-3)
        assert (row[~mask] == 0).all()


def test_refit_is_never_worse_than_sparsegpt() -> None:
    for seed in range(5):
        target, inputs = weight_and_mask(seed)[0], tokens(seed + 20)
        hessian = inputs.T @ inputs
        weight, keep = sparsegpt(target, hessian, 0.5)
        found = refit(weight, keep, target, hessian, 0.0)
        assert output_error(found - target, hessian) < output_error(weight - target, hessian)
        assert torch.equal(found == 0, ~keep)


def test_more_steps_than_it_takes_change_nothing() -> None:
    target, keep = weight_and_mask(9)
    hessian = torch.diag(torch.arange(12.0))  # solved in one; the first channel was never seen
    found = refit(target * keep, keep, target, hessian, 0.0, steps=500)
    torch.testing.assert_close(found, target * keep, rtol=1e-6, atol=1e-6)


# --- models -----------------------------------------------------------------------------------


def prompts(source: SourceModel) -> list[list[int]]:
    return [source.tokenizer.encode_chat(user(line)) for line in LINES]


@torch.inference_mode()
def logits(source: SourceModel) -> Tensor:
    rows = [source.model(torch.tensor([ids]), use_cache=False).logits[0, -4:] for ids in prompts(source)]
    return torch.cat(rows)


def config_of(method: str, **settings: object) -> PruneConfig:
    return PruneConfig(method=method, response_tokens=3, **settings)  # type: ignore[arg-type]


def pruned_logits(folder: Path, config: PruneConfig) -> Tensor:
    source = load_source(tiny_llama(folder))
    prune_model(source, prompts(source), config, harmful=HARMFUL)
    return logits(source)


@pytest.mark.parametrize("sparsity_frac", [0.5, 0.7])
def test_nearer_to_the_unpruned_model_than_sparsegpt(tmp_path: Path, sparsity_frac: float) -> None:
    wanted = logits(load_source(tiny_llama(tmp_path / "dense")))
    distance = {}
    for name, settings in (
        ("sparsegpt", {}),
        ("aligned-sparsegpt", {"allocation": "uniform"}),
        ("auto", {}),
    ):
        method = "aligned-sparsegpt" if name == "auto" else name
        found = pruned_logits(tmp_path / name, config_of(method, sparsity_frac=sparsity_frac, **settings))
        distance[name] = float((found - wanted).square().mean())
    assert distance["aligned-sparsegpt"] < 0.8 * distance["sparsegpt"]
    assert distance["auto"] < 0.8 * distance["sparsegpt"]


def test_the_block_that_answers_hang_on_stays_denser(tmp_path: Path) -> None:
    """The second block adds next to nothing, though its weights and inputs are as large as the first's."""
    source = load_source(tiny_llama(tmp_path))
    last = source.model.model.layers[1]
    for linear in (last.self_attn.o_proj, last.mlp.down_proj):
        linear.weight.mul_(1e-3)
    report = prune_model(source, prompts(source), config_of("aligned-sparsegpt"), harmful=HARMFUL)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.gate_proj"):
        first, second = (report.modules[f"model.layers.{block}.{name}"].sparsity_frac for block in (0, 1))
        assert second > first + 0.2
    assert report.allocation == "sensitivity"
    assert 0.499 < report.reached_frac <= 0.5


def test_channels_that_answers_hang_on_keep_more(tmp_path: Path) -> None:
    """Nothing reads the second half of what `up_proj` writes."""
    source = load_source(tiny_llama(tmp_path))
    mlp = source.model.model.layers[1].mlp
    half = mlp.up_proj.out_features // 2
    mlp.down_proj.weight[:, half:] = 1e-4
    prune_model(
        source, prompts(source), config_of("aligned-sparsegpt", allocation="uniform"), harmful=HARMFUL
    )
    kept = (mlp.up_proj.weight != 0).float().mean(dim=1)
    assert kept[:half].mean() > kept[half:].mean() + 0.1


@pytest.mark.parametrize("architecture", sorted(ROWS))
def test_every_architecture(tmp_path: Path, architecture: str) -> None:
    source = load_source(tiny_model(tmp_path, architecture))
    report = prune_model(source, prompts(source), config_of("aligned-sparsegpt"), harmful=HARMFUL)
    assert 0.495 < report.reached_frac <= 0.5
    assert torch.isfinite(logits(source)).all()


def test_protected_weights_of_the_set_difference_stay(tmp_path: Path) -> None:
    source = load_source(tiny_llama(tmp_path))
    config = config_of("set-difference", rest="aligned-sparsegpt")
    report = prune_model(source, prompts(source), config, harmful=HARMFUL)
    assert report.allocation == "sensitivity"
    assert sum(entry.protected for entry in report.modules.values()) > 0
    assert sum(entry.protected_zeros for entry in report.modules.values()) == 0


def test_zeros_of_before_stay(tmp_path: Path) -> None:
    source = load_source(tiny_llama(tmp_path))
    prune_model(source, [], PruneConfig(method="magnitude", sparsity_frac=0.2))
    before = {name: linear.weight == 0 for name, linear in block_linear_modules(source.model).items()}
    config = config_of("aligned-sparsegpt", allow_zeros=True, allocation="uniform")
    prune_model(source, prompts(source), config, harmful=HARMFUL)
    for name, linear in block_linear_modules(source.model).items():
        assert (linear.weight[before[name]] == 0).all()
        assert int((linear.weight == 0).sum()) == linear.weight.numel() // 2
