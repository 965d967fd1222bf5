"""A model: the ModelProto that is its truth, the file it came from, and where its weights lie."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, numpy_helper

Source = str | os.PathLike[str] | bytes | ModelProto | Any


class Model:
    """A ModelProto and what belongs to it.

    Attributes:
        proto: the model; payloads of large tensors may be elided, `array` reads them.
        path: the file it was loaded from, or None.
        kind: what `load` was given: "path", "bytes", "proto", "graphsurgeon" or "ir".
    """

    def __init__(self, proto: ModelProto, path: Path | None, kind: str) -> None:
        self.proto = proto
        self.path = path
        self.kind = kind

    def array(self, tensor: TensorProto) -> np.ndarray[Any, Any]:
        """Return the tensor's values, read on demand."""
        return numpy_helper.to_array(tensor, str(self.path.parent) if self.path else "")

    def to_proto(self) -> ModelProto:
        """Return the complete ModelProto, payloads filled in."""
        return self.proto

    def export(self, kind: str | None = None) -> Any:
        """Return the model as `kind`, by default what it was loaded from ("path": a ModelProto)."""
        kind = kind or self.kind
        if kind == "bytes":
            return self.to_proto().SerializeToString()
        if kind == "graphsurgeon":
            import onnx_graphsurgeon

            return onnx_graphsurgeon.import_onnx(self.to_proto())
        if kind == "ir":
            import onnx_ir

            return onnx_ir.from_proto(self.to_proto())
        return self.to_proto()


def load(source: Source) -> Model:
    """Load a model from a path, bytes, ModelProto, onnx-graphsurgeon Graph or onnx_ir.Model."""
    if isinstance(source, ModelProto):
        return Model(source, None, "proto")
    if isinstance(source, bytes):
        return Model(ModelProto.FromString(source), None, "bytes")
    if isinstance(source, str | os.PathLike):
        return Model(onnx.load(os.fspath(source), load_external_data=False), Path(source), "path")
    if type(source).__module__.startswith("onnx_graphsurgeon"):
        import onnx_graphsurgeon

        return Model(onnx_graphsurgeon.export_onnx(source), None, "graphsurgeon")
    import onnx_ir

    return Model(onnx_ir.to_proto(source), None, "ir")


def save(model: Model, destination: str | os.PathLike[str]) -> None:
    """Write the model to a file."""
    Path(destination).write_bytes(model.to_proto().SerializeToString())
