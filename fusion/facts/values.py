"""Small integers: shape arithmetic on tensors of at most 64 elements, element by element, with symbols.

A rule returns an object array of elements (a `Dim`, a bool, or None for one it cannot tell), or None where it can tell
nothing.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto

from fusion.dims import Dim, product
from fusion.facts import constants, elementwise
from fusion.facts.common import attribute_ints, input_shape
from fusion.facts.dtypes import INTEGERS
from fusion.facts.integers import MOST, IntTensor, Item, Items, Rule, Shape, input_items, objects
from fusion.facts.pieces import cut, pads, slice_bounds, split_sizes
from fusion.facts.shapes import shape_range, squeezed_axes
from fusion.models.graph import Node, Value
from fusion.schema import attribute, axes

if TYPE_CHECKING:
    from fusion.facts import Facts

_RANGES: dict[int, tuple[int, int]] = {
    kind: (np.iinfo(name).min, np.iinfo(name).max)
    for kind, name in (
        (TensorProto.INT64, "int64"),
        (TensorProto.INT32, "int32"),
        (TensorProto.INT16, "int16"),
        (TensorProto.INT8, "int8"),
        (TensorProto.UINT64, "uint64"),
        (TensorProto.UINT32, "uint32"),
        (TensorProto.UINT16, "uint16"),
        (TensorProto.UINT8, "uint8"),
    )
}
_WIDE = (TensorProto.INT64, TensorProto.INT32)
"""Types that hold any dimension and any difference of two; expressions in others might have wrapped around."""


def integers(facts: Facts, value: Value) -> IntTensor | None:
    """The elements of `value`, where it is a small integer or boolean tensor and something is known of it."""
    node = value.producer
    stored = constants.stored(value)
    if stored is None and (node is None or node.key not in RULES):
        return None
    dtype = facts.dtype(value)
    if dtype is not None and dtype not in INTEGERS and dtype != TensorProto.BOOL:
        return None
    dims = facts.shape(value)
    shape = tuple(dim for dim in dims or () if isinstance(dim, int))
    if dims is None or len(shape) != len(dims) or prod(shape) > MOST:
        return None
    if stored is not None:
        payload = constants.small(facts.graph, value)
        return None if payload is None else IntTensor(shape, tuple(payload.reshape(-1).tolist()))
    assert node is not None
    try:
        found = RULES[node.key](facts, node, value.slot, shape)
    except ValueError:  # numpy's word for sizes that contradict each other: no runtime computes this
        return None
    if found is None or found.shape != shape:
        return None
    items = tuple(_kept(item, dtype) for item in found.reshape(-1).tolist())
    if items and all(item is None for item in items):
        return None
    return IntTensor(shape, tuple(item if isinstance(item, int | None) else facts.dim(item) for item in items))


def _kept(item: Item, dtype: int | None) -> Item:
    """The element, if the element type can hold it: arithmetic that wraps around is not followed."""
    if item is None or isinstance(item, bool):
        return item
    if not isinstance(item, int):
        return item if dtype is None or dtype in _WIDE else None
    least, most = _RANGES.get(dtype or TensorProto.INT64, (0, 1))
    return item if least <= item <= most else None


# --- what brings integers in ------------------------------------------------------------------------------------------


def _shape(facts: Facts, node: Node, slot: int, shape: Shape) -> Items | None:
    dims = input_shape(facts, node, 0)
    return None if dims is None else objects(dims[shape_range(node)])


def _size(facts: Facts, node: Node, slot: int, shape: Shape) -> Items | None:
    dims = input_shape(facts, node, 0)
    if dims is None or any(dim is None for dim in dims):
        return None
    return objects([product(dim for dim in dims if dim is not None)]).reshape(())


def _constant_of_shape(facts: Facts, node: Node, slot: int, shape: Shape) -> Items | None:
    number = facts.number(node.outputs[0]) if node.outputs[0] is not None else None
    if number is None or not number.is_integer():
        return None
    boolean = node.outputs[0] is not None and facts.dtype(node.outputs[0]) == TensorProto.BOOL
    return _full(shape, bool(number) if boolean else int(number))


def _full(shape: Shape, item: Item) -> Items:
    return objects([item] * prod(shape)).reshape(shape)


def _range(facts: Facts, node: Node, slot: int, shape: Shape) -> Items | None:
    start, step = (_scalar(facts, node, i) for i in (0, 2))
    if start is None or step is None:
        return None
    return objects([start + step * i for i in range(shape[0])])


def _scalar(facts: Facts, node: Node, slot: int) -> Dim | None:
    found = input_items(facts, node, slot)
    if found is None or found.size != 1:
        return None
    item = found.reshape(-1)[0]
    return None if isinstance(item, bool) else item


# --- rearrangements ---------------------------------------------------------------------------------------------------


def _same(facts: Facts, node: Node, slot: int, shape: Shape) -> Items | None:
    return input_items(facts, node, 0) if slot == 0 else None


def _reshape(facts: Facts, node: Node, slot: int, shape: Shape) -> Items | None:
    array = input_items(facts, node, 0)
    return array.reshape(shape) if array is not None and array.size == prod(shape) else None


def _slice(facts: Facts, node: Node, slot: int, shape: Shape) -> Items | None:
    array, bounds = input_items(facts, node, 0), slice_bounds(facts, node)
    if array is None or bounds is None:
        return None
    for axis, (start, end, step) in bounds.items():
        first, length = cut(facts, array.shape[axis], start, end, step)
        if not isinstance(first, int) or not isinstance(length, int) or not isinstance(step, int):
            return None
        array = array.take([first + step * i for i in range(length)], axis)
    return array


def _gather(facts: Facts, node: Node, slot: int, shape: Shape) -> Items | None:
    array, along = input_items(facts, node, 0), axes(node, facts)
    index = None if node.input(1) is None else facts.integers(node.inputs[1])  # type: ignore[arg-type]
    if array is None or along is None or index is None or index.numbers is None:
        return None
    size = array.shape[along[0]]
    if any(not -size <= i < size for i in index.numbers):
        return None
    taken = array.take(index.numbers, along[0])
    return taken.reshape((*array.shape[: along[0]], *index.shape, *array.shape[along[0] + 1 :]))


def _concat(facts: Facts, node: Node, slot: int, shape: Shape) -> Items | None:
    """Parts of which only the shape is known leave a gap."""
    along = axes(node, facts)
    if along is None:
        return None
    parts = []
    for i in range(len(node.inputs)):
        part = input_items(facts, node, i)
        if part is None:
            dims = input_shape(facts, node, i) or [None]
            if any(not isinstance(dim, int) for dim in dims):
                return None
            part = _full(tuple(dim for dim in dims if isinstance(dim, int)), None)
        parts.append(part)
    if any(part.ndim != parts[0].ndim for part in parts):
        return None
    return np.concatenate(parts, along[0])


def _split(facts: Facts, node: Node, slot: int, shape: Shape) -> Items | None:
    array, along = input_items(facts, node, 0), axes(node, facts)
    if array is None or along is None:
        return None
    sizes = split_sizes(facts, node, array.shape[along[0]])
    before = sizes[:slot]
    if any(not isinstance(size, int) for size in before):
        return None
    start = sum(size for size in before if isinstance(size, int))
    return array.take(range(start, start + shape[along[0]]), along[0])


def _transpose(facts: Facts, node: Node, slot: int, shape: Shape) -> Items | None:
    array, perm = input_items(facts, node, 0), attribute_ints(node, "perm")
    return None if array is None else array.transpose(perm)


def _expand(facts: Facts, node: Node, slot: int, shape: Shape) -> Items | None:
    array = input_items(facts, node, 0)
    return None if array is None else np.broadcast_to(array, shape)


def _tile(facts: Facts, node: Node, slot: int, shape: Shape) -> Items | None:
    array, repeats = input_items(facts, node, 0), input_items(facts, node, 1)
    if array is None or repeats is None or any(not isinstance(n, int) for n in repeats.tolist()):
        return None
    return np.tile(array, repeats.tolist())


def _squeeze(facts: Facts, node: Node, slot: int, shape: Shape) -> Items | None:
    array = input_items(facts, node, 0)
    return None if array is None or squeezed_axes(facts, node) is None else array.reshape(shape)


def _pad(facts: Facts, node: Node, slot: int, shape: Shape) -> Items | None:
    array = input_items(facts, node, 0)
    around = None if array is None else pads(facts, node, array.ndim)
    fill = 0 if node.input(2) is None else _scalar(facts, node, 2)
    if array is None or around is None or attribute(node, "mode") not in (None, b"constant"):
        return None
    if fill is None or any(not isinstance(n, int) or n < 0 for pair in around for n in pair):
        return None
    return np.pad(array, around, constant_values=np.array(fill, dtype=object))  # type: ignore[arg-type]


RULES: dict[str, Rule] = {
    **elementwise.RULES,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Dropout": _same,
    "Expand": _expand,
    "Flatten": _reshape,
    "Gather": _gather,
    "Identity": _same,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _reshape,
}
