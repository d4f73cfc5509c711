"""The bundle's manifest: what is in it, where it came from, and whether a byte changed since.

`manifest.json` lists every file of the bundle but itself with SHA-256 and size, and ends with a
digest of its own content, so that a changed byte anywhere is found before anything is loaded.
The digest finds damage; it does not prove an author.
"""

from __future__ import annotations

import json
import os
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import msgspec

from holdfast.config import Config, encode
from holdfast.errors import BundleError, BundleIntegrityError
from holdfast.files import sha256_file, sha256_text, to_json, write_text

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1


class FileEntry(Config, frozen=True):
    """One file of the bundle."""

    sha256: str
    size_bytes: int


class ModelEntry(Config, frozen=True):
    """A model that the bundle was made from.

    Attributes:
        kind: `checkpoint`, or `ablated` for a twin that only ever existed in memory.
        name: last part of its path.
        files: relative path to SHA-256; for an ablated twin, those of the model it was made from.
    """

    kind: Literal["checkpoint", "ablated"]
    name: str
    files: dict[str, str]


class StepEntry(Config, frozen=True):
    """One step of the run: its settings, and what it says about its result."""

    name: str
    settings: dict[str, Any]
    result: dict[str, Any]


class Manifest(Config, frozen=True):
    """Everything a reader or a machine needs to know about a bundle.

    Attributes:
        schema_version: version of this layout.
        verdict: outcome of the alignment gate when the bundle was made.
        chat_digest: digest of tokenizer, chat template and stop tokens.
        versions: packages that made the bundle.
    """

    schema_version: int
    holdfast_version: str
    verdict: Literal["PASS", "FAIL", "INCONCLUSIVE"]
    seed: int
    model: ModelEntry
    base: ModelEntry
    chat_digest: str
    versions: dict[str, str]
    steps: tuple[StepEntry, ...]
    files: dict[str, FileEntry]


def file_entries(folder: Path) -> dict[str, FileEntry]:
    """Digests and sizes of all files below `folder` but the manifest, by POSIX path.

    Raises:
        BundleIntegrityError: a symbolic link or anything else that is not a plain file.
    """
    return {
        name: FileEntry(sha256=sha256_file(folder / name), size_bytes=(folder / name).stat().st_size)
        for name in _file_names(folder)
    }


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` with its own digest."""
    body = encode(manifest)
    write_text(folder / MANIFEST, to_json(body | {"digest": sha256_text(to_json(body))}))


def seal(folder: Path, manifest: Manifest) -> Manifest:
    """Write the manifest for the files that are in `folder` now, and return it."""
    sealed: Manifest = msgspec.structs.replace(manifest, files=file_entries(folder))
    write_manifest(folder, sealed)
    return sealed


def read_manifest(folder: Path) -> Manifest:
    """Read and check `manifest.json` itself; `check_files` checks what it lists.

    Raises:
        BundleError: no bundle there, or one of another schema version.
        BundleIntegrityError: the manifest is not the one that was written.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(
            f"{folder} is not a Holdfast bundle (no {MANIFEST} in it): pass the folder that "
            "`holdfast run --out` wrote."
        )
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        body = json.loads(text)
    except ValueError as error:
        raise BundleIntegrityError(_changed(path, "it is not JSON any more")) from error
    if not isinstance(body, dict):
        raise BundleIntegrityError(_changed(path, "it holds no JSON object"))
    if body.get("schema_version") != SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema version {body.get('schema_version')!r}, this Holdfast reads "
            f"{SCHEMA_VERSION}: use the Holdfast release that made the bundle, or make it again."
        )
    digest = body.pop("digest", None)
    if digest != sha256_text(to_json(body)) or text != to_json(body | {"digest": digest}):
        raise BundleIntegrityError(_changed(path, "its content does not match its own digest"))
    return msgspec.convert(body, Manifest)


def check_files(folder: Path, manifest: Manifest) -> None:
    """Compare every file of the bundle with the manifest.

    Raises:
        BundleIntegrityError: names the first file that is missing, changed, truncated or unlisted.
    """
    present = set(_file_names(folder))
    for name in sorted(present | set(manifest.files)):
        if name not in manifest.files:
            raise BundleIntegrityError(_changed(folder / name, "the manifest does not list it"))
        if name not in present:
            raise BundleIntegrityError(_changed(folder / name, "it is missing"))
        _check_file(folder / name, manifest.files[name])


def _check_file(path: Path, entry: FileEntry) -> None:
    size_bytes = path.stat().st_size
    if size_bytes != entry.size_bytes:
        raise BundleIntegrityError(_changed(path, f"expected {entry.size_bytes} bytes, found {size_bytes}"))
    if sha256_file(path) != entry.sha256:
        raise BundleIntegrityError(_changed(path, "its SHA-256 differs"))


def _file_names(folder: Path) -> list[str]:
    """POSIX paths of all files but the manifest. Walks without following links."""
    names: list[str] = []
    for root, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(root) / name
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise BundleIntegrityError(_changed(path, "a bundle holds plain files only"))
        names += [str(PurePosixPath((Path(root) / name).relative_to(folder))) for name in files]
    return sorted(name for name in names if name != MANIFEST)


def _changed(path: Path, why: str) -> str:
    return (
        f"{path} is not what the bundle was sealed with: {why}. Copy the bundle again, "
        "or make it again with `holdfast run`."
    )
