"""Writing without leaving halves behind: atomic files and folders, digests, full disks."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from holdfast.errors import DiskFullError, OutputExistsError

CHUNK_BYTES = 1 << 20


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, lower-case hex, read in chunks of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def to_json(value: Any) -> str:
    """Canonical JSON: sorted keys, two spaces, a final newline; NaN is refused, since JSON has none."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn a full disk into DiskFullError, whichever library noticed; other errors pass through."""
    try:
        yield
    except Exception as error:
        if not _is_disk_full(error):
            raise
        raise DiskFullError(
            f"The disk that holds {target} is full: free some space and run the same command again; "
            "finished steps are kept."
        ) from error


def _is_disk_full(error: BaseException | None) -> bool:
    """ENOSPC or EDQUOT anywhere in the chain; safetensors and ONNX Runtime only say it in words."""
    if error is None:
        return False
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "No space left on device" in str(error) or _is_disk_full(error.__cause__)


def write_text(path: Path, text: str) -> None:
    """Replace `path` atomically: a reader sees the old content or the new, never a part."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(path):
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    write_text(path, to_json(value))


def refuse_existing(target: Path, *, overwrite: bool) -> None:
    """Raise OutputExistsError when `target` is there and `overwrite` was not asked for."""
    if target.exists() and not overwrite:
        raise OutputExistsError(
            f"{target} exists already: choose another --out, or pass --overwrite to replace it."
        )


@contextmanager
def atomic_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place when the block succeeds.

    When the block fails, nothing is left and `target` is as before.
    """
    refuse_existing(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        with disk_errors(target):
            yield temporary
        temporary.chmod(0o755)
        replace_folder(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def replace_folder(source: Path, target: Path) -> None:
    """Move `source` to `target`; an existing target steps aside first and is removed last."""
    if not target.exists():
        os.replace(source, target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    os.replace(target, aside / "old")
    try:
        os.replace(source, target)
    except BaseException:
        os.replace(aside / "old", target)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
