"""Shape inputs as constants: what a chain of Shape, Gather and Concat works out, said by numbers, 0 and -1.

Only what holds for every size is written. Where a size may be 0, -1 is not: a runtime cannot infer it then.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import TensorProto

from fusion.dims import Dim, lower
from fusion.facts import Facts
from fusion.facts.common import attribute_int, listed_dims
from fusion.facts.pieces import cut, slice_bounds
from fusion.models.graph import Node
from fusion.simplify.edits import Editor

INTEGERS: dict[int | None, type[np.int64] | type[np.int32]] = {TensorProto.INT64: np.int64, TensorProto.INT32: np.int32}


def reshape_target(want: Sequence[Dim], have: Sequence[Dim], given: Sequence[Dim | None] = ()) -> list[int] | None:
    """The items of a Reshape to `want`: numbers, 0 where the axis is copied, one -1 for the rest.

    Args:
        want: the sizes of the result.
        have: those of the data.
        given: the items that the Reshape reads now; where there is a -1 already, it may stay.

    Returns:
        None where two sizes would have to be inferred, or one while another may be 0.
    """
    copied = [axis < len(have) and have[axis] == dim and not isinstance(dim, int) for axis, dim in enumerate(want)]
    items: list[int] = []
    inferred: int | None = None
    for axis, dim in enumerate(want):
        if isinstance(dim, int):
            if dim == 0 and not (axis < len(have) and have[axis] == 0):
                return None
            items.append(dim)
        elif copied[axis]:
            items.append(0)
        elif inferred is None:
            inferred = axis
            items.append(-1)
        else:
            return None
    if inferred is not None:
        was_inferred = inferred < len(given) and given[inferred] == -1
        others = [dim for axis, dim in enumerate(want) if axis != inferred]
        if not was_inferred and any(lower(dim) < 1 for dim in others):
            return None
    return items


def expand_target(want: Sequence[Dim], have: Sequence[Dim]) -> list[int] | None:
    """The items of an Expand of `have` to `want`: 1 where the axis is as it was."""
    missing = len(want) - len(have)
    items: list[int] = []
    for axis, dim in enumerate(want):
        if axis >= missing and have[axis - missing] == dim:
            items.append(1)
        elif isinstance(dim, int):
            items.append(dim)
        else:
            return None
    return items


def settle_sizes(editor: Editor, rule: str, node: Node) -> bool:
    """Let a Reshape, Expand or Slice read a constant where it reads computed sizes."""
    slot = SLOTS.get(node.key)
    sizes = None if slot is None else node.input(slot)
    if slot is None or sizes is None or sizes.producer is None or editor.facts.is_constant(sizes):
        return False
    items = _items(editor.facts, node)
    dtype = INTEGERS.get(editor.facts.dtype(sizes))
    if items is None or dtype is None:
        return False
    limits = np.iinfo(dtype)
    array = np.array([min(max(item, limits.min), limits.max) for item in items], dtype)
    editor.rewire(rule, node, slot, editor.constant(node.scope, array, "shape", node))
    return True


SLOTS = {"Reshape": 1, "Expand": 1, "Slice": 2}
"""Where operators read sizes."""


def _items(facts: Facts, node: Node) -> list[int] | None:
    data, result = node.input(0), node.outputs[0]
    have = None if data is None else facts.shape(data)
    if have is None:
        return None
    if node.op == "Slice":
        return _ends(facts, node, have)
    want = None if result is None else facts.shape(result)
    if want is None:
        return None
    if node.op == "Expand":
        return expand_target(want, have)
    given = listed_dims(facts, node, 1)
    if given is None:
        return None
    items = reshape_target(want, have, given)
    if items is not None and attribute_int(node, "allowzero") == 1 and 0 in items:
        return None
    return items


def _ends(facts: Facts, node: Node, have: Sequence[Dim]) -> list[int] | None:
    """Where a Slice ends: numbers, or as far as there is anything."""
    bounds = slice_bounds(facts, node)
    if bounds is None:
        return None
    items: list[int] = []
    for axis, (start, end, step) in bounds.items():
        if isinstance(end, int):
            items.append(end)
            continue
        first, length = cut(facts, have[axis], start, end, step)
        if step != 1 or first is None or length is None or first + length != have[axis]:
            return None
        items.append(np.iinfo(np.int64).max)
    return items
