"""Payloads: the bytes of large tensors, which stay where they are until someone reads or writes them.

A tensor of the shell has, in place of its data, one `external_data` entry whose location is a marker: which store
holds the bytes, and where. Being ordinary protobuf, a marker survives copies, moves and onnx's own tools (the version
converter keeps external data but drops fields it does not know); a program that takes it for a file fails at once.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from math import prod

from onnx import TensorProto, helper

from fusion.errors import ModelError
from fusion.models import wire
from fusion.models.store import BytesStore, Payload, Piece, Store, join, store_of

ELIDED_ABOVE = 1024  # bytes; smaller payloads are shapes, axes and scalars, which patterns read
MARKER = "onnx-fusion://"
LOCATION = "\x0a\x08location"  # how an entry of external data begins in the file: markers, and real ones

_NUMBER = {field.name: field.number for field in TensorProto.DESCRIPTOR.fields}
RAW_DATA = _NUMBER["raw_data"]
# string_data is left out: it is many fields, not one, and no weight.
_PAYLOADS = {_NUMBER[f"{kind}_data"] for kind in ("float", "int32", "int64", "raw", "double", "uint64")}
_ELSEWHERE = {_NUMBER["external_data"], _NUMBER["data_location"]}

# Element types narrower than a byte, packed, as numpy's itemsize does not know. onnx 1.19 does not name the last two.
_BITS = {TensorProto.UINT4: 4, TensorProto.INT4: 4, TensorProto.FLOAT4E2M1: 4, 25: 2, 26: 2}


def byte_size(data_type: int, shape: Iterable[int]) -> int:
    """Return how many bytes a tensor's values take as `raw_data`."""
    bits = _BITS.get(data_type) or 8 * helper.tensor_dtype_to_np_dtype(data_type).itemsize
    return (prod(shape) * bits + 7) // 8


def mark(tensor: TensorProto, payloads: Sequence[Payload]) -> None:
    """Let a tensor without data have these."""
    chunks = ",".join(f"{chunk.field}:{chunk.offset}:{chunk.length}" for chunk in payloads)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=f"{MARKER}{payloads[0].store.serial}/{chunks}")


def marked(tensor: TensorProto) -> list[Payload] | None:
    """Return the payloads of a tensor whose data was elided, None for one that has its data, or has it in a file.

    Raises:
        ModelError: they belong to a model that is no longer there.
    """
    if tensor.data_location != TensorProto.EXTERNAL:
        return None
    text = next((entry.value for entry in tensor.external_data if entry.value.startswith(MARKER)), None)
    if text is None:
        return None
    serial, chunks = text.removeprefix(MARKER).split("/")
    store = store_of(int(serial))
    if store is None:
        raise ModelError(f"the data of tensor {tensor.name!r} belongs to a model that is no longer loaded")
    return [Payload(store, *map(int, chunk.split(":"))) for chunk in chunks.split(",")]


def without_data(tensor: TensorProto) -> TensorProto:
    """Return a copy of the tensor that does not say where its data is."""
    copy = TensorProto()
    copy.CopyFrom(tensor)
    copy.ClearField("data_location")
    copy.ClearField("external_data")
    return copy


def elide(store: Store) -> bytes:
    """Return the serialized model in `store` with a marker in place of every payload above `ELIDED_ABOVE` bytes.

    Raises:
        wire.WireError: the bytes are no message.
    """

    def edit(start: int, stop: int) -> list[Piece] | None:
        found = list(wire.fields(store, start, stop))
        large = {field.number for field in found if field.stop - field.start > ELIDED_ABOVE} & _PAYLOADS
        if not large or any(
            field.number in _ELSEWHERE
            or (field.number in large and field.wire != wire.BYTES)  # element by element, mixed with packed runs
            for field in found
        ):
            return None
        marker = TensorProto()
        mark(marker, [Payload(store, f.number, f.start, f.stop - f.start) for f in found if f.number in large])
        kept = [store.read(f.tag, f.stop - f.tag) for f in found if f.number not in large]
        return [*kept, marker.SerializeToString()]

    return join(wire.replace_tensors(store, lambda start, stop: stop - start > ELIDED_ABOVE, edit))


def restore(shell: bytes) -> list[Piece]:
    """Return a serialized shell with its payloads again where the markers are, as pieces to be written."""

    def edit(tensor: TensorProto) -> list[Piece] | None:
        chunks = marked(tensor)
        if chunks is None:
            return None
        pieces: list[Piece] = [without_data(tensor).SerializeToString()]
        for chunk in chunks:
            pieces += (wire.header(chunk.field, len(chunk)), chunk)
        return pieces

    return replace(shell, MARKER, edit)


def replace(shell: bytes, text: str, edit: Callable[[TensorProto], list[Piece] | None]) -> list[Piece]:
    """Return a serialized shell with other tensors, as pieces to be written.

    Args:
        text: only tensors are looked at in which it occurs.
        edit: the new content of a tensor, or None to leave it.
    """
    places = [match.start() for match in re.finditer(re.escape(text.encode()), shell)]
    if not places:
        return [shell]

    def wanted(start: int, stop: int) -> bool:
        index = bisect_left(places, start)
        return index < len(places) and places[index] < stop

    return wire.replace_tensors(
        BytesStore(shell), wanted, lambda start, stop: edit(TensorProto.FromString(shell[start:stop]))
    )
