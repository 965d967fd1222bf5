"""Powers: Sqrt, Reciprocal, Pow and x * x are one thing, base ** exponent."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx import TensorProto

from fusion.terms import Prod, Ref, power

if TYPE_CHECKING:
    from fusion.instances.spell import Speller
    from fusion.laws.writer import Written
    from fusion.models.graph import Node
    from fusion.view import View

EXPONENT = {"Sqrt": 0.5, "Reciprocal": -1.0}
OPERATORS = frozenset({*EXPONENT, "Pow"})
INT64 = TensorProto.INT64


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


def spell(base: Written, exponent: float, speller: Speller) -> Written:
    """Write base ** exponent as Pow, Sqrt, Reciprocal, Div or repeated Mul."""
    if exponent == 1.0:
        return base
    draw, writer = speller.draw, speller.writer
    if exponent in (2.0, 3.0) and draw.choose(False, True):
        square = writer.node("Mul", [base, base], base.axes)
        if exponent == 2.0:
            return square
        return writer.node("Mul", [square, base] if draw.choose(True, False) else [base, square], base.axes)
    if exponent == 3.0 and draw.chance(4):
        return writer.node("Mul", [base, spell(base, 2.0, speller)], base.axes)
    if exponent == 0.5 and not draw.chance(4):
        return writer.node("Sqrt", [base], base.axes)
    if exponent == -0.5 and not draw.chance(4):
        first, second = draw.choose((0.5, -1.0), (-1.0, 0.5))
        return spell(spell(base, first, speller), second, speller)
    if exponent == -1.0 and not draw.chance(4):
        if draw.choose(True, False):
            return writer.node("Reciprocal", [base], base.axes)
        return writer.node("Div", [writer.number(1.0, len(base.axes), base.dtype), base], base.axes)
    # From opset 12 on the exponent may be of another type; exporters write integers.
    whole = exponent == int(exponent) and writer.opset >= 12 and draw.chance(3)
    given = writer.number(exponent, len(base.axes), INT64 if whole else base.dtype)
    return writer.node("Pow", [base, given], base.axes)
