"""codes.safetensors written part by part: no more of it is in memory than one decoder block's codes.

safetensors writes a file from tensors in memory only, so each part becomes a file of its own, and in the
end their bytes are put one after another under one header.
"""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from holdfast.files import disk_errors
from holdfast.quantize.weights.codes import CODES_FILE, LAYOUT, WeightCodes, save_codes

PARTS = ".codes"
HEADER_ALIGNMENT = 8
ITEM_BYTES = {"F32": 4, "I8": 1}


class CodesParts:
    """Codes of a model, added part by part; leaving it without an error writes the one file.

    Arguments:
        folder: gets codes.safetensors, byte for byte as `codes.save_codes` writes it, once it is left.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._parts: list[Path] = []

    def add(self, weights: dict[str, WeightCodes]) -> None:
        """Write some codes to disk; no path may come twice.

        Raises:
            QuantizationError: the parts of a weight contradict each other.
            DiskFullError: no room.
        """
        if weights:
            part = self.folder / PARTS / f"{len(self._parts):05d}"
            save_codes(weights, part)
            self._parts.append(part / CODES_FILE)

    def __enter__(self) -> CodesParts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with disk_errors(self.folder):
                    merge_codes(self._parts, self.folder / CODES_FILE)
        finally:
            shutil.rmtree(self.folder / PARTS, ignore_errors=True)


def merge_codes(parts: list[Path], target: Path) -> None:
    """One safetensors file of several, ordered as safetensors does it: wide tensors first, then by name."""
    with ExitStack() as stack:
        files = [stack.enter_context(part.open("rb")) for part in parts]
        headers = [_header(file) for file in files]
        tensors = [
            (name, entry, file)
            for file, header in zip(files, headers, strict=True)
            for name, entry in header.items()
            if name != "__metadata__"
        ]
        tensors.sort(key=lambda item: (-ITEM_BYTES[item[1]["dtype"]], item[0]))
        starts = {id(file): file.tell() for file in files}
        with target.open("wb") as out:
            out.write(_merged_header(headers, [(name, entry) for name, entry, _ in tensors]))
            for _, entry, file in tensors:
                first, last = entry["data_offsets"]
                file.seek(starts[id(file)] + first)
                out.write(file.read(last - first))


def _header(file: BinaryIO) -> dict[str, Any]:
    """The header of a safetensors file; the file is left where its data begin."""
    size = int.from_bytes(file.read(8), "little")
    header: dict[str, Any] = json.loads(file.read(size))
    return header


def _merged_header(headers: list[dict[str, Any]], tensors: list[tuple[str, dict[str, Any]]]) -> bytes:
    weights: dict[str, Any] = {}
    index: dict[str, Any] = {}
    for header in headers:
        index = json.loads(header["__metadata__"][LAYOUT])
        weights |= index["weights"]
    merged = json.dumps({**index, "weights": weights}, sort_keys=True, separators=(",", ":"))
    whole: dict[str, Any] = {"__metadata__": {LAYOUT: merged}}
    end = 0
    for name, entry in tensors:
        first, last = entry["data_offsets"]
        start, end = end, end + last - first
        whole[name] = {"dtype": entry["dtype"], "shape": entry["shape"], "data_offsets": [start, end]}
    text = json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
