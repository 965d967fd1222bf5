"""A dimension: an `int`, or a `Poly` with floor division, minimum and broadcast sets as further atoms.

What is stated here holds in every run that succeeds: a division assumes that its divisor is not 0, a broadcast that its
operands agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from math import gcd

from fusion.polynomial import (
    Atom,
    Bound,
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
    "Bound",
    "Dim",
    "Poly",
    "atom_of",
    "atoms",
    "broadcast",
    "contains",
    "divide",
    "equal",
    "evaluate",
    "floordiv",
    "lower",
    "maximum",
    "minimum",
    "product",
    "stretched",
    "substitute",
    "symbol",
    "symbols",
    "tail",
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


def tail(size: Dim, count: Dim) -> Dim:
    """How many elements the slice [-count:] of `size` takes: the smaller one, but all of them where count is 0."""
    if count == 0:
        return size
    if lower(count) >= 1:
        return minimum(size, count)
    return make_atom("tail", "", (size, count))


@lru_cache(maxsize=4096)
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
    members = sorted(dict.fromkeys(_members(a) + _members(b)), key=_order)
    for x in reversed(members):
        if any(y is not x and _one_where(x, y) for y in members):
            members.remove(x)
    return members[0] if len(members) == 1 else make_atom("^", "", tuple(members))


def stretched(size: Dim, result: Dim) -> Verdict:
    """Whether broadcasting repeats an axis of `size` to give `result`: NO where the two are equal in every run."""
    if size == 1:
        return Verdict.NO if result == 1 else Verdict.YES
    if size == result or broadcast(size, result) == size or _one_where(result, size):
        return Verdict.NO
    return Verdict.UNKNOWN


def _members(dim: Dim) -> list[Dim]:
    atom = atom_of(dim)
    return list(atom.args) if atom is not None and atom.kind == "^" else [dim]


def _one_where(x: Dim, y: Dim) -> bool:
    """Whether x is 1 wherever y is. Broadcast together, the two give y in every run: x is y, or 1, or both are 1."""
    for term, factors in terms(y):
        if abs(term) == 1 and len(factors) == 1:
            (atom,) = factors
            others = y - atom * term
            if atom not in atoms(others) and substitute(x, {atom: (1 - others) * term}) == 1:
                return True
    kind = atom_of(y)
    if kind is not None and kind.kind == "tail":  # 1 where the count or the size is
        size, count = kind.args
        return lower(size) >= 2 and (x == count or _one_where(x, count))
    pair = split_minimum(y)
    if pair is None:
        return False
    return any(lower(q) >= 2 and (x == p or _one_where(x, p)) for p, q in (pair, pair[::-1]))


def _order(dim: Dim) -> tuple[int, int, object]:
    return (0, dim, ()) if isinstance(dim, int) else (1, dim.weight, dim.terms)


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
    return [poly for poly, atom in _nested_atoms(dim).items() if not atom.args]


def contains(dim: Dim, atom: Poly) -> bool:
    """Whether `atom` occurs in `dim`, also inside other atoms."""
    return atom in _nested_atoms(dim)


def _nested_atoms(dim: Dim) -> dict[Poly, Atom]:
    found: dict[Poly, Atom] = {}
    work = [dim]
    while work:
        for poly in atoms(work.pop()):
            atom = atom_of(poly)
            if atom is not None and poly not in found:
                found[poly] = atom
                work.extend(atom.args)
    return found


def substitute(dim: Dim, mapping: Mapping[Poly, Dim], least: Sequence[Dim] = ()) -> Dim:
    """`dim` with every atom in `mapping` replaced, also inside other atoms.

    Args:
        least: dimensions known to be at least 0, beyond what each of their atoms says; they settle minimums.
    """
    return _Substitution(mapping, least)(dim) if mapping else dim


class _Substitution:
    """One mapping, with the atoms it has already been applied to."""

    def __init__(self, mapping: Mapping[Poly, Dim], least: Sequence[Dim]) -> None:
        self.memo: dict[Poly, Dim] = dict(mapping)
        self.least = least

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
            if any(lower(first - known) >= 0 for known in self.least):
                return 0
            return first if any(lower(-first - known) >= 0 for known in self.least) else minimum(first, 0)
        if atom.kind == "//":
            return poly if others[0] == 0 else floordiv(first, others[0])
        if atom.kind == "tail":
            return tail(first, others[0])
        for other in others:
            first = broadcast(first, other)
        return first


def evaluate(dim: Dim, binding: Mapping[Poly, int]) -> int | None:
    """The number `dim` is under a binding of its symbols; None where one is unbound or a divisor is 0."""
    value = substitute(dim, binding)
    return value if isinstance(value, int) else None
