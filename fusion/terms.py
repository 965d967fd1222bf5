"""Terms: the one-level normal form shared by patterns and graphs.

A value is a product `coef * atom ** exponent * …`; an atom is a leaf, or a sum
`const + coef * atom ** exponent * … + …`. What a leaf is differs: in a graph a `Ref` (a value, seen through a layout)
or a contraction or reduction over such; in a pattern a capture or an operator. The algebra below knows neither, so both
are normalised by the same code.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple

from fusion.dims import Dim
from fusion.layout import Layout
from fusion.models.graph import Value

Atom = Hashable
Factors = tuple[tuple[Atom, float], ...]


class Ref(NamedTuple):
    """A value of the graph in coordinates: `layout` maps coordinate axes to axes of `value`."""

    value: Value
    layout: Layout


class Prod(NamedTuple):
    """coef * Π atom ** exponent."""

    coef: float
    factors: Factors

    @property
    def single(self) -> Atom | None:
        """The atom where the product is nothing but one atom, else None."""
        if self.coef == 1.0 and len(self.factors) == 1 and self.factors[0][1] == 1.0:
            return self.factors[0][0]
        return None


class Item(NamedTuple):
    """One summand: coef * Π factors. `origin` is the graph's own value for it, worth `share` of the summand."""

    coef: float
    factors: Factors
    origin: Ref | None = None
    share: float = 1.0


class Sum(NamedTuple):
    """const + Σ items; always at least one item, and more than one or a constant."""

    const: float
    items: tuple[Item, ...]


class Group(NamedTuple):
    """A product kept together as one atom: it is shared, or a fraction may not be distributed over it."""

    product: Prod


class Reduce(NamedTuple):
    """mean or max of `child` over its last `rank` coordinate axes."""

    kind: str
    child: Ref | Prod
    rank: int


class Clamp(NamedTuple):
    """`child` where it lies between `low` and 1, else the nearer of the two."""

    child: Prod
    low: float = 0.0


class Contract(NamedTuple):
    """Σ over the last coordinate axis of left * right."""

    left: Ref
    right: Ref


def number(value: float) -> Prod:
    """A constant."""
    return Prod(value, ())


def leaf(atom: Atom) -> Prod:
    """One atom."""
    return Prod(1.0, ((atom, 1.0),))


def multiply(*terms: Prod) -> Prod:
    """The product; exponents of one atom are added where they have one sign (x / x is not 1 where x is 0)."""
    coef = 1.0
    for term in terms:
        coef *= term.coef
    factored = [term for term in terms if term.factors]
    if len(factored) < 2:
        return Prod(coef, factored[0].factors if factored else ())
    merged: dict[tuple[Atom, bool], float] = {}
    for term in factored:
        for atom, exponent in term.factors:
            key = (atom, exponent > 0)
            merged[key] = merged.get(key, 0.0) + exponent
    return Prod(coef, tuple((atom, exponent) for (atom, _), exponent in merged.items()))


def power(term: Prod, exponent: float) -> Prod | None:
    """term ** exponent, or None where it is a number out of domain.

    An integer power distributes over a product. A fraction does so only over one factor, and not over an even power:
    (x ** 2) ** 0.5 is |x|, and (x * y) ** 0.5 is defined where x and y are both negative.
    """
    try:
        coef = float(term.coef**exponent)
    except (ZeroDivisionError, OverflowError, TypeError):
        return None
    if exponent == int(exponent):
        return Prod(coef, tuple((atom, e * exponent) for atom, e in term.factors))
    if not term.factors:
        return number(coef)
    if len(term.factors) == 1 and term.factors[0][1] % 2 != 0:
        atom, inner = term.factors[0]
        return Prod(coef, ((atom, inner * exponent),))
    return Prod(coef, ((Group(Prod(1.0, term.factors)), exponent),))


