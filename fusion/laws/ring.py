"""Ring: + and * associate and commute; Sub, Neg, Div and Sum are spellings of them; numbers are folded."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from fusion.laws import contraction, guards, powers
from fusion.terms import Atom, Item, Prod, Ref, Sum, add, leaf, multiply, number, power

if TYPE_CHECKING:
    from fusion.instances.spell import Speller
    from fusion.laws.writer import Written
    from fusion.models.graph import Node
    from fusion.view import View

    Token: TypeAlias = tuple[Written | float, bool]
    """An operand, and whether it is divided by, or subtracted."""

SUMS = frozenset({"Add", "Sub", "Sum"})
PRODUCTS = frozenset({"Mul", "Div", "Neg"})
LIKE_SUMS = frozenset({"Max", "Min", "Mean"})
"""Operators of as many operands as there are, of which none comes first."""


def normalise(node: Node, ref: Ref, view: View) -> Prod | None:
    """Return a sum or product of the operands of `node` as they lie in the coordinates of `ref`.

    None where an operand cannot be aligned with the result (an unknown shape).
    """
    factors: list[Prod] = []
    origins: list[Ref | None] = []
    for index, value in enumerate(node.inputs):
        constant = view.number(value) if value is not None else None
        operand = view.operand(ref, node, index) if constant is None else None
        if constant is None and operand is None:
            return None
        factors.append(number(constant) if operand is None else view.factor(operand))  # type: ignore[arg-type]
        origins.append(operand)
    if node.op == "Neg":
        return multiply(number(-1.0), factors[0])
    if node.op == "Div":
        inverse = power(factors[1], -1.0)
        return None if inverse is None else multiply(factors[0], inverse)
    if node.op == "Mul":
        return multiply(*factors)
    items: list[Item] = []
    for index, (term, origin) in enumerate(zip(factors, origins, strict=True)):
        sign = -1.0 if node.op == "Sub" and index == 1 else 1.0
        items.append(Item(sign * term.coef, term.factors, origin, sign))
    return _gathered(add(0.0, items), view)


def _gathered(term: Prod, view: View) -> Prod:
    """A sum in which summands are one that alone read a factor: x a - y a + b is (x - y) a + b, and a is opened.

    What several summands read is one thing, and read once when it is pulled out of them.
    """
    single = term.single
    if not isinstance(single, Sum):
        sums = [atom for atom, _ in term.factors if isinstance(atom, Sum)]
        summands = len(sums[0].items) + bool(sums[0].const) if len(sums) == 1 else 0
        return multiply(number(term.coef), *(_opened(atom, own, summands, view) for atom, own in term.factors))
    for atom in dict.fromkeys(atom for item in single.items for atom, _ in item.factors):
        among = [item for item in single.items if atom in dict(item.factors)]
        if not isinstance(atom, Ref) or not 1 < len(among) == view.readers(atom.value):
            continue
        inner = add(0.0, among)
        if not isinstance(inner.single, Sum):
            inner = _gathered(inner, view)
            others = [item for item in single.items if item not in among]
            return _gathered(add(single.const, [Item(inner.coef, inner.factors), *others]), view)
    return term


def _opened(atom: Atom, exponent: float, summands: int, view: View) -> Prod:
    """A factor that was pulled out of summands: opened where they alone read it."""
    alone = isinstance(atom, Ref) and 1 < summands == view.readers(atom.value)
    opened = power(view.expand(atom), exponent) if isinstance(atom, Ref) and alone else None
    return opened or Prod(1.0, ((atom, exponent),))


def one_level(ref: Ref, view: View) -> Prod | None:
    """The sum of the operands of an addition as they are grouped in the graph; None where `ref` is no addition.

    A capture may stand for a sum of its own: in (a + b) + c the graph has a value for a + b.
    """
    ref = view.source(ref)
    node = ref.value.producer
    if node is None or node.key not in SUMS:
        return None
    items: list[Item] = []
    for index in range(len(node.inputs)):
        operand = view.operand(ref, node, index)
        if operand is None:
            return None
        sign = -1.0 if node.op == "Sub" and index == 1 else 1.0
        items.append(Item(sign, ((view.source(operand), 1.0),), operand, sign))
    return leaf(Sum(0.0, tuple(items)))


def spell(term: Prod, speller: Speller, *, flat: bool = False) -> Written:
    """Write a product: any order and association, Div for Mul by an inverse, Neg, a factor distributed over a sum.

    Args:
        term: what to write.
        flat: whether the product is a summand, where distributing it would leave another sum.
    """
    single = term.single
    if single is not None:
        return speller.atom(single)[0]
    draw = speller.draw
    inner = _distributable(term, speller)
    if inner is not None and not flat and draw.chance(4):
        return _distribute(term, inner, speller)
    coef = term.coef
    tokens: list[Token] = []
    for atom, exponent in draw.shuffled(term.factors):
        value, left = speller.atom(atom, coef if exponent == 1.0 else 1.0)
        coef = left if exponent == 1.0 else coef
        below = exponent < 0 and not draw.chance(3)
        tokens.append((powers.spell(value, -exponent if below else exponent, speller), below))
    return fold(tokens, coef, speller)


def fold(tokens: list[Token], coef: float, speller: Speller) -> Written:
    """Multiply and divide the tokens and a number, two at a time."""
    draw = speller.draw
    left: list[Token] = list(tokens)
    negated = coef < 0 and draw.chance(2)
    coef = -coef if negated else coef
    if coef != 1.0 or not left:
        left.extend(_numbers(coef, speller))
    while len(left) > 1:
        first, second = left.pop(draw.index(len(left))), left.pop(draw.index(len(left)))
        left.append(_pair(first, second, speller))
    value, below = left[0]
    written = speller.writer.number(value) if isinstance(value, float) else value
    if below:
        written = powers.spell(written, -1.0, speller)
    return speller.writer.node("Neg", [written], written.axes) if negated else written


def _numbers(coef: float, speller: Speller) -> list[Token]:
    """A number as one constant to multiply, or to divide by; or as two."""
    draw = speller.draw
    if draw.chance(6):
        return [(2.0, False), (coef / 2.0, False)]
    if coef != 0.0 and draw.chance(3):
        return [(1.0 / coef, True)]
    return [(coef, False)]


def _pair(first: Token, second: Token, speller: Speller) -> Token:
    """One token for two."""
    (left, left_below), (right, right_below) = (second, first) if first[1] else (first, second)
    if isinstance(left, float) and isinstance(right, float):
        return (left / right if right_below and not left_below else left * right), left_below
    over, under = _operand(left, right, speller), _operand(right, left, speller)
    if left_below == right_below:
        operands = (over, under) if speller.draw.choose(True, False) else (under, over)
        return speller.elementwise("Mul", *operands), left_below
    return speller.elementwise("Div", over, under), False


def _operand(value: Written | float, beside: Written | float, speller: Speller) -> Written:
    """A number becomes a constant that fits what it is combined with."""
    if not isinstance(value, float):
        return value
    rank, dtype = (0, None) if isinstance(beside, float) else (len(beside.axes), beside.dtype)
    return speller.writer.number(value, rank, dtype)


def _distributable(term: Prod, speller: Speller) -> Sum | None:
    """The sum over which the rest of a product may be distributed."""
    sums = [atom for atom, exponent in term.factors if isinstance(atom, Sum) and exponent == 1.0]
    usable = [atom for atom in sums if not speller.is_shared(atom) and not any(map(speller.is_rest, atom.items))]
    return usable[0] if usable else None


def _distribute(term: Prod, inner: Sum, speller: Speller) -> Written:
    """f (a + b) as f a + f b; a factor that is a formula is computed once, now and then with its number."""
    others: list[tuple[Atom, float]] = []
    for atom, exponent in term.factors:
        if atom is not inner:
            others.append((atom, exponent) if speller.is_variable(atom) else (speller.done(leaf(atom)), exponent))
    coef = term.coef
    if others and coef != 1.0 and speller.draw.chance(3):
        others, coef = [(speller.done(Prod(coef, tuple(others))), 1.0)], 1.0
    items = [Item(coef * item.coef, _merged(others, item.factors)) for item in inner.items]
    if inner.const != 0.0:
        items.append(Item(coef * inner.const, tuple(others)))
    const = items.pop().coef if not items[-1].factors else 0.0
    return spell_sum(Sum(const, tuple(items)), speller)


def _merged(left: list[tuple[Atom, float]], right: tuple[tuple[Atom, float], ...]) -> tuple[tuple[Atom, float], ...]:
    return multiply(Prod(1.0, tuple(left)), Prod(1.0, right)).factors


def spell_sum(term: Sum, speller: Speller) -> Written:
    """Write a sum: any order and association, Sub for a negative summand, Sum for several, Gemm for a contraction.

    What a `rest` capture stands for is added and masked around everything else.
    """
    draw = speller.draw
    beside = [entry for item in term.items if speller.is_rest(item) for entry in speller.rest(item)]
    items = [item for item in term.items if not speller.is_rest(item)]
    whole = contraction.spell_gemm(term, speller) if len(items) == 2 and not beside else None
    tokens: list[Token] = [] if whole is None else [(whole, False)]
    for item in draw.shuffled(items) if whole is None else ():
        below = item.coef < 0 and not draw.chance(3)
        tokens.append((speller.value(Prod(-item.coef if below else item.coef, item.factors), flat=True), below))
    if term.const != 0.0:
        below = draw.chance(3)
        tokens.append((-term.const if below else term.const, below))
    while len(tokens) > 1:
        positive = [token for token in tokens if not token[1] and not isinstance(token[0], float)]
        if len(positive) > 1 and draw.chance(5):
            tokens = [token for token in tokens if token not in positive]
            tokens.append((speller.elementwise("Sum", *(v for v, _ in positive if not isinstance(v, float))), False))
            continue
        first, second = tokens.pop(draw.index(len(tokens))), tokens.pop(draw.index(len(tokens)))
        tokens.append(_pair_sum(first, second, speller))
    value, below = tokens[0]
    assert not isinstance(value, float), "a sum has at least one summand that is no number"
    written = speller.writer.node("Neg", [value], value.axes) if below else value
    for entry in beside:
        written = guards.spell_beside(written, entry, speller)
    return written


def _pair_sum(first: Token, second: Token, speller: Speller) -> Token:
    (left, left_below), (right, right_below) = (second, first) if first[1] else (first, second)
    over, under = _operand(left, right, speller), _operand(right, left, speller)
    if left_below == right_below:
        operands = (over, under) if speller.draw.choose(True, False) else (under, over)
        return speller.elementwise("Add", *operands), left_below
    return speller.elementwise("Sub", over, under), False
