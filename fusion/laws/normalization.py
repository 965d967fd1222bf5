"""Normalization: InstanceNormalization is arithmetic over means, read as if it were written out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusion.schema import attribute
from fusion.terms import Item, Prod, Reduce, Ref, Sum, add, leaf, multiply, number, power

if TYPE_CHECKING:
    from fusion.layout import Layout
    from fusion.models.graph import Node, Value
    from fusion.view import View

OPERATORS = frozenset({"InstanceNormalization"})


def normalise(node: Node, ref: Ref, view: View) -> Prod | None:
    """Return (x - mean x) (mean (x - mean x)² + epsilon) ** -½ scale + bias, the means over all axes after the second.

    A scale of ones and a bias of zeros, which exporters write to have none, are not there, though they are stored.
    None where the shape or epsilon is unknown, or x has no axis to take a mean over.
    """
    value, scale, bias = (node.input(slot) for slot in range(3))
    shape = view.facts.shape(value) if value is not None else None
    epsilon = attribute(node, "epsilon")
    if value is None or scale is None or bias is None or shape is None or len(shape) < 3:
        return None
    if not isinstance(epsilon, float):
        return None
    spread = _over(ref.layout)
    square = Prod(1.0, ((_centred(value, spread, view), 2.0),))
    variance = Item(1.0, ((Reduce("mean", square, len(shape) - 2), 1.0),))
    root = power(add(epsilon, [variance]), -0.5)
    if root is None:
        return None
    scaled = multiply(leaf(_centred(value, ref.layout, view)), root, _parameter(scale, 1.0, ref, view))
    shift = _parameter(bias, 0.0, ref, view)
    return add(0.0, [Item(scaled.coef, scaled.factors), Item(shift.coef, shift.factors, _channels(bias, ref))])


def _centred(value: Value, layout: Layout, view: View) -> Sum:
    """x - mean x where x lies as `layout` says."""
    source = view.peel(Ref(value, layout)).ref
    mean = Reduce("mean", view.peel(Ref(value, _over(layout))).ref, len(layout.source) - 2)
    return Sum(0.0, (Item(1.0, ((source, 1.0),), source), Item(-1.0, ((mean, 1.0),))))


def _over(layout: Layout) -> Layout:
    """The layout with one coordinate axis more for each axis after the second, which it no longer depends on."""
    rank = len(layout.source)
    return layout.remap(layout.source, [0, 1, *([None] * (rank - 2))], extra=range(2, rank))


def _parameter(value: Value, neutral: float, ref: Ref, view: View) -> Prod:
    return number(neutral) if view.facts.number(value) == neutral else view.factor(_channels(value, ref))


def _channels(value: Value, ref: Ref) -> Ref:
    """A parameter, one number for each channel, in the coordinates of the result."""
    layout = ref.layout
    return Ref(value, layout.remap(layout.source[1:2], [None, 0, *([None] * (len(layout.source) - 2))]))
