"""Sizes: shape tensors for new nodes. What is no known number is read off a value that has it."""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto

from fusion.dims import Dim, divide, terms
from fusion.matching.region import sources
from fusion.models.graph import Node
from fusion.writing.found import Found, New, Operand
from fusion.writing.place import before

if TYPE_CHECKING:
    from fusion.writing.nodes import Nodes


def sizes(op: Nodes, found: Found, dims: tuple[Dim, ...], have: tuple[Dim, ...], copy: bool) -> New:
    """See `Nodes.sizes`."""
    items = _items(dims, have, copy)
    if all(isinstance(item, int) for item in items):
        return op.constant(int64([int(str(item)) for item in items]), "shape")
    parts: list[Operand] = [item_of(op, found, item, found.node) for item in items]
    return op.shared("Concat", parts, (len(parts),), dtype=TensorProto.INT64, axis=0)


def item_of(op: Nodes, found: Found, item: Dim, at: Node) -> New:
    """One size as a tensor of shape (1,), known by the time of `at`.

    Raises:
        Unmet: it cannot be read off any capture or input.
    """
    return op.constant(int64([item]), "size") if isinstance(item, int) else _size(op, found, item, at)


def filled(op: Nodes, found: Found, number: Dim, count: Dim) -> New:
    """See `Nodes.filled`."""
    if isinstance(number, int) and isinstance(count, int):
        return op.constant(np.full(count, number, np.int32), "lengths")
    size = item_of(op, found, number, found.node)
    size = op.shared("Cast", [size], (1,), dtype=TensorProto.INT32, to=TensorProto.INT32)
    return size if count == 1 else op.shared("Expand", [size, item_of(op, found, count, found.node)], (count,))


def _size(op: Nodes, found: Found, dim: Dim, at: Node) -> New:
    """Read off an input or capture from before `at` that has the size or a multiple of it, or made of such sizes.

    Inputs come first: what one match reads off them, others do too.
    """
    facts, main = found.facts, found.facts.graph.main
    multiples = [
        (often, source, axis)
        for source in (*(main.values[given.name] for given in main.proto.input), *sources(found.state))
        for axis, own in enumerate(facts.shape(source) or ())
        if isinstance(often := divide(own, dim), int) and often and before(source, at)
    ]
    if multiples:
        often, source, axis = min(multiples, key=lambda multiple: multiple[0])
        shape = op.shared("Shape", [source], None, dtype=TensorProto.INT64)
        index = op.constant(int64([axis]), "axis")
        size = op.shared("Gather", [shape, index], (1,), dtype=TensorProto.INT64, axis=0)
        return size if often == 1 else op.shared("Div", [size, op.constant(int64([often]), "size")], (1,))
    parts = terms(dim)
    if parts == [(1, (dim,))] or any(len(atoms) > 1 for _, atoms in parts):
        raise op.unmet(f"the size {dim} cannot be read off any capture or input", found.root)
    summands: list[New] = []
    for factor, atoms in parts:
        factors = [item_of(op, found, part, at) for part in atoms]
        if factor != 1 or not atoms:
            factors.append(item_of(op, found, factor, at))
        summands.append(reduce(lambda some, more: op.shared("Mul", [some, more], (1,)), factors))
    return reduce(lambda some, more: op.shared("Add", [some, more], (1,)), summands)


def _items(dims: tuple[Dim, ...], have: tuple[Dim, ...], copy: bool) -> list[int | Dim]:
    """A shape tensor's items: numbers, 0 where Reshape may copy, one -1; what stays a Dim must be computed."""
    items: list[int | Dim] = []
    inferred = False
    for index, dim in enumerate(dims):
        if isinstance(dim, int):
            items.append(dim)
        elif copy and index < len(have) and have[index] == dim:
            items.append(0)
        elif not copy and index < len(have) and have[index] == dim:
            items.append(1)
        elif copy and not inferred:
            inferred = True
            items.append(-1)
        else:
            items.append(dim)
    return items


def int64(items: list[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """A shape tensor."""
    return np.array(items, dtype=np.int64)
