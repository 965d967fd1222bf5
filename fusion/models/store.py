"""Where bytes lie: in memory or in a file, read in part and copied without being looked at."""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fusion.errors import ModelError

_CHUNK = 1 << 20


class Store:
    """Bytes that can be read in part. Every store has a serial number, by which the shell of a model names it."""

    def __init__(self) -> None:
        self.serial = next(_serials)
        _stores[self.serial] = self

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes; a ModelError where there are fewer."""
        raise NotImplementedError

    def copy(self, offset: int, length: int, file: IO[bytes]) -> None:
        """Write `length` bytes to `file`."""
        file.write(self.read(offset, length))


_serials = itertools.count(1)
_stores: weakref.WeakValueDictionary[int, Store] = weakref.WeakValueDictionary()


def store_of(serial: int) -> Store | None:
    """Return the store of that number, None where nobody holds it any more."""
    return _stores.get(serial)


class BytesStore(Store):
    """Bytes in memory."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def read(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length]


class FileStore(Store):
    """A file, kept open: its content stays readable when another file takes its name."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)
        self.size = os.fstat(self.descriptor).st_size

    def __len__(self) -> int:
        return self.size

    def read(self, offset: int, length: int) -> bytes:
        data = os.pread(self.descriptor, length, offset)
        while len(data) < length:  # one call gives 2 GB at most
            more = os.pread(self.descriptor, length - len(data), offset + len(data))
            if not more:
                raise ModelError(
                    f"{self.path}: {length - len(data)} bytes are missing at byte {offset + len(data)}: "
                    "the file was changed meanwhile"
                )
            data += more
        return data

    def copy(self, offset: int, length: int, file: IO[bytes]) -> None:
        file.flush()
        stop = offset + length
        while offset < stop and hasattr(os, "copy_file_range"):
            try:
                # Shares the blocks where the file system can, and never brings them into this process.
                copied = os.copy_file_range(self.descriptor, file.fileno(), stop - offset, offset)
            except OSError:  # another file system, an old kernel; a full disk shows again below
                break
            if not copied:
                break
            offset += copied
        for start in range(offset, stop, _CHUNK):
            file.write(self.read(start, min(_CHUNK, stop - start)))


@dataclass(frozen=True, slots=True)
class Payload:
    """A piece of a store: the content of one field of a serialized model."""

    store: Store
    field: int
    offset: int
    length: int

    def __len__(self) -> int:
        return self.length

    def read(self) -> bytes:
        return self.store.read(self.offset, self.length)


Piece = bytes | Payload


def write(pieces: Iterable[Piece], file: IO[bytes]) -> None:
    """Write pieces one after the other; payloads go from store to file."""
    for piece in pieces:
        if isinstance(piece, Payload):
            piece.store.copy(piece.offset, piece.length, file)
        else:
            file.write(piece)


def join(pieces: Iterable[Piece]) -> bytes:
    """Return the pieces as one bytes object."""
    return b"".join(piece.read() if isinstance(piece, Payload) else piece for piece in pieces)
