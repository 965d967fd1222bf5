"""The graph types of other libraries: read from them, give the same kind back.

What they cannot carry, neither can we give back: onnx-graphsurgeon drops metadata, doc strings and quantization
annotations, onnx-ir drops sparse initializers. A path or a ModelProto loses nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from google.protobuf.message import EncodeError  # type: ignore[import-untyped]
from onnx import ModelProto

from fusion.errors import ModelError


def serialized(proto: ModelProto, label: str) -> bytes:
    """Return the model as protobuf writes it, or raise a ModelError."""
    try:
        data: bytes = proto.SerializeToString()
    except (EncodeError, ValueError) as error:
        raise ModelError(
            f"{label}: protobuf cannot write it ({error}): if it is larger than 2 GB, keep its weights as external data"
        ) from None
    return data


def read(source: Any) -> tuple[str, bytes, Path | None]:
    """Return the kind of a source in memory, its bytes, and the folder of its external data where it knows one.

    Raises:
        TypeError: no kind of model that we know.
        ModelError: the library or protobuf cannot write it as ONNX.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return "bytes", bytes(source), None
    kind, proto, directory = _proto(source)
    return kind, serialized(proto, "the model"), directory


def _proto(source: Any) -> tuple[str, ModelProto, Path | None]:
    if isinstance(source, ModelProto):
        return "proto", source, None
    # A graph of a library that nobody has imported cannot exist: so neither library is imported to find out.
    surgeon, ir = sys.modules.get("onnx_graphsurgeon"), sys.modules.get("onnx_ir")
    try:
        if surgeon is not None and isinstance(source, surgeon.Graph):
            return "graphsurgeon", surgeon.export_onnx(source), None
        if ir is not None and isinstance(source, ir.Model):
            return "ir", ir.to_proto(source), _ir_directory(ir, source)
    except Exception as error:
        library = type(source).__module__.split(".")[0]
        raise ModelError(f"{library} cannot write its graph as an ONNX model: {error}") from error
    raise TypeError(
        "a model is a path, bytes, a ModelProto, an onnx_graphsurgeon.Graph or an onnx_ir.Model, "
        f"not {type(source).__name__}"
    )


def build(kind: str, proto: ModelProto, directory: Path | None) -> Any:
    """Return a complete ModelProto as the given kind."""
    if kind == "graphsurgeon":
        return import_module("onnx_graphsurgeon").import_onnx(proto)
    if kind == "ir":
        ir = import_module("onnx_ir")
        model = ir.from_proto(proto)
        if directory is not None:
            ir.external_data.set_base_dir(model.graph, directory)
        return model
    return proto


def _ir_directory(ir: Any, model: Any) -> Path | None:
    """Return the folder that the model's external tensors name; they all come from one file."""
    values = (value.const_value for graph in model.graphs() for value in graph.initializers.values())
    return next((Path(value.base_dir) for value in values if isinstance(value, ir.ExternalTensor)), None)
