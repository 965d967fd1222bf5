"""Constants: initializers nobody can override, and Constant nodes."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from onnx import AttributeProto, TensorProto, helper

from fusion.errors import ModelError
from fusion.models.graph import Graph, Value

SMALL_PAYLOAD = 4096
"""Bytes up to which a payload is read to find facts in it."""

Array = np.ndarray[Any, Any]


def stored(value: Value) -> TensorProto | AttributeProto | None:
    """Where a constant's payload is: its tensor, or the attribute of its Constant node; None for anything else."""
    if value.tensor is not None:
        return value.tensor
    node = value.producer
    if node is None or node.op != "Constant" or node.domain != "":
        return None
    attribute = next(iter(node.proto.attribute), None)
    if attribute is None or attribute.ref_attr_name or attribute.name == "sparse_value":
        return None
    found: TensorProto | AttributeProto = attribute.t if attribute.name == "value" else attribute
    return found


def shape(found: TensorProto | AttributeProto) -> tuple[int, ...]:
    """The shape of a stored constant."""
    if isinstance(found, TensorProto):
        return tuple(found.dims)
    if found.name in ("value_floats", "value_ints", "value_strings"):
        return (len(found.floats) + len(found.ints) + len(found.strings),)
    return ()


def dtype(found: TensorProto | AttributeProto) -> int:
    """The element type of a stored constant."""
    if isinstance(found, TensorProto):
        return found.data_type
    kind = found.name.removeprefix("value_").rstrip("s")
    return {"int": TensorProto.INT64, "float": TensorProto.FLOAT}.get(kind, TensorProto.STRING)


def payload(graph: Graph, value: Value) -> Array | None:
    """The elements of a constant, read now; None where `value` is none."""
    found = stored(value)
    if isinstance(found, AttributeProto):
        if dtype(found) == TensorProto.STRING:
            return np.array(helper.get_attribute_value(found), dtype=object)
        numpy_type = np.int64 if dtype(found) == TensorProto.INT64 else np.float32
        return np.array(helper.get_attribute_value(found), dtype=numpy_type)
    return None if found is None else graph.model.array(found)


def small(graph: Graph, value: Value) -> Array | None:
    """The elements of a constant of at most SMALL_PAYLOAD bytes; None where it is larger, or no constant."""
    found = stored(value)
    if found is None or dtype(found) in (TensorProto.STRING, TensorProto.UNDEFINED):
        return None
    try:
        size = prod(shape(found)) * np.dtype(helper.tensor_dtype_to_np_dtype(dtype(found))).itemsize
        return payload(graph, value) if size <= SMALL_PAYLOAD else None
    except (KeyError, ModelError):  # a type this onnx does not know, or data that is not there: no fact
        return None
