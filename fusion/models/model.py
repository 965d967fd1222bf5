"""A model: the ModelProto that is its truth, the file it came from, and where its weights lie.

The ModelProto is a *shell*: payloads above about 1 KiB stay in their file until `array` or `save` wants them, so that
memory grows with the graph and not with the weights. Every field that is not a payload is in the shell, known or not.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import ModelProto, TensorProto, numpy_helper

from fusion.errors import ModelError
from fusion.models import check, external, kinds, output, payload, wire
from fusion.models.derived import Recipe
from fusion.models.store import BytesStore, FileStore, Payload, Piece, Store, join

Array = np.ndarray[Any, Any]


class Model:
    """A ModelProto and what belongs to it; made by `load`.

    Attributes:
        proto: the shell. Read payloads with `array` only.
        path: the file it was loaded from, or None.
        directory: where external data lies, or None where that is not known.
        kind: what it was loaded from: "path", "bytes", "proto", "graphsurgeon" or "ir".
        notes: what was put right on loading, one sentence each.
        unedited: the serialized shell as it was loaded.
    """

    def __init__(self, store: Store, proto: ModelProto, path: Path | None, directory: Path | None, kind: str) -> None:
        self.proto = proto
        self.path = path
        self.directory = directory
        self.kind = kind
        self.notes: list[str] = []
        self.unedited = b""
        self._store = store
        self._derived: list[Recipe] = []  # markers name a store, and do not keep it alive

    @property
    def label(self) -> str:
        """What to call the model in a message."""
        return str(self.path) if self.path else "the model"

    # -- weights ------------------------------------------------------------------------------------------------------

    def array(self, tensor: TensorProto) -> Array:
        """Return the tensor's values, reading its payload now if it was elided or is external.

        Raises:
            ModelError: external data is missing or too short, or the data does not fit the tensor's shape and type.
        """
        chunks = self._payloads(tensor)
        if chunks:
            tensor = payload.without_data(tensor)
            for chunk in chunks:  # several runs of one field add up, as in the file
                tensor.MergeFromString(wire.header(chunk.field, len(chunk)) + chunk.read())
        try:
            return np.asarray(numpy_helper.to_array(tensor))
        except (ValueError, TypeError, KeyError) as error:
            raise ModelError(f"{self.label}: the data of tensor {tensor.name!r} cannot be read: {error}") from None

    def _payloads(self, tensor: TensorProto) -> list[Payload]:
        chunks = payload.marked(tensor)
        if chunks is not None or tensor.data_location != TensorProto.EXTERNAL:
            return chunks or []
        reference = external.reference(tensor, self.label)
        if self.directory is None:
            raise ModelError(
                f"the data of tensor {tensor.name!r} lies in the file {reference.location!r}, "
                "and a model in memory has no folder: load it from its path"
            )
        return [reference.payload(self.directory)]

    def derive(
        self,
        name: str,
        parts: Sequence[TensorProto],
        axis: int = 0,
        *,
        transpose: Sequence[Sequence[int] | None] | None = None,
        factor: Array | None = None,
    ) -> TensorProto:
        """Return a new initializer whose values are worked out only when it is written: concatenated initializers.

        Args:
            name: its name.
            parts: tensors of this model, one element type, of known shape: (D, N1), (D, N2), … along axis 1.
            axis: where the parts are put together, counted after their transposition.
            transpose: per part the permutation applied first, or None.
            factor: what the whole is multiplied by; it broadcasts to it.

        Raises:
            ValueError: the parts do not fit together.
        """
        recipe = Recipe(parts, axis, transpose, self.array, factor)
        self._derived.append(recipe)
        tensor = TensorProto(name=name, data_type=recipe.data_type, dims=recipe.shape)
        payload.mark(tensor, [Payload(recipe, payload.RAW_DATA, 0, len(recipe))])
        return tensor

    # -- giving it back -----------------------------------------------------------------------------------------------

    def pieces(self) -> list[Piece]:
        """Return the complete serialized model, as pieces; the source's own bytes where nothing was changed."""
        shell = self.serialized()
        if shell == self.unedited:
            return [Payload(self._store, 0, 0, len(self._store))]
        return payload.restore(shell)

    def serialized(self) -> bytes:
        """Return the serialized shell."""
        return kinds.serialized(self.proto, self.label)

    def to_proto(self) -> ModelProto:
        """Return the complete ModelProto, payloads filled in; external data stays external."""
        whole = ModelProto()
        try:
            whole.MergeFromString(join(self.pieces()))
        except DecodeError:
            raise ModelError(
                f"{self.label}: with its weights it is larger than the 2 GB that protobuf can hold: save it to a file"
            ) from None
        return whole

    def export(self) -> Any:
        """Return the model as what it was loaded from; a complete ModelProto where that was a file."""
        return join(self.pieces()) if self.kind == "bytes" else kinds.build(self.kind, self.to_proto(), self.directory)


def load(source: Any, *, validate: bool = True) -> Model:
    """Load a model.

    Args:
        source: path of a file, its bytes, a ModelProto, an onnx_graphsurgeon.Graph or an onnx_ir.Model.
        validate: whether to reject what onnx's checker rejects, and missing external data. Nodes out of order are put
            in order then. False is for models that are not complete, such as skeletons without weights.

    Raises:
        ModelError: not an ONNX file, truncated, rejected by the checker, with a cycle, or without its external data.
    """
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        store = _open(path)
        model = Model(store, ModelProto(), path, path.parent, "path")
    else:
        kind, data, directory = kinds.read(source)
        store = BytesStore(data)
        model = Model(store, ModelProto(), None, directory, kind)
    try:
        shell = payload.elide(store)
        model.proto.MergeFromString(shell)
    except (wire.WireError, DecodeError) as error:
        raise check.unreadable(model.label, store, error) from None
    if not model.proto.HasField("graph"):
        raise check.unreadable(model.label, store, None)
    if validate:
        try:
            model.notes = check.validate(model.proto, shell, model.label)
        except UnicodeDecodeError:  # in the checker's own message
            raise ModelError(
                f"{model.label} is damaged: a name in it is no UTF-8 text; fetch or export it again"
            ) from None
        if model.directory is not None:
            for reference in external.references(shell, model.label):
                reference.file(model.directory)
    model.unedited = model.serialized()
    return model


def save(model: Model, destination: str | os.PathLike[str]) -> None:
    """Write the model to a file: byte for byte its source where nothing was changed.

    Payloads are streamed from source to destination. External data stays external; in another folder its files are
    copied beside the destination. The destination appears only when it is complete.

    Raises:
        OutputError: the destination cannot be written.
        ModelError: a payload cannot be read.
    """
    output.write(model, Path(destination))


def _open(path: Path) -> Store:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ModelError(f"{path} is a folder: give the path of the .onnx file in it")
        if not stat.S_ISREG(mode):  # a pipe can be read only once, and not in part
            return BytesStore(path.read_bytes())
        return FileStore(path)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from None
