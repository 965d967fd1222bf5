"""Is this a valid ONNX model? And if not, the one sentence that says where and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain

from onnx import (
    IR_VERSION,
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    checker,
    defs,
)

from fusion import registry
from fusion.errors import ModelError
from fusion.models import order, payload, wire
from fusion.models.store import Piece, Store, join

# How files begin that people take for ONNX models (from which byte on), and what to do with them.
_OTHERS = {
    (0, b"version https://git-lfs"): "a Git LFS pointer, not the model itself: run `git lfs pull`",
    (0, b"PK\x03\x04"): "a zip archive (a PyTorch checkpoint?): export it with torch.onnx.export",
    (0, b"\x1f\x8b"): "compressed with gzip: unpack it first",
    (0, b"\x89HDF"): "an HDF5 file: convert it with tf2onnx",
    (0, b"<"): "a text file (a web page?): download the file itself",
    (4, b"ORTM"): "a model in onnxruntime's own format: give the .onnx file that it was made from",
}
_FIRST = {  # the tags of ModelProto's fields, of which one is the first byte
    field.number << 3 | (wire.BYTES if field.cpp_type in (field.CPPTYPE_STRING, field.CPPTYPE_MESSAGE) else wire.VARINT)
    for field in ModelProto.DESCRIPTOR.fields
}
_UNCHECKED = "onnx-fusion.unchecked"  # a domain that onnx's checker does not know, and so lets pass


def unreadable(label: str, data: Store, error: Exception | None) -> ModelError:
    """Return the error for bytes that are no ModelProto."""
    start = data.read(0, min(64, len(data)))
    if not start:
        return ModelError(f"{label} is empty: fetch or export it again")
    for (position, prefix), what in _OTHERS.items():
        if start.startswith(prefix, position):
            return ModelError(f"{label} is {what}")
    if start[0] not in _FIRST:
        return ModelError(f"{label} is not an ONNX file: give a binary .onnx model, as onnx.save writes it")
    if not isinstance(error, wire.WireError):
        return ModelError(f"{label} is damaged: its fields do not decode; fetch or export it again")
    how = "truncated" if error.truncated else "damaged"
    return ModelError(f"{label} is {how}: at byte {error.offset} there is {error}; fetch or export it again")


def validate(proto: ModelProto, shell: bytes, label: str) -> list[str]:
    """Check the shell of a model with onnx's checker, and put its nodes in order where they are not.

    `shell` is `proto`, serialized.

    Operators that onnxruntime registers in the standard domains (SimplifiedLayerNormalization) pass; so do elided and
    external tensors, whose data the caller checks. Returns what was put right, one sentence each.

    Raises:
        ModelError: the checker rejects the model, a value has no definition, or the nodes form a cycle.
    """
    for imported in proto.opset_import:
        if not 0 < imported.version < 2**31:
            raise ModelError(
                f"{label} is damaged: it imports version {imported.version} of {imported.domain or 'ONNX'!r}"
            )
    problem = _rejection(shell)
    if problem is None:
        return []
    notes = []
    if order.sort(proto, label):
        notes.append("its nodes were not in topological order: they were sorted")
        problem = _rejection(proto.SerializeToString())
    if problem is not None:
        raise ModelError(f"{label}: onnx's checker rejects the model: {problem}")
    return notes


def _rejection(shell: bytes) -> str | None:
    """Return why onnx's checker rejects a shell, in one line; None where it does not, or where no runtime would."""
    data = _without_data(shell)
    message = _ask(data) and _ask(_forgiven(data))
    if not message:
        return None
    # "what\n\n==> Context: Bad node spec for node. Name: n OpType: Op": the place belongs into the sentence
    what, *contexts = re.split(r"\s*==> Context: ", " ".join(message.split()))
    places = [match.groups() for text in contexts if (match := re.search(r"Name: (.*?) ?OpType: (\S+)", text))]
    where = f" (node {places[0][0]!r}, {places[0][1]})" if places else ""
    return what.rstrip(".") + where


def _ask(data: bytes) -> str:
    try:
        checker.check_model(data)
    except checker.ValidationError as error:
        return str(error)
    return ""


def _without_data(shell: bytes) -> bytes:
    """Return the shell with empty tensors in place of those whose data lies elsewhere, which the checker cannot see."""

    def edit(tensor: TensorProto) -> list[Piece] | None:
        if tensor.data_location != TensorProto.EXTERNAL:
            return None
        return [TensorProto(name=tensor.name, data_type=tensor.data_type, dims=[0]).SerializeToString()]

    return join(payload.replace(shell, payload.LOCATION, edit))


def _forgiven(data: bytes) -> bytes:
    """Return the serialized model without the faults that runtimes accept and exporters therefore have.

    They are: an IR version newer than the installed onnx (whose fields we keep all the same), operators that only
    onnxruntime registers in the standard domains, a domain without an import, an input without a shape, an inner value
    or an output without a type.
    """
    proto = ModelProto.FromString(data)
    proto.ir_version = min(proto.ir_version, IR_VERSION)
    for body, imports in [(proto.graph, proto.opset_import)] + [(f, f.opset_import) for f in proto.functions]:
        versions = {"" if o.domain == "ai.onnx" else o.domain: o.version for o in imports}
        nodes = list(_all_nodes(body))
        for node in nodes:
            if _only_runtime_knows(node, versions):
                node.domain = _UNCHECKED
        known = versions.keys() | {"ai.onnx"}
        for domain in sorted({node.domain for node in nodes} - known):
            imports.add(domain=domain, version=1 if domain else defs.onnx_opset_version())
        for graph in chain([body], *(order.bodies(node) for node in nodes)):
            if isinstance(graph, GraphProto):
                _declare(graph)
    forgiven: bytes = proto.SerializeToString()
    return forgiven


def _declare(graph: GraphProto) -> None:
    """Give the declared values of a graph what the checker wants to see."""
    typed = [info for info in graph.value_info if info.HasField("type")]
    if len(typed) < len(graph.value_info):
        del graph.value_info[:]
        graph.value_info.extend(typed)
    for output in graph.output:
        if not output.HasField("type"):
            output.type.tensor_type.elem_type = TensorProto.FLOAT
    for info in chain(graph.input, graph.output, graph.value_info):
        if info.type.HasField("tensor_type"):
            info.type.tensor_type.shape.SetInParent()


def _only_runtime_knows(node: NodeProto, versions: dict[str, int]) -> bool:
    domain = "" if node.domain == "ai.onnx" else node.domain
    asked = node.op_type, domain, versions.get(domain, 0)
    return registry.standard().schema(*asked) is None and registry.current().schema(*asked) is not None


def _all_nodes(body: GraphProto | FunctionProto) -> Iterator[NodeProto]:
    for node in body.node:
        yield node
        for inner in order.bodies(node):
            yield from _all_nodes(inner)
