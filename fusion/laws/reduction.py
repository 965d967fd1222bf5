"""Reduction: ReduceMean, ReduceSum, ReduceSumSquare and ReduceL2 over known axes are means, times the count."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusion.dims import product
from fusion.schema import attribute, axes
from fusion.terms import Prod, Reduce, Ref, leaf, multiply, number, power

if TYPE_CHECKING:
    from fusion.graph import Node
    from fusion.view import View

OPERATORS = frozenset({"ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2", "ReduceMax"})


def normalise(node: Node, ref: Ref, view: View) -> Prod | None:
    """Return the reduction over coordinate axes appended to those of `ref`.

    None where the axes or the shape are unknown, or where a sum counts an unknown number of elements.
    """
    operand = lift(node, ref, view)
    if operand is None:
        return None
    child, rank = operand
    if node.op == "ReduceMax":
        return leaf(Reduce("max", view.peel(child).ref, rank))
    if node.op == "ReduceMean":
        return leaf(Reduce("mean", view.peel(child).ref, rank))
    count = product(child.layout.shape[-rank:])
    if not isinstance(count, int):
        return None
    if node.op == "ReduceSum":
        return multiply(number(count), leaf(Reduce("mean", view.peel(child).ref, rank)))
    square = power(view.factor(child), 2.0)
    assert square is not None, "an integer power of a finite number is defined"
    total = multiply(number(count), leaf(Reduce("mean", square, rank)))
    return power(total, 0.5) if node.op == "ReduceL2" else total


def lift(node: Node, ref: Ref, view: View) -> tuple[Ref, int] | None:
    """Return the operand of a reduction with one coordinate axis more per reduced axis, and how many those are."""
    value = node.inputs[0]
    shape = view.facts.shape(value) if value is not None else None
    reduced = axes(node, view.facts)
    if value is None or shape is None or reduced is None:
        return None
    kept = [axis for axis in range(len(shape)) if axis not in reduced]
    if attribute(node, "keepdims") == 0:
        axis_of: list[int | None] = list(kept)
    else:
        axis_of = [None if axis in reduced else axis for axis in range(len(shape))]
    return Ref(value, ref.layout.remap(shape, axis_of, extra=sorted(reduced))), len(reduced)
