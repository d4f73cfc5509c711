"""The table: what it says of real models, and what its folding claims are worth."""

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from holdfast.errors import ModelSourceError, UnsupportedArchitectureError
from holdfast.exporter.architectures import (
    ROWS,
    attention_window,
    block_linear_modules,
    block_paths,
    foldable_pairs,
    head_is_tied,
    linear_modules,
    lookup,
    row_of,
)
from holdfast.exporter.source import load_source
from tests.tiny import tiny_llama, tiny_model

IDS = torch.tensor([[5, 40, 7, 260, 11, 90, 33]])


def test_the_linears_of_a_llama(tmp_path: Path) -> None:
    model = load_source(tiny_llama(tmp_path)).model
    assert block_paths(model) == ["model.layers.0", "model.layers.1"]
    names = list(linear_modules(model))
    assert names[:7] == [
        f"model.layers.0.{name}"
        for name in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    ]
    assert names[-1] == "lm_head"
    assert list(block_linear_modules(model)) == names[:-1]


@pytest.mark.parametrize("architecture", sorted(ROWS))
def test_every_linear_of_the_model_is_in_its_row(tmp_path: Path, architecture: str) -> None:
    model = load_source(tiny_model(tmp_path, architecture)).model
    every = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert every == set(linear_modules(model))
    assert isinstance(model.get_submodule(row_of(model).embedding), nn.Embedding)
    model.get_submodule(row_of(model).final_norm)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_seen(tmp_path: Path, tied: bool) -> None:
    assert head_is_tied(load_source(tiny_llama(tmp_path, tied=tied)).model) is tied


@pytest.mark.parametrize("architecture", sorted(ROWS))
@torch.inference_mode()
def test_scales_folded_along_the_row_leave_the_logits_alone(tmp_path: Path, architecture: str) -> None:
    """The claims of `norm_groups` and `foldable_pairs`, by doing what they allow."""
    model = load_source(tiny_model(tmp_path, architecture, num_key_value_heads=4)).model
    before = model(IDS).logits
    generator = torch.Generator().manual_seed(0)
    for block in block_paths(model):
        for norm, linears in (group for group in row_of(model).norm_groups if group[0] is not None):
            module, offset = model.get_submodule(f"{block}.{norm}"), row_of(model).norm_offset
            scale = torch.rand(module.weight.shape, generator=generator) + 0.5
            module.weight.copy_((module.weight + offset) / scale - offset)
            if getattr(module, "bias", None) is not None:
                module.bias /= scale
            for linear in linears:
                model.get_submodule(f"{block}.{linear}").weight *= scale
    for producer, consumer in foldable_pairs(model):
        source, target = model.get_submodule(producer), model.get_submodule(consumer)
        scale = torch.rand(source.out_features, generator=generator) + 0.5
        source.weight /= scale[:, None]
        if source.bias is not None:
            source.bias /= scale
        target.weight *= scale
    assert torch.allclose(model(IDS).logits, before, rtol=0.0, atol=2e-5)
    assert before.std() > 0.5


def test_values_and_outputs_fold_only_without_grouped_queries(tmp_path: Path) -> None:
    grouped = load_source(tiny_llama(tmp_path / "grouped", kv_heads=2)).model
    full = load_source(tiny_llama(tmp_path / "full", kv_heads=4)).model
    pair = ("model.layers.0.self_attn.v_proj", "model.layers.0.self_attn.o_proj")
    assert pair not in foldable_pairs(grouped)
    assert pair in foldable_pairs(full)
    assert ("model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj") in foldable_pairs(grouped)


def test_windows_by_every_name() -> None:
    settings = {
        "MistralForCausalLM": {"sliding_window": 6},
        "GPTNeoForCausalLM": {"window_size": 7},
        "ModernBertForSequenceClassification": {"local_attention": 8},
        "LlamaForCausalLM": {},
    }
    classes = {name: getattr(transformers, name).config_class for name in settings}
    found = {name: attention_window(classes[name](**fields)) for name, fields in settings.items()}
    assert list(found.values()) == [6, 7, 8, 0]


def test_an_unknown_name() -> None:
    with pytest.raises(UnsupportedArchitectureError, match="`BertModel` is not supported: expected one of"):
        lookup("BertModel")


def test_a_replaced_linear_is_refused(tmp_path: Path) -> None:
    model = load_source(tiny_llama(tmp_path)).model
    model.model.layers[0].mlp.up_proj = nn.Identity()
    with pytest.raises(ModelSourceError) as caught:
        linear_modules(model)
    assert str(caught.value) == (
        "Expected a linear layer at `model.layers.0.mlp.up_proj` of LlamaForCausalLM, found Identity: "
        "the model does not have the layout of its architecture."
    )
