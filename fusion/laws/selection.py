"""Selection: Where(c, s, f), and s [c] + f (1 - [c]), where [c] is a boolean that was cast to a number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from onnx import TensorProto

from fusion.laws import linear, ring
from fusion.terms import Atom, Group, Prod, Ref, Sum

if TYPE_CHECKING:
    from fusion.models.graph import Node, Value
    from fusion.view import View

DEPTH = 6
"""How many operators the number that is selected may be made of."""


class Selection(NamedTuple):
    """coef * chosen where `condition` is `keep`, else the number `fill`.

    `read` are the values that say so, of which none is computed from what is chosen.
    """

    chosen: Ref
    coef: float
    condition: Ref
    keep: bool
    fill: float
    read: tuple[Value, ...]


def normalise(node: Node, ref: Ref, view: View) -> Prod | None:
    """Return the sum, or None where it selects: that is a value of its own, as Where gives it."""
    return None if next(selections(node, ref, view), None) else ring.normalise(node, ref, view)


def selections(node: Node, ref: Ref, view: View) -> Iterator[Selection]:
    """The ways to read a value as a selection between another and a number."""
    if node.key == "Where":
        condition, yes, no = view.beside(ref, node, 0), view.operand(ref, node, 1), view.operand(ref, node, 2)
        for chosen, other, keep in ((yes, no, True), (no, yes, False)):
            fill = None if other is None else view.number(other.value)
            if condition is not None and chosen is not None and fill is not None:
                yield Selection(chosen, 1.0, condition, keep, fill, ())
    elif node.key in ring.SUMS and len(node.inputs) == 2:
        for index in (0, 1):
            yield from _blended(node, index, ref, view)


def _blended(node: Node, index: int, ref: Ref, view: View) -> Iterator[Selection]:
    """The selections of which one operand of a sum is the product."""
    product, other = view.operand(ref, node, index), view.operand(ref, node, 1 - index)
    if product is None or other is None:
        return
    product, coef = linear.without_numbers(product, view)
    times = product.value.producer
    if times is None or times.key != "Mul":
        return
    for side in (0, 1):
        chosen, factor = view.operand(product, times, 1 - side), view.operand(product, times, side)
        truth = None if factor is None else _indicated(factor, view)
        if chosen is None or factor is None or truth is None:
            continue
        condition, keep = truth
        there, elsewhere = (_number(other, condition, holds, view, DEPTH) for holds in (keep, not keep))
        if there == 0.0 and elsewhere is not None:
            signs = (1.0, -1.0) if node.op == "Sub" else (1.0, 1.0)
            read = (factor.value, other.value)
            yield Selection(chosen, signs[index] * coef, condition, keep, signs[1 - index] * elsewhere, read)


def _indicated(ref: Ref, view: View) -> tuple[Ref, bool] | None:
    """(c, b) where a value is 1 where c is b, and 0 elsewhere; None where it is no boolean cast to a number."""
    ref, keep = view.peel(ref).ref, True
    node = ref.value.producer
    source = node.inputs[0] if node is not None and node.key == "Cast" else None
    if node is None or source is None or view.facts.dtype(source) != TensorProto.BOOL:
        return None
    condition = view.operand(ref, node, 0)
    while condition is not None:
        condition = view.peel(condition).ref
        node = condition.value.producer
        if node is None or node.key != "Not":
            return condition, keep
        condition, keep = view.operand(condition, node, 0), not keep
    return None


def _number(ref: Ref, condition: Ref, holds: bool, view: View, depth: int) -> float | None:
    """The number that a value is wherever a condition holds, or does not; None where it is none."""
    number, truth = view.number(ref.value), _indicated(ref, view)
    if number is not None:
        return number
    if truth is not None:
        return float(truth[1] is holds) if truth[0] == condition else None
    term = view.expand(ref)
    return _term(term, condition, holds, view, depth - 1) if depth and term.single != view.peel(ref).ref else None


def _term(term: Prod, condition: Ref, holds: bool, view: View, depth: int) -> float | None:
    total = term.coef
    for atom, exponent in term.factors:
        found = _atom(atom, condition, holds, view, depth)
        if found is None or (found == 0.0 and exponent < 0):
            return None
        total *= found**exponent
    return total


def _atom(atom: Atom, condition: Ref, holds: bool, view: View, depth: int) -> float | None:
    if isinstance(atom, Ref):
        return _number(atom, condition, holds, view, depth)
    if isinstance(atom, Group):
        return _term(atom.product, condition, holds, view, depth)
    if not isinstance(atom, Sum):
        return None
    parts = [_term(Prod(item.coef, item.factors), condition, holds, view, depth) for item in atom.items]
    return None if None in parts else atom.const + sum(part for part in parts if part is not None)
