"""Clamps: Clip up to a number is this number times a clamp up to 1, and HardSigmoid is a clamp to [0, 1].

A root that is kept from being 0 is the root of a sum with a number, as good as.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from fusion.schema import attribute
from fusion.terms import Clamp, Item, Prod, Ref, add, leaf, multiply, number, power

if TYPE_CHECKING:
    from fusion.instances.spell import Speller
    from fusion.laws.writer import Written
    from fusion.models.graph import Node
    from fusion.plan import Op
    from fusion.view import View

OPERATORS = frozenset({"Clip", "HardSigmoid"})
LARGEST = 3.4e38
"""An upper bound above it is none."""
TINY = 1.001e-12
"""What roots are kept above so that nobody divides by 0; a norm is taken to be 0 or far above it."""


def normalise(node: Node, ref: Ref, view: View) -> Prod | None:
    """Return high clamp(x / high) for Clip, clamp(alpha x + beta) for HardSigmoid, sqrt(x² + low²) for a root x that is
    only kept above a tiny number.

    None where a bound is no known number, another one is absent, or the upper one is not above 0.
    """
    operand = view.operand(ref, node, 0)
    if operand is None:
        return None
    if node.op == "HardSigmoid":
        scale, shift = attribute(node, "alpha"), attribute(node, "beta")
        if not isinstance(scale, float) or not isinstance(shift, float):
            return None
        scaled = multiply(number(scale), view.factor(operand))
        return leaf(Clamp(add(shift, [Item(scaled.coef, scaled.factors)])))
    if node.version < 11:
        bounds = [attribute(node, name) for name in ("min", "max")]
    else:
        bounds = [None if value is None else view.number(value) for value in (node.input(1), node.input(2))]
        if node.input(2) is None:
            bounds[1] = inf
    low, high = bounds
    if not isinstance(low, float) or not isinstance(high, float) or high <= 0.0:
        return None
    if high > LARGEST:
        return _rooted(view.factor(operand), low) if 0.0 < low <= TINY else None
    return Prod(high, ((Clamp(multiply(number(1.0 / high), view.factor(operand)), low / high), 1.0),))


def _rooted(root: Prod, low: float) -> Prod | None:
    """sqrt(root² + low²) for the larger of a root and `low`; None where it is no root."""
    if root.coef <= 0.0 or len(root.factors) != 1 or root.factors[0][1] != 0.5:
        return None
    squared = power(root, 2.0)
    return squared and power(add(low * low, [Item(squared.coef, squared.factors)]), 0.5)


# -- spelling ---------------------------------------------------------------------------------------------------------


def spell(atom: Op, speller: Speller) -> Written:
    """Write clamp(x) as Clip between 0 and a number, before or after which x is scaled, or as HardSigmoid."""
    draw, writer = speller.draw, speller.writer
    width = draw.choose(1.0, 6.0)
    operand = speller.value(multiply(number(width), atom.child))
    if width == 1.0 and draw.choose(False, True):
        return writer.node("HardSigmoid", [operand], operand.axes, alpha=1.0, beta=0.0)
    if writer.opset < 11:
        clipped = writer.node("Clip", [operand], operand.axes, min=0.0, max=width)
    else:
        bounds = (writer.number(0.0, 0, operand.dtype), writer.number(width, 0, operand.dtype))
        clipped = writer.node("Clip", [operand, *bounds], operand.axes)
    return speller.scaled(clipped, 1.0 / width)
