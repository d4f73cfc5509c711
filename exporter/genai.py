"""genai_config.json, which makes an exported folder a model of onnxruntime-genai.

onnxruntime-genai 0.18 takes the graph as Optimum lays it out; what it cannot read from the graph stands
in this file. It needs, and ONNX Runtime alone does not: every present output of the float type of its past,
int32 or int64 `attention_mask` and `position_ids` of one type, one scalar pad id, and a context length.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx

from holdfast.chat import ChatTokenizer
from holdfast.errors import ExportError, ModelSourceError
from holdfast.files import write_json
from holdfast.runtime.external_data import MODEL_FILE

CONFIG = "genai_config.json"
PAST_NAMES = {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"}
PRESENT_NAMES = {"present_key_names": "present.%d.key", "present_value_names": "present.%d.value"}
OPTIONAL_INPUTS = ("attention_mask", "position_ids")

# `model_type` of config.json -> `type`. Each of these is the same decoder loop in onnxruntime-genai 0.18;
# `phi3` alone does more (it computes the cache again at 4,097 tokens, for the length-dependent rotary
# embeddings that the export refuses), so Phi-3 is a plain `decoder`, as is what has no row.
TYPES = {name: name for name in ("granite", "llama", "mistral", "qwen2", "qwen3", "smollm3")}
ANY_DECODER = "decoder"
# What older families of transformers call a size.
OTHER_NAMES = {
    "hidden_size": ("n_embd",),
    "max_position_embeddings": ("n_positions",),
    "num_attention_heads": ("n_head", "num_heads"),
    "num_hidden_layers": ("n_layer", "num_layers"),
}


def genai_config(
    config: dict[str, Any],
    *,
    eos_ids: Sequence[int],
    pad_id: int,
    graph_inputs: Sequence[str],
    cache: tuple[int, int] | None = None,
    shared_cache: bool = False,
    filename: str = MODEL_FILE,
) -> dict[str, Any]:
    """The content of genai_config.json: greedy decoding on the CPU, as the suites decode.

    Arguments:
        config: the content of config.json.
        eos_ids: ids that end an answer, at least one.
        pad_id: id of padding. In a batch, onnxruntime-genai takes every such id at the end of a prompt for
            padding.
        graph_inputs: names of the graph's inputs.
        cache: (heads, width of one) of the graph's KV cache; what config.json says of them if None.
        shared_cache: whether past and present may be one buffer of the context's length. True only for a
            graph whose attention operator writes into it (GroupQueryAttention); a graph that joins past and
            new keys with Concat needs False.
        filename: the graph, beside genai_config.json.

    Raises:
        ModelSourceError: config.json does not state a size that is needed.
        ExportError: the graph has other inputs than a decoder in Optimum's layout.
    """
    layers = _size(config, "num_hidden_layers")
    _check_inputs(graph_inputs, layers)
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": filename,
        **_head_sizes(config, cache),
        "hidden_size": _size(config, "hidden_size"),
        "num_hidden_layers": layers,
        "inputs": {
            "input_ids": "input_ids",
            **{name: name for name in OPTIONAL_INPUTS if name in graph_inputs},
            **PAST_NAMES,
        },
        "outputs": {"logits": "logits", **PRESENT_NAMES},
    }
    model = {
        "type": TYPES.get(config.get("model_type", ""), ANY_DECODER),
        "vocab_size": _size(config, "vocab_size"),
        "context_length": _size(config, "max_position_embeddings"),
        "eos_token_id": list(eos_ids),
        "pad_token_id": pad_id,
        "decoder": decoder,
    }
    if isinstance(config.get("bos_token_id"), int):  # null is no id, and onnxruntime-genai reads a number
        model["bos_token_id"] = config["bos_token_id"]
    search = {
        "do_sample": False,
        "num_beams": 1,
        "max_length": model["context_length"],
        "past_present_share_buffer": shared_cache,
    }
    return {"model": model, "search": search}


def write_genai_config(folder: Path, *, shared_cache: bool = False, filename: str = MODEL_FILE) -> Path:
    """Write genai_config.json of an exported folder or a bundle, from what lies in it.

    Raises:
        ModelSourceError: config.json is missing, malformed or without a size that is needed.
        TokenizerError: no stop id is known.
        ExportError: the graph cannot be read or has another layout.
    """
    tokenizer = ChatTokenizer.from_folder(folder)
    config, inputs = _read_config(folder), _graph_inputs(folder / filename)
    content = genai_config(
        config,
        eos_ids=tokenizer.eos_ids,
        pad_id=tokenizer.pad_id,
        graph_inputs=list(inputs),
        cache=inputs.get(PAST_NAMES["past_key_names"] % 0),
        shared_cache=shared_cache,
        filename=filename,
    )
    write_json(folder / CONFIG, content)
    return folder / CONFIG


def name_graph(folder: Path, filename: str) -> None:
    """Point the genai_config.json of a folder at another file of the same graph."""
    content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    content["model"]["decoder"]["filename"] = filename
    write_json(folder / CONFIG, content)


def _head_sizes(config: dict[str, Any], cache: tuple[int, int] | None) -> dict[str, int]:
    """Heads of queries and of the cache, and the width of one; `head_dim` where it is stated."""
    heads = _size(config, "num_attention_heads")
    if cache is None:
        stated = config.get("head_dim")
        width = stated if isinstance(stated, int) else _size(config, "hidden_size") // heads
        cache = (config.get("num_key_value_heads") or heads, width)
    return {"num_attention_heads": heads, "num_key_value_heads": cache[0], "head_size": cache[1]}


def _check_inputs(found: Sequence[str], layers: int) -> None:
    past = {name % layer for name in PAST_NAMES.values() for layer in range(layers)}
    missing = sorted(({"input_ids"} | past) - set(found))
    unknown = sorted(set(found) - {"input_ids", *OPTIONAL_INPUTS} - past)
    if missing or unknown:
        raise ExportError(
            f"Expected a decoder graph in Optimum's layout with {layers} layers of cache, found one "
            f"without {missing} and with {unknown}: export the model again."
        )


def _size(config: dict[str, Any], key: str) -> int:
    value = next((config[name] for name in (key, *OTHER_NAMES.get(key, ())) if name in config), None)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelSourceError(
            f"Expected `{key}` in config.json to be a positive number, found {value!r}: copy the model's "
            "config.json again."
        )
    return value


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelSourceError(f"{path} is not readable JSON ({error}): copy it again.") from error
    return config


def _graph_inputs(graph: Path) -> dict[str, tuple[int, int] | None]:
    """Inputs that have to be given -> (heads, width of one) of a cache, None of every other."""
    try:
        model = onnx.load(graph, load_external_data=False)
    except Exception as error:  # protobuf's and the system's errors have no common base but Exception
        raise ExportError(f"{graph} is not a readable ONNX graph ({error}): export it again.") from error
    weights = {tensor.name for tensor in model.graph.initializer}
    return {v.name: _cache_size(v) for v in model.graph.input if v.name not in weights}


def _cache_size(value: onnx.ValueInfoProto) -> tuple[int, int] | None:
    sizes = [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
    return (sizes[1], sizes[3]) if len(sizes) == 4 and sizes[1] and sizes[3] else None
