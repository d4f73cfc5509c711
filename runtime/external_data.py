"""Which files a graph reads beside itself, found before ONNX Runtime opens any of them.

Older ONNX Runtimes (1.20, for one) follow `location` out of the model's folder: `..`, absolute
paths, links. A hostile graph could so read any file of the device into its weights. The onnx
package is not on the device; the few protobuf fields that lead to a location are walked here instead.
Field numbers: onnx.proto of ONNX 1.18; wire format: protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from holdfast.errors import ExecutionError

MODEL_FILE = "model.onnx"
ORT_FILE = "model.ort"  # ORT format: a FlatBuffers file of reduced builds, with all its weights inside
ORT_IDENTIFIER = b"ORTM"  # at byte 4; onnxruntime/core/flatbuffers/schema/ort.fbs

# message -> field number -> message inside it; everything else is stepped over
_NESTED: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def graph_files(folder: Path) -> list[Path]:
    """`model.onnx` of `folder` and the external data it names; `model.ort` where there is no model.onnx.

    All are inside the folder; the first is the graph.

    Raises:
        ExecutionError: no graph, not a file of its format, or a location outside the folder or missing.
    """
    graph = graph_file(folder)
    _require_inside(folder, PurePosixPath(graph.name), graph)
    if graph.name == ORT_FILE:
        _require_ort_format(graph)
        return [graph]
    locations = sorted(external_locations(graph))
    for location in locations:
        _require_inside(folder, PurePosixPath(location), graph)
    return [graph, *(folder / location for location in locations)]


def graph_file(folder: Path) -> Path:
    """The graph that is run: `model.onnx`, else `model.ort`.

    Raises:
        ExecutionError: there is neither.
    """
    for name in (MODEL_FILE, ORT_FILE):
        if (folder / name).is_file():
            return folder / name
    raise ExecutionError(
        f"Expected {MODEL_FILE} or {ORT_FILE} in {folder}, found none: export the model there first."
    )


def _require_ort_format(graph: Path) -> None:
    with graph.open("rb") as stream:
        head = stream.read(8)
    if head[4:] != ORT_IDENTIFIER:
        raise ExecutionError(f"{graph} is not a file in ORT format: copy or convert it again.")


def external_locations(graph: Path) -> set[str]:
    """Every `location` that a tensor of the graph names, wherever the tensor is nested.

    Raises:
        ExecutionError: the bytes are not a protobuf message.
    """
    if graph.stat().st_size == 0:
        raise ExecutionError(f"{graph} is empty: copy or export the model again.")
    with (
        graph.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as view,
    ):
        try:
            return set(_locations(view))
        except (IndexError, UnicodeDecodeError, _MalformedError):
            raise ExecutionError(
                f"{graph} is not a readable ONNX graph: copy or export the model again."
            ) from None


class _MalformedError(Exception):
    pass


def _require_inside(folder: Path, location: PurePosixPath, graph: Path) -> None:
    path = folder / location
    leaves = location.is_absolute() or ".." in location.parts
    if leaves or not path.resolve().is_relative_to(folder.resolve()):
        raise ExecutionError(
            f"{graph} reads {str(location)!r}, which is outside its folder: "
            "keep the graph's data beside the graph."
        )
    if not path.is_file():
        raise ExecutionError(
            f"{graph} reads its weights from {location}, which is missing: copy that file as well."
        )


def _locations(view: memoryview) -> Iterator[str]:
    pending = [("model", 0, len(view))]
    while pending:
        message, start, end = pending.pop()
        if message == "entry":
            yield from _location(view, start, end)
            continue
        for number, first, last in _byte_fields(view, start, end):
            if number in _NESTED[message]:
                pending.append((_NESTED[message][number], first, last))


def _location(view: memoryview, start: int, end: int) -> Iterator[str]:
    """The value of a StringStringEntryProto whose key is `location`."""
    texts = {
        number: bytes(view[first:last]).decode() for number, first, last in _byte_fields(view, start, end)
    }
    if texts.get(1) == "location":
        yield texts.get(2, "")


def _byte_fields(view: memoryview, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(field number, first byte, byte after the last) of a message's length-delimited fields."""
    position = start
    while position < end:
        tag, position = _varint(view, position)
        wire, number = tag & 7, tag >> 3
        if wire == _VARINT:
            _, position = _varint(view, position)
        elif wire == _BYTES:
            size, position = _varint(view, position)
            if position + size > end:
                raise _MalformedError
            yield number, position, position + size
            position += size
        elif wire in (_FIXED32, _FIXED64):
            position += 4 if wire == _FIXED32 else 8
        else:  # groups: not in ONNX
            raise _MalformedError


def _varint(view: memoryview, position: int) -> tuple[int, int]:
    """A base-128 integer and the position after it."""
    value = shift = 0
    while True:
        byte = view[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise _MalformedError
