"""What onnxruntime registers: operator schemas and kernels, read from the installed one, else from a snapshot."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

from onnx import AttributeProto


@cache
def _schemas() -> dict[tuple[str, str], dict[int, Any]]:
    try:
        state = import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    except ImportError:
        return {}
    table: dict[tuple[str, str], dict[int, Any]] = {}
    for schema in state.get_all_operator_schema():
        table.setdefault((schema.domain, schema.name), {})[schema.since_version] = schema
    return table


def defaults(op: str, domain: str, version: int) -> dict[str, AttributeProto]:
    """Return the default of every attribute that has one; empty where the runtime does not know the operator."""
    versions = _schemas().get((domain, op), {})
    since = max((known for known in versions if known <= version), default=None)
    if since is None:
        return {}
    found = {}
    for name, attribute in versions[since].attributes.items():
        proto = AttributeProto.FromString(attribute._default_value)
        if proto.name:
            found[name] = proto
    return found


def knows(op: str, domain: str, version: int) -> bool:
    """Whether the runtime has a schema for the operator at this opset."""
    return any(since <= version for since in _schemas().get((domain, op), {}))
