"""Ring: + and * associate and commute; Sub, Neg, Div and Sum are spellings of them; numbers are folded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusion.terms import Item, Prod, Ref, add, multiply, power

if TYPE_CHECKING:
    from fusion.graph import Node
    from fusion.view import View

SUMS = frozenset({"Add", "Sub", "Sum"})
PRODUCTS = frozenset({"Mul", "Div", "Neg"})


def normalise(node: Node, ref: Ref, view: View) -> Prod | None:
    """Return a sum or product of the operands of `node` as they lie in the coordinates of `ref`.

    None where an operand cannot be aligned with the result (an unknown shape).
    """
    operands = [view.operand(ref, node, index) for index in range(len(node.inputs))]
    known = [operand for operand in operands if operand is not None]
    if len(known) < len(operands):
        return None
    if node.op in PRODUCTS:
        factors = [view.factor(operand) for operand in known]
        if node.op == "Neg":
            return multiply(Prod(-1.0, ()), factors[0])
        if node.op == "Div":
            inverse = power(factors[1], -1.0)
            return None if inverse is None else multiply(factors[0], inverse)
        return multiply(*factors)
    items: list[Item] = []
    for index, operand in enumerate(known):
        sign = -1.0 if node.op == "Sub" and index == 1 else 1.0
        term = view.factor(operand)
        items.append(Item(sign * term.coef, term.factors, operand if term.factors else None, sign))
    return add(0.0, items)
