"""Optional dependencies: one place that turns a missing package into an install command."""

from __future__ import annotations

import importlib.util

from holdfast.errors import MissingExtraError

# extra -> import names whose presence means that the extra is installed
EXTRAS: dict[str, tuple[str, ...]] = {
    "export": ("torch", "transformers", "optimum", "onnx", "onnxscript", "safetensors", "scipy"),
    "adapters": ("peft",),
    "inc": ("neural_compressor", "six", "pkg_resources"),
    "plots": ("matplotlib",),
    "serve": ("starlette", "uvicorn"),
}


def missing_packages(extra: str) -> list[str]:
    """Import names of `extra` that cannot be found. Finds without importing."""
    return [name for name in EXTRAS[extra] if importlib.util.find_spec(name) is None]


def require_extra(extra: str, purpose: str) -> None:
    """Raise MissingExtraError with the install command unless `extra` is installed.

    Arguments:
        extra: a key of `EXTRAS`.
        purpose: what the user asked for, to open the sentence ("`holdfast export`").
    """
    missing = missing_packages(extra)
    if missing:
        raise MissingExtraError(
            f"{purpose} needs {', '.join(missing)}, not installed here: "
            f"run `pip install 'holdfast[{extra}]'`."
        )
