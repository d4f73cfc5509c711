"""A model's config.json is read and judged here before any library sees it.

transformers 4.57.6 runs code named by a hostile config.json (CVE-2026-4372, through
`_attn_implementation_internal`) whatever `trust_remote_code` says, so that a config is refused by
its keys: private ones, and public ones that name code or redirect loading to other files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from holdfast.errors import ModelSourceError

# Private keys that transformers itself has written, read back as plain attributes.
HARMLESS_PRIVATE = frozenset(
    {"_name_or_path", "_commit_hash", "_attn_implementation_autoset", "_flash_attn_2_enabled"}
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


def read_config(folder: Path, *, role: str) -> dict[str, Any]:
    """The JSON object in `folder`/config.json, once it is known to be safe to load.

    Raises:
        ModelSourceError: missing, unreadable, not an object, or with a key that could run code.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelSourceError(
            f"Expected a config.json in {folder}, found none: point the {role} at a folder that "
            "`save_pretrained` wrote."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ModelSourceError(f"{path} is not readable JSON ({error}): save the model again.") from error
    if not isinstance(config, dict):
        raise ModelSourceError(
            f"{path} should hold one JSON object, found {type(config).__name__}: save the model again."
        )
    _refuse_unsafe(path, config)
    return config


def _refuse_unsafe(path: Path, config: dict[str, Any]) -> None:
    unsafe = sorted({key for key, value in _pairs(config) if _is_unsafe(key, value)})
    if unsafe:
        raise ModelSourceError(
            f"{path} has the key `{unsafe[0]}`, through which a model folder can run code or load "
            "other files: remove it if you trust where the model comes from."
        )
    if "quantization_config" in config:
        raise ModelSourceError(
            f"{path} describes a model that is quantized already (`quantization_config`): "
            "start from the full-precision checkpoint."
        )


def _is_unsafe(key: str, value: Any) -> bool:
    if key in HARMLESS_PRIVATE:
        return not isinstance(value, str | bool | None)
    return key.startswith("_") or key in REFUSED


def _pairs(value: Any) -> Iterator[tuple[str, Any]]:
    """Every (key, value) of nested objects and lists."""
    if isinstance(value, dict):
        yield from value.items()
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for child in children:
        yield from _pairs(child)
