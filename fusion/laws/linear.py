"""Linear: numbers float through contractions and layouts: (c q) @ k is c (q @ k), so a scale may stand anywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusion.terms import Ref

if TYPE_CHECKING:
    from fusion.models.graph import Node
    from fusion.view import View

OPERATORS = frozenset({"Mul", "Div", "Neg"})


def without_numbers(ref: Ref, view: View, *, shared: bool = False) -> tuple[Ref, float]:
    """Take the numbers off an operand of a contraction: the reference behind them, and their product.

    What others read too stays as it is, unless `shared`: the number is of use to them.
    """
    coef = 1.0
    while True:
        source = view.source(ref)
        node = source.value.producer
        if node is None or node.key not in OPERATORS or not (shared or view.peel(ref).private):
            return source, coef
        following = behind(node, source, view)
        if following is None:
            return source, coef
        ref, coef = following[0], coef * following[1]


def behind(node: Node, ref: Ref, view: View) -> tuple[Ref, float] | None:
    """What `node` multiplies by a number, and the number; None where it does something else."""
    if node.key not in OPERATORS:
        return None
    if node.op == "Neg":
        operand = view.operand(ref, node, 0)
        return None if operand is None else (operand, -1.0)
    for index in (0, 1) if node.op == "Mul" else (0,):
        other = node.inputs[1 - index]
        number = view.number(other) if other is not None else None
        if number is None or (node.op == "Div" and number == 0.0):
            continue
        operand = view.operand(ref, node, index)
        return None if operand is None else (operand, number if node.op == "Mul" else 1.0 / number)
    return None
