"""Masks: what a condition on scores provably leaves in every row.

A causal mask hides no key from its own query, so no row of it is hidden as a whole. It is read from the mask itself:
one column that is kept in all rows is enough, and in a triangle, however it is cut, that is the first one.
"""

from __future__ import annotations

from fusion.terms import Ref
from fusion.view import View

LARGEST_SCORE = 4096.0
"""What the magnitude of a score is taken to be below, where a mask writes a number that is not the smallest one.

A row that keeps a key then gives a hidden one at most exp(-104), which is 0 in float and nothing in double.
"""
ABSORBING = -2 * LARGEST_SCORE - 104.0

_PAYLOAD = 2**24
"""Elements up to which a mask is read: 4096 positions."""


def keeps_a_key(view: View, ref: Ref, keep: bool) -> bool:
    """Whether each row of the mask `ref` (…, keys) has an element that is `keep`, wherever there are keys at all.

    False where nobody knows.
    """
    ref = view.peel(ref).ref
    node = ref.value.producer
    if node is not None and node.key in ("Cast", "Not"):
        operand = view.operand(ref, node, 0)
        return operand is not None and keeps_a_key(view, operand, keep != (node.op == "Not"))
    return _first_column(view, ref, keep)


def _first_column(view: View, ref: Ref, keep: bool) -> bool:
    layout = ref.layout
    if not view.facts.is_constant(ref.value) or len(layout.axes[-1]) != 1:
        return False
    ((axis, _, _),) = layout.axes[-1]
    size = 1
    for dim in layout.source:
        size *= dim if isinstance(dim, int) else _PAYLOAD + 1
    if axis is None or size > _PAYLOAD or any(axis == own for factors in layout.axes[:-1] for own, _, _ in factors):
        return False
    offset = layout.offsets[axis]
    array = view.facts.constant(ref.value)
    if array is None or not isinstance(offset, int) or offset < 0 or offset >= array.shape[axis]:
        return False
    # Other axes may be cut anywhere: every row of the constant must keep the column.
    return bool(((array.take(offset, axis) != 0) == keep).all())
