"""Where heads and channels lie in an architecture's linears, and what its config calls their number.

What differs between architectures is a row of `LAYOUTS`; its keys are those of
`holdfast.exporter.architectures.ROWS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import nn

from holdfast.exporter.architectures import Settings, block_paths

Unit: TypeAlias = Literal["query", "key_value", "channel"]
Segments: TypeAlias = tuple[Unit, ...]
Readers: TypeAlias = tuple[tuple[str, Segments], ...]
"""(linear, what its output rows are, run after run): a packed linear has more than one run."""


@dataclass(frozen=True)
class Layout:
    """One architecture; module paths are relative to a decoder block.

    Attributes:
        head_readers: linears whose output rows belong to heads; empty where no head can go.
        head_writer: linear whose input columns are the query heads' outputs, head after head.
        channel_readers: linears whose output rows are FFN channels.
        channel_writer: linear whose input columns are FFN channels.
        channels_field: field of the config that holds their number.
        per_block: fields of the config that are a list with an entry for each block, where it has them.
        repeated: (field, entry of `per_block`): the field holds the same list as `[[list, 1]]`.
        by_index: settings of the config under which a block computes something else at another index.
    """

    head_writer: str
    channel_readers: Readers
    channel_writer: str
    head_readers: Readers = ()
    channels_field: str = "intermediate_size"
    per_block: tuple[str, ...] = ("layer_types", "no_rope_layers")
    repeated: tuple[tuple[str, str], ...] = ()
    by_index: tuple[Settings, ...] = ()


@dataclass(frozen=True)
class Shape:
    """How many structures a model has; the same in every block, as configs of transformers want it.

    Attributes:
        blocks: decoder blocks.
        heads: query heads of a block.
        kv_heads: key-value heads of a block; `heads` where the architecture has no grouped queries or
            cannot lose a head.
        channels: FFN channels of a block.
    """

    blocks: int
    heads: int
    kv_heads: int
    channels: int


_LLAMA = Layout(
    head_readers=(
        ("self_attn.q_proj", ("query",)),
        ("self_attn.k_proj", ("key_value",)),
        ("self_attn.v_proj", ("key_value",)),
    ),
    head_writer="self_attn.o_proj",
    channel_readers=(("mlp.gate_proj", ("channel",)), ("mlp.up_proj", ("channel",))),
    channel_writer="mlp.down_proj",
)
_PHI3 = Layout(
    head_readers=(("self_attn.qkv_proj", ("query", "key_value", "key_value")),),
    head_writer="self_attn.o_proj",
    channel_readers=(("mlp.gate_up_proj", ("channel", "channel")),),
    channel_writer="mlp.down_proj",
)
# From here on transformers computes a head's width as hidden size / heads, so that no head can go.
_GPT2 = Layout(
    head_writer="attn.c_proj",
    channel_readers=(("mlp.c_fc", ("channel",)),),
    channel_writer="mlp.c_proj",
    channels_field="n_inner",
    by_index=((("scale_attn_by_inverse_layer_idx", True),),),
)
_GPT_NEO = Layout(
    head_writer="attn.attention.out_proj",
    channel_readers=(("mlp.c_fc", ("channel",)),),
    channel_writer="mlp.c_proj",
    per_block=("attention_layers",),
    repeated=(("attention_types", "attention_layers"),),
)
_GPT_NEOX = Layout(
    head_writer="attention.dense",
    channel_readers=(("mlp.dense_h_to_4h", ("channel",)),),
    channel_writer="mlp.dense_4h_to_h",
)
_OPT = Layout(
    head_writer="self_attn.out_proj",
    channel_readers=(("fc1", ("channel",)),),
    channel_writer="fc2",
    channels_field="ffn_dim",
)
_FALCON = Layout(
    head_writer="self_attention.dense",
    channel_readers=(("mlp.dense_h_to_4h", ("channel",)),),
    channel_writer="mlp.dense_4h_to_h",
    channels_field="ffn_hidden_size",
)

LAYOUTS: dict[str, Layout] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA,
    "SmolLM3ForCausalLM": _LLAMA,
    "GraniteForCausalLM": _LLAMA,
    "Gemma2ForCausalLM": _LLAMA,
    "Gemma3ForCausalLM": _LLAMA,
    "Phi3ForCausalLM": _PHI3,
    "GPT2LMHeadModel": _GPT2,
    "GPTNeoForCausalLM": _GPT_NEO,
    "GPTNeoXForCausalLM": _GPT_NEOX,
    "OPTForCausalLM": _OPT,
    "FalconForCausalLM": _FALCON,
}


def layout_of(model: nn.Module) -> Layout:
    """The row of a loaded model, by its class."""
    return LAYOUTS[type(model).__name__]


def shape_of(model: nn.Module) -> Shape:
    """How many blocks, heads and channels a loaded model has."""
    config: Any = model.config
    layout = layout_of(model)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) if layout.head_readers else None
    return Shape(
        blocks=len(block_paths(model)),
        heads=heads,
        kv_heads=kv_heads or heads,
        channels=linear_in(model, 0, layout.channel_writer).in_features,
    )


def head_dim_of(model: nn.Module) -> int:
    """Width of a head in channels."""
    writer = linear_in(model, 0, layout_of(model).head_writer)
    return writer.in_features // shape_of(model).heads


def linear_in(model: nn.Module, index: int, name: str) -> nn.Linear:
    """The linear `name` of decoder block number `index`."""
    module = model.get_submodule(f"{block_paths(model)[index]}.{name}")
    assert isinstance(module, nn.Linear)
    return module
