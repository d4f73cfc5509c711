"""Quantization-aware training: what it gains, what it may not touch, and what the artifact holds."""

import copy
import math
from pathlib import Path

import pytest
import torch
from msgspec import structs
from safetensors import safe_open
from torch import Tensor

from holdfast.errors import CalibrationError
from holdfast.exporter.architectures import block_linear_modules, linear_modules
from holdfast.exporter.source import SourceModel, load_source
from holdfast.quantize.artifact.write import quantize_bundle
from holdfast.quantize.calibrate import Calibration, calibrate, total_steps
from holdfast.quantize.formats import formats
from holdfast.quantize.learning.candidates import clear_gradients
from holdfast.quantize.learning.lesson import sequences
from holdfast.quantize.learning.qat import (
    TrainedLearnables,
    make_optimizer,
    require_finite_gradients,
    trained_paths,
)
from holdfast.quantize.learning.start import watched_inputs
from holdfast.quantize.prompts.draw import CalibrationPrompt
from holdfast.quantize.prompts.sequences import chat_prompts
from holdfast.quantize.simulate import check_simulation
from holdfast.recipe import CalibrateConfig, QATConfig, QuantizeConfig
from tests.quantize.conftest import Case
from tests.tiny import tiny_llama

Prompts = list[CalibrationPrompt]
RANK = 2
STEPS = 5


def settings(
    *,
    objective: str = "contrastive",
    rank: int = 0,
    lr: float = 2e-3,
    steps: int = STEPS,
    **changes: object,
) -> CalibrateConfig:
    trained = QATConfig(objective=objective, lora_rank=rank, lr=lr, steps=steps)  # type: ignore[arg-type]
    plain: dict[str, object] = {
        "batch_size": 64,  # every step sees all prompts
        "held_out_frac": 0.25,
        "alphas": (),
        "response_tokens": 4,
        "top_k": 50,
        "rounding_start": "nearest",  # GPTQ's leaves five steps little to gain
    }
    return CalibrateConfig(method="qat", qat=trained, **(plain | changes))  # type: ignore[arg-type]


CASES = {
    "full": (QuantizeConfig(scheme="w2a8", block_size=16, atol=1e-3, agreement_frac=0.98), settings()),
    "lora": (
        QuantizeConfig(scheme="w2", block_size=16, accuracy_level=1, atol=1e-3, agreement_frac=0.98),
        settings(rank=RANK, lr=5e-3, learn_scales=False),
    ),
    "dpo": (
        QuantizeConfig(scheme="w2", block_size=16, accuracy_level=1, atol=1e-3, agreement_frac=0.98),
        settings(objective="dpo", rank=RANK, lr=5e-3),
    ),
}


@pytest.fixture(scope="module", name="prompts")
def few_prompts(prompts: Prompts) -> Prompts:
    """Nine to learn from, three held out."""
    return prompts[:12]


@pytest.fixture(scope="module")
def token_ids(aligned: SourceModel, prompts: Prompts) -> list[list[int]]:
    return chat_prompts(aligned.tokenizer, [prompt.prompt for prompt in prompts])