def add(const: float, items: Iterable[Item]) -> Prod:
    """The sum as a product: a nested sum is opened, a factor common to all summands is pulled out.

    So 0.5 x + 0.5 x erf(y) becomes x (0.5 + 0.5 erf(y)).
    """
    opened: list[Item] = []
    for item in items:
        inner = item.factors[0][0] if len(item.factors) == 1 and item.factors[0][1] == 1.0 else None
        if isinstance(inner, Sum):
            const += item.coef * inner.const
            opened.extend(_scaled(part, item.coef) for part in inner.items)
        elif not item.factors:
            const += item.coef
        else:
            opened.append(item)
    parts = [item for item in (_merged(opened) if len(opened) > 1 else opened) if item.coef != 0.0]
    if not parts:
        return number(const)
    if len(parts) == 1 and const == 0.0:
        return Prod(parts[0].coef, parts[0].factors)
    common = _common(parts) if const == 0.0 else ()
    if not common:
        return leaf(Sum(const, tuple(parts)))
    rest = Prod(1.0, common)
    inverse = tuple((atom, -exponent) for atom, exponent in common)
    reduced = [Item(part.coef, _divide(part.factors, dict(inverse))) for part in parts]
    return multiply(rest, add(0.0, reduced))


def _merged(items: list[Item]) -> Iterable[Item]:
    merged: dict[frozenset[tuple[Atom, float]], Item] = {}
    for item in items:
        key = frozenset(item.factors)
        known = merged.get(key)
        merged[key] = item if known is None else Item(known.coef + item.coef, item.factors)
    return merged.values()


def _scaled(item: Item, coef: float) -> Item:
    return Item(item.coef * coef, item.factors, item.origin, item.share * coef)


def _common(parts: list[Item]) -> Factors:
    shared = dict(parts[0].factors)
    for part in parts[1:]:
        own = dict(part.factors)
        shared = {
            atom: min(exponent, own[atom], key=abs)
            for atom, exponent in shared.items()
            if atom in own and (own[atom] > 0) == (exponent > 0)
        }
        if not shared:
            return ()
    return tuple(shared.items())


def _divide(factors: Factors, removed: dict[Atom, float]) -> Factors:
    remaining = ((atom, exponent + removed.get(atom, 0.0)) for atom, exponent in factors)
    return tuple((atom, exponent) for atom, exponent in remaining if exponent != 0.0)


def references(term: Prod) -> Iterator[Ref]:
    """The values of the graph in a term, those inside sums too."""
    for atom, _ in term.factors:
        if isinstance(atom, Ref):
            yield atom
        elif isinstance(atom, Sum):
            for item in atom.items:
                yield from references(Prod(item.coef, item.factors))


def recut(term: Ref | Prod, start: int, stop: int, sizes: Sequence[Dim]) -> Ref | Prod | None:
    """The term with its coordinate axes from `start` to `stop` merged, and cut into these sizes; None where unprovable.

    What a mean runs over may be one axis or several: the numbers are the same, and so is their order.
    """

    def cut(ref: Ref) -> Ref:
        layout = ref.layout.merge(start, stop).split(start, sizes)
        if layout is None:
            raise _Uncut
        return Ref(ref.value, layout)

    def atom(given: Atom) -> Atom:
        if isinstance(given, Ref):
            return cut(given)
        if isinstance(given, Sum):
            return Sum(
                given.const,
                tuple(Item(i.coef, factors(i.factors), i.origin and cut(i.origin), i.share) for i in given.items),
            )
        if isinstance(given, Reduce):
            return Reduce(given.kind, whole(given.child), given.rank)
        if isinstance(given, Group):
            return Group(Prod(given.product.coef, factors(given.product.factors)))
        raise _Uncut

    def factors(given: Factors) -> Factors:
        return tuple((atom(own), exponent) for own, exponent in given)

    def whole(given: Ref | Prod) -> Ref | Prod:
        return cut(given) if isinstance(given, Ref) else Prod(given.coef, factors(given.factors))

    try:
        return whole(term)
    except _Uncut:
        return None


class _Uncut(Exception):
    """Coordinate axes cannot be cut so."""
