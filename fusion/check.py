"""Is this a valid ONNX model? And if not, the one sentence that says where and what to do."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator
from itertools import chain

from onnx import (
    IR_VERSION,
    AttributeProto,
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    checker,
    defs,
)

from fusion import payload, registry, wire
from fusion.errors import ModelError

Body = GraphProto | FunctionProto

# How files begin that people take for ONNX models, and what to do with them.
_OTHERS = {
    b"version https://git-lfs": "a Git LFS pointer, not the model itself: run `git lfs pull`",
    b"PK\x03\x04": "a zip archive (a PyTorch checkpoint?): export it with torch.onnx.export",
    b"\x1f\x8b": "compressed with gzip: unpack it first",
    b"\x89HDF": "an HDF5 file: convert it with tf2onnx",
    b"<": "a text file (a web page?): download the file itself",
}
_ORT_FORMAT = b"ORTM"  # at byte 4
_UNCHECKED = "onnx-fusion.unchecked"  # a domain that onnx's checker does not know, and so lets pass
_TOP_LEVEL = {field.number: field for field in ModelProto.DESCRIPTOR.fields}


def unreadable(label: str, data: wire.Readable, error: Exception) -> ModelError:
    """Return the error for bytes that are no ModelProto."""
    start = data.read(0, min(64, len(data)))
    if not start:
        return ModelError(f"{label} is empty: fetch or export it again")
    for prefix, what in _OTHERS.items():
        if start.startswith(prefix):
            return ModelError(f"{label} is {what}")
    if start[4:8] == _ORT_FORMAT:
        return ModelError(f"{label} is a model in onnxruntime's own format: give the .onnx file that it was made from")
    if isinstance(error, wire.WireError) and error.truncated and _begins_like_a_model(data):
        return ModelError(f"{label} is truncated: at byte {error.offset} there is {error}; fetch or export it again")
    what = (
        f"at byte {error.offset} there is {error}" if isinstance(error, wire.WireError) else "its fields do not decode"
    )
    if _begins_like_a_model(data):
        return ModelError(f"{label} is damaged: {what}; fetch or export it again")
    return ModelError(f"{label} is not an ONNX file: give a binary .onnx model, as onnx.save writes it")


def _begins_like_a_model(data: wire.Readable) -> bool:
    try:
        first = next(wire.fields(data, 0, len(data)), None)
    except wire.WireError as error:
        # The first field may be the graph, cut off: its tag alone says what it is.
        tag = data.read(0, 1)[0]
        return error.offset == 0 and tag >> 3 in _TOP_LEVEL and tag & 7 == _wire(tag >> 3)
    return first is not None and first.number in _TOP_LEVEL and first.wire == _wire(first.number)


def _wire(number: int) -> int:
    field = _TOP_LEVEL[number]
    return wire.VARINT if field.cpp_type in (field.CPPTYPE_INT64, field.CPPTYPE_INT32) else wire.BYTES


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
    if sort(proto, label):
        notes.append("its nodes were not in topological order: they were sorted")
        problem = _rejection(proto.SerializeToString())
    if problem is not None:
        raise ModelError(f"{label}: onnx's checker rejects the model: {problem}")
    return notes


def _rejection(shell: bytes) -> str | None:
    """Return why onnx's checker rejects a shell, in one line; None where it does not, or where no runtime would."""
    data = _without_data(shell)
    message = _ask(data)
    if message is not None:
        message = _ask(_forgiven(data))
    if message is None:
        return None
    # "what\n\n==> Context: Bad node spec for node. Name: n OpType: Op": the place belongs into the sentence
    what, *contexts = re.split(r"\s*==> Context: ", " ".join(message.split()))
    places = [match.groups() for text in contexts if (match := re.search(r"Name: (.*?) ?OpType: (\S+)", text))]
    where = f" (node {places[0][0]!r}, {places[0][1]})" if places else ""
    return what.rstrip(".") + where


def _ask(data: bytes) -> str | None:
    try:
        checker.check_model(data)
    except checker.ValidationError as error:
        return str(error)
    return None


