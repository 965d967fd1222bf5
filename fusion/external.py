"""External data: files beside a model that hold its weights. They are checked and copied, never read as a whole."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from onnx import TensorProto

from fusion import payload, wire
from fusion.errors import ModelError, OutputError


class Reference:
    """Where an external tensor has its data.

    Attributes:
        location: path of the file, relative to the model.
        offset, length: the bytes; `length` is worked out where the model leaves it open.
    """

    __slots__ = ("length", "location", "name", "offset")

    def __init__(self, tensor: TensorProto, label: str) -> None:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        self.name = tensor.name
        self.location: str = entries.get("location", "")
        try:
            self.offset = int(entries.get("offset") or 0)
            self.length = (
                int(entries["length"]) if entries.get("length") else payload.byte_size(tensor.data_type, tensor.dims)
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"{label}: tensor {self.name!r}: its external data has no readable position: {error}"
            ) from None
        parts = Path(self.location).parts
        if not parts or ".." in parts or os.path.isabs(self.location):
            raise ModelError(
                f"{label}: tensor {self.name!r} keeps its data in {self.location!r}: ONNX allows only a path inside "
                "the model's folder; save the model again with onnx.save_model(..., save_as_external_data=True)"
            )

    def file(self, directory: Path) -> Path:
        """Return the path of the file that holds the bytes; a ModelError where it is missing or too short."""
        path: Path = directory / self.location
        try:
            size = path.stat().st_size
        except OSError:
            raise ModelError(
                f"{path} is missing: tensor {self.name!r} has its data there; put the file beside the model"
            ) from None
        if not path.is_file():
            raise ModelError(f"{path} is no regular file, yet tensor {self.name!r} has its data there")
        if min(self.offset, self.length) < 0 or self.offset + self.length > size:
            raise ModelError(
                f"{path} is too short: tensor {self.name!r} has bytes {self.offset} to {self.offset + self.length}, "
                f"the file ends at {size}; fetch or export it again"
            )
        return path


def is_external(tensor: TensorProto) -> bool:
    """Whether the tensor's data lies in a file (and was not merely elided)."""
    return tensor.data_location == TensorProto.EXTERNAL and payload.marked(tensor) is None


def references(shell: bytes, label: str = "the model") -> list[Reference]:
    """Return where the external tensors of a serialized shell have their data.

    Raises:
        ModelError: a place that cannot be read, or lies outside the model's folder.
    """
    found: list[Reference] = []

    def collect(start: int, stop: int) -> None:
        tensor = TensorProto.FromString(shell[start:stop])
        if is_external(tensor):
            found.append(Reference(tensor, label))

    wire.replace_tensors(payload.BytesStore(shell), payload.occurrences(shell, payload.LOCATION), collect)
    return found


def plan_copies(
    found: Iterable[Reference], source: Path, destination: Path, owned: set[str]
) -> list[tuple[Path, Path]]:
    """Return which files must be copied (from, to) so that a model moved from folder `source` finds its data.

    Nothing where both are one folder, or where the files are there already with the same content. A different file of
    that name is replaced only if the model that is being replaced keeps its data in it (`owned`): nobody else's weights
    are overwritten.

    Raises:
        ModelError: a data file is missing or too short.
        OutputError: a file of that name is in the way.
    """
    files = {reference.location: reference.file(source) for reference in found}
    copies = []
    for location, file in files.items():
        target = destination / location
        if target.exists():
            if target.samefile(file):
                continue
            if location not in owned:
                if _same_content(file, target):
                    continue
                raise OutputError(
                    f"{target} exists with other content, and the model's external data would replace it: "
                    "choose another folder, or remove the file"
                )
        copies.append((file, target))
    return copies


def copy(source: Path, destination: Path) -> None:
    """Copy a file, sharing its blocks where the file system can."""
    store = payload.FileStore(source)
    with open(destination, "xb") as file:
        store.copy(0, len(store), file)


def _same_content(a: Path, b: Path) -> bool:
    if a.stat().st_size != b.stat().st_size:
        return False
    with open(a, "rb") as left, open(b, "rb") as right:
        while chunk := left.read(1 << 20):
            if chunk != right.read(1 << 20):
                return False
    return True
