"""Powers: Sqrt, Reciprocal, Pow and x * x are one thing, base ** exponent."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusion.terms import Prod, Ref, power

if TYPE_CHECKING:
    from fusion.graph import Node
    from fusion.view import View

EXPONENT = {"Sqrt": 0.5, "Reciprocal": -1.0}
OPERATORS = frozenset({*EXPONENT, "Pow"})


def normalise(node: Node, ref: Ref, view: View) -> Prod | None:
    """Return `node` as a product of powers, or None where its exponent is not a known number.

    (x ** even) ** fraction is left alone: it is |x|, not x.
    """
    exponent = EXPONENT.get(node.op)
    if exponent is None:
        given = node.input(1)
        exponent = None if given is None else view.number(given)
    base = view.operand(ref, node, 0)
    if exponent is None or base is None:
        return None
    return power(view.factor(base), exponent)
