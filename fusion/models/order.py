"""Topological order: of anything that needs something, and of the nodes of a model whose exporter did not care."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from graphlib import CycleError, TopologicalSorter
from heapq import heappop, heappush
from itertools import chain

from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, defs

from fusion.errors import ModelError

Body = GraphProto | FunctionProto


def nearest(needs: Sequence[set[int]], labels: Sequence[str], place: str) -> list[int]:
    """Return the topological order nearest to the given one: every node moves back only as far as it must.

    Args:
        needs: per node the indices of those that come before it.
        labels, place: what to call the nodes, and where they are, in a message.

    Raises:
        ModelError: the nodes form a cycle.
    """
    sorter = TopologicalSorter(dict(enumerate(needs)))
    try:
        sorter.prepare()
    except CycleError as error:
        cycle = error.args[1][1:]
        first = cycle.index(min(cycle))
        loop = " → ".join(labels[index] for index in (*cycle[first:], *cycle[: first + 1]))
        raise ModelError(
            f"{place}: the nodes form a cycle: {loop}; no ONNX graph may, so export the model again"
        ) from None
    ready: list[int] = []
    order: list[int] = []
    while sorter:
        for index in sorter.get_ready():
            heappush(ready, index)
        order.append(heappop(ready))
        sorter.done(order[-1])
    return order


def sort(proto: ModelProto, label: str) -> bool:
    """Put the nodes of every graph, body and function in topological order; return whether any was not.

    Raises:
        ModelError: a node reads a value that nothing defines, or the nodes form a cycle.
    """
    changed = _sort_body(proto.graph, set(), f"{label}: graph")
    for function in proto.functions:
        changed |= _sort_body(function, set(), f"{label}: function {function.name}")
    return changed


def bodies(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs among the attributes of a node."""
    if not _may_hold_bodies(node.op_type, node.domain):
        return
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


@cache
def _may_hold_bodies(op: str, domain: str) -> bool:
    """Whether an operator has graphs among its attributes; where no schema says so, the node itself must be asked."""
    try:
        schema = defs.get_schema(op, "" if domain == "ai.onnx" else domain)
    except (defs.SchemaError, TypeError):  # a damaged name is bytes
        return True
    return any(attribute.type in _GRAPHS for attribute in schema.attributes.values())


_GRAPHS = (defs.OpSchema.AttrType.GRAPH, defs.OpSchema.AttrType.GRAPHS)


def _sort_body(body: Body, visible: set[str], place: str) -> bool:
    producer = {name: index for index, node in enumerate(body.node) for name in node.output if name}
    visible = visible.union(producer, _inputs(body))
    labels = [repr(node.name) if node.name else f"{node.op_type} -> {''.join(node.output[:1])!r}" for node in body.node]
    changed = False
    for node, label in zip(body.node, labels, strict=True):
        for inner in bodies(node):
            changed |= _sort_body(inner, visible, f"{place}: body of {label}")
        for name in node.input:
            if name and name not in visible:
                raise ModelError(f"{place}: node {label} reads {name!r}, which no node, input or initializer defines")
    needs = [{producer[name] for name in _reads(node) if name in producer} for node in body.node]
    order = nearest(needs, labels, place)
    if order == list(range(len(needs))):
        return changed
    nodes = [body.node[index] for index in order]
    del body.node[:]
    body.node.extend(nodes)
    return True


def _inputs(body: Body) -> Iterator[str]:
    if isinstance(body, FunctionProto):
        yield from body.input
    else:
        yield from (value.name for value in chain(body.input, body.initializer))
        yield from (sparse.values.name for sparse in body.sparse_initializer)


def _reads(node: NodeProto) -> Iterator[str]:
    """The names a node needs from its own graph, those that its bodies read included."""
    yield from node.input
    for body in bodies(node):
        for inner in body.node:
            yield from _reads(inner)
        yield from (output.name for output in body.output)
