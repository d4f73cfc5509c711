"""A model's config.json is read and judged here before any library sees it.

transformers 4.57.6 runs code named by a hostile config.json (CVE-2026-4372, through
`_attn_implementation_internal`) whatever `trust_remote_code` says, so that a config is refused by
its keys: private ones, and public ones that name code or redirect loading to other files. Of these
`auto_map`, at the top level, is let through when the user asks for remote code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from holdfast.errors import ModelSourceError

# Private keys that transformers itself has written, read back as plain attributes.
HARMLESS_PRIVATE = frozenset(
    {
        "_name_or_path",
        "_commit_hash",
        "_attn_implementation_autoset",
        "_flash_attn_2_enabled",
        "_remove_final_layer_norm",  # every OPT checkpoint
        "_sliding_window_pattern",  # every Gemma 3 checkpoint
    }
)
# Public keys that make transformers import code, fetch kernels or open other files.
REFUSED = frozenset(
    {
        "attn_implementation",
        "auto_map",
        "configuration_files",
        "custom_generate",
        "custom_pipelines",
        "transformers_weights",
        "trust_remote_code",
    }
)
# Where transformers and compressed-tensors describe a quantized checkpoint.
QUANTIZATION_KEYS = frozenset({"quantization_config", "compression_config"})


def read_config(folder: Path, *, role: str, trust_remote_code: bool = False) -> dict[str, Any]:
    """The JSON object in `folder`/config.json, once it is known to be safe to load.

    Arguments:
        trust_remote_code: let an `auto_map` through that names Python files of the folder itself.

    Raises:
        ModelSourceError: missing, unreadable, not an object, with a key that could run code, or of
            a quantized model.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelSourceError(
            f"Expected a config.json in {folder}, found none: point the {role} at a folder that "
            "`save_pretrained` wrote."
        )
    config = read_object(path)
    _judge_auto_map(path, config, trust_remote_code)
    refuse_unsafe(path, {key: value for key, value in config.items() if key != "auto_map"})
    _refuse_quantized(path, config)
    return config


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ModelSourceError: unreadable, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ModelSourceError(f"{path} is not readable JSON ({error}): save the model again.") from error
    if not isinstance(value, dict):
        raise ModelSourceError(
            f"{path} should hold one JSON object, found {type(value).__name__}: save the model again."
        )
    return value


def refuse_unsafe(path: Path, config: dict[str, Any]) -> None:
    """Refuse an object with, at any depth, a key that could run code or load other files.

    Raises:
        ModelSourceError
    """
    unsafe = sorted({key for key, value in _pairs(config) if _is_unsafe(key, value)})
    if unsafe:
        raise ModelSourceError(
            f"{path} has the key `{unsafe[0]}`, through which a model folder can run code or load "
            "other files: remove it if you trust where the model comes from."
        )


def _judge_auto_map(path: Path, config: dict[str, Any], trust_remote_code: bool) -> None:
    """Top level only; code of another repository would be neither pinned nor in the digests."""
    if "auto_map" not in config:
        return
    if not trust_remote_code:
        raise ModelSourceError(
            f"{path} names Python code of its own (`auto_map`): remove that key to load it with "
            "transformers' own class, or, after reading the code, allow it with --trust-remote-code."
        )
    foreign = sorted({text for text in _texts(config["auto_map"]) if "--" in text})
    if foreign:
        raise ModelSourceError(
            f"{path} takes its Python code from another repository (`{foreign[0]}`): copy the code into "
            "the model folder."
        )


def _refuse_quantized(path: Path, config: dict[str, Any]) -> None:
    for key, value in _pairs(config):
        if key in QUANTIZATION_KEYS:
            raise ModelSourceError(
                f"{path} describes a model that is quantized already (`{key}`, {_method(value)}): "
                "start from the full-precision checkpoint."
            )


def _method(value: Any) -> str:
    method = value.get("quant_method") if isinstance(value, dict) else None
    return f"method {method}" if isinstance(method, str) else "no method given"


def _is_unsafe(key: str, value: Any) -> bool:
    if key in HARMLESS_PRIVATE:
        return not isinstance(value, str | int | None)
    return key.startswith("_") or key in REFUSED


def _texts(value: Any) -> Iterator[str]:
    """Every string in nested objects and lists."""
    if isinstance(value, str):
        yield value
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for child in children:
        yield from _texts(child)


def _pairs(value: Any) -> Iterator[tuple[str, Any]]:
    """Every (key, value) of nested objects and lists."""
    if isinstance(value, dict):
        yield from value.items()
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for child in children:
        yield from _pairs(child)
