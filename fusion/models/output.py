"""Writing a model: beside the destination first, renamed when complete, its external data with it."""

from __future__ import annotations

import filecmp
import os
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto

from fusion.errors import ModelError, OutputError
from fusion.models import external, payload, store
from fusion.models.derived import Recipe
from fusion.models.store import FileStore, Payload, Piece

if TYPE_CHECKING:
    from fusion.models.model import Model

LARGEST = 2**31 - 1  # bytes that protobuf can read back in one message
_ALIGNMENT = 4096  # of tensors in a data file, so that a runtime can map them


def write(model: Model, destination: Path) -> None:
    """Write the model and its external data; see `fusion.model.save`."""
    _check_destination(destination)
    try:
        with TemporaryDirectory(prefix=".", suffix=".part", dir=destination.parent) as folder:
            complete: list[tuple[Path, Path]] = []
            for target, pieces in _files(model, destination):
                temporary = Path(folder, str(len(complete)))
                with open(temporary, "xb") as file:
                    store.write(pieces, file)
                complete.append((temporary, target))
            for temporary, target in complete:
                target.parent.mkdir(parents=True, exist_ok=True)
                if target.exists():
                    shutil.copymode(target, temporary)
                shutil.move(temporary, target)  # a rename, but for data folders that lie on another disk
    except OSError as error:
        raise OutputError(f"{destination} cannot be written: {error.strerror or error}") from error


def _files(model: Model, destination: Path) -> Iterator[tuple[Path, list[Piece]]]:
    """Yield the files to be written and what goes into them, the model after its data."""
    pieces = model.pieces()
    shell = model.serialized()
    found = external.references(shell, model.label)
    if model.directory is not None:
        yield from _copies(model.directory, found, destination)
    if found or _size(pieces) > LARGEST:
        # A model that keeps its weights outside, or has no room for more, gets its new ones outside as well.
        target = _data_file(destination, {reference.location for reference in found})
        data: list[Piece] = []
        spilled = _spill(shell, target.name, data)
        if data:
            if target.exists() and target.name not in _locations_in(destination):
                raise OutputError(f"{target} is in the way of the model's new weights: remove it, or save elsewhere")
            yield target, data
            pieces = payload.restore(spilled)
    if _size(pieces) > LARGEST:
        raise OutputError(
            f"{destination}: the model takes {_size(pieces):,} bytes, and protobuf stops at 2 GB: "
            "keep its weights as external data"
        )
    yield destination, pieces


def _copies(directory: Path, found: list[external.Reference], destination: Path) -> Iterator[tuple[Path, list[Piece]]]:
    """Yield the data files that must be copied so that the model finds its data beside the destination.

    Nothing where both are one folder, or where the files are there already with the same content. A different file of
    that name is replaced only if the model that is being replaced keeps its data in it: nobody else's weights are
    overwritten.
    """
    files = {reference.location: reference.file(directory) for reference in found}
    if not files:
        return
    if destination.exists() and any(map(destination.samefile, files.values())):
        raise OutputError(f"{destination} holds the model's own weights: choose another destination")
    owned = _locations_in(destination)
    for location, file in files.items():
        target = destination.parent / location
        if target.exists():
            if target.samefile(file):
                continue
            if location not in owned:
                if filecmp.cmp(file, target, shallow=False):
                    continue
                raise OutputError(
                    f"{target} exists with other content, and the model's external data would replace it: "
                    "choose another folder, or remove the file"
                )
        data = FileStore(file)  # open only while it is copied: there may be a file per tensor
        yield target, [Payload(data, 0, 0, len(data))]


def _locations_in(path: Path) -> set[str]:
    """Return the data files of the model that is about to be replaced; none where there is no readable model."""
    try:
        return {reference.location for reference in external.references(payload.elide(FileStore(path)))}
    except (OSError, ValueError, DecodeError, ModelError):
        return set()


def _data_file(destination: Path, taken: set[str]) -> Path:
    names = (f"{destination.name}.fused{f'-{number}' if number > 1 else ''}.data" for number in count(1))
    return destination.parent / next(name for name in names if name not in taken)


def _spill(shell: bytes, location: str, data: list[Piece]) -> bytes:
    """Return the shell with its derived initializers in a file of that name, whose content is appended to `data`."""

    def edit(tensor: TensorProto) -> list[Piece] | None:
        chunks = payload.marked(tensor)
        if chunks is None or not isinstance(chunks[0].store, Recipe):
            return None
        data.append(bytes(-_size(data) % _ALIGNMENT))
        entries = {"location": location, "offset": _size(data), "length": len(chunks[0])}
        data.extend(chunks)
        outside = payload.without_data(tensor)
        outside.data_location = TensorProto.EXTERNAL
        for key, value in entries.items():
            outside.external_data.add(key=key, value=str(value))
        return [outside.SerializeToString()]

    return store.join(payload.replace(shell, payload.MARKER, edit))


def _size(pieces: list[Piece]) -> int:
    return sum(map(len, pieces))


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
