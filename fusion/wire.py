"""Protobuf's wire format, as far as weights need it: find the tensors of a serialized model and replace their bytes.

A message is a run of fields; a field is a tag (number, wire type) and a value; a value of wire type 2 has a length, and
may be a message again. So a tensor is found by stepping over everything else, and replaced by writing the lengths of
the messages around it anew. Nothing is decoded, and no payload is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from typing import NamedTuple

from onnx import ModelProto

Buffer = bytes | memoryview
Piece = Sized  # bytes, a memoryview, or something with a length that knows how to write itself

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
DEEPEST = 100  # protobuf's own limit on nested messages


class WireError(ValueError):
    """Bytes that are no protobuf message.

    Attributes:
        offset: where in the buffer.
        truncated: whether a field claims more bytes than there are.
    """

    def __init__(self, message: str, offset: int, *, truncated: bool = False) -> None:
        super().__init__(message)
        self.offset, self.truncated = offset, truncated


class Field(NamedTuple):
    """One field: its number and wire type, where its tag starts, and where its value starts and stops."""

    number: int
    wire: int
    tag: int
    start: int
    stop: int


def fields(buffer: Buffer, start: int, stop: int) -> Iterator[Field]:
    """Step through the fields of the message that lies in `buffer[start:stop]`.

    Raises:
        WireError: the bytes are no message.
    """
    at = start
    while at < stop:
        tag_at = at
        tag = buffer[at]
        at += 1
        if tag >= 0x80:
            tag, at = _varint(buffer, tag_at, stop)
        wire = tag & 7
        if wire == BYTES:
            if at >= stop:
                raise WireError("a field without its length", tag_at, truncated=True)
            length = buffer[at]
            at += 1
            if length >= 0x80:
                length, at = _varint(buffer, at - 1, stop)
            end = at + length
        elif wire == VARINT:
            end = _varint(buffer, at, stop)[1]
        elif wire == FIXED32:
            end = at + 4
        elif wire == FIXED64:
            end = at + 8
        else:
            raise WireError(f"wire type {wire}, which no model uses", tag_at)
        if tag < 8:
            raise WireError("a field with the number 0", tag_at)
        if end > stop:
            raise WireError(f"a field of {end - at} bytes where {stop - at} are left", tag_at, truncated=True)
        yield Field(tag >> 3, wire, tag_at, at, end)
        at = end


def _varint(buffer: Buffer, at: int, stop: int) -> tuple[int, int]:
    """Return the number that starts at `at`, and where it stops."""
    value, shift = 0, 0
    for position in range(at, min(stop, at + 10)):
        byte = buffer[position]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position + 1
        shift += 7
    raise WireError("a number without an end", at, truncated=stop - at < 10)


def number(buffer: Buffer, field: Field) -> int:
    """Return the value of a field of wire type VARINT."""
    return _varint(buffer, field.start, field.stop)[0]


def varint(value: int) -> bytes:
    """Return a number >= 0 as protobuf writes it."""
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def header(field_number: int, length: int) -> bytes:
    """Return tag and length of a field of wire type BYTES."""
    return varint(field_number << 3 | BYTES) + varint(length)


def replace_tensors(
    buffer: Buffer,
    wanted: Callable[[int, int], bool],
    edit: Callable[[int, int], list[Piece] | None],
) -> list[Piece]:
    """Return the serialized model in `buffer` with other tensors, as pieces to be written one after the other.

    Args:
        buffer: a serialized ModelProto.
        wanted: whether a message at these positions may hold a tensor to replace; only such messages are entered.
        edit: the new content of the TensorProto at these positions, or None to leave it. Tensors inside sparse tensors
            are not offered: index and value tensors depend on each other.

    Raises:
        WireError: the bytes are no message.
    """
    changed = _replace(buffer, "ModelProto", 0, len(buffer), wanted, edit, DEEPEST)
    return [buffer] if changed is None else changed[0]


def _replace(
    buffer: Buffer,
    message: str,
    start: int,
    stop: int,
    wanted: Callable[[int, int], bool],
    edit: Callable[[int, int], list[Piece] | None],
    depth: int,
) -> tuple[list[Piece], int] | None:
    """Return the pieces of one message and their total length, or None where it stays as it is."""
    if not depth:
        raise WireError("messages nested too deep", start)
    children = _CHILDREN[message]
    view = memoryview(buffer)
    pieces: list[Piece] = []
    size, kept = 0, start
    for field in fields(buffer, start, stop):
        child = children.get(field.number)
        if child is None or field.wire != BYTES or not wanted(field.start, field.stop):
            continue
        if child == "TensorProto":
            content = edit(field.start, field.stop)
            inner = None if content is None else (content, sum(len(piece) for piece in content))
        else:
            inner = _replace(buffer, child, field.start, field.stop, wanted, edit, depth - 1)
        if inner is None:
            continue
        head = header(field.number, inner[1])
        pieces += (view[kept : field.tag], head, *inner[0])
        size += field.tag - kept + len(head) + inner[1]
        kept = field.stop
    if not pieces:
        return None
    pieces.append(view[kept:stop])
    return pieces, size + stop - kept


def _tensor_paths() -> dict[str, dict[int, str]]:
    """Return, per message that can hold a tensor, the fields that lead to one; read off onnx's own descriptors."""
    messages = {}
    waiting = [ModelProto.DESCRIPTOR]
    while waiting:
        descriptor = waiting.pop()
        if descriptor.name not in messages:
            messages[descriptor.name] = descriptor
            waiting += [field.message_type for field in descriptor.fields if field.message_type is not None]
    del messages["SparseTensorProto"]
    leading = {"TensorProto"}
    paths: dict[str, dict[int, str]] = {}
    while True:
        paths = {
            name: {
                field.number: field.message_type.name
                for field in descriptor.fields
                if field.message_type is not None and field.message_type.name in leading
            }
            for name, descriptor in messages.items()
        }
        reached = leading | {name for name, found in paths.items() if found}
        if reached == leading:
            return paths
        leading = reached


_CHILDREN = _tensor_paths()
