"""Softmax: e = exp(x) over the sum of e along one axis is a softmax of x, however the quotient is written."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fusion.laws import guards, reduction, ring
from fusion.laws.arrange import arrange
from fusion.terms import Prod, Reduce, Ref, Sum

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fusion import plan as p
    from fusion.instances.spell import Speller
    from fusion.laws.writer import Written
    from fusion.models.graph import Node
    from fusion.view import View

OPERATORS = ring.PRODUCTS
"""Operators that may compute such a quotient."""


def normalise(node: Node, ref: Ref, view: View) -> Prod | None:
    """Return the product, or None where it is a softmax: that is a value of its own, not two factors."""
    term = ring.normalise(node, ref, view)
    return None if term is None or _quotient(term, view) is not None else term


def written_out(node: Node, ref: Ref, view: View) -> tuple[Ref, int] | None:
    """(x, axis) where `node` is exp(x) / Σ exp(x) along one axis of x; else None.

    Where x is not y - max(y), it overflows.
    """
    term = ring.normalise(node, ref, view) if node.key in OPERATORS else None
    return None if term is None else _quotient(term, view)


def _quotient(term: Prod, view: View) -> tuple[Ref, int] | None:
    """(x, axis) where a product is exp(x) / Σ exp(x)."""
    if len(term.factors) != 2:
        return None
    (power, one), (total, minus_one) = term.factors
    if one < minus_one:
        power, one, total, minus_one = total, minus_one, power, one
    if one != 1.0 or minus_one != -1.0:
        return None
    node = power.value.producer if isinstance(power, Ref) else None
    if not isinstance(power, Ref) or node is None or node.key != "Exp":
        return None
    summed, scores = reduction.total(total, view), view.operand(power, node, 0)
    shape = power.layout.source
    if scores is None or summed is None or summed[0].rank != 1 or not math.isclose(term.coef, summed[1]):
        return None
    for axis in range(len(shape)):
        kept: list[int | None] = [None if own == axis else own for own in range(len(shape))]
        if summed[0].child == Ref(power.value, power.layout.remap(shape, kept, extra=[axis])):
            return scores, axis
    return None


def without_maximum(ref: Ref, view: View, positions: Sequence[int]) -> Ref:
    """x where `ref` is x - max(x), the same along these axes, which a softmax over them does not see."""
    single = view.expand(ref).single
    if isinstance(single, Sum) and single.const == 0.0 and len(single.items) == 2:
        for kept, maximum in (single.items, single.items[::-1]):
            subtracted = maximum.factors[0][0]
            reduced = subtracted
            if isinstance(subtracted, Ref):
                reduced = view.expand(subtracted).single
            if kept.origin is not None and kept.coef == 1.0 and maximum.coef == -1.0 and isinstance(reduced, Reduce):
                inner = reduced.child
                if reduced.kind != "max" or not isinstance(inner, Ref) or any(map(inner.layout.depends, positions)):
                    continue
                if _reduces(inner, view.source(kept.origin), positions):
                    return kept.origin
    return ref


def _reduces(inner: Ref, source: Ref, positions: Sequence[int]) -> bool:
    """Whether a reduction of `inner` runs over these axes of `source`, and over nothing else of it.

    The maximum over others may be -inf, or far above, in a row where the own one is not.
    """
    axes, count = source.layout.axes, len(source.layout.axes)
    over = [factor for factors in inner.layout.axes[count:] for factor in factors]
    return (
        inner.value is source.value
        and inner.layout.offsets == source.layout.offsets
        and over == [factor for axis in positions for factor in axes[axis]]
        and all(inner.layout.axes[axis] == axes[axis] for axis in range(count) if axis not in positions)
    )


# -- spelling ---------------------------------------------------------------------------------------------------------


def spell(atom: p.Softmax, speller: Speller) -> Written:
    """Write a softmax, now and then with the maximum subtracted before, and then as a quotient.

    Where the formula is a softmax and nothing else, always so: else it would be the operator that it is to become.
    """
    draw, writer = speller.draw, speller.writer
    (label,) = speller.labels(atom.letters)
    scores = speller.value(atom.child)
    axis = next((index for index, group in enumerate(scores.axes) if group == (label,)), None)
    # Below opset 13 a softmax flattens from its axis on, so only the last one is the axis alone.
    if axis is None or (axis != len(scores.axes) - 1 and writer.opset < 13):
        others = [group for group in scores.axes if label not in group]
        scores = arrange(writer, scores, (*others, (label,)))
        axis = len(scores.axes) - 1
    if speller.is_whole(atom) or draw.chance(6):
        scores = speller.elementwise("Sub", scores, reduction.reduce("ReduceMax", scores, (label,), speller))
        if draw.choose(False, True):
            power = writer.node("Exp", [scores], scores.axes)
            total = reduction.reduce("ReduceSum", power, (label,), speller)
            return guards.spell(ring.fold([(power, False), (total, True)], 1.0, speller), speller)
    absent = writer.opset >= 13 and axis == len(scores.axes) - 1 and draw.chance(3)
    (given,) = writer.signed([axis], len(scores.axes))
    return guards.spell(writer.node("Softmax", [scores], scores.axes, axis=None if absent else given), speller)
