"""The one part of an ORT-format file that differs from run to run, put in order.

ONNX Runtime writes the table that maps operators to the types of their kernels
(`KernelTypeStrResolver` in its ort.fbs) in the order of a randomly seeded hash map. Here the table is
written again, sorted, at the end of the file, and the old one is blanked: the same graph then
gives the same bytes, unless the old table took a few bytes more or less room (one run in about fifty).
ONNX Runtime reads tables wherever the root points.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

import flatbuffers
from flatbuffers import number_types
from flatbuffers.table import Table

RESOLVER_SLOT = 3  # of the root table: version, model, a deprecated field, resolver
ALIGNMENT = 16
_UOFFSET_BYTES = 4

Arguments = tuple[tuple[int, int], ...]
Entry = tuple[bytes, tuple[tuple[bytes, Arguments], ...]]
"""(operator, ((type name, ((input or output, index), ...)), ...))."""


@dataclass
class _Reader:
    """Reads tables of a buffer, and keeps the extent of everything it read."""

    buffer: bytearray
    seen: list[tuple[int, int]] = field(default_factory=list)

    def table(self, position: int) -> Table:
        vtable = position - struct.unpack_from("<i", self.buffer, position)[0]
        self._note(position, struct.unpack_from("<H", self.buffer, vtable + 2)[0])
        return Table(self.buffer, position)

    def text(self, table: Table, slot: int) -> bytes:
        start = self._target(table, slot)
        length = struct.unpack_from("<I", self.buffer, start)[0]
        self._note(start, _UOFFSET_BYTES + length + 1)  # and a final zero
        return bytes(self.buffer[start + _UOFFSET_BYTES : start + _UOFFSET_BYTES + length])

    def tables(self, table: Table, slot: int) -> Iterator[Table]:
        start = self._target(table, slot)
        count = struct.unpack_from("<I", self.buffer, start)[0]
        self._note(start, _UOFFSET_BYTES * (1 + count))
        for index in range(count):
            place = start + _UOFFSET_BYTES * (1 + index)
            yield self.table(place + struct.unpack_from("<I", self.buffer, place)[0])

    def _target(self, table: Table, slot: int) -> int:
        return int(table.Indirect(table.Pos + _field(table, slot)))

    def _note(self, start: int, size: int) -> None:
        self.seen.append((start, start + size))


def in_order(content: bytes) -> bytes:
    """An ORT-format file with its table of kernel types sorted.

    Arguments:
        content: the whole file, as ONNX Runtime saved it.
    """
    buffer = bytearray(content)
    root = Table(buffer, struct.unpack_from("<I", buffer, 0)[0])
    pointer = root.Pos + _field(root, RESOLVER_SLOT)
    reader = _Reader(buffer)
    entries = _entries(reader, reader.table(root.Indirect(pointer)))
    start, end = min(a for a, _ in reader.seen), max(b for _, b in reader.seen)
    buffer[start:end] = bytes(end - start)
    buffer += bytes(-len(buffer) % ALIGNMENT)
    blob = _build(entries)
    struct.pack_into("<I", buffer, pointer, len(buffer) + struct.unpack_from("<I", blob)[0] - pointer)
    return bytes(buffer + blob)


def _field(table: Table, slot: int) -> int:
    """Offset of a field from its table."""
    return int(table.Offset(4 + 2 * slot))


def _entries(reader: _Reader, resolver: Table) -> list[Entry]:
    return sorted(
        (
            reader.text(entry, 0),
            tuple(
                sorted(
                    (reader.text(types, 0), _arguments(reader, types)) for types in reader.tables(entry, 1)
                )
            ),
        )
        for entry in reader.tables(resolver, 0)
    )


def _arguments(reader: _Reader, types: Table) -> Arguments:
    return tuple((_number(a, 0, "<b"), _number(a, 1, "<I")) for a in reader.tables(types, 1))


def _number(table: Table, slot: int, layout: str) -> int:
    """A scalar field; 0, the default of both that are read here, is not written."""
    offset = _field(table, slot)
    return int(struct.unpack_from(layout, table.Bytes, table.Pos + offset)[0]) if offset else 0


def _build(entries: list[Entry]) -> bytes:
    """The resolver as a buffer of its own, the offset of its table first."""
    builder = flatbuffers.Builder(0)
    written = []
    for operator, types in entries:
        inner = [
            _write(builder, builder.CreateString(name), [_argument(builder, *pair) for pair in arguments])
            for name, arguments in types
        ]
        written.append(_write(builder, builder.CreateString(operator), inner))
    vector = _vector(builder, written)
    builder.StartObject(1)
    builder.PrependUOffsetTRelativeSlot(0, vector, 0)
    builder.Finish(builder.EndObject())
    return bytes(builder.Output())


def _write(builder: flatbuffers.Builder, text: int, children: list[int]) -> int:
    """A table of a string and a vector of tables, the shape of both kinds of entry."""
    vector = _vector(builder, children)
    builder.StartObject(2)
    builder.PrependUOffsetTRelativeSlot(0, text, 0)
    builder.PrependUOffsetTRelativeSlot(1, vector, 0)
    return int(builder.EndObject())


def _argument(builder: flatbuffers.Builder, kind: int, index: int) -> int:
    builder.StartObject(2)
    builder.PrependInt8Slot(0, kind, 0)
    builder.PrependUint32Slot(1, index, 0)
    return int(builder.EndObject())


def _vector(builder: flatbuffers.Builder, tables: list[int]) -> int:
    builder.StartVector(_UOFFSET_BYTES, len(tables), number_types.UOffsetTFlags.bytewidth)
    for table in reversed(tables):
        builder.PrependUOffsetTRelative(table)
    return int(builder.EndVector())
