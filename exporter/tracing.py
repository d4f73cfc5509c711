"""A torch model to a graph whose attention is one operator, `com.microsoft::GroupQueryAttention`.

Finding attention again in a traced graph is fragile; here it is never lost. transformers lets a model's
attention be replaced (`AttentionInterface`), and the replacement emits the operator while the model is
traced. The operator keeps the KV cache and the causal mask; every other node is torch's own.

The operator's cache holds a row from its first column on, and the new tokens follow the last one. Zeros
before the first 1 of the attention mask are padding that lies in the cache, and `attention_bias` hides it;
zeros after it are padding that the next token overwrites, as onnxruntime-genai pads. So a prefill may be
padded on the left, on the right, or both. Several new tokens on top of a cache are not padded, and for one
row alone: ONNX Runtime refuses more.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from holdfast.errors import ExportError
from holdfast.exporter.quiet import quiet

ATTENTION = "holdfast_group_query_attention"
PROBE = "holdfast_probe"
OPERATOR = "GroupQueryAttention"
DOMAIN = "com.microsoft"
MODULE = "module"  # metadata of a node
WRAPPER = "model."  # what `_Decoder` puts before the paths of the model's modules
HIDDEN = -1e9  # added to the score of a key that is padding; exp() of it is exactly 0 in float32

# Sizes that the example inputs are traced with. All differ, and none is 0 or 1, which torch specializes.
ROWS, NEW_TOKENS, PAST_TOKENS = 2, 3, 5
OPSET = 15  # of the operators that are written by name; later ones take the same inputs
# Arguments that some models pass to their attention and that change nothing here.
IGNORED = frozenset({"dropout", "position_ids", "cache_position", "use_cache", "layer_idx"})


@dataclass
class _Trace:
    """What the attention of every layer reads, and the caches that it leaves."""

    past: list[tuple[Tensor, Tensor]]
    seqlens_k: Tensor
    total: Tensor
    bias: Tensor
    total_tokens: int
    present: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


_TRACE: ContextVar[_Trace] = ContextVar("holdfast_trace")


@torch.inference_mode()
def pluggable(model: Any) -> bool:
    """Whether every layer calls its attention through transformers' interface, tried on one token."""
    called: set[int] = set()

    def probe(module: nn.Module, *args: Any, **more: Any) -> tuple[Tensor, None]:
        called.add(_layer(module))
        output, _ = sdpa_attention_forward(module, *args, **more)
        return output, None

    AttentionInterface.register(PROBE, probe)
    AttentionMaskInterface.register(PROBE, _no_mask)
    with quiet(), _attention_of(model, PROBE):
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False)
    return called == set(range(len(_cache_shapes(model))))


def trace(model: Any, *, opset: int) -> ir.Model:
    """Trace a causal language model with its KV cache.

    Inputs `input_ids` int64 [batch, new], `attention_mask` int64 [batch, total], `position_ids` int64
    [batch, new] and `past_key_values.N.key|value` float32 [batch, kv_heads, past, head_size]; outputs
    `logits` [batch, new, vocabulary] and `present.N.key|value`, as Optimum names them. The metadata
    `module` of a node is the path of the module that it was traced in.

    Arguments:
        model: a transformers model in eval mode with pluggable attention; see `pluggable`.

    Raises:
        ExportError: torch cannot trace the model, or its attention asks for what the operator lacks.
    """
    caches = _cache_shapes(model)
    past = [tuple(torch.zeros(ROWS, heads, PAST_TOKENS, size) for _ in "kv") for heads, size in caches]
    new, total = (torch.ones(ROWS, n, dtype=torch.int64) for n in (NEW_TOKENS, NEW_TOKENS + PAST_TOKENS))
    example = (new, total, new.clone(), past)
    with quiet(), _attention_of(model, ATTENTION):
        program = _export(_Decoder(model), example, len(caches), opset)
    traced: ir.Model = program.model
    _check_attention(traced.graph, len(caches), type(model).__name__)
    _name_interface(traced.graph, len(caches))
    _name_modules(traced.graph)
    return traced


class _Decoder(nn.Module):
    """The model as a function of Optimum's inputs; the cache never passes through transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, ...]:
        current = _Trace(past, *_mask_inputs(attention_mask, input_ids), attention_mask.shape[1])
        token = _TRACE.set(current)
        try:
            logits = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=False,
            ).logits
        finally:
            _TRACE.reset(token)
        caches = (cache for index in range(len(past)) for cache in current.present[index])
        return (logits, *caches)


def _mask_inputs(mask: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`seqlens_k` int32 [batch], the total int32 [1] and the bias float32 [batch, 1, new, total].

    `seqlens_k` is the column of the last new token: after the row's padding on the left and its tokens, and
    in a prefill after whatever is padded on the right, which the next token overwrites.
    """
    (rows, columns), count = mask.shape, ids.shape[1]
    one, new = torch.ones(1, dtype=torch.int64), _length(ids)
    left = mask.cumsum(dim=1) == 0
    filled = torch.where(left, 1, mask).sum(dim=1)
    seqlens_k = (torch.maximum(filled, new) - 1).to(torch.int32)
    hidden = torch.where(left, HIDDEN, 0.0).unsqueeze(1).unsqueeze(1)
    shape = torch.cat([one, one, new, one])
    bias = _onnx("Expand", (hidden, shape), torch.float32, (rows, 1, count, columns))
    return seqlens_k, _length(mask).to(torch.int32), bias


def _length(ids: Tensor) -> Tensor:
    """The size of the second axis, int64 [1]."""
    return _onnx("Shape", (ids,), torch.int64, (1,), start=1, end=2)


