"""The table of supported architectures: what differs between them is a row, never a branch.

Module paths are those of transformers 4.57; the names of graph nodes follow from them, because the
exporter names a node after the module it was traced in (`/model/layers.0/mlp/up_proj/MatMul`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from holdfast.errors import ModelSourceError, UnsupportedArchitectureError


@dataclass(frozen=True)
class Row:
    """One architecture.

    Attributes:
        name: class of transformers, as `architectures` in config.json spells it.
        model_type: `model_type` in config.json.
        linears: linear modules of a decoder block, relative to the block.
        norm_groups: (norm, the linears it feeds), relative to the block. A scale of the norm's
            output channels can be folded into the norm's weight and the linears' columns.
        up_down: (producer, consumer) linears, relative to the block, with only element-wise
            products of the producer's channels between them; see `foldable_pairs`.
        blocks: module list of the decoder blocks.
        embedding: token embedding.
        final_norm: the norm that feeds the head.
        head: linear that gives the logits.
    """

    name: str
    model_type: str
    linears: tuple[str, ...]
    norm_groups: tuple[tuple[str, tuple[str, ...]], ...]
    up_down: tuple[tuple[str, str], ...]
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"


_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_GATED_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def _llama_like(name: str, model_type: str) -> Row:
    """Separate q, k, v and a gated MLP, with a norm in front of each half of the block."""
    return Row(
        name=name,
        model_type=model_type,
        linears=_ATTENTION + _GATED_MLP,
        norm_groups=(
            ("input_layernorm", _ATTENTION[:3]),
            ("post_attention_layernorm", _GATED_MLP[:2]),
        ),
        up_down=(("mlp.up_proj", "mlp.down_proj"), ("self_attn.v_proj", "self_attn.o_proj")),
    )


# q, k, v and gate, up are one linear each, so that a producer's channels are not a whole module's.
_PHI3 = Row(
    name="Phi3ForCausalLM",
    model_type="phi3",
    linears=("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    norm_groups=(
        ("input_layernorm", ("self_attn.qkv_proj",)),
        ("post_attention_layernorm", ("mlp.gate_up_proj",)),
    ),
    up_down=(),
)

ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        _llama_like("LlamaForCausalLM", "llama"),
        _llama_like("MistralForCausalLM", "mistral"),
        _llama_like("Qwen2ForCausalLM", "qwen2"),
        _llama_like("Qwen3ForCausalLM", "qwen3"),
        _llama_like("SmolLM3ForCausalLM", "smollm3"),
        _llama_like("GraniteForCausalLM", "granite"),
        _PHI3,
    )
}


def lookup(name: str) -> Row:
    """The row of an architecture, by its class name.

    Raises:
        UnsupportedArchitectureError: no such row; the message names the supported ones.
    """
    if name not in ROWS:
        raise UnsupportedArchitectureError(
            f"Architecture `{name}` is not supported: expected one of {', '.join(ROWS)}."
        )
    return ROWS[name]


def row_of(model: nn.Module) -> Row:
    """The row of a loaded model, by its class."""
    return lookup(type(model).__name__)


def block_paths(model: nn.Module) -> list[str]:
    """Module paths of the decoder blocks in order, for example `["model.layers.0", ...]`."""
    row = row_of(model)
    count = len(list(model.get_submodule(row.blocks).children()))
    return [f"{row.blocks}.{index}" for index in range(count)]


def block_linear_modules(model: nn.Module) -> dict[str, nn.Linear]:
    """Module path -> linear inside the decoder blocks, in the order of computation; no head."""
    row = row_of(model)
    return {
        f"{block}.{name}": _linear(model, f"{block}.{name}")
        for block in block_paths(model)
        for name in row.linears
    }


def linear_modules(model: nn.Module) -> dict[str, nn.Linear]:
    """`block_linear_modules` and, last, the head."""
    head = row_of(model).head
    return {**block_linear_modules(model), head: _linear(model, head)}


def foldable_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Module paths (producer, consumer) whose shared channels may be rescaled in place.

    Output channel `j` of the producer divided by `s_j` and input channel `j` of the consumer
    multiplied by `s_j` leaves the block's function as it is. With grouped-query attention one value
    head feeds several columns of `o_proj`, so the widths differ and the pair is left out.
    """
    pairs = []
    for block in block_paths(model):
        for producer, consumer in row_of(model).up_down:
            paths = (f"{block}.{producer}", f"{block}.{consumer}")
            if _linear(model, paths[0]).out_features == _linear(model, paths[1]).in_features:
                pairs.append(paths)
    return pairs


def head_is_tied(model: nn.Module) -> bool:
    """Whether the head and the token embedding are one parameter."""
    row = row_of(model)
    embedding = model.get_submodule(row.embedding)
    return embedding.weight is model.get_submodule(row.head).weight


def _linear(model: nn.Module, path: str) -> nn.Linear:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        raise ModelSourceError(
            f"Expected a linear layer at `{path}` of {type(model).__name__}, found "
            f"{type(module).__name__}: the model does not have the layout of its architecture."
        )
    return module
