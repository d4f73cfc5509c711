"""Versions of the packages that decide a result; part of the manifest and of every step's key."""

from __future__ import annotations

import importlib.metadata
import platform

PACKAGES = (
    "holdfast",
    "neural-compressor",
    "numpy",
    "onnx",
    "onnxruntime",
    "optimum",
    "optimum-onnx",
    "tokenizers",
    "torch",
    "transformers",
)


def installed_versions() -> dict[str, str]:
    """Package -> version of what is installed of `PACKAGES`, and Python's."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
