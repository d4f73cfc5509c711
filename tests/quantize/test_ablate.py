"""The unaligned twin: the direction is gone from every write, and an unconvincing twin is refused."""

import copy as copying
import dataclasses

import pytest
import torch

from holdfast.errors import CalibrationError
from holdfast.exporter.source import SourceModel
from holdfast.quantize.learning import ablate
from holdfast.quantize.prompts.draw import CalibrationPrompt
from holdfast.quantize.prompts.sequences import chat_prompts

Prompts = list[CalibrationPrompt]


@pytest.fixture
def labels(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Refusal rates that the judge will report, first before and then after each ablation."""
    rates: list[float] = []
    monkeypatch.setattr(ablate, "refusal_rate", lambda *_: rates.pop(0))
    return rates


def copy(source: SourceModel) -> SourceModel:
    return dataclasses.replace(source, model=copying.deepcopy(source.model))


def test_nothing_writes_the_direction_any_more(aligned: SourceModel) -> None:
    source = copy(aligned)
    vector = torch.nn.functional.normalize(torch.arange(32.0) - 7.0, dim=0)
    ablate.ablate_direction(source.model, vector)
    writers = ablate.residual_writers(source.model)
    assert len(writers) == 1 + 2 * 2  # the embedding, o_proj and down_proj of both blocks
    states = source.model(torch.tensor([[5, 6, 7]]), output_hidden_states=True).hidden_states
    for state in states[:-1]:  # the last one is behind the final norm
        assert float((state @ vector).abs().max()) < 1e-5


def test_directions_come_from_early_layers_and_template_tokens(
    aligned: SourceModel, prompts: Prompts
) -> None:
    ids = chat_prompts(aligned.tokenizer, [prompt.prompt for prompt in prompts])
    found = ablate.refusal_directions(aligned, ids[:8], ids[8:16])
    assert {direction.layer for direction in found} == {0}
    assert {direction.position for direction in found} <= {-5, -4, -3, -2, -1}
    assert all(float(d.vector.norm()) == pytest.approx(1.0, abs=1e-5) for d in found)


def test_shared_suffix_by_hand() -> None:
    assert ablate.shared_suffix([[1, 2, 8, 9], [5, 8, 9], [7, 7, 8, 9]]) == 2
    assert ablate.shared_suffix([[1, 2], [3, 4]]) == 1


def test_model_that_does_not_refuse_has_no_direction(aligned: SourceModel, prompts: Prompts) -> None:
    with pytest.raises(CalibrationError, match="refuses 0% of the harmful calibration prompts"):
        ablate.make_twin(aligned, prompts)


def test_twin_whose_refusals_did_not_fall_is_refused(
    aligned: SourceModel, prompts: Prompts, labels: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablate, "LARGEST_KL_NATS", 1e9)
    labels += [0.9] + [0.8] * 50
    with pytest.raises(CalibrationError, match=r"of 90% down by half \(the best left 80%\)"):
        ablate.make_twin(aligned, prompts)


def test_twin_that_strays_is_refused(
    aligned: SourceModel, prompts: Prompts, labels: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablate, "LARGEST_KL_NATS", 0.0)
    labels += [0.9] + [0.0] * 50
    with pytest.raises(CalibrationError, match="none stayed near the model"):
        ablate.make_twin(aligned, prompts)


def test_best_twin_is_returned_and_the_source_left_alone(
    aligned: SourceModel, prompts: Prompts, labels: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablate, "LARGEST_KL_NATS", 1e9)
    before = {k: v.clone() for k, v in aligned.model.state_dict().items()}
    labels += [0.9, 0.3] + [0.5] * 50
    twin = ablate.make_twin(aligned, prompts)
    assert (twin.refusal_rate_before, twin.refusal_rate_after) == (0.9, 0.3)
    assert "model" not in twin.record()
    assert twin.record()["prompts"] == 4
    assert all(torch.equal(v, before[k]) for k, v in aligned.model.state_dict().items())
    changed = twin.model.state_dict()["model.embed_tokens.weight"]
    assert not torch.equal(changed, before["model.embed_tokens.weight"])
