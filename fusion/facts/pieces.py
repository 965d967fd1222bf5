"""Pieces: Slice, Split, Gather, Concat, Pad. Which part of an axis is read, and the shapes that follow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fusion.dims import Dim, divide, floordiv, maximum, minimum, tail, upper
from fusion.facts.common import Dims, attribute_int, attribute_ints, input_shape, listed_dims
from fusion.models.graph import Node
from fusion.schema import axes

if TYPE_CHECKING:
    from fusion.facts import Facts

_FAR = 2**31 - 1
"""From here on a bound means "to the end": exporters write the largest int32 or int64."""


def count(facts: Facts, start: Dim, limit: Dim, step: int) -> Dim:
    """How many numbers start, start + step, … lie before `limit`."""
    distance, stride = (limit - start, step) if step > 0 else (start - limit, -step)
    found = floordiv(distance + (stride - 1), stride)
    return found if facts.lower(found) >= 0 else maximum(0, found)


def cut(facts: Facts, size: Dim, start: Dim | None, end: Dim | None, step: Dim | None) -> tuple[Dim | None, Dim | None]:
    """(first index, length) of a slice of an axis of `size` elements; None for what cannot be told."""
    if not isinstance(step, int) or step == 0:
        return None, None
    if step > 0:
        first, last = _clamped(facts, start, size, 0, size), _clamped(facts, end, size, 0, size)
    else:
        first, last = _from_behind(facts, start, size), _clamped(facts, end, size, -1, size - 1)
    return first, None if first is None or last is None else count(facts, first, last, step)


def _clamped(facts: Facts, bound: Dim | None, size: Dim, least: Dim, most: Dim) -> Dim | None:
    """A bound counted from the front and clamped, as Slice does; None where its sign is unknown."""
    if bound is None:
        return None
    if isinstance(bound, int) and abs(bound) >= _FAR:
        return most if bound > 0 else least
    if facts.lower(bound) >= 0:
        return minimum(bound, most)
    if upper(bound) < 0:
        return maximum(bound + size, least)
    # -count from the end, which is the front where count is 0
    return size - tail(size, -bound) if facts.lower(-bound) >= 0 and (least, most) == (0, size) else None


def _from_behind(facts: Facts, bound: Dim | None, size: Dim) -> Dim | None:
    """Where a slice backwards starts. None before the front: the runtimes take one element there, or none."""
    if bound is None:
        return None
    if facts.lower(bound) >= 0:
        return size - 1 if isinstance(bound, int) and bound >= _FAR else minimum(bound, size - 1)
    return bound + size if bound == -1 or (upper(bound) < 0 and facts.lower(bound + size) >= 0) else None


def slice_bounds(facts: Facts, node: Node) -> dict[int, tuple[Dim | None, Dim | None, Dim | None]] | None:
    """axis → (start, end, step) of a Slice; None where its axes are unknown."""
    along = axes(node, facts)
    if along is None:
        return None
    starts: Sequence[Dim | None] | None
    ends: Sequence[Dim | None] | None
    if node.version < 10:
        starts, ends = attribute_ints(node, "starts"), attribute_ints(node, "ends")
    else:
        starts, ends = listed_dims(facts, node, 1), listed_dims(facts, node, 2)
    steps = listed_dims(facts, node, 4) if node.input(4) is not None else [1] * len(along)
    nothing = [None] * len(along)
    columns = [nothing if column is None else column for column in (starts, ends, steps)]
    if any(len(column) != len(along) for column in columns):
        return None
    return {axis: (a, b, c) for axis, a, b, c in zip(along, *columns, strict=True)}


def _slice(facts: Facts, node: Node, slot: int) -> Dims | None:
    dims = input_shape(facts, node, 0)
    if dims is None:
        return None
    bounds = slice_bounds(facts, node)
    if bounds is None:
        return [None] * len(dims)
    return [
        dim if axis not in bounds else None if dim is None else cut(facts, dim, *bounds[axis])[1]
        for axis, dim in enumerate(dims)
    ]


def split_sizes(facts: Facts, node: Node, size: Dim | None) -> Dims:
    """The sizes of all outputs of a Split along an axis of `size` elements."""
    given: Sequence[Dim | None] | None
    given = attribute_ints(node, "split") if node.version < 13 else listed_dims(facts, node, 1)
    parts = len(node.outputs)
    if given is not None and len(given) == parts:
        return given
    explicit = node.input(1) is not None
    if size is None or explicit or given is not None:
        return [None] * parts
    even = divide(size, parts)
    if even is None and node.version >= 18:
        each = floordiv(size + (parts - 1), parts)
        return [each] * (parts - 1) + [size - each * (parts - 1)]
    return [floordiv(size, parts) if even is None else even] * parts


def _split(facts: Facts, node: Node, slot: int) -> Dims | None:
    dims = input_shape(facts, node, 0)
    along = axes(node, facts)
    if dims is None or along is None:
        return None if dims is None else [None] * len(dims)
    axis = along[0]
    return [*dims[:axis], split_sizes(facts, node, dims[axis])[slot], *dims[axis + 1 :]]


def _gather(facts: Facts, node: Node, slot: int) -> Dims | None:
    dims, indices = input_shape(facts, node, 0), input_shape(facts, node, 1)
    if dims is None or indices is None:
        return None
    along = axes(node, facts)
    if along is None:
        return [None] * (len(dims) - 1 + len(indices))
    return [*dims[: along[0]], *indices, *dims[along[0] + 1 :]]


def _gather_nd(facts: Facts, node: Node, slot: int) -> Dims | None:
    dims, indices = input_shape(facts, node, 0), input_shape(facts, node, 1)
    batch = attribute_int(node, "batch_dims") or 0
    if dims is None or not indices or not isinstance(indices[-1], int):
        return None
    return [*indices[:-1], *dims[batch + indices[-1] :]]


def _gather_elements(facts: Facts, node: Node, slot: int) -> Dims | None:
    return input_shape(facts, node, 1)


def _concat(facts: Facts, node: Node, slot: int) -> Dims | None:
    found = [input_shape(facts, node, i) for i in range(len(node.inputs))]
    known = [dims for dims in found if dims is not None]
    if not known:
        return None
    result = [_agreed([dims[axis] for dims in known if axis < len(dims)]) for axis in range(len(known[0]))]
    along = axes(node, facts)
    if along is None:
        return [None] * len(result)
    total: Dim | None = 0 if len(known) == len(found) else None
    for dims in known:
        part = dims[along[0]] if len(dims) == len(result) else None
        total = None if total is None or part is None else total + part
    result[along[0]] = total
    return result


def _agreed(dims: Dims) -> Dim | None:
    """The dimension that several have to share: a number before a symbol."""
    known = [dim for dim in dims if dim is not None]
    return next((dim for dim in known if isinstance(dim, int)), known[0] if known else None)


def pads(facts: Facts, node: Node, rank: int) -> list[tuple[Dim | None, Dim | None]] | None:
    """(before, after) for each axis of a Pad; None where its axes are unknown."""
    given = listed_dims(facts, node, 1) if node.version >= 11 else attribute_ints(node, "pads")
    along = axes(node, facts)
    if given is None or along is None or len(given) != 2 * len(along):
        return None
    result: list[tuple[Dim | None, Dim | None]] = [(0, 0)] * rank
    for i, axis in enumerate(along):
        result[axis] = (given[i], given[i + len(along)])
    return result


def _pad(facts: Facts, node: Node, slot: int) -> Dims | None:
    dims = input_shape(facts, node, 0)
    if dims is None:
        return None
    around = pads(facts, node, len(dims))
    if around is None:
        return [None] * len(dims)
    return [
        None if dim is None or before is None or after is None else dim + before + after
        for dim, (before, after) in zip(dims, around, strict=True)
    ]


RULES = {
    "Concat": _concat,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Pad": _pad,
    "Slice": _slice,
    "Split": _split,
}
