"""Payloads: the bytes of large tensors, which stay where they are until someone reads or writes them.

A tensor of the shell has, in place of its data, one `external_data` entry whose location is a marker: which store
holds the bytes, and where. Being ordinary protobuf, a marker survives copies, moves and onnx's own tools (the version
converter keeps external data but drops fields it does not know); a program that takes it for a file fails at once.
"""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path
from typing import IO

from onnx import StringStringEntryProto, TensorProto, helper

from fusion import wire
from fusion.errors import ModelError

ELIDED_ABOVE = 1024  # bytes; smaller payloads are shapes, axes and scalars, which patterns read
MARKER = "onnx-fusion://"
LOCATION = "\x0a\x08location"  # how an entry of external data begins in the file: markers, and real ones
_CHUNK = 1 << 20

_NUMBER = {field.name: field.number for field in TensorProto.DESCRIPTOR.fields}
RAW_DATA = _NUMBER["raw_data"]
# string_data is left out: it is many fields, not one, and no weight.
_PAYLOADS = {_NUMBER[f"{kind}_data"] for kind in ("float", "int32", "int64", "raw", "double", "uint64")}
_EXTERNAL_DATA, _DATA_LOCATION = _NUMBER["external_data"], _NUMBER["data_location"]

# Element types narrower than a byte, packed; numpy's itemsize knows nothing of it.
_BITS = {
    getattr(TensorProto, name): bits
    for name, bits in {"UINT4": 4, "INT4": 4, "FLOAT4E2M1": 4, "UINT2": 2, "INT2": 2}.items()
    if hasattr(TensorProto, name)
}


def byte_size(data_type: int, shape: Iterable[int]) -> int:
    """Return how many bytes a tensor's values take as `raw_data`."""
    bits = _BITS.get(data_type) or 8 * helper.tensor_dtype_to_np_dtype(data_type).itemsize
    return (prod(shape) * bits + 7) // 8


class Store:
    """Bytes that can be read in part. Every store has a serial number, by which markers name it."""

    def __init__(self) -> None:
        self.serial = next(_serials)
        _stores[self.serial] = self

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes; a ModelError where there are fewer."""
        raise NotImplementedError

    def copy(self, offset: int, length: int, file: IO[bytes]) -> None:
        """Write `length` bytes to `file`, which is open for writing and has been flushed."""
        file.write(self.read(offset, length))


_serials = itertools.count(1)
_stores: weakref.WeakValueDictionary[int, Store] = weakref.WeakValueDictionary()


class BytesStore(Store):
    """Bytes in memory."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def read(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length]

    def copy(self, offset: int, length: int, file: IO[bytes]) -> None:
        file.write(memoryview(self.data)[offset : offset + length])


class FileStore(Store):
    """A file, kept open: its content stays readable when another file takes its name."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self.descriptor)
        self.size = os.fstat(self.descriptor).st_size

    def __len__(self) -> int:
        return self.size

    def read(self, offset: int, length: int) -> bytes:
        chunks = []
        while length:
            chunk = os.pread(self.descriptor, length, offset)
            if not chunk:
                raise ModelError(
                    f"{self.path}: {length} bytes are missing at byte {offset}: the file was changed meanwhile"
                )
            chunks.append(chunk)
            offset, length = offset + len(chunk), length - len(chunk)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def copy(self, offset: int, length: int, file: IO[bytes]) -> None:
        file.flush()
        while length and hasattr(os, "copy_file_range"):
            try:
                # Shares the blocks where the file system can, and never brings them into this process.
                copied = os.copy_file_range(self.descriptor, file.fileno(), length, offset)
            except OSError:  # another file system, an old kernel; a full disk shows again below
                break
            if not copied:
                break
            offset, length = offset + copied, length - copied
        while length:
            chunk = self.read(offset, min(length, _CHUNK))
            file.write(chunk)
            offset, length = offset + len(chunk), length - len(chunk)


class Payload:
    """A piece of a store, as it stands in a serialized model."""

    __slots__ = ("field", "length", "offset", "store")

    def __init__(self, store: Store, field: int, offset: int, length: int) -> None:
        self.store, self.field, self.offset, self.length = store, field, offset, length

    def __len__(self) -> int:
        return self.length

    def read(self) -> bytes:
        return self.store.read(self.offset, self.length)

    def copy_to(self, file: IO[bytes]) -> None:
        self.store.copy(self.offset, self.length, file)


def write(pieces: Sequence[wire.Piece], file: IO[bytes]) -> None:
    """Write pieces one after the other; payloads go from store to file."""
    for piece in pieces:
        if isinstance(piece, Payload):
            piece.copy_to(file)
        else:
            assert isinstance(piece, bytes)
            file.write(piece)


def join(pieces: Sequence[wire.Piece]) -> bytes:
    """Return the pieces as one bytes object."""
    return b"".join(piece.read() if isinstance(piece, Payload) else piece for piece in pieces)  # type: ignore[misc]


# -- markers ----------------------------------------------------------------------------------------------------------


def mark(tensor: TensorProto, payloads: Sequence[Payload]) -> None:
    """Let a tensor without data have these."""
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=_text(payloads))


def marked(tensor: TensorProto) -> list[Payload] | None:
    """Return the payloads of a tensor whose data was elided, None for one that has its data, or has it in a file."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return None
    for entry in tensor.external_data:
        if entry.value.startswith(MARKER):
            return _payloads(entry.value, tensor.name)
    return None


