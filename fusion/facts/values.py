"""Small integers: shape arithmetic on tensors of at most 64 elements, element by element, with symbols.

A rule gets the facts, the node, the slot and the shape of the result, and returns an object array of elements (a `Dim`,
a bool, or None for one it cannot tell), or None where it can tell nothing. Logic is Kleene's.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from onnx import TensorProto

from fusion.dims import Dim, equal, floordiv, maximum, minimum, product, upper
from fusion.facts import constants
from fusion.facts.common import attribute_int, attribute_ints, input_shape
from fusion.facts.dtypes import INTEGERS
from fusion.facts.integers import MOST, IntTensor, Item, Items, objects
from fusion.facts.pieces import cut, pads, slice_bounds, split_sizes
from fusion.facts.shapes import shape_range, squeezed_axes
from fusion.graph import Node, Value
from fusion.schema import attribute, axes
from fusion.verdict import Verdict

if TYPE_CHECKING:
    from fusion.facts import Facts

Shape: TypeAlias = tuple[int, ...]
Rule: TypeAlias = Callable[["Facts", Node, int, Shape], "Items | None"]

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
_WIDE = (TensorProto.INT64, TensorProto.INT32, TensorProto.UINT64, TensorProto.UINT32)
"""Types that hold any dimension; symbols in others might have wrapped around."""


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
    found = RULES[node.key](facts, node, value.slot, shape)
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
    found = _input(facts, node, slot)
    if found is None or found.size != 1:
        return None
    item = found.reshape(-1)[0]
    return None if isinstance(item, bool) else item


# --- rearrangements ---------------------------------------------------------------------------------------------------


def _input(facts: Facts, node: Node, slot: int) -> Items | None:
    value = node.input(slot)
    found = None if value is None else facts.integers(value)
    return None if found is None else found.array


def _same(facts: Facts, node: Node, slot: int, shape: Shape) -> Items | None:
    return _input(facts, node, 0) if slot == 0 else None


def _reshape(facts: Facts, node: Node, slot: int, shape: Shape) -> Items | None:
    array = _input(facts, node, 0)
    return array.reshape(shape) if array is not None and array.size == prod(shape) else None


def _slice(facts: Facts, node: Node, slot: int, shape: Shape) -> Items | None:
    array, bounds = _input(facts, node, 0), slice_bounds(facts, node)
    if array is None or bounds is None:
        return None
    for axis, (start, end, step) in bounds.items():
        first, length = cut(facts, array.shape[axis], start, end, step)
        if not isinstance(first, int) or not isinstance(length, int) or not isinstance(step, int):
            return None
        array = array.take([first + step * i for i in range(length)], axis)
    return array


def _gather(facts: Facts, node: Node, slot: int, shape: Shape) -> Items | None:
    array, along = _input(facts, node, 0), axes(node, facts)
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
        part = _input(facts, node, i)
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
    array, along = _input(facts, node, 0), axes(node, facts)
    if array is None or along is None:
        return None
    sizes = split_sizes(facts, node, array.shape[along[0]])
    before = sizes[:slot]
    if any(not isinstance(size, int) for size in before):
        return None
    start = sum(size for size in before if isinstance(size, int))
    return array.take(range(start, start + shape[along[0]]), along[0])


def _transpose(facts: Facts, node: Node, slot: int, shape: Shape) -> Items | None:
    array, perm = _input(facts, node, 0), attribute_ints(node, "perm")
    return None if array is None else array.transpose(perm)


def _expand(facts: Facts, node: Node, slot: int, shape: Shape) -> Items | None:
    array = _input(facts, node, 0)
    return None if array is None else np.broadcast_to(array, shape)


def _tile(facts: Facts, node: Node, slot: int, shape: Shape) -> Items | None:
    array, repeats = _input(facts, node, 0), _input(facts, node, 1)
    if array is None or repeats is None or any(not isinstance(n, int) for n in repeats.tolist()):
        return None
    return np.tile(array, repeats.tolist())


def _squeeze(facts: Facts, node: Node, slot: int, shape: Shape) -> Items | None:
    array = _input(facts, node, 0)
    return None if array is None or squeezed_axes(facts, node) is None else array.reshape(shape)


def _pad(facts: Facts, node: Node, slot: int, shape: Shape) -> Items | None:
    array = _input(facts, node, 0)
    around = None if array is None else pads(facts, node, array.ndim)
    fill = 0 if node.input(2) is None else _scalar(facts, node, 2)
    if array is None or around is None or attribute(node, "mode") not in (None, b"constant"):
        return None
    if fill is None or any(not isinstance(n, int) or n < 0 for pair in around for n in pair):
        return None
    return np.pad(array, around, constant_values=np.array(fill, dtype=object))  # type: ignore[arg-type]


# --- arithmetic -------------------------------------------------------------------------------------------------------


def _each(operation: Callable[..., Item]) -> Rule:
    """An elementwise rule from an operation on known or unknown elements."""

    def rule(facts: Facts, node: Node, slot: int, shape: Shape) -> Items | None:
        arrays = [_input(facts, node, i) for i in range(len(node.inputs))]
        columns = []
        for array in arrays:
            # An operand of which nothing is known may not matter: False and anything is False.
            known = np.full((), None, dtype=object) if array is None else array
            columns.append(np.broadcast_to(known, shape).reshape(-1).tolist())
        return objects(operation(facts, *items) for items in zip(*columns, strict=True)).reshape(shape)

    return rule


def _arithmetic(operation: Callable[[Facts, Dim, Dim], Dim | None]) -> Callable[..., Item]:
    """An operation on any number of known integers, folded from the left."""

    def fold(facts: Facts, first: Item, *others: Item) -> Item:
        result = first
        for other in others:
            if result is None or other is None or isinstance(result, bool) or isinstance(other, bool):
                return None
            result = operation(facts, result, other)
        return result

    return fold


def _add(facts: Facts, a: Dim, b: Dim) -> Dim:
    return a + b


def _subtract(facts: Facts, a: Dim, b: Dim) -> Dim:
    return a - b


def _multiply(facts: Facts, a: Dim, b: Dim) -> Dim:
    return a * b


def _largest(facts: Facts, a: Dim, b: Dim) -> Dim:
    return a if facts.lower(a - b) >= 0 else maximum(a, b)


def _smallest(facts: Facts, a: Dim, b: Dim) -> Dim:
    return b if facts.lower(a - b) >= 0 else minimum(a, b)


def _divide(facts: Facts, a: Dim, b: Dim) -> Dim | None:
    """Integer division as ONNX does it, towards zero."""
    if b == 0:
        return None
    if isinstance(a, int) and isinstance(b, int):
        return a // b if (a < 0) == (b < 0) or a % b == 0 else a // b + 1
    return floordiv(a, b) if facts.lower(a) >= 0 and facts.lower(b) >= 0 else None


def _modulo(facts: Facts, a: Dim, b: Dim) -> Dim | None:
    if b == 0:
        return None
    return a - floordiv(a, b) * b if facts.lower(b) >= 0 and (isinstance(b, int) or facts.lower(a) >= 0) else None


def _mod(facts: Facts, node: Node, slot: int, shape: Shape) -> Items | None:
    return None if attribute_int(node, "fmod") else _each(_arithmetic(_modulo))(facts, node, slot, shape)


def _power(facts: Facts, a: Dim, b: Dim) -> Dim | None:
    return product([a] * b) if isinstance(b, int) and 0 <= b <= 8 else None


def _negate(facts: Facts, item: Item) -> Item:
    return None if item is None or isinstance(item, bool) else -item


def _absolute(facts: Facts, item: Item) -> Item:
    if item is None or isinstance(item, bool):
        return None
    return item if facts.lower(item) >= 0 else -item if upper(item) <= 0 else None


def _sign(facts: Facts, item: Item) -> Item:
    if item is None or isinstance(item, bool):
        return None
    return 1 if facts.lower(item) > 0 else -1 if upper(item) < 0 else 0 if item == 0 else None


def _compare(decide: Callable[[Facts, Dim, Dim], bool | None]) -> Callable[..., Item]:
    def compare(facts: Facts, a: Item, b: Item) -> Item:
        if a is None or b is None:
            return None
        return decide(facts, a, b)

    return compare


def _equal(facts: Facts, a: Dim, b: Dim) -> bool | None:
    verdict = equal(a, b)
    if verdict is Verdict.UNKNOWN and ((b == -1 and facts.lower(a) >= 0) or (a == -1 and facts.lower(b) >= 0)):
        return False
    return None if verdict is Verdict.UNKNOWN else verdict is Verdict.YES


def _less(facts: Facts, a: Dim, b: Dim) -> bool | None:
    difference = b - a
    return True if facts.lower(difference) > 0 else False if facts.lower(-difference) >= 0 else None


def _not(facts: Facts, item: Item) -> Item:
    return None if item is None else not item


def _and(facts: Facts, a: Item, b: Item) -> Item:
    if a is False or b is False:
        return False
    return None if a is None or b is None else bool(a and b)


def _or(facts: Facts, a: Item, b: Item) -> Item:
    if a is True or b is True:
        return True
    return None if a is None or b is None else bool(a or b)


def _where(facts: Facts, condition: Item, yes: Item, no: Item) -> Item:
    if condition is None:
        return yes if yes is not None and (yes is no or (type(yes) is type(no) and yes == no)) else None
    return yes if condition else no


def _cast(facts: Facts, node: Node, slot: int, shape: Shape) -> Items | None:
    """Between integers and booleans; a float source has no integers."""
    array = _input(facts, node, 0)
    output = node.outputs[0]
    if array is None or output is None:
        return None
    if facts.dtype(output) == TensorProto.BOOL:
        return objects(_truth(item) for item in array.reshape(-1).tolist()).reshape(shape)
    return objects(int(i) if isinstance(i, bool) else i for i in array.reshape(-1).tolist()).reshape(shape)


def _truth(item: Item) -> bool | None:
    if item is None or isinstance(item, bool):
        return item
    verdict = equal(item, 0)
    return None if verdict is Verdict.UNKNOWN else verdict is Verdict.NO


def _reduce(operation: Callable[[Facts, Dim, Dim], Dim]) -> Rule:
    def rule(facts: Facts, node: Node, slot: int, shape: Shape) -> Items | None:
        array, along = _input(facts, node, 0), axes(node, facts)
        if array is None or along is None or array.size == 0:
            return None
        fold = _arithmetic(operation)
        kept = [axis for axis in range(array.ndim) if axis not in along]
        rows = array.transpose([*kept, *along]).reshape(prod(array.shape[axis] for axis in kept), -1)
        return objects(fold(facts, *row) for row in rows.tolist()).reshape(shape)

    return rule


def _cumulative_sum(facts: Facts, node: Node, slot: int, shape: Shape) -> Items | None:
    array = _input(facts, node, 0)
    if array is None or array.ndim != 1 or attribute_int(node, "exclusive") or attribute_int(node, "reverse"):
        return None
    total: Item = 0
    result = []
    for item in array.tolist():
        total = _arithmetic(_add)(facts, total, item)
        result.append(total)
    return objects(result)


RULES: dict[str, Rule] = {
    "Abs": _each(_absolute),
    "Add": _each(_arithmetic(_add)),
    "And": _each(_and),
    "Cast": _cast,
    "CastLike": _cast,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "CumSum": _cumulative_sum,
    "Div": _each(_arithmetic(_divide)),
    "Dropout": _same,
    "Equal": _each(_compare(_equal)),
    "Expand": _expand,
    "Flatten": _reshape,
    "Gather": _gather,
    "Greater": _each(_compare(lambda facts, a, b: _less(facts, b, a))),
    "GreaterOrEqual": _each(_compare(lambda facts, a, b: _less(facts, b, a + 1))),
    "Identity": _same,
    "Less": _each(_compare(_less)),
    "LessOrEqual": _each(_compare(lambda facts, a, b: _less(facts, a, b + 1))),
    "Max": _each(_arithmetic(_largest)),
    "Min": _each(_arithmetic(_smallest)),
    "Mod": _mod,
    "Mul": _each(_arithmetic(_multiply)),
    "Neg": _each(_negate),
    "Not": _each(_not),
    "Or": _each(_or),
    "Pad": _pad,
    "Pow": _each(_arithmetic(_power)),
    "Range": _range,
    "ReduceMax": _reduce(_largest),
    "ReduceMin": _reduce(_smallest),
    "ReduceProd": _reduce(_multiply),
    "ReduceSum": _reduce(_add),
    "Reshape": _reshape,
    "Shape": _shape,
    "Sign": _each(_sign),
    "Size": _size,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Sub": _each(_arithmetic(_subtract)),
    "Sum": _each(_arithmetic(_add)),
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _reshape,
    "Where": _each(_where),
}
