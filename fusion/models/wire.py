"""Protobuf's wire format, as far as weights need it: find the tensors of a serialized model and replace their bytes.

A message is a run of fields; a field is a tag (number, wire type) and a value; a value of wire type 2 has a length, and
may be a message again. So a tensor is found by stepping over everything else, and replaced by writing the lengths of
the messages around it anew. Nothing is decoded, and no payload is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, TrainingInfoProto

from fusion.models.store import Piece, Store

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_FIXED = {FIXED64: 8, FIXED32: 4}
_DEEPEST = 100  # protobuf's own limit on nested messages
_WINDOW = 1 << 16  # bytes read at a time. A mapped file would do, but then the kernel counts megabytes around each look
_HEAD = 20  # bytes that tag and length take at most

# Per message that can hold a tensor, the fields that lead to one; the parts of sparse tensors depend on each other.
_ENTERED = (ModelProto, GraphProto, FunctionProto, TrainingInfoProto, NodeProto, AttributeProto)
_LEADING = {message.DESCRIPTOR.name for message in (*_ENTERED, TensorProto)}
_CHILDREN = {
    message.DESCRIPTOR.name: {
        field.number: field.message_type.name
        for field in message.DESCRIPTOR.fields
        if field.message_type is not None and field.message_type.name in _LEADING
    }
    for message in _ENTERED
}


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


def fields(store: Store, start: int, stop: int) -> Iterator[Field]:
    """Step through the fields of the message that lies in `store` from `start` to `stop`.

    Raises:
        WireError: the bytes are no message.
    """
    at, base, window = start, start, b""
    while at < stop:
        here = at - base
        if here + _HEAD > len(window) and base + len(window) < stop:
            window, base, here = store.read(at, min(_WINDOW, stop - at)), at, 0
        tag = window[here]
        value = here + 1
        if tag >= 0x80:
            tag, value = _varint(window, here, base)
        wire = tag & 7
        if wire == BYTES:
            # Most are short; a window that ends here is a file that does.
            length, value = window[value] if value < len(window) else 0x80, value + 1
            if length >= 0x80:
                length, value = _varint(window, value - 1, base)
        elif wire == VARINT:
            length = _varint(window, value, base)[1] - value
        elif wire in _FIXED:
            length = _FIXED[wire]
        else:
            raise WireError(f"wire type {wire}, which no model uses", at)
        if tag < 8:
            raise WireError("a field with the number 0", at)
        begin = base + value
        if begin + length > stop:
            raise WireError(f"a field of {length:,} bytes where {stop - begin:,} are left", at, truncated=True)
        yield Field(tag >> 3, wire, at, begin, begin + length)
        at = begin + length


def _varint(window: bytes, at: int, base: int) -> tuple[int, int]:
    """Return the number that starts at `at`, and where it stops."""
    value, shift = 0, 0
    for position in range(at, min(len(window), at + 10)):
        byte = window[position]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position + 1
        shift += 7
    raise WireError("a number without an end", base + at, truncated=len(window) - at < 10)


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


Wanted = Callable[[int, int], bool]
Edit = Callable[[int, int], list[Piece] | None]


def replace_tensors(store: Store, wanted: Wanted, edit: Edit) -> list[Piece]:
    """Return the serialized ModelProto in `store` with other tensors, as pieces to be written one after the other.

    Args:
        wanted: whether a message at these positions may hold a tensor to replace; only such messages are entered.
        edit: the new content of the TensorProto at these positions, or None to leave it.

    Raises:
        WireError: the bytes are no message.
    """
    pieces = _replaced("ModelProto", store, 0, len(store), wanted, edit, _DEEPEST)
    return [store.read(0, len(store))] if pieces is None else pieces


def _replaced(
    message: str, store: Store, start: int, stop: int, wanted: Wanted, edit: Edit, depth: int
) -> list[Piece] | None:
    """Return the pieces of one message, None where it stays as it is."""
    if message == "TensorProto":
        return edit(start, stop)
    if not depth:
        raise WireError("messages nested too deep", start)
    children = _CHILDREN[message]
    pieces: list[Piece] = []
    kept = start
    for number, wire, tag, begin, end in fields(store, start, stop):
        if number not in children or wire != BYTES or not wanted(begin, end):
            continue
        inner = _replaced(children[number], store, begin, end, wanted, edit, depth - 1)
        if inner is not None:
            pieces += (store.read(kept, tag - kept), header(number, sum(map(len, inner))), *inner)
            kept = end
    return [*pieces, store.read(kept, stop - kept)] if pieces else None
