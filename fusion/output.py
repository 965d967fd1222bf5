"""Writing a model: beside the destination first, renamed when complete, its external data with it."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import IO, TYPE_CHECKING

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto

from fusion import external, payload, wire
from fusion.derived import Recipe
from fusion.errors import ModelError, OutputError

if TYPE_CHECKING:
    from fusion.model import Model

LARGEST = 2**31 - 1  # bytes that protobuf can read back in one message
_ALIGNMENT = 4096  # of tensors in a data file, so that a runtime can map them


def write(model: Model, destination: Path) -> None:
    """Write the model and its external data; see `fusion.model.save`."""
    _check_destination(destination)
    files = _Files()
    try:
        _write(model, destination, files)
        files.commit()
    except OSError as error:
        raise OutputError(f"{destination} cannot be written: {error.strerror or error}") from error
    finally:
        files.discard()


def _write(model: Model, destination: Path, files: _Files) -> None:
    pieces = model.pieces()
    shell = model.serialized()
    found = external.references(shell, model.label)
    if model.directory is not None and found:
        for source, copy in _copies(model.directory, found, destination):
            external.copy(source, files.beside(copy))
    if found or _size(pieces) > LARGEST:
        # A model that keeps its weights outside, or has no room for more, gets its new ones outside as well.
        spilled = _spill(shell, destination, {reference.location for reference in found}, files)
        if spilled is not None:
            pieces = payload.restore(spilled)
    if _size(pieces) > LARGEST:
        raise OutputError(
            f"{destination}: the model takes {_size(pieces):,} bytes, and protobuf stops at 2 GB: "
            "keep its weights as external data"
        )
    with open(files.beside(destination), "xb") as file:
        payload.write(pieces, file)


def _copies(directory: Path, found: list[external.Reference], destination: Path) -> list[tuple[Path, Path]]:
    """Return the data files to copy, having made sure that the destination is none of them."""
    for reference in found:
        if destination.exists() and destination.samefile(reference.file(directory)):
            raise OutputError(f"{destination} holds the model's own weights: choose another destination")
    if directory.resolve() == destination.parent.resolve():
        return []
    return external.plan_copies(found, directory, destination.parent, _locations_in(destination))


def _locations_in(path: Path) -> set[str]:
    """Return the data files of the model that is about to be replaced; none where there is no readable model."""
    try:
        store = payload.FileStore(path)
        shell = payload.elide(store)
        return {reference.location for reference in external.references(shell)}
    except (OSError, ValueError, DecodeError, ModelError):
        return set()


def _spill(shell: bytes, destination: Path, taken: set[str], files: _Files) -> bytes | None:
    """Write the derived initializers to a data file of their own and return the shell that refers to it.

    None where there are none. Raises OutputError where a foreign file has the name.
    """
    location = next(name for name in _data_names(destination.name) if name not in taken)
    target = destination.parent / location
    data: IO[bytes] | None = None

    def edit(start: int, stop: int) -> list[wire.Piece] | None:
        nonlocal data
        tensor = TensorProto.FromString(shell[start:stop])
        chunks = payload.marked(tensor)
        if chunks is None or not isinstance(chunks[0].store, Recipe):
            return None
        if data is None:
            if target.exists() and location not in _locations_in(destination):
                raise OutputError(f"{target} is in the way of the model's new weights: remove it, or save elsewhere")
            data = open(files.beside(target), "xb")  # noqa: SIM115 - closed below, and opened only where it is needed
        data.seek(-data.tell() % _ALIGNMENT, os.SEEK_CUR)
        entries = {"location": location, "offset": data.tell(), "length": len(chunks[0])}
        payload.write(chunks, data)
        outside = payload.unmarked(tensor)
        outside.data_location = TensorProto.EXTERNAL
        for key, value in entries.items():
            outside.external_data.add(key=key, value=str(value))
        return [outside.SerializeToString()]

    try:
        pieces = wire.replace_tensors(payload.BytesStore(shell), payload.occurrences(shell, payload.MARKER), edit)
    finally:
        if data is not None:
            data.close()
    return None if data is None else payload.join(pieces)


def _data_names(name: str) -> Iterator[str]:
    yield f"{name}.fused.data"
    yield from (f"{name}.fused-{number}.data" for number in count(2))


def _size(pieces: list[wire.Piece]) -> int:
    return sum(len(piece) for piece in pieces)


def _check_destination(destination: Path) -> None:
    if destination.is_dir():
        raise OutputError(f"{destination} is a folder: give the name of a file")
    if not destination.parent.is_dir():
        raise OutputError(f"{destination} cannot be written: there is no folder {destination.parent}")
    if destination.exists():
        if not destination.is_file():  # a rename would replace /dev/null itself
            raise OutputError(f"{destination} is no regular file: give the name of one")
        if not os.access(destination, os.W_OK):
            raise OutputError(f"{destination} is write-protected")


class _Files:
    """Files being written beside their targets: all of them take their names in the end, or none is left."""

    def __init__(self) -> None:
        self.pending: list[tuple[Path, Path]] = []
        self.folders: list[Path] = []

    def beside(self, target: Path) -> Path:
        """Return a path in the target's folder that is free."""
        for folder in (*reversed(target.parent.parents), target.parent):
            if not folder.exists():
                folder.mkdir()
                self.folders.append(folder)
        temporary = target.parent / f".{secrets.token_hex(8)}.part"
        self.pending.append((temporary, target))
        return temporary

    def commit(self) -> None:
        """Give every file its name; the model, which was added last, after its data."""
        while self.pending:
            temporary, target = self.pending[0]
            if target.exists():
                shutil.copymode(target, temporary)
            os.replace(temporary, target)
            del self.pending[0]
        self.folders.clear()

    def discard(self) -> None:
        """Remove what has not been given its name."""
        for temporary, _ in self.pending:
            temporary.unlink(missing_ok=True)
        for folder in reversed(self.folders):
            with suppress(OSError):
                folder.rmdir()
