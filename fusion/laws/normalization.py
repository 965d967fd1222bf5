"""Normalization: InstanceNormalization, and BatchNormalization by a mean that is computed, read as if written out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusion.schema import attribute
from fusion.terms import Item, Prod, Reduce, Ref, Sum, add, leaf, multiply, number, power

if TYPE_CHECKING:
    from fusion.layout import Layout
    from fusion.models.graph import Node, Value
    from fusion.view import View

OPERATORS = frozenset({"InstanceNormalization", "BatchNormalization"})


def normalise(node: Node, ref: Ref, view: View) -> Prod | None:
    """Return the arithmetic of a normalization."""
    return _batch(node, ref, view) if node.op == "BatchNormalization" else _instance(node, ref, view)


def _batch(node: Node, ref: Ref, view: View) -> Prod | None:
    """Return (x - mean) (variance + epsilon) ** -½ scale + bias, which is how Keras normalizes layers, too.

    None where the mean is stored: that is a scale and a shift of each channel, and a value of its own.
    """
    value, scale, bias, mean, variance = (node.input(slot) for slot in range(5))
    shape = view.facts.shape(value) if value is not None else None
    epsilon = attribute(node, "epsilon")
    if value is None or scale is None or bias is None or mean is None or variance is None or len(shape or ()) < 2:
        return None
    if node.version < 9 or attribute(node, "training_mode") or not isinstance(epsilon, float):
        return None  # older ones may train, or normalize each element for itself
    if view.facts.is_constant(mean):
        return None
    source = view.peel(Ref(value, ref.layout)).ref
    centre, spread = (view.factor(_channels(own, ref)) for own in (mean, variance))
    root = power(add(epsilon, [Item(spread.coef, spread.factors)]), -0.5)
    if root is None:
        return None
    shifted = add(0.0, [Item(1.0, ((source, 1.0),), source), Item(-centre.coef, centre.factors)])
    return _affine(multiply(shifted, root), scale, bias, ref, view)


def _instance(node: Node, ref: Ref, view: View) -> Prod | None:
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
    return _affine(multiply(leaf(_centred(value, ref.layout, view)), root), scale, bias, ref, view)


def _affine(normed: Prod, scale: Value, bias: Value, ref: Ref, view: View) -> Prod:
    """normed * scale + bias, parameters of the channels."""
    scaled, shift = multiply(normed, _parameter(scale, 1.0, ref, view)), _parameter(bias, 0.0, ref, view)
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