def unmarked(tensor: TensorProto) -> TensorProto:
    """Return a copy of the tensor without its marker."""
    copy = TensorProto()
    copy.CopyFrom(tensor)
    copy.ClearField("data_location")
    kept = [entry for entry in tensor.external_data if not entry.value.startswith(MARKER)]
    del copy.external_data[:]
    copy.external_data.extend(kept)
    return copy


def _text(payloads: Sequence[Payload]) -> str:
    chunks = ",".join(f"{chunk.field}:{chunk.offset}:{chunk.length}" for chunk in payloads)
    return f"{MARKER}{payloads[0].store.serial}/{chunks}"


def _payloads(text: str, name: str) -> list[Payload]:
    serial, chunks = text[len(MARKER) :].split("/")
    store = _stores.get(int(serial))
    if store is None:
        raise ModelError(f"the data of tensor {name!r} belongs to a model that is no longer loaded")
    return [Payload(store, *map(int, chunk.split(":"))) for chunk in chunks.split(",")]


# -- a model without payloads, and back -------------------------------------------------------------------------------


def elide(store: Store) -> bytes:
    """Return the serialized model in `store` with a marker in place of every payload above `ELIDED_ABOVE` bytes.

    Raises wire.WireError where the bytes are no message.
    """

    def edit(start: int, stop: int) -> list[wire.Piece] | None:
        found = list(wire.fields(store, start, stop))
        large = {field.number for field in found if field.stop - field.start > ELIDED_ABOVE} & _PAYLOADS
        if not large or any(
            field.number in (_EXTERNAL_DATA, _DATA_LOCATION)  # keeps its data elsewhere, or says so
            or (field.number in large and field.wire != wire.BYTES)  # element by element, mixed with packed runs
            for field in found
        ):
            return None
        chunks = [Payload(store, f.number, f.start, f.stop - f.start) for f in found if f.number in large]
        marker = TensorProto()
        mark(marker, chunks)
        kept: list[wire.Piece] = [store.read(f.tag, f.stop - f.tag) for f in found if f.number not in large]
        return [*kept, marker.SerializeToString()]

    return join(wire.replace_tensors(store, lambda start, stop: stop - start > ELIDED_ABOVE, edit))


def restore(shell: bytes) -> list[wire.Piece]:
    """Return a serialized shell with its payloads again where the markers are, as pieces to be written."""

    def edit(start: int, stop: int) -> list[wire.Piece] | None:
        chunks: list[Payload] = []
        parts: list[tuple[int, wire.Piece]] = []
        for field in wire.fields(data, start, stop):
            if field.number == _EXTERNAL_DATA:
                entry = StringStringEntryProto.FromString(shell[field.start : field.stop])
                if entry.value.startswith(MARKER):
                    chunks = _payloads(entry.value, TensorProto.FromString(shell[start:stop]).name)
                    continue
            parts.append((field.number, shell[field.tag : field.stop]))
        if not chunks:
            return None
        parts = [part for part in parts if part[0] != _DATA_LOCATION]
        for chunk in chunks:
            parts += [(chunk.field, wire.header(chunk.field, len(chunk))), (chunk.field, chunk)]
        parts.sort(key=lambda part: part[0])  # the order in which protobuf writes fields; stable, so chunks keep theirs
        return [piece for _, piece in parts]

    data = BytesStore(shell)
    return wire.replace_tensors(data, occurrences(shell, MARKER), edit)


def occurrences(data: bytes, text: str) -> wire.Wanted:
    """Return a question to put, in ascending order of positions: does `text` occur between these two?"""
    return _Occurrences(data, text.encode())


class _Occurrences:
    def __init__(self, data: bytes, text: bytes) -> None:
        self.data, self.text = data, text
        self.next = data.find(text)

    def __call__(self, start: int, stop: int) -> bool:
        while 0 <= self.next < start:
            self.next = self.data.find(self.text, start)
        return 0 <= self.next < stop
