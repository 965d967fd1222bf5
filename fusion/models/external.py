"""External data: files beside a model that hold its weights. They are checked and copied, never read as a whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from onnx import TensorProto

from fusion.errors import ModelError
from fusion.models import payload
from fusion.models.store import FileStore, Payload


class Reference(NamedTuple):
    """Where an external tensor has its data: bytes of a file, whose path is relative to the model."""

    tensor: str
    location: str
    offset: int
    length: int

    def file(self, directory: Path) -> Path:
        """Return the path of the file that holds the bytes; a ModelError where it is missing or too short."""
        path = directory / self.location
        try:
            size = path.stat().st_size
        except OSError:
            raise ModelError(
                f"{path} is missing: tensor {self.tensor!r} has its data there; put the file beside the model"
            ) from None
        if not path.is_file():
            raise ModelError(f"{path} is no regular file, yet tensor {self.tensor!r} has its data there")
        if min(self.offset, self.length) < 0 or self.offset + self.length > size:
            raise ModelError(
                f"{path} is too short: tensor {self.tensor!r} has bytes {self.offset} to {self.offset + self.length}, "
                f"the file ends at {size}; fetch or export it again"
            )
        return path

    def payload(self, directory: Path) -> Payload:
        """Return the bytes, unread; a ModelError where they are not there."""
        return Payload(FileStore(self.file(directory)), payload.RAW_DATA, self.offset, self.length)


def is_external(tensor: TensorProto) -> bool:
    """Whether the tensor's data lies in a file (and was not merely elided)."""
    return tensor.data_location == TensorProto.EXTERNAL and payload.marked(tensor) is None


def reference(tensor: TensorProto, label: str) -> Reference:
    """Return where an external tensor has its data; the length follows from the shape where it is left open.

    Raises:
        ModelError: the place cannot be read, or lies outside the model's folder.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    try:
        offset = int(entries.get("offset") or 0)
        length = int(entries.get("length") or payload.byte_size(tensor.data_type, tensor.dims))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{label}: tensor {tensor.name!r}: its external data has no readable position: {error}"
        ) from None
    parts = Path(location).parts
    if not parts or ".." in parts or os.path.isabs(location):
        raise ModelError(
            f"{label}: tensor {tensor.name!r} keeps its data in {location!r}: ONNX allows only a path inside "
            "the model's folder; save the model again with onnx.save_model(..., save_as_external_data=True)"
        )
    return Reference(tensor.name, location, offset, length)


def references(shell: bytes, label: str = "the model") -> list[Reference]:
    """Return where the external tensors of a serialized shell have their data.

    Raises:
        ModelError: a place that cannot be read, or lies outside the model's folder.
    """
    found: list[Reference] = []

    def collect(tensor: TensorProto) -> None:
        if is_external(tensor):
            found.append(reference(tensor, label))

    payload.replace(shell, payload.LOCATION, collect)
    return found
