"""The table of supported architectures: what differs between them is a row, never a branch.

Module paths are those of transformers 4.57; the names of graph nodes follow from them, because the
exporter names a node after the module it was traced in (`/model/layers.0/mlp/up_proj/MatMul`).
`docs/architectures.md` says how a row is added and what was tested of each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import nn

from holdfast.errors import ModelSourceError, UnsupportedArchitectureError

CLASSIFIER = "ForSequenceClassification"

NormGroups = tuple[tuple[str | None, tuple[str, ...]], ...]
Settings = tuple[tuple[str, Any], ...]
"""(field of the config, value) pairs that have to hold together."""


@dataclass(frozen=True)
class Variant:
    """Settings of the config under which the blocks are wired differently."""

    settings: Settings
    norm_groups: NormGroups


@dataclass(frozen=True)
class Refusal:
    """Settings of the config that cannot be exported exactly.

    Attributes:
        why: ends the sentence "config.json sets ...", and says what to do.
    """

    settings: Settings
    why: str


class SourceRow(Protocol):
    """What loading needs to know of an architecture, whatever its task."""

    @property
    def name(self) -> str: ...
    @property
    def model_type(self) -> str: ...
    @property
    def embedding(self) -> str: ...
    @property
    def attention(self) -> str: ...
    @property
    def refused(self) -> tuple[Refusal, ...]: ...


@dataclass(frozen=True)
class Row:
    """One architecture.

    Attributes:
        name: class of transformers, as `architectures` in config.json spells it.
        model_type: `model_type` in config.json.
        linears: linear modules of a decoder block, relative to the block.
        norm_groups: (norm, the linears it feeds), relative to the block. A scale of the norm's
            output channels can be folded into the norm's weight and the linears' columns. None
            instead of a norm: the linears share their input, and nothing in front can carry a scale.
        up_down: (producer, consumer) linears, relative to the block, with only element-wise
            products of the producer's channels between them; see `foldable_pairs`.
        writers: linears that write into the residual stream, relative to the block.
        blocks: module list of the decoder blocks.
        embedding: token embedding.
        final_norm: the norm that feeds the head.
        head: linear that gives the logits.
        before, after: linears between embedding and blocks, and between blocks and head, which a
            model may have.
        norm_offset: what the norms add to their weight; Gemma multiplies by `1 + weight`.
        attention: transformers' implementation that computes all that the config can ask for; its
            `sdpa` leaves soft caps and GPT-2's scaling by layer out without a word.
        conv1d: whether the checkpoint holds the block's linears as `Conv1D`, [in, out].
        scopes: (scope of graph nodes, module path) where a module is called past its parent.
        flattened: linears of a block that transformers calls with [row * token, channel].
        variants: what differs by config; the first whose settings all hold replaces `norm_groups`.
        refused: what a config may not ask for.
        unfused: settings that transformers' attention interface is not told of, so that only a plain
            graph computes them.
    """

    name: str
    model_type: str
    linears: tuple[str, ...]
    norm_groups: NormGroups
    up_down: tuple[tuple[str, str], ...]
    writers: tuple[str, ...]
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    norm_offset: float = 0.0
    attention: str = "sdpa"
    conv1d: bool = False
    scopes: tuple[tuple[str, str], ...] = ()
    flattened: tuple[str, ...] = ()
    variants: tuple[Variant, ...] = ()
    refused: tuple[Refusal, ...] = ()
    unfused: tuple[Settings, ...] = ()


_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_GATED_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def _llama_like(
    name: str, model_type: str, *, mlp_norm: str = "post_attention_layernorm", **columns: Any
) -> Row:
    """Separate q, k, v and a gated MLP, with a norm in front of each half of the block."""
    return Row(
        name=name,
        model_type=model_type,
        linears=_ATTENTION + _GATED_MLP,
        norm_groups=(("input_layernorm", _ATTENTION[:3]), (mlp_norm, _GATED_MLP[:2])),
        up_down=(("mlp.up_proj", "mlp.down_proj"), ("self_attn.v_proj", "self_attn.o_proj")),
        writers=("self_attn.o_proj", "mlp.down_proj"),
        **columns,
    )


_GEMMA3 = _llama_like(
    "Gemma3ForCausalLM",
    "gemma3_text",
    mlp_norm="pre_feedforward_layernorm",
    norm_offset=1.0,
    refused=(
        Refusal(
            (("use_bidirectional_attention", True),),
            "which makes it an encoder that cannot answer: use a causal checkpoint",
        ),
    ),
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
    writers=("self_attn.o_proj", "mlp.down_proj"),
)

_GPT2 = Row(
    name="GPT2LMHeadModel",
    model_type="gpt2",
    linears=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    norm_groups=(("ln_1", ("attn.c_attn",)), ("ln_2", ("mlp.c_fc",))),
    up_down=(),
    writers=("attn.c_proj", "mlp.c_proj"),
    blocks="transformer.h",
    embedding="transformer.wte",
    final_norm="transformer.ln_f",
    attention="eager",
    conv1d=True,
    refused=(
        Refusal(
            (("add_cross_attention", True),),
            "which makes it the decoder of an encoder: use a decoder-only checkpoint",
        ),
    ),
    unfused=((("scale_attn_by_inverse_layer_idx", True),), (("scale_attn_weights", False),)),
)

_GPT_NEO = Row(
    name="GPTNeoForCausalLM",
    model_type="gpt_neo",
    linears=(
        "attn.attention.q_proj",
        "attn.attention.k_proj",
        "attn.attention.v_proj",
        "attn.attention.out_proj",
        "mlp.c_fc",
        "mlp.c_proj",
    ),
    norm_groups=(
        ("ln_1", ("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj")),
        ("ln_2", ("mlp.c_fc",)),
    ),
    up_down=(("attn.attention.v_proj", "attn.attention.out_proj"),),
    writers=("attn.attention.out_proj", "mlp.c_proj"),
    blocks="transformer.h",
    embedding="transformer.wte",
    final_norm="transformer.ln_f",
    attention="eager",
)

_GPT_NEOX = Row(
    name="GPTNeoXForCausalLM",
    model_type="gpt_neox",
    linears=("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    norm_groups=(
        ("input_layernorm", ("attention.query_key_value",)),
        ("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
    ),
    up_down=(),
    writers=("attention.dense", "mlp.dense_4h_to_h"),
    blocks="gpt_neox.layers",
    embedding="gpt_neox.embed_in",
    final_norm="gpt_neox.final_layer_norm",
    head="embed_out",
)

_OPT_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
# A norm that follows a half of the block feeds the residual stream as well, and can carry no scale.
_OPT = Row(
    name="OPTForCausalLM",
    model_type="opt",
    linears=(*_OPT_QKV, "self_attn.out_proj", "fc1", "fc2"),
    norm_groups=(("self_attn_layer_norm", _OPT_QKV), ("final_layer_norm", ("fc1",))),
    up_down=(("self_attn.v_proj", "self_attn.out_proj"),),
    writers=("self_attn.out_proj", "fc2"),
    blocks="model.decoder.layers",
    embedding="model.decoder.embed_tokens",
    final_norm="model.decoder.final_layer_norm",
    before=("model.decoder.project_in",),
    after=("model.decoder.project_out",),
    scopes=(("decoder", "model.decoder"),),
    flattened=("fc1", "fc2"),
    variants=(Variant((("do_layer_norm_before", False),), ((None, _OPT_QKV), (None, ("fc1",)))),),
)

_FALCON_QKV, _FALCON_UP = ("self_attention.query_key_value",), ("mlp.dense_h_to_4h",)
_FALCON = Row(
    name="FalconForCausalLM",
    model_type="falcon",
    linears=(*_FALCON_QKV, "self_attention.dense", *_FALCON_UP, "mlp.dense_4h_to_h"),
    norm_groups=(("input_layernorm", _FALCON_QKV + _FALCON_UP),),
    up_down=(),
    writers=("self_attention.dense", "mlp.dense_4h_to_h"),
    blocks="transformer.h",
    embedding="transformer.word_embeddings",
    final_norm="transformer.ln_f",
    variants=(
        Variant(
            (("parallel_attn", True), ("num_ln_in_parallel_attn", 2)),
            (("ln_attn", _FALCON_QKV), ("ln_mlp", _FALCON_UP)),
        ),
        Variant(
            (("parallel_attn", False),),
            (("input_layernorm", _FALCON_QKV), ("post_attention_layernorm", _FALCON_UP)),
        ),
    ),
    refused=(
        Refusal(
            (("new_decoder_architecture", True), ("parallel_attn", False)),
            "which transformers itself cannot run: correct the config",
        ),
        Refusal(
            (("new_decoder_architecture", False), ("num_ln_in_parallel_attn", 2)),
            "which transformers itself cannot run: correct the config",
        ),
    ),
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
        _llama_like(
            "Gemma2ForCausalLM",
            "gemma2",
            mlp_norm="pre_feedforward_layernorm",
            norm_offset=1.0,
            attention="eager",
        ),
        _GEMMA3,
        _PHI3,
        _GPT2,
        _GPT_NEO,
        _GPT_NEOX,
        _OPT,
        _FALCON,
    )
}


def lookup(name: str) -> Row:
    """The row of an architecture, by its class name.

    Raises:
        UnsupportedArchitectureError: no such row; the message names the supported ones.
    """
    if name.endswith(CLASSIFIER):
        raise UnsupportedArchitectureError(
            f"`{name}` is a classifier and cannot answer: a language model is expected, one of "
            f"{', '.join(ROWS)}; only `holdfast export` takes classifiers."
        )
    if name not in ROWS:
        raise UnsupportedArchitectureError(
            f"Architecture `{name}` is not supported: expected one of {', '.join(ROWS)}."
        )
    return ROWS[name]


def row_of(model: nn.Module) -> Row:
    """The row of a loaded model, by its class, as its config varies it."""
    row = lookup(type(model).__name__)
    for variant in row.variants:
        if _holds(model.config, variant.settings):
            return replace(row, norm_groups=variant.norm_groups)
    return row


def refuse_settings(row: SourceRow, config: Any) -> None:
    """Refuse a config (of transformers) that asks for what cannot be exported exactly.

    Raises:
        ModelSourceError: as the row's `refused` says.
    """
    for refusal in row.refused:
        if _holds(config, refusal.settings):
            raise ModelSourceError(
                f"The config of this {row.name} sets {_said(refusal.settings)}, {refusal.why}."
            )


def why_unfused(model: nn.Module) -> str | None:
    """The setting of a model's config that only a plain graph computes, in words; None without one."""
    config: Any = model.config
    for settings in row_of(model).unfused:
        if _holds(config, settings):
            return f"its config sets {_said(settings)}, which transformers' attention interface leaves out"
    return None


def _said(settings: Settings) -> str:
    return " and ".join(f"`{key}` to {value}" for key, value in settings)


WINDOWS = ("sliding_window", "window_size", "local_attention")


def attention_window(config: Any) -> int:
    """Tokens that a layer with local attention sees, as a config calls it; 0 where it names none."""
    return max(int(getattr(config, name, None) or 0) for name in WINDOWS)


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
    """Every linear of the model in the order of computation: the blocks', the head last.

    Where the model projects its embedding into the blocks and their output to the head, these
    linears come first and last but one.
    """
    row = row_of(model)
    before = {path: _linear(model, path) for path in present(model, row.before)}
    after = {path: _linear(model, path) for path in (*present(model, row.after), row.head)}
    return {**before, **block_linear_modules(model), **after}


def present(model: nn.Module, paths: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the paths that this model has a module at; transformers leaves None at the others."""
    parents = [(path, *path.rpartition(".")[::2]) for path in paths]
    return tuple(
        path for path, parent, name in parents if getattr(model.get_submodule(parent), name) is not None
    )


def _holds(config: Any, settings: Settings) -> bool:
    return all(getattr(config, key, None) == value for key, value in settings)


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
