"""Rearrangements: operators that only move, repeat or leave out elements, as a layout over their data input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias

from fusion.dims import Dim
from fusion.facts.common import attribute_int, attribute_ints, listed_dims
from fusion.facts.pieces import cut, slice_bounds, split_sizes
from fusion.facts.shapes import squeezed_axes
from fusion.layout import Layout
from fusion.models.graph import Node, Value
from fusion.schema import attribute, axes

if TYPE_CHECKING:
    from fusion.facts import Facts

Rule: TypeAlias = Callable[["Facts", Node, int, Layout], "Layout | None"]
"""The facts, the node, the output slot, and the identity layout of input 0."""


def layout(facts: Facts, node: Node, slot: int) -> Layout | None:
    """Output `slot` over input 0; None where the node computes, or it cannot be proved what it moves."""
    rule = RULES.get(node.key)
    source = node.input(0)
    if rule is None or source is None:
        return None
    shape = facts.shape(source)
    return None if shape is None else rule(facts, node, slot, Layout.identity(shape))


def _output_shape(facts: Facts, node: Node, slot: int) -> tuple[Dim, ...] | None:
    value = node.outputs[slot]
    return None if value is None else facts.shape(value)


def _transpose(facts: Facts, node: Node, slot: int, data: Layout) -> Layout | None:
    perm = attribute_ints(node, "perm") or list(range(len(data.axes)))[::-1]
    return data.transpose(perm) if sorted(perm) == list(range(len(data.axes))) else None


def _unsqueeze(facts: Facts, node: Node, slot: int, data: Layout) -> Layout | None:
    inserted = axes(node, facts)
    return None if inserted is None else data.unsqueeze(inserted)


def _squeeze(facts: Facts, node: Node, slot: int, data: Layout) -> Layout | None:
    dropped = squeezed_axes(facts, node)
    return None if dropped is None else data.squeeze(dropped)


def _reshape(facts: Facts, node: Node, slot: int, data: Layout) -> Layout | None:
    shape = _output_shape(facts, node, slot)
    return None if shape is None else data.reshape(shape)


def _expand(facts: Facts, node: Node, slot: int, data: Layout) -> Layout | None:
    shape = _output_shape(facts, node, slot)
    return None if shape is None else data.expand(shape)


def _tile(facts: Facts, node: Node, slot: int, data: Layout) -> Layout | None:
    repeats = listed_dims(facts, node, 1)
    if repeats is None or len(repeats) != len(data.axes):
        return None
    known = [count for count in repeats if count is not None]
    return data.tile(known) if len(known) == len(repeats) else None


def _slice(facts: Facts, node: Node, slot: int, data: Layout) -> Layout | None:
    bounds = slice_bounds(facts, node)
    if bounds is None:
        return None
    result: Layout | None = data
    for axis, (start, end, step) in bounds.items():
        first, length = cut(facts, data.source[axis], start, end, step)
        if result is None or first is None or length is None or not isinstance(step, int):
            return None
        if (first, length, step) != (0, data.source[axis], 1):
            result = result.slice(axis, first, length, step)
    return result


def _split(facts: Facts, node: Node, slot: int, data: Layout) -> Layout | None:
    along = axes(node, facts)
    if along is None:
        return None
    start: Dim = 0
    sizes = split_sizes(facts, node, data.source[along[0]])
    for size in sizes[:slot]:
        if size is None:
            return None
        start = start + size
    length = sizes[slot]
    return None if length is None else data.slice(along[0], start, length)


def _gather(facts: Facts, node: Node, slot: int, data: Layout) -> Layout | None:
    """Constant indices that are one number, or evenly spaced."""
    along = axes(node, facts)
    index = node.input(1)
    found = None if index is None else facts.integers(index)
    if along is None or found is None or len(found.shape) > 1 or not found.items:
        return None
    axis, size = along[0], data.source[along[0]]
    places = [_from_front(facts, item, size) for item in found.dims]
    first = places[0]
    if first is None:
        return None
    if not found.shape:
        return data.take(axis, first)
    step = _spacing(places)
    return None if step is None else data.slice(axis, first, len(places), step)


def _from_front(facts: Facts, index: Dim | None, size: Dim) -> Dim | None:
    """An index counted from the front; None where its sign is unknown."""
    if index is None:
        return None
    if isinstance(index, int):
        return index if index >= 0 else size + index
    # size - 1 is negative only where the axis is empty, and then there is nothing to gather.
    return index if facts.lower(index) >= 0 or index == size - 1 else None


def _spacing(places: Sequence[Dim | None]) -> int | None:
    """The constant distance between neighbours."""
    if len(places) == 1:
        return 1
    distances = set()
    for place, following in pairwise(places):
        if place is None or following is None:
            return None
        distances.add(following - place)
    step = distances.pop()
    return step if not distances and isinstance(step, int) and step != 0 else None


def _concat(facts: Facts, node: Node, slot: int, data: Layout) -> Layout | None:
    """Copies of one value, side by side: a Tile of it."""
    along = axes(node, facts)
    sources = {_source(facts, value) for value in node.inputs}
    if along is None or len(sources) != 1 or None in sources:
        return None
    return data.tile([len(node.inputs) if axis == along[0] else 1 for axis in range(len(data.axes))])


def _source(facts: Facts, value: Value | None) -> tuple[Value, Layout] | None:
    """What a value rearranges, and how; itself where it computes."""
    shape = facts.shape(value) if value is not None else None
    if value is None or shape is None:
        return None
    layout = Layout.identity(shape)
    while (through := facts.through(value)) is not None:
        composed = layout.compose(through[1])
        if composed is None:
            break
        value, layout = through[0], composed
    return value, layout


def _blocks(facts: Facts, node: Node, slot: int, data: Layout) -> Layout | None:
    """DepthToSpace and SpaceToDepth: a reshape to six axes, a transposition, and a reshape back."""
    size = attribute_int(node, "blocksize")
    shape = _output_shape(facts, node, slot)
    if shape is None or not size or len(data.source) != 4:
        return None
    n, c, h, w = data.source
    _, c_out, h_out, w_out = shape
    split: tuple[Dim, ...]
    by_channel = attribute(node, "mode") == b"CRD"
    if node.op == "SpaceToDepth":
        split, perm = (n, c, h_out, size, w_out, size), (0, 1, 3, 5, 2, 4) if by_channel else (0, 3, 5, 1, 2, 4)
    elif by_channel:
        split, perm = (n, c_out, size, size, h, w), (0, 1, 4, 2, 5, 3)
    else:
        split, perm = (n, size, size, c_out, h, w), (0, 3, 4, 1, 5, 2)
    cut_up = data.reshape(split)
    return None if cut_up is None else cut_up.transpose(perm).reshape(shape)


RULES: dict[str, Rule] = {
    "Concat": _concat,
    "DepthToSpace": _blocks,
    "Expand": _expand,
    "Flatten": _reshape,
    "Gather": _gather,
    "Reshape": _reshape,
    "Slice": _slice,
    "SpaceToDepth": _blocks,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
