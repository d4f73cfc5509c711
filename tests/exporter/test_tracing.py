"""Tracing: what a config says about attention arrives in the operator, and the graph is the model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from holdfast.errors import ExportError
from holdfast.exporter.architectures import ROWS
from holdfast.exporter.export import UNTRACEABLE_ROPE, refuse_rope, save_graph
from holdfast.exporter.fused import fused_graph
from holdfast.exporter.parity import graph_agreement
from holdfast.exporter.source import SourceModel, load_source
from holdfast.exporter.tracing import OPERATOR, pluggable, trace
from tests.tiny import tiny_model

ATOL = 2e-5
POSITIONS = 128


def loaded(folder: Path, architecture: str, **settings: Any) -> SourceModel:
    return load_source(tiny_model(folder / "model", architecture, hidden_size=64, **settings))


def attentions(model: ir.Model) -> list[dict[str, Any]]:
    """Attributes of the attention operators, in the order of the layers."""
    nodes = [node for node in model.graph if node.op_type == OPERATOR]
    return [{name: attribute.value for name, attribute in node.attributes.items()} for node in nodes]


def fused(source: SourceModel, folder: Path) -> ir.Model:
    """The fused graph, saved and compared with torch beyond the sliding window, left-padded and cached."""
    graph = fused_graph(source.model, opset=21, positions=POSITIONS).model
    save_graph(graph, folder)
    agreement = graph_agreement(folder / "model.onnx", source, seed=0)
    assert agreement.max_abs < ATOL
    assert agreement.same_top_frac == 1.0
    return graph


ONE = {"num_hidden_layers": 1}
PARTIAL = {"num_attention_heads": 2, "num_key_value_heads": 1}  # heads of 32, of which 16 are rotated
CASES: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]]]] = {
    "sliding window": ("MistralForCausalLM", {**ONE, "sliding_window": 6}, [{"local_window_size": 6}]),
    "sliding window of some layers": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
        [{"local_window_size": None}, {"local_window_size": 6}],
    ),
    "soft caps, alternating windows": (
        "Gemma2ForCausalLM",
        {"sliding_window": 6, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 64},
        [
            {"local_window_size": 6, "softcap": 2.0, "scale": 0.125},
            {"local_window_size": None, "softcap": 2.0, "scale": 0.125},
        ],
    ),
    "norms of query and key, two rotary bases": (
        "Gemma3ForCausalLM",
        {
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 64,
        },
        [{"local_window_size": 6, "scale": 0.125}, {"local_window_size": None, "scale": 0.125}],
    ),
    "norms of query and key": ("Qwen3ForCausalLM", ONE, [{"scale": 0.25}]),
    "half of the channels rotated, one product": (
        "Phi3ForCausalLM",
        {**ONE, **PARTIAL, "partial_rotary_factor": 0.5},
        [{"num_heads": 2, "kv_num_heads": 1}],
    ),
    "half of the channels rotated": (
        "GPTNeoXForCausalLM",
        {**ONE, "num_attention_heads": 2, "rotary_pct": 0.5},
        [{"num_heads": 2, "kv_num_heads": 2}],
    ),
    "a scale of its own": ("GraniteForCausalLM", {**ONE, "attention_multiplier": 0.4}, [{"scale": 0.4}]),
    "a layer without rotary embedding": (
        "SmolLM3ForCausalLM",
        {"no_rope_layers": [1, 0]},
        [{"do_rotary": 1}, {"do_rotary": None}],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_the_config_says_arrives(case: str, tmp_path: Path) -> None:
    architecture, settings, wanted = CASES[case]
    found = attentions(fused(loaded(tmp_path, architecture, **settings), tmp_path))
    assert len(found) == len(wanted)
    for attributes, layer in zip(found, wanted, strict=True):
        for name, value in {"do_rotary": 1, **layer}.items():
            assert attributes.get(name) == (value if value is None else pytest.approx(value, rel=1e-6)), (
                name
            )


ROPE: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
}


@pytest.mark.parametrize("kind", ROPE)
def test_fixed_scalings_of_the_rotary_embedding_are_in_the_caches(kind: str, tmp_path: Path) -> None:
    source = loaded(tmp_path, "LlamaForCausalLM", **ONE, rope_scaling={"rope_type": kind, **ROPE[kind]})
    graph = fused(source, tmp_path)
    assert attentions(graph)[0]["do_rotary"] == 1
    cos = graph.graph.initializers["rotary.0.cos"].const_value
    rotary = source.model.model.rotary_emb
    angles = torch.arange(POSITIONS)[:, None] * rotary.inv_freq[None]
    expected = angles.cos() * rotary.attention_scaling
    torch.testing.assert_close(torch.from_numpy(cos.numpy()), expected, rtol=0, atol=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", UNTRACEABLE_ROPE)
def test_scalings_by_the_length_are_refused(kind: str, tmp_path: Path) -> None:
    config = SimpleNamespace(rope_scaling={"rope_type": kind, "factor": 2.0})
    with pytest.raises(ExportError, match=f"scales its rotary embedding by `{kind}`"):
        refuse_rope(config, tmp_path)


@pytest.fixture
def llama(tmp_path: Path) -> SourceModel:
    return loaded(tmp_path, "LlamaForCausalLM", **ONE)


def with_arguments(source: SourceModel, **arguments: Any) -> Any:
    """The attention module, now called with more arguments."""
    attention = source.model.model.layers[0].self_attn
    attention.forward = functools.partial(attention.forward, **arguments)
    return attention


@pytest.fixture
def sinks() -> str:
    """GPT-OSS' own attention with sinks, in torch."""
    AttentionInterface.register("sinks", _sinks)
    AttentionMaskInterface.register("sinks", eager_mask)
    return "sinks"


