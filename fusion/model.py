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
from google.protobuf.message import DecodeError, EncodeError  # type: ignore[import-untyped]
from onnx import ModelProto, TensorProto, numpy_helper

from fusion import check, external, kinds, output, payload, wire
from fusion.derived import Recipe
from fusion.errors import ModelError

Array = np.ndarray[Any, Any]


class Model:
    """A ModelProto and what belongs to it; made by `load`.

    Attributes:
        proto: the shell. Read payloads with `array` only.
        path: the file it was loaded from, or None.
        directory: where external data lies, or None where that is not known.
        kind: what it was loaded from: "path", "bytes", "proto", "graphsurgeon" or "ir".
        edited: whether someone says that the shell was changed; where not, `save` looks.
        notes: what was put right on loading, one sentence each.
    """

    def __init__(
        self, store: payload.Store, proto: ModelProto, *, path: Path | None, directory: Path | None, kind: str
    ) -> None:
        self.proto = proto
        self.path = path
        self.directory = directory
        self.kind = kind
        self.edited = False
        self.notes: list[str] = []
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
        try:
            return np.asarray(numpy_helper.to_array(self._complete(tensor)))
        except (ValueError, TypeError, KeyError) as error:
            raise ModelError(f"{self.label}: the data of tensor {tensor.name!r} cannot be read: {error}") from None

    def _complete(self, tensor: TensorProto) -> TensorProto:
        chunks = payload.marked(tensor)
        if chunks is not None:
            whole = payload.unmarked(tensor)
            for chunk in chunks:  # several runs of one field add up, as in the file
                whole.MergeFromString(wire.header(chunk.field, len(chunk)) + chunk.read())
            return whole
        if not external.is_external(tensor):
            return tensor
        reference = external.Reference(tensor, self.label)
        if self.directory is None:
            raise ModelError(
                f"the data of tensor {tensor.name!r} lies in the file {reference.location!r}, "
                "and a model in memory has no folder: load it from its path"
            )
        whole = payload.unmarked(tensor)
        del whole.external_data[:]
        store = payload.FileStore(reference.file(self.directory))
        whole.raw_data = store.read(reference.offset, reference.length)
        return whole

    def derive(
        self,
        name: str,
        parts: Sequence[TensorProto],
        axis: int = 0,
        *,
        transpose: Sequence[Sequence[int] | None] | None = None,
        shape: Sequence[int] | None = None,
    ) -> TensorProto:
        """Return a new initializer whose values are worked out only when it is written: concatenated initializers.

        Args:
            name: its name.
            parts: tensors of this model, one element type, of known shape: (D, N1), (D, N2), … along axis 1.
            axis: where the parts are put together, counted after their transposition.
            transpose: per part the permutation applied first, or None.
            shape: what the result is reshaped to, if anything.

        Raises:
            ValueError: the parts do not fit together.
        """
        recipe = Recipe(parts, axis, transpose, shape, self.array)
        self._derived.append(recipe)
        tensor = TensorProto(name=name, data_type=recipe.data_type, dims=recipe.shape)
        payload.mark(tensor, [payload.Payload(recipe, payload.RAW_DATA, 0, len(recipe))])
        return tensor

    def copy(self) -> Model:
        """Return a model whose shell can be edited apart from this one; payloads are shared, not copied."""
        proto = ModelProto()
        proto.CopyFrom(self.proto)
        twin = Model(self._store, proto, path=self.path, directory=self.directory, kind=self.kind)
        twin.edited, twin.notes, twin._derived = self.edited, list(self.notes), list(self._derived)
        return twin

    # -- giving it back -----------------------------------------------------------------------------------------------

    def pieces(self) -> list[wire.Piece]:
        """Return the complete serialized model, as pieces; the source's own bytes where nothing was changed."""
        if self.untouched():
            return [payload.Payload(self._store, 0, 0, len(self._store))]
        return payload.restore(self.serialized())

    def serialized(self) -> bytes:
        """Return the serialized shell."""
        try:
            data: bytes = self.proto.SerializeToString()
        except (EncodeError, ValueError) as error:
            raise ModelError(f"{self.label}: protobuf cannot write the model: {error}") from None
        return data

    def untouched(self) -> bool:
        """Whether the shell says what the source says."""
        if self.edited:
            return False
        again = ModelProto.FromString(payload.elide(self._store))
        if self.notes:
            check.sort(again)
        return bool(again.SerializeToString() == self.serialized())

    def to_proto(self) -> ModelProto:
        """Return the complete ModelProto, payloads filled in; external data stays external."""
        whole = ModelProto()
        try:
            whole.MergeFromString(payload.join(self.pieces()))
        except DecodeError:
            raise ModelError(
                f"{self.label}: with its weights it is larger than the 2 GB that protobuf can hold: save it to a file"
            ) from None
        return whole

    def export(self, kind: str | None = None) -> Any:
        """Return the model as `kind`, by default what it was loaded from; for "path" that is a complete ModelProto."""
        kind = kind or self.kind
        if kind == "bytes":
            return payload.join(self.pieces())
        return kinds.build(kind, self.to_proto(), self.directory)


def load(source: Any, *, validate: bool = True) -> Model:
    """Load a model.

    Args:
        source: path of a file, its bytes, a ModelProto, an onnx_graphsurgeon.Graph or an onnx_ir.Model.
        validate: whether to reject what onnx's checker rejects, and missing external data. Nodes out of order are put
            in order then. False is for models that are not complete, such as skeletons without weights.

    Raises:
        ModelError: not an ONNX file, truncated, rejected by the checker, with a cycle, or without its external data.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return _load(payload.BytesStore(bytes(source)), None, None, "bytes", validate)
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        return _load(_open(path), path, path.parent, "path", validate)
    kind, proto, directory = kinds.read(source)
    try:
        data = proto.SerializeToString()
    except (EncodeError, ValueError):
        raise ModelError(
            "the model in memory is larger than the 2 GB that protobuf can write: "
            "save it with external data and load the file"
        ) from None
    return _load(payload.BytesStore(data), None, directory, kind, validate)


def save(model: Model, destination: str | os.PathLike[str]) -> None:
    """Write the model to a file: byte for byte its source where nothing was changed.

    Payloads are streamed from source to destination. External data stays external; in another folder its files are
    copied beside the destination. The destination appears only when it is complete.

    Raises:
        OutputError: the destination cannot be written.
        ModelError: a payload cannot be read.
    """
    output.write(model, Path(destination))


def _load(store: payload.Store, path: Path | None, directory: Path | None, kind: str, validate: bool) -> Model:
    label = str(path) if path else "the model"
    try:
        shell = payload.elide(store)
        model = Model(store, ModelProto.FromString(shell), path=path, directory=directory, kind=kind)
    except (wire.WireError, DecodeError) as error:
        raise check.unreadable(label, store, error) from None
    if not model.proto.HasField("graph"):
        raise check.unreadable(label, store, ValueError("no graph"))
    if validate:
        try:
            model.notes = check.validate(model.proto, shell, label)
        except UnicodeDecodeError:  # in the checker's own message
            raise ModelError(f"{label} is damaged: a name in it is no UTF-8 text; fetch or export it again") from None
        if directory is not None:
            for reference in external.references(shell, label):
                reference.file(directory)
    return model


def _open(path: Path) -> payload.Store:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ModelError(f"{path} is a folder: give the path of the .onnx file in it")
        if not stat.S_ISREG(mode):  # a pipe can be read only once, and not in part
            return payload.BytesStore(path.read_bytes())
        return payload.FileStore(path)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from None