def _without_data(shell: bytes) -> bytes:
    """Return the shell with empty tensors in place of those whose data lies elsewhere, which the checker cannot see."""

    def edit(start: int, stop: int) -> list[wire.Piece] | None:
        tensor = TensorProto.FromString(shell[start:stop])
        if tensor.data_location != TensorProto.EXTERNAL:
            return None
        return [TensorProto(name=tensor.name, data_type=tensor.data_type, dims=[0]).SerializeToString()]

    pieces = wire.replace_tensors(payload.BytesStore(shell), payload.occurrences(shell, payload.LOCATION), edit)
    return payload.join(pieces)


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
        for graph in chain([body], *(_bodies(node) for node in nodes)):
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
    version = versions.get(domain)
    if version is None:
        return False
    try:
        defs.get_schema(node.op_type, version, domain)
    except TypeError:  # a name that is no UTF-8 text comes as bytes
        return False
    except defs.SchemaError:
        return registry.knows(node.op_type, domain, version)
    return False


# -- order ------------------------------------------------------------------------------------------------------------


def sort(proto: ModelProto, label: str = "the model") -> bool:
    """Put the nodes of every graph, body and function in topological order; return whether any was not.

    A graph that is in order stays as it is; else every node moves back only as far as it must.

    Raises:
        ModelError: a node reads a value that nothing defines, or the nodes form a cycle.
    """
    changed = _sort_body(proto.graph, set(), f"{label}: graph")
    for function in proto.functions:
        changed |= _sort_body(function, set(), f"{label}: function {function.name}")
    return changed


def _sort_body(body: Body, visible: set[str], place: str) -> bool:
    visible = visible | _defined(body)
    changed = False
    for node in body.node:
        for inner in _bodies(node):
            changed |= _sort_body(inner, visible, f"{place}: body of {_label(node)}")
        for name in node.input:
            if name and name not in visible:
                raise ModelError(
                    f"{place}: node {_label(node)} reads {name!r}, which no node, input or initializer defines"
                )
    producer = {name: index for index, node in enumerate(body.node) for name in node.output if name}
    needs = [{producer[name] for name in _reads(node) if name in producer} for node in body.node]
    order = _order(needs)
    if len(order) < len(needs):
        cycle = " → ".join(_label(body.node[index]) for index in _cycle(needs, set(order)))
        raise ModelError(f"{place}: the nodes form a cycle: {cycle}; no ONNX graph may, so export the model again")
    if order == list(range(len(needs))):
        return changed
    nodes = [body.node[index] for index in order]
    del body.node[:]
    body.node.extend(nodes)
    return True


def _order(needs: list[set[int]]) -> list[int]:
    """Return the topological order nearest to the given one, without the nodes that wait for a cycle."""
    waiting = [len(needed) for needed in needs]
    readers: list[list[int]] = [[] for _ in needs]
    for index, needed in enumerate(needs):
        for producer in needed:
            readers[producer].append(index)
    ready = [index for index, count in enumerate(waiting) if not count]
    order = []
    while ready:
        index = heapq.heappop(ready)
        order.append(index)
        for reader in readers[index]:
            waiting[reader] -= 1
            if not waiting[reader]:
                heapq.heappush(ready, reader)
    return order


def _cycle(needs: list[set[int]], ordered: set[int]) -> list[int]:
    """Return one cycle among the nodes that have no order, in the direction of the data, closed by its first node."""
    path: list[int] = []
    at = next(index for index in range(len(needs)) if index not in ordered)
    while at not in path:  # a node that cannot be ordered needs another one
        path.append(at)
        at = min(needs[at] - ordered)
    loop = path[path.index(at) :][::-1]
    first = loop.index(min(loop))
    return [*loop[first:], *loop[:first], loop[first]]


# -- bodies -----------------------------------------------------------------------------------------------------------


def _bodies(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def _all_nodes(body: Body) -> Iterator[NodeProto]:
    for node in body.node:
        yield node
        for inner in _bodies(node):
            yield from _all_nodes(inner)


def _defined(body: Body) -> set[str]:
    names = {name for node in body.node for name in node.output}
    if isinstance(body, FunctionProto):
        return names.union(body.input)
    names.update(value.name for value in chain(body.input, body.initializer))
    names.update(sparse.values.name for sparse in body.sparse_initializer)
    return names


def _reads(node: NodeProto) -> Iterator[str]:
    """The names a node needs from its own graph, those that its bodies read included."""
    yield from node.input
    for body in _bodies(node):
        for inner in body.node:
            yield from _reads(inner)
        for output in body.output:
            yield output.name


def _label(node: NodeProto) -> str:
    return repr(node.name) if node.name else f"{node.op_type} -> {next(iter(node.output), '')!r}"
