"""Products: the coefficient and the factors of a plan's term against those of a value."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from fusion import plan as p
from fusion.laws import ring
from fusion.matching.describe import describe
from fusion.matching.state import Context, State
from fusion.plan import UNARY, is_clamp
from fusion.terms import Atom, Factors, Item, Prod, Ref, Sum, leaf, multiply, number, power
from fusion.verdict import Verdict
from fusion.view import MERGED

if TYPE_CHECKING:
    from fusion.matching.match import Matcher

FUNCTIONS = MERGED | UNARY | ring.LIKE_SUMS
"""Operators below which, to explain, the operand is looked at where it should have been the result."""


class ProductPlan(NamedTuple):
    """The factors of a plan's term by how they match: sorted out once, for a plan meets thousands of values.

    Attributes:
        formulas: in the order in which they are tried.
        variables: captures other than a scalar.
        scalar: the capture that takes up the coefficient.
        least, most: how many factors a value must have.
        opened: how many of these may be no value of the graph, such as a sum: no capture and no operator matches one.
    """

    formulas: list[tuple[Atom, float]]
    variables: list[tuple[p.Var, float]]
    scalar: tuple[str, float] | None
    least: int
    most: int
    opened: int


class Products:
    """Matches products of one plan.

    Args:
        matcher: which the factors are matched by.
    """

    def __init__(self, matcher: Matcher) -> None:
        self.matcher = matcher
        self.view = matcher.view
        self.plan = matcher.plan
        self.record = matcher.record
        self._known: dict[int, tuple[Factors, ProductPlan]] = {}

    def match(self, term: Prod, given: Prod, context: Context, state: State, place: str) -> Iterator[State]:
        """Match coefficient and factors; the one scalar capture among the factors takes up the coefficient."""
        single = term.single
        if isinstance(single, Sum):
            core, alone = self.matcher.sums.core(single, state)
            if core is not None:
                yield from self.match(core, given, context, alone, place)
        parts = self.plan_of(term.factors)
        formulas, variables, scalar = parts.formulas, parts.variables, parts.scalar
        if not self.record and not _may_fit(parts, given.factors):
            return
        if self.record and (spread := _spread(term)) is not None:
            whole = given.single
            ways: Iterator[tuple[State, float]] = iter(())
            if isinstance(whole, Sum):
                ways = self.matcher.sums.match(spread, whole, context, state, place)
            elif isinstance(whole, Ref):
                ways = self.matcher.atoms.no_sum(spread, whole, context, state)
            for matched, scale in ways:
                yield from self._coefficient(1.0, None, scale, matched, place)
        self.matcher.place = place or self.matcher.place
        if self.record and formulas:
            yield from self._unknown(term, given, state, place)
        if scalar is None and len(formulas) == 1 and not variables and given.coef != 1.0:
            given = _distribute(formulas[0], given)
        free = scalar is not None and scalar[0] not in state.bound
        whole = False
        for found, scale in self._formulas(formulas, list(given.factors), given.coef, context, state, free, place):
            rest, matched = found
            for done in self.matcher.assign(variables, rest, self, context, matched, place):
                for finished in self._coefficient(term.coef, scalar, given.coef * scale, done, place):
                    whole = whole or finished.misses is state.misses
                    yield finished
        if not whole and scalar is None and (opened := self._opened(given)) is not None:
            yield from self.match(term, opened, context, state, place)

    def _opened(self, given: Prod) -> Prod | None:
        """The product with the numbers of its shared factors taken out; None where none of them has one.

        In h + h erf(x) with h = x / 2, the number of the product is in h.
        """
        numbered = [self.matcher.behind(atom) for atom, _ in given.factors]
        if not any(numbered):
            return None
        parts = [number(given.coef)]
        for (atom, exponent), behind in zip(given.factors, numbered, strict=True):
            inner = leaf(atom) if behind is None else Prod(behind[1], ((behind[0], 1.0),))
            parts.append(power(inner, exponent) or Prod(1.0, ((atom, exponent),)))
        return multiply(*parts)

    def plan_of(self, factors: Factors) -> ProductPlan:
        """The factors of a term of the plan, sorted out."""
        known = self._known.get(id(factors))
        if known is not None:
            return known[1]
        formulas: list[tuple[Atom, float]] = []
        kept: list[tuple[Atom, float]] = []
        variables: list[tuple[p.Var, float]] = []
        scalar: tuple[str, float] | None = None
        optional = 0
        for atom, exponent in factors:
            if isinstance(atom, p.Kept):  # it binds captures only: what binds letters comes first
                kept.append((atom, exponent))
            elif not isinstance(atom, p.Var):
                formulas.append((atom, exponent))
            elif self.plan.captures[atom.name].kind == "scalar":
                scalar = (atom.name, exponent)
            else:
                variables.append((atom, exponent))
                optional += self.plan.captures[atom.name].kind != "tensor"
        formulas += kept
        most = len(formulas) + len(variables)
        values = (p.Op, p.Softmax, p.Operator, p.Fused, p.Kept)
        opened = sum(not isinstance(atom, values) or is_clamp(atom) for atom, _ in formulas)
        parts = ProductPlan(formulas, variables, scalar, most - optional, most, opened)
        self._known[id(factors)] = factors, parts
        return parts

    def _formulas(
        self,
        formulas: list[tuple[Atom, float]],
        given: list[tuple[Atom, float]],
        coef: float,
        context: Context,
        state: State,
        free: bool,
        place: str,
    ) -> Iterator[tuple[tuple[list[tuple[Atom, float]], State], float]]:
        """Assign each formula a factor; yield the factors left, the state, and the scale the factors carry."""
        if not formulas:
            yield (given, state), 1.0
            return
        (atom, exponent), others = formulas[0], formulas[1:]
        found = False
        for index, (candidate, own) in enumerate(given):
            if own != exponent and not self.matcher.close(own, exponent):
                continue
            remaining = given[:index] + given[index + 1 :]
            for matched, scale in self.matcher.atoms.match(atom, candidate, context, state, free):
                found = found or matched.misses is state.misses
                share = _power(scale, exponent)
                states: Iterator[State] = iter((matched,))
                if share is None:
                    states = self.matcher.miss(
                        matched, "constant", describe(atom, exponent), f"{scale:g} times", 1, place
                    )
                for current in states:
                    for rest, more in self._formulas(others, remaining, coef, context, current, free, place):
                        yield rest, (1.0 if share is None else share) * more
        if self.record and not found:
            for index, (candidate, own) in enumerate(given):
                remaining = given[:index] + given[index + 1 :]
                for matched, scale in self._nearly(atom, exponent, candidate, own, context, state, free):
                    for rest, more in self._formulas(others, remaining, coef, context, matched, free, place):
                        yield rest, (_power(scale, exponent) or 1.0) * more
            lost = self.matcher.lost(atom)
            if not self.matcher.may_miss(state, lost, place):
                return
            kinds = ", ".join(describe(candidate, own) for candidate, own in given) or f"the number {coef:g}"
            for missed in self.matcher.miss(state, "operator", describe(atom, exponent), kinds, lost, place):
                for rest, more in self._formulas(others, given, coef, context, missed, free, place):
                    yield rest, more

    def _unknown(self, term: Prod, given: Prod, state: State, place: str) -> Iterator[State]:
        """A fact is missing that would tell whether a part of the formula is there."""
        for atom, _ in given.factors:
            fact = self.view.unknown(atom) if isinstance(atom, Ref) else ""
            if fact:
                lost = min(p.weight(term), 2)  # nothing speaks against it
                yield from self.matcher.miss(state, "dimension", "a formula", fact, lost, place, Verdict.UNKNOWN)

    def _nearly(
        self, atom: Atom, exponent: float, given: Atom, own: float, context: Context, state: State, free: bool
    ) -> Iterator[tuple[State, float]]:
        """Match, to explain, a factor of another exponent, or what lies below a function of one value."""
        wanted, found, place = describe(atom, exponent), describe(given, own), self.matcher.name(given)
        if own != exponent:
            for missed in self.matcher.miss(state, "constant", wanted, found, 1, place):
                yield from self.matcher.atoms.match(atom, given, context, missed, free)
        node = given.value.producer if isinstance(given, Ref) else None
        if isinstance(given, Ref) and node is not None and node.key in FUNCTIONS and not isinstance(atom, p.Op):
            operands = [index for index, value in enumerate(node.inputs) if value and self.view.number(value) is None]
            operand = self.view.operand(given, node, operands[0]) if len(operands) == 1 else None
            if operand is not None:
                opened = self.view.expand(operand).factors
                below = opened[0][0] if len(opened) == 1 else operand
                for missed in self.matcher.miss(state, "operator", wanted, found, 1, place):
                    yield from self.matcher.atoms.match(atom, below, context, missed, free)

    def _coefficient(
        self, expected: float, scalar: tuple[str, float] | None, found: float, state: State, place: str
    ) -> Iterator[State]:
        if scalar is None:
            if self.matcher.close(expected, found):
                yield state
            else:
                yield from self.matcher.miss(state, "constant", f"the factor {expected:g}", f"{found:g}", 1, place)
            return
        name, exponent = scalar
        value = found / expected
        if exponent != 1.0:
            if value <= 0:
                yield from self.matcher.miss(state, "constant", f"{name} ** {exponent:g}", f"{value:g}", 1, place)
                return
            value = value ** (1.0 / exponent)
        yield from self.matcher.bind_number(name, value, state, place)

    # -- the captures among the factors: see `Matcher.assign` ------------------------------------------------------

    noun = "factor"

    def bindable(
        self, variable: p.Var, exponent: float, factor: tuple[Atom, float], state: State, place: str
    ) -> Iterator[tuple[Ref, State]]:
        """The value that a factor is, where its exponent is that of the capture."""
        atom, own = factor
        if not isinstance(atom, Ref):
            return
        if own == exponent:
            yield atom, state
            return
        for missed in self.matcher.miss(state, "constant", describe(variable, exponent), describe(atom, own), 1, place):
            yield atom, missed

    def described(self, factor: tuple[Atom, float]) -> str:
        """A factor in words."""
        return describe(*factor)


def _may_fit(parts: ProductPlan, given: Factors) -> bool:
    """Whether the numbers of factors can agree: a cheap question that rules out most places."""
    if not parts.least <= len(given) <= parts.most:
        return False
    opened = parts.opened
    for atom, _ in given:
        if not isinstance(atom, Ref):
            opened -= 1
    return opened >= 0


def _distribute(formula: tuple[Atom, float], given: Prod) -> Prod:
    """Move the number before a sum into it where the formula is a bare sum: c (a + b) is c a + c b."""
    atom, exponent = formula
    if not isinstance(atom, Sum) or exponent != 1.0 or len(given.factors) != 1 or given.factors[0][1] != 1.0:
        return given
    inner = given.factors[0][0]
    if not isinstance(inner, Sum):
        return given
    items = tuple(Item(i.coef * given.coef, i.factors, i.origin, i.share * given.coef) for i in inner.items)
    return Prod(1.0, ((Sum(inner.const * given.coef, items), 1.0),))


def _spread(term: Prod) -> Sum | None:
    """c x (a + b) as c x a + c x b; None where the term is no product with a sum."""
    inner = [atom for atom, exponent in term.factors if isinstance(atom, Sum) and exponent == 1.0]
    if not inner or len(term.factors) == 1:
        return None
    rest = Prod(term.coef, tuple(factor for factor in term.factors if factor[0] is not inner[0]))
    parts = [multiply(rest, Prod(item.coef, item.factors)) for item in inner[0].items]
    parts += [multiply(rest, number(inner[0].const))] if inner[0].const else []
    return Sum(0.0, tuple(Item(part.coef, part.factors) for part in parts))


def _power(scale: float, exponent: float) -> float | None:
    """The number to a power, None where that is no real number."""
    try:
        share = scale**exponent
    except (ZeroDivisionError, OverflowError):
        return None
    return None if isinstance(share, complex) else float(share)