def _onnx(
    op: str, inputs: Sequence[Tensor], dtype: torch.dtype, shape: Sequence[int], **attrs: int
) -> Tensor:
    """One node of ONNX, for which torch would trace several."""
    return torch.onnx.ops.symbolic(op, inputs, attrs={**attrs}, dtype=dtype, shape=shape, version=OPSET)


def _group_query_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface, as one operator.

    Arguments:
        query: float32 [batch, heads, new, head_size].
        key, value: float32 [batch, kv_heads, new, head_size].
        attention_mask: unused. The operator masks by itself; OPT makes a causal mask all the same.
        s_aux: attention sinks, one learned logit a head.

    Returns:
        float32 [batch, new, heads, head_size], and no weights.

    Raises:
        ExportError: the layer asks for what the operator lacks.
    """
    _refuse_unknown(module, more)
    current, layer = _TRACE.get(), _layer(module)
    past_key, past_value = current.past[layer]
    batch, heads, new, size = query.shape
    kv_heads = key.shape[1]
    cache = (batch, kv_heads, current.total_tokens, size)
    attributes: dict[str, Any] = {
        "num_heads": heads,
        "kv_num_heads": kv_heads,
        "scale": float(size**-0.5 if scaling is None else scaling),
    }
    if sliding_window:
        attributes["local_window_size"] = int(sliding_window)
    if softcap:
        attributes["softcap"] = float(softcap)
    output, present_key, present_value = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{OPERATOR}",
        (
            _rows(query),
            _rows(key),
            _rows(value),
            past_key,
            past_value,
            current.seqlens_k,
            current.total,
            None,
            None,
            None,
            current.bias,
            *(() if s_aux is None else (s_aux,)),
        ),
        attrs=attributes,
        dtypes=(query.dtype,) * 3,
        shapes=((batch, new, heads * size), cache, cache),
        version=1,
    )
    current.present[layer] = (present_key, present_value)
    return output.reshape(batch, new, heads, size), None


def _rows(heads: Tensor) -> Tensor:
    """[batch, heads, tokens, size] to [batch, tokens, heads * size]."""
    batch, count, tokens, size = heads.shape
    return heads.transpose(1, 2).reshape(batch, tokens, count * size)


def _layer(module: nn.Module) -> int:
    index: Any = module.layer_idx
    return int(index)


def _refuse_unknown(module: nn.Module, more: dict[str, Any]) -> None:
    """Raise ExportError for an argument that changes the result and has no place in the operator."""
    asked = sorted(n for n, value in more.items() if not (value is None or value is False or n in IGNORED))
    if more.get("is_causal", getattr(module, "is_causal", True)) is False:
        asked = ["is_causal=False"]
    asked = [name for name in asked if name != "is_causal"]
    if asked:
        raise ExportError(
            f"The attention of {type(module).__name__} asks for `{asked[0]}`, which {OPERATOR} does not "
            "offer: export with `--target portable`."
        )


def _no_mask(*_: Any, **__: Any) -> None:
    """transformers' mask interface: the operator masks by itself."""


AttentionInterface.register(ATTENTION, _group_query_attention)
AttentionMaskInterface.register(ATTENTION, _no_mask)


@contextmanager
def _attention_of(model: Any, name: str) -> Iterator[None]:
    """The model with another attention inside, and as it was outside."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.inference_mode()
def _cache_shapes(model: Any) -> list[tuple[int, int]]:
    """(kv heads, head size) of every layer, from a cache that holds one token."""
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.zeros(1, 1, dtype=torch.int64), past_key_values=cache, use_cache=True)
    return [(layer.keys.shape[1], layer.keys.shape[3]) for layer in cache.layers]


def _export(decoder: nn.Module, example: tuple[Any, ...], layers: int, opset: int) -> Any:
    batch, new, past, total = (torch.export.Dim(name) for name in ("batch", "new", "past", "total"))
    shapes = (
        {0: batch, 1: new},
        {0: batch, 1: total},
        {0: batch, 1: new},
        [({0: batch, 2: past}, {0: batch, 2: past})] * layers,
    )
    try:
        program = torch.export.export(decoder, example, dynamic_shapes=shapes, strict=False)
        return torch.onnx.export(program, dynamo=True, opset_version=opset, optimize=False, verbose=False)
    except ExportError:
        raise
    except Exception as error:  # torch raises whatever the tracing ran into
        reason = str(error).strip().splitlines()
        raise ExportError(
            f"torch could not trace the {type(decoder.model).__name__} ({type(error).__name__}: "
            f"{reason[0] if reason else 'no message'}): export with `--target portable`."
        ) from error


def _check_attention(graph: ir.Graph, layers: int, name: str) -> None:
    found = sum(node.op_type == OPERATOR for node in graph)
    if found != layers:
        raise ExportError(
            f"The {name} has {layers} layers, and {found} of them call their attention through "
            "transformers' interface: export with `--target portable`."
        )


def _name_interface(graph: ir.Graph, layers: int) -> None:
    caches = [f"{index}.{part}" for index in range(layers) for part in ("key", "value")]
    inputs = ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{c}" for c in caches)]
    outputs = ["logits", *(f"present.{cache}" for cache in caches)]
    for value, name in zip(graph.inputs, inputs, strict=True):
        value.name = name
    for value, name in zip(graph.outputs, outputs, strict=True):
        value.name = name


def _name_modules(graph: ir.Graph) -> None:
    """Note on every node the path of the module that it was traced in; all other metadata goes."""
    graph.metadata_props.clear()
    values = [*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]
    for value in values:
        value.metadata_props.clear()
    for node in graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        modules = [scope for scope in scopes[:-1] if scope.startswith(WRAPPER)]  # the last is the node
        node.metadata_props.clear()
        node.metadata_props[MODULE] = modules[-1].removeprefix(WRAPPER) if modules else ""
