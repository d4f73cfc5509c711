"""Calibration: deterministic, faithful to pruning, better than min-max where min-max breaks."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from holdfast.errors import CalibrationError, VocabularyMismatchError
from holdfast.exporter.architectures import block_linear_modules
from holdfast.exporter.source import SourceModel, load_source
from holdfast.quantize.calibrate import Calibration, calibrate, total_steps
from holdfast.quantize.learning.candidates import best, candidate_alphas
from holdfast.quantize.learning.held_out import count_flips
from holdfast.quantize.prompts.draw import CalibrationPrompt
from holdfast.quantize.prompts.sequences import make_batch, response_weights, with_stop
from holdfast.quantize.record import read_record
from holdfast.quantize.simulate import torch_logits
from holdfast.recipe import CalibrateConfig, QuantizeConfig
from tests.quantize.conftest import SHORT, Case
from tests.tiny import tiny_llama

Prompts = list[CalibrationPrompt]


def run(
    source: SourceModel,
    negative: SourceModel,
    prompts: Prompts,
    *,
    scheme: str = "w8a8",
    **changes: object,
) -> Calibration:
    settings = {name: getattr(SHORT, name) for name in SHORT.__struct_fields__} | changes
    config = CalibrateConfig(**settings)
    quantize = QuantizeConfig(scheme=scheme)
    return calibrate(source, negative.model, config, quantize, prompts=prompts, seed=0)


def test_same_seed_same_calibration(aligned: SourceModel, negative: SourceModel, prompts: Prompts) -> None:
    first, second = (run(aligned, negative, prompts) for _ in range(2))
    assert first.record == second.record
    for ours, theirs in zip(first.source.model.parameters(), second.source.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_record_survives_the_folder(cases: dict[str, Case]) -> None:
    case = cases["w8a8"]
    assert read_record(case.calibrated) == case.calibration.record


def test_the_source_is_left_alone(aligned: SourceModel, negative: SourceModel, prompts: Prompts) -> None:
    before = {name: value.clone() for name, value in aligned.model.state_dict().items()}
    run(aligned, negative, prompts)
    after = aligned.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(parameter.requires_grad for parameter in aligned.model.parameters())


def test_alpha_zero_and_the_start_are_always_candidates(cases: dict[str, Case]) -> None:
    record = cases["w8a8"].calibration.record
    assert [(c.alpha, c.steps) for c in record.candidates] == [(0.0, 3), (0.3, 3), (0.0, 0)]
    chosen = record.candidates[best(record.candidates)]
    assert (record.chosen_alpha, record.chosen_steps) == (chosen.alpha, chosen.steps)
    assert candidate_alphas(CalibrateConfig(loss="kl", alphas=(0.5,))) == (0.0,)
    assert candidate_alphas(CalibrateConfig(loss="apc", alphas=(0.75,))) == (0.75,)
    assert total_steps(SHORT, cases["w8a8"].source) == 5  # 3, and 2 after the first of them
    assert record.smooth_frac in SHORT.smooth_fracs


def test_inputs_that_are_one_tensor_share_a_range(cases: dict[str, Case]) -> None:
    ranges = cases["w8a8"].calibration.record.activation_ranges
    names = [f"model.layers.1.self_attn.{name}_proj" for name in "qkv"]
    assert len({ranges[name] for name in names}) == 1
    assert len(ranges) == 15


def test_zero_weights_stay_zero(
    aligned: SourceModel, negative: SourceModel, prompts: Prompts, tmp_path: Path
) -> None:
    pruned = load_source(tiny_llama(tmp_path / "pruned", seed=0))
    masks = {}
    for path, linear in block_linear_modules(pruned.model).items():
        masks[path] = linear.weight.abs() < 0.1
        linear.weight[masks[path]] = 0.0
    settings = CalibrateConfig(samples=24, steps=3, batch_size=8, alphas=(), response_tokens=4)
    calibration = calibrate(
        pruned,
        negative.model,
        settings,
        QuantizeConfig(scheme="w8a4"),
        prompts=prompts,
        seed=0,
        aligned=aligned,
    )
    for path, linear in block_linear_modules(calibration.source.model).items():
        assert bool((linear.weight[masks[path]] == 0.0).all())
        assert int((linear.weight == 0.0).sum()) == int(masks[path].sum())


@pytest.mark.parametrize("scheme", ["w4", "w2", "w2a8"])
def test_learned_rounding_starts_where_gptq_rounds(
    scheme: str, negative: SourceModel, prompts: Prompts, tmp_path: Path
) -> None:
    """Nearer to the aligned model than the nearest codes; zeros and a tied head stay as they are."""
    pruned = load_source(tiny_llama(tmp_path / "pruned", seed=0))
    for linear in block_linear_modules(pruned.model).values():
        linear.weight[linear.weight.abs() < 0.05] = 0.0
    before = {path: linear.weight == 0.0 for path, linear in block_linear_modules(pruned.model).items()}
    away = {}
    for start in ("gptq", "nearest"):
        made = run(pruned, negative, prompts, scheme=scheme, steps=0, rounding_start=start)
        away[start] = made.record.candidates[0].divergence
        after = {path: linear.weight for path, linear in block_linear_modules(made.source.model).items()}
        assert all(torch.equal(after[path] == 0.0, zeros) for path, zeros in before.items())
        assert all(
            bool((made.codes[path].dequantized()[zeros] == 0.0).all()) for path, zeros in before.items()
        )
        assert torch.equal(made.source.model.lm_head.weight, pruned.model.lm_head.weight)
    assert away["gptq"] < away["nearest"]


def outlier_model(folder: Path) -> SourceModel:
    """A model whose down_proj inputs have one channel 200 times larger than it needs to be.

    Its function is that of the model without: up_proj's row is larger, down_proj's column smaller.
    """
    source = load_source(tiny_llama(folder, seed=0))
    for path, linear in block_linear_modules(source.model).items():
        if path.endswith("up_proj"):
            linear.weight[3] *= 200.0
        if path.endswith("down_proj"):
            linear.weight[:, 3] /= 200.0
    return source


@pytest.mark.parametrize("bits", [8, 4])
def test_calibration_beats_minmax_on_outliers(
    bits: int, negative: SourceModel, prompts: Prompts, tmp_path: Path
) -> None:
    source = outlier_model(tmp_path / "outlier")
    minmax = run(
        source, negative, prompts, scheme=f"w8a{bits}", steps=0, smooth_fracs=(0.0,), start="minmax"
    ).record.candidates[0]
    learned = run(source, negative, prompts, scheme=f"w8a{bits}", steps=6)
    chosen = next(c for c in learned.record.candidates if c.steps == learned.record.chosen_steps)
    assert chosen.changed_tokens_frac < minmax.changed_tokens_frac
    assert chosen.divergence < 0.25 * minmax.divergence


def test_steps_lower_the_loss(aligned: SourceModel, negative: SourceModel, prompts: Prompts) -> None:
    changes = {"steps": 12, "alphas": (), "batch_size": 64}  # every step sees all prompts
    losses = run(aligned, negative, prompts, scheme="w8a4", **changes).record.candidates[0].losses
    assert min(losses[-3:]) < losses[0]


def test_scheme_none_changes_nothing(aligned: SourceModel, negative: SourceModel, prompts: Prompts) -> None:
    calibration = run(aligned, negative, prompts, scheme="none")
    assert calibration.record.method == "none"
    assert calibration.source is aligned


def test_weight_only_has_no_activation_ranges(cases: dict[str, Case]) -> None:
    record = cases["w4"].calibration.record
    assert record.activation_ranges == {}
    assert min(record.kept_frac.values()) < 1.0


def test_tied_head_keeps_the_embedding(cases: dict[str, Case], aligned: SourceModel) -> None:
    embedding = cases["w8a8"].source.model.model.embed_tokens.weight
    assert torch.equal(embedding, aligned.model.model.embed_tokens.weight)


def test_foreign_vocabulary_is_refused(aligned: SourceModel, prompts: Prompts, tmp_path: Path) -> None:
    other = load_source(tiny_llama(tmp_path / "other", vocab=280))
    with pytest.raises(VocabularyMismatchError, match="300 logits and the unaligned one 280"):
        run(aligned, other, prompts)


def test_nothing_to_learn_is_refused(aligned: SourceModel, negative: SourceModel, prompts: Prompts) -> None:
    kinds = ("activations", "clip", "scales", "rounding")
    off = {f"learn_{kind}": False for kind in kinds}
    with pytest.raises(CalibrationError, match="Nothing is left to learn"):
        run(aligned, negative, prompts, **off)
    assert run(aligned, negative, prompts, steps=0, **off).record.chosen_steps == 0


def test_a_loss_that_is_no_number_is_refused(
    aligned: SourceModel, negative: SourceModel, prompts: Prompts, tmp_path: Path
) -> None:
    with pytest.raises(CalibrationError, match="no longer a number"):
        run(aligned, negative, prompts, scale_lr=1e6, steps=5)


def test_flips_by_hand() -> None:
    before = ["refused", "refused", "complied", "complied", "complied"]
    after = ["refused", "complied", "refused", "incoherent", "complied"]
    assert count_flips(before, after) == (1, 1, 1)  # type: ignore[arg-type]


def test_sequences_by_hand() -> None:
    assert with_stop([7, 8], limit=4, stop_id=1) == [7, 8, 1]
    assert with_stop([7, 8], limit=2, stop_id=1) == [7, 8]
    assert response_weights(3, response_tokens=4, first=4.0) == [4.0, 3.0, 2.0]
    batch = make_batch([[5, 6, 7], [5]], [[8, 9], [4, 3, 2]], pad_id=0, response_tokens=3, first_weight=3.0)
    assert batch.ids.tolist() == [[5, 6, 7, 8], [0, 5, 4, 3]]  # the last answer token is only predicted
    assert batch.mask.tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]
    assert batch.weights.tolist() == [[0.0, 3.0, 2.0], [3.0, 2.0, 1.0]]
    only = batch.rows(torch.tensor([0]))
    assert only.ids.tolist() == [[5, 6, 7, 8]]
    assert only.weights.tolist() == [[3.0, 2.0]]


def test_float_logits_survive_folding_without_clips(
    aligned: SourceModel, negative: SourceModel, prompts: Prompts
) -> None:
    calibration = run(aligned, negative, prompts, learn_clip=False, steps=3)
    ids = [[5, 6, 7, 8], [9, 10, 11]]
    torch.testing.assert_close(
        torch.from_numpy(torch_logits(calibration.source, ids)),
        torch.from_numpy(torch_logits(replace(aligned), ids)),
        atol=2e-5,
        rtol=0.0,
    )