def _sinks(module: Any, *args: Any, s_aux: torch.Tensor, **more: Any) -> Any:
    module.sinks = s_aux
    return eager_attention_forward(module, *args, **more)


def test_attention_sinks(llama: SourceModel, sinks: str, tmp_path: Path) -> None:
    values = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5, 3.0]), requires_grad=False)
    llama.model.model.layers[0].register_parameter("sink_values", values)
    with_arguments(llama, s_aux=values)
    llama.model.set_attn_implementation(sinks)
    graph = fused(llama, tmp_path)
    (node,) = (node for node in graph.graph if node.op_type == OPERATOR)
    assert node.inputs[11].const_value.numpy().tolist() == values.tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "asked"),
    [
        (lambda source: with_arguments(source, head_bias=torch.ones(4)), "head_bias"),
        (lambda source: with_arguments(source, is_causal=False), "is_causal=False"),
        (lambda source: setattr(with_arguments(source), "is_causal", False), "is_causal=False"),
    ],
)
def test_what_the_operator_lacks_is_refused(
    change: Callable[[SourceModel], Any], asked: str, llama: SourceModel
) -> None:
    change(llama)
    before = llama.model.config._attn_implementation
    with pytest.raises(ExportError) as caught:
        trace(llama.model, opset=21)
    assert str(caught.value) == (
        f"The attention of LlamaAttention asks for `{asked}`, which GroupQueryAttention does not offer: "
        "export with `--target portable`."
    )
    assert llama.model.config._attn_implementation == before


def test_what_torch_cannot_trace_is_one_sentence(llama: SourceModel) -> None:
    norm = llama.model.model.norm
    norm.forward = lambda hidden: hidden if hidden.sum() > 0 else -hidden
    with pytest.raises(ExportError) as caught:
        trace(llama.model, opset=21)
    assert str(caught.value).startswith("torch could not trace the LlamaForCausalLM (")
    assert str(caught.value).endswith("): export with `--target portable`.")
    assert "\n" not in str(caught.value)


def test_tracing_leaves_the_model_as_it_was(llama: SourceModel) -> None:
    model, ids = llama.model, torch.arange(6)[None]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings, hooks = model.config.to_dict(), len(model._forward_hooks)
    before = model.config._attn_implementation
    with torch.inference_mode():
        logits = model(input_ids=ids).logits
        trace(model, opset=21)
        assert pluggable(model)
        assert torch.equal(model(input_ids=ids).logits, logits)
    assert model.config._attn_implementation == before
    assert (model.config.to_dict(), len(model._forward_hooks), model.training) == (settings, hooks, False)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("architecture", ROWS)
def test_which_architectures_are_pluggable(architecture: str, tmp_path: Path) -> None:
    model = loaded(tmp_path, architecture).model
    before = model.config._attn_implementation
    assert pluggable(model) == (architecture not in ("GPTNeoForCausalLM", "FalconForCausalLM"))
    assert model.config._attn_implementation == before