@pytest.fixture(scope="module")
def trained(
    aligned: SourceModel,
    negative: SourceModel,
    prompts: Prompts,
) -> dict[str, Calibration]:
    """Labels of tiny models' noise are noise: candidates are chosen by their divergence alone."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("holdfast.quantize.learning.held_out.count_flips", lambda *_: (0, 0, 0))
        for name, (quantize, config) in CASES.items():
            made[name] = calibrate(aligned, negative.model, config, quantize, prompts=prompts, seed=0)
    return made


def weights(source: SourceModel) -> dict[str, Tensor]:
    return {path: linear.weight for path, linear in block_linear_modules(source.model).items()}


@pytest.mark.parametrize("name", CASES)
def test_training_lowers_the_loss_and_the_divergence(name: str, trained: dict[str, Calibration]) -> None:
    learned, start = trained[name].record.candidates
    assert (learned.steps, start.steps) == (STEPS, 0)
    assert learned.losses[-1] < 0.97 * learned.losses[0]
    assert learned.divergence < start.divergence
    assert trained[name].record.chosen_steps == STEPS


def test_weights_gain_what_ranges_alone_do_not(
    aligned: SourceModel, negative: SourceModel, prompts: Prompts, trained: dict[str, Calibration]
) -> None:
    quantize, _ = CASES["full"]
    frozen = calibrate(
        aligned, negative.model, settings(lr=1e-12), quantize, prompts=prompts, seed=0
    ).record.candidates[0]
    assert trained["full"].record.candidates[0].losses[-1] < frozen.losses[-1]
    assert frozen.losses[0] == trained["full"].record.candidates[0].losses[0]


@pytest.mark.parametrize("name", ["full", "dpo"])
def test_the_artifact_is_the_simulation(
    name: str, trained: dict[str, Calibration], token_ids: list[list[int]], tmp_path: Path
) -> None:
    """`quantize_bundle` reads the codes back and compares them; nothing of an adapter is left."""
    quantize, _ = CASES[name]
    case = Case(trained[name], quantize, tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    quantize_bundle(case.exported, out, case.calibrated, quantize)
    decided = case.calibration.decisions(quantize)
    assert set(decided.codes) == set(decided.formats)
    agreement = check_simulation(case.source, decided, out, quantize, token_ids)
    assert agreement.positions == sum(map(len, token_ids))
    with safe_open(case.calibrated / "model.safetensors", framework="pt") as file:
        assert not [name for name in file.keys() if not name.endswith(("weight", "bias"))]  # noqa: SIM118


def test_adapters_change_weights_by_their_rank(
    trained: dict[str, Calibration], aligned: SourceModel
) -> None:
    before, after = weights(aligned), weights(trained["lora"].source)
    for path, weight in after.items():
        singular = torch.linalg.svdvals(weight - before[path])
        assert float(singular[RANK - 1]) > 1e-5
        assert float(singular[RANK]) < 1e-3 * float(singular[0])  # rounding of float32


def test_full_training_changes_them_by_more(trained: dict[str, Calibration], aligned: SourceModel) -> None:
    path = "model.layers.1.mlp.down_proj"  # its rows are nobody's consumer: no scale is folded into them
    ratio = weights(trained["full"].source)[path] / weights(aligned)[path]
    assert float(torch.linalg.svdvals(ratio - ratio.mean(dim=0))[5]) > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_a_tied_head_and_the_source_are_left_alone(
    name: str, trained: dict[str, Calibration], aligned: SourceModel
) -> None:
    ours, theirs = trained[name].source.model, aligned.model
    assert torch.equal(ours.lm_head.weight, theirs.lm_head.weight)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert not any(parameter.requires_grad for parameter in [*ours.parameters(), *theirs.parameters()])
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_same_seed_same_weights(
    aligned: SourceModel, negative: SourceModel, prompts: Prompts, trained: dict[str, Calibration]
) -> None:
    quantize, config = CASES["lora"]
    again = calibrate(aligned, negative.model, config, quantize, prompts=prompts, seed=0)
    assert again.record.candidates[0].losses == trained["lora"].record.candidates[0].losses


# --- the parts --------------------------------------------------------------------------------


def attach(source: SourceModel, prompts: Prompts, scheme: str, rank: int) -> TrainedLearnables:
    config = settings(rank=rank)
    model = copy.deepcopy(source.model)
    batch, _ = sequences(source, prompts[:4], config)
    chosen = formats(list(linear_modules(model)), QuantizeConfig(scheme=scheme))
    inputs = watched_inputs(model, batch, config.batch_size)
    starts = inputs.starts(chosen, config, 0.5)
    learned = TrainedLearnables(model, inputs.groups, starts, chosen, rounding=True)
    learned.open(trained_paths(model, chosen), rank, seed=0)
    return learned


def descend(learned: TrainedLearnables, source: SourceModel, lr: float = 1e-2, steps: int = 2) -> None:
    """A few optimizer steps on a loss that moves every weight."""
    optimizer = make_optimizer(learned, settings(lr=lr))
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    with learned.attached():
        for _ in range(steps):
            clear_gradients(learned)
            learned.model(input_ids=ids, use_cache=False).logits.square().mean().backward()
            optimizer.step()
            learned.project()


@pytest.mark.parametrize("rank", [0, RANK])
def test_pruned_weights_stay_zero(rank: int, prompts: Prompts, tmp_path: Path) -> None:
    pruned = load_source(tiny_llama(tmp_path / "pruned", seed=0))
    masks = {}
    for path, linear in block_linear_modules(pruned.model).items():
        masks[path] = linear.weight.abs() < 0.1
        linear.weight[masks[path]] = 0.0
    learned = attach(pruned, prompts, "w4", rank)
    descend(learned, pruned)
    learned.close()
    codes = learned.folded_codes()
    for path, linear in block_linear_modules(learned.model).items():
        assert not torch.equal(linear.weight, pruned.model.get_submodule(path).weight)
        assert bool((linear.weight[masks[path]] == 0.0).all())
        assert int((linear.weight == 0.0).sum()) == int(masks[path].sum())
        assert bool((codes[path].codes[masks[path]] == 0).all())


@pytest.mark.parametrize("rank", [0, RANK])
def test_a_state_holds_the_weights(rank: int, aligned: SourceModel, prompts: Prompts) -> None:
    learned = attach(aligned, prompts, "w4", rank)
    start = learned.state()
    descend(learned, aligned)
    assert all(not torch.equal(learned.parameters()[name], start[name]) for name in learned.weights)
    learned.load(start)
    learned.close()
    for path, linear in linear_modules(learned.model).items():
        assert torch.equal(linear.weight, aligned.model.get_submodule(path).weight)
    assert learned.weights == {}


def test_not_finite_gradients_name_the_linear_nearest_to_the_loss(
    aligned: SourceModel, prompts: Prompts
) -> None:
    learned = attach(aligned, prompts, "w4", 0)
    for name, parameter in learned.weights.items():
        fault = 0.0 if ".1.mlp.down" in name else float("nan")
        parameter.grad = torch.full_like(parameter, fault)
    with pytest.raises(CalibrationError, match=r"gradient of `model\.layers\.1\.mlp\.up_proj`"):
        require_finite_gradients(learned.parameters())


def test_training_that_diverges_names_a_linear(
    aligned: SourceModel, negative: SourceModel, prompts: Prompts
) -> None:
    config = settings(lr=1e37)
    with pytest.raises(CalibrationError, match=r"no longer in numbers, from the \w+ of `model\.layers\.\d"):
        calibrate(aligned, negative.model, config, QuantizeConfig(), prompts=prompts, seed=0)


def test_block_losses_are_refused(aligned: SourceModel, negative: SourceModel, prompts: Prompts) -> None:
    with pytest.raises(CalibrationError, match="`loss: mse` is of each block's output"):
        calibrate(aligned, negative.model, settings(loss="mse"), QuantizeConfig(), prompts=prompts, seed=0)


def test_pairs_of_a_file_are_learned(
    aligned: SourceModel, negative: SourceModel, prompts: Prompts, tmp_path: Path
) -> None:
    """The loss falls from where the aligned model itself has log 2 on the one pair of ten sequences."""
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "What shall we do", "chosen": "abc", "rejected": "xyz"}', encoding="utf-8")
    config = settings(objective="dpo", steps=4, lr=1e-3)
    config = structs.replace(config, qat=structs.replace(config.qat, pairs=str(path)))
    form = QuantizeConfig(scheme="w8")
    record = calibrate(aligned, negative.model, config, form, prompts=prompts, seed=0).record
    trained = record.candidates[0]
    assert trained.losses[0] == pytest.approx(math.log(2.0) / 10, rel=0.2)
    assert trained.losses[-1] < 0.97 * trained.losses[0]
    assert record.chosen_steps == 4


def test_every_step_is_counted(aligned: SourceModel, negative: SourceModel, prompts: Prompts) -> None:
    config = settings(steps=1, alphas=(0.2,), block_steps=1)
    counted: list[int] = []
    record = calibrate(
        aligned,
        negative.model,
        config,
        QuantizeConfig(scheme="w4"),
        prompts=prompts,
        seed=0,
        on_step=counted.append,
    ).record
    assert sum(counted) == total_steps(config, aligned) == 4  # two alphas, two blocks
    assert [(c.alpha, c.steps) for c in record.candidates] == [(0.0, 1), (0.2, 1), (0.0, 0)]
