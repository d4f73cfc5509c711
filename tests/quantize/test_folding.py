"""Folding leaves the function as it is; shared channels follow grouped-query attention."""

from pathlib import Path

import pytest
import torch

from holdfast.errors import CalibrationError
from holdfast.exporter.source import load_source
from holdfast.quantize.folding import fold_scales
from holdfast.quantize.plan import input_groups, shared_channels
from holdfast.quantize.simulate import torch_logits
from tests.tiny import tiny_model

IDS = [[5, 6, 7, 8, 9], [11, 12, 13]]
VARIANTS = {
    "llama": ("LlamaForCausalLM", {}),
    "llama, all heads": ("LlamaForCausalLM", {"num_key_value_heads": 4}),
    "llama, biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "qwen2, untied": ("Qwen2ForCausalLM", {"tie_word_embeddings": False}),
    "mistral": ("MistralForCausalLM", {}),
}


@pytest.mark.parametrize("name", list(VARIANTS))
def test_folding_leaves_the_logits(name: str, tmp_path: Path) -> None:
    architecture, settings = VARIANTS[name]
    source = load_source(tiny_model(tmp_path / "m", architecture, **settings))
    before = torch_logits(source, IDS)
    generator = torch.Generator().manual_seed(0)
    folded = 0
    for group in input_groups(source.model):
        if group.producer is None:
            continue
        channels = int(group.channel_map.max()) + 1
        fold_scales(source.model, group, torch.rand(channels, generator=generator) * 4 + 0.25)
        folded += 1
    assert folded == 2 * 4  # both norms, v -> o and up -> down, in two blocks
    torch.testing.assert_close(
        torch.from_numpy(torch_logits(source, IDS)), torch.from_numpy(before), atol=2e-5, rtol=0.0
    )


def test_every_linear_is_in_exactly_one_group(tmp_path: Path) -> None:
    model = load_source(tiny_model(tmp_path / "m", "LlamaForCausalLM")).model
    paths = [path for group in input_groups(model) for path in group.consumers]
    assert len(paths) == len(set(paths)) == 15


def test_value_heads_repeat() -> None:
    # two value heads of two channels feed four query heads
    assert shared_channels(4, 8, head_size=2).tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    assert shared_channels(3, 3, head_size=2).tolist() == [0, 1, 2]


def test_the_head_has_nothing_to_fold_into(tmp_path: Path) -> None:
    model = load_source(tiny_model(tmp_path / "m", "LlamaForCausalLM")).model
    with pytest.raises(CalibrationError, match="lm_head"):
        fold_scales(model, input_groups(model)[-1], torch.ones(32))
