"""A dimension: an `int`, or a `Poly` with floor division, minimum and broadcast sets as further atoms.

What is stated here holds in every run that succeeds: a division assumes that its divisor is not 0, a broadcast that its
operands agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import gcd

from fusion.polynomial import (
    Atom,
    Dim,
    Poly,
    atom_of,
    divide,
    floordiv,
    lower,
    make_atom,
    split_minimum,
    symbol,
    terms,
    upper,
    weight,
)
from fusion.verdict import Verdict

__all__ = [
    "Atom",
    "Dim",
    "Poly",
    "atom_of",
    "atoms",
    "broadcast",
    "divide",
    "equal",
    "evaluate",
    "floordiv",
    "lower",
    "maximum",
    "minimum",
    "product",
    "substitute",
    "symbol",
    "symbols",
    "terms",
    "upper",
    "weight",
]


def product(dims: Iterable[Dim]) -> Dim:
    """The product, 1 for none."""
    result: Dim = 1
    for dim in dims:
        if dim != 1:
            result = dim if result == 1 else result * dim
    return result


def minimum(a: Dim, b: Dim) -> Dim:
    """The smaller one. Kept as b + min(a - b, 0), so that n - max(n - k, 0) is min(n, k) without any rule."""
    difference = a - b
    if isinstance(difference, int):
        return a if difference < 0 else b
    if lower(difference) >= 0:
        return b
    if upper(difference) <= 0:
        return a
    if difference.terms[-1][1] < 0:
        a, b, difference = b, a, -difference
    common = gcd(*(coefficient for coefficient, _ in terms(difference)))
    return b + make_atom("min0", "", (floordiv(difference, common),)) * common


def maximum(a: Dim, b: Dim) -> Dim:
    """The larger one."""
    if isinstance(a, int) and isinstance(b, int):
        return max(a, b)
    return a + b - minimum(a, b)


def broadcast(a: Dim, b: Dim) -> Dim:
    """The dimension two operands of these dimensions broadcast to, in every run in which they do.

    Two that may be 1 give a set: associative, commutative, idempotent.
    """
    if a is b or a == b or b == 1:
        return a
    if a == 1 or (isinstance(b, int) and not isinstance(a, int)):
        return b
    if isinstance(a, int) or lower(a) >= 2:
        return a
    if lower(b) >= 2:
        return b
    members = list(dict.fromkeys(_members(a) + _members(b)))
    members = [x for x in members if not any(y is not x and _covered(x, y) for y in members)]
    if len(members) == 1:
        return members[0]
    return make_atom("^", "", tuple(sorted(members, key=lambda dim: dim.terms if isinstance(dim, Poly) else ())))


def _members(dim: Dim) -> list[Dim]:
    atom = atom_of(dim)
    return list(atom.args) if atom is not None and atom.kind == "^" else [dim]


def _covered(x: Dim, y: Dim) -> bool:
    """Whether x is min(y, c) with c >= 1: broadcast together they are y in every case (x = y, or x = 1)."""
    pair = split_minimum(x)
    if pair is None:
        return False
    return any((p is y or _covered(p, y)) and lower(q) >= 1 for p, q in (pair, pair[::-1]))


def equal(a: Dim, b: Dim) -> Verdict:
    """YES where provably equal, NO where provably different, else UNKNOWN.

    >>> equal(symbol("s"), -1), equal(symbol("s"), 1)
    (<Verdict.NO: 'no'>, <Verdict.UNKNOWN: 'unknown'>)
    """
    if a is b:
        return Verdict.YES
    difference = a - b
    if isinstance(difference, int):
        return Verdict.of(difference == 0)
    common = gcd(*(coefficient for coefficient, factors in terms(difference) if factors))
    if difference.constant % common or lower(difference) > 0 or upper(difference) < 0:
        return Verdict.NO
    return Verdict.UNKNOWN


def atoms(dim: Dim) -> list[Poly]:
    """The atoms `dim` is a polynomial of, each once; not those inside other atoms."""
    return list(dict.fromkeys(atom for _, factors in terms(dim) for atom in factors))


def symbols(dim: Dim) -> list[Poly]:
    """The symbols in `dim`, each once, also those inside other atoms, in a reproducible order."""
    found: dict[Poly, None] = {}
    seen: set[Dim] = set()
    work = [dim]
    while work:
        for poly in atoms(work.pop()):
            atom = atom_of(poly)
            if atom is not None and poly not in seen:
                seen.add(poly)
                work.extend(atom.args)
                if not atom.args:
                    found[poly] = None
    return list(found)


def substitute(dim: Dim, mapping: Mapping[Poly, Dim]) -> Dim:
    """`dim` with every atom in `mapping` replaced, also inside other atoms."""
    return _Substitution(mapping)(dim) if mapping else dim


class _Substitution:
    """One mapping, with the atoms it has already been applied to."""

    def __init__(self, mapping: Mapping[Poly, Dim]) -> None:
        self.memo: dict[Poly, Dim] = dict(mapping)

    def __call__(self, dim: Dim) -> Dim:
        if isinstance(dim, int):
            return dim
        result: Dim = 0
        for coefficient, factors in terms(dim):
            result = result + product((coefficient, *(self.atom(poly) for poly in factors)))
        return result

    def atom(self, poly: Poly) -> Dim:
        found = self.memo.get(poly)
        if found is None:
            found = self.memo[poly] = self.rebuild(poly)
        return found

    def rebuild(self, poly: Poly) -> Dim:
        atom = atom_of(poly)
        if atom is None or not atom.args:
            return poly
        first, *others = (self(arg) for arg in atom.args)
        if atom.kind == "min0":
            return minimum(first, 0)
        if atom.kind == "//":
            return poly if others[0] == 0 else floordiv(first, others[0])
        for other in others:
            first = broadcast(first, other)
        return first


def evaluate(dim: Dim, binding: Mapping[Poly, int]) -> int | None:
    """The number `dim` is under a binding of its symbols; None where one is unbound or a divisor is 0."""
    value = substitute(dim, binding)
    return value if isinstance(value, int) else None
