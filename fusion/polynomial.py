"""Polynomials over the symbols of dimensions: arithmetic, exact and floor division, bounds.

A `Poly` is canonical and interned: structural equality is identity. Every symbol stands for a dimension, hence for an
integer that is never negative. What is stated here holds in every run that succeeds: a division assumes that its
divisor is not 0. `dims` builds on this what shapes need; import from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from math import gcd, inf
from typing import TypeAlias
from weakref import WeakValueDictionary

Monomial: TypeAlias = tuple[str, ...]
"""Keys of atoms, sorted, repeated for powers; () is the constant."""
Terms: TypeAlias = tuple[tuple[Monomial, int], ...]
Bound: TypeAlias = int | float
Dim: TypeAlias = "int | Poly"


@dataclass(frozen=True, slots=True)
class Atom:
    """What a polynomial is built of; two atoms are the same exactly when their keys are."""

    kind: str
    """"symbol", "own", "//" (two arguments), "min0" (min(x, 0)), "^" (a broadcast set), "tail" (size, count)."""
    name: str
    args: tuple[Dim, ...]


_atoms: dict[str, Atom] = {}
_polys: WeakValueDictionary[Terms, Poly] = WeakValueDictionary()


class Poly:
    """A polynomial with integer coefficients that is not a constant. Build it with `symbol` and operators only."""

    __slots__ = ("__weakref__", "_lower", "_upper", "terms", "weight")

    terms: Terms
    weight: int
    """How large the expression is, atoms inside atoms included."""
    _lower: Bound | None
    _upper: Bound | None

    @property
    def constant(self) -> int:
        """The constant term."""
        mono, coefficient = self.terms[0]
        return 0 if mono else coefficient

    def __add__(self, other: Dim) -> Dim:
        terms = dict(self.terms)
        for mono, coefficient in (((), other),) if isinstance(other, int) else other.terms:
            terms[mono] = terms.get(mono, 0) + coefficient
        return _poly(terms)

    __radd__ = __add__

    def __neg__(self) -> Dim:
        return self * -1

    def __sub__(self, other: Dim) -> Dim:
        return self + -other

    def __rsub__(self, other: Dim) -> Dim:
        return -self + other

    def __mul__(self, other: Dim) -> Dim:
        if isinstance(other, int):
            if other == 1:
                return self
            return _poly({mono: coefficient * other for mono, coefficient in self.terms})
        terms: dict[Monomial, int] = {}
        for mono, coefficient in self.terms:
            for mono2, coefficient2 in other.terms:
                both = tuple(sorted(mono + mono2))
                terms[both] = terms.get(both, 0) + coefficient * coefficient2
        return _poly(terms)

    __rmul__ = __mul__

    def __floordiv__(self, other: Dim) -> Dim:
        return floordiv(self, other)

    def __rfloordiv__(self, other: Dim) -> Dim:
        return floordiv(other, self)

    def __reduce__(self) -> tuple[object, ...]:
        return _restore, (self.terms, {key: _atoms[key] for mono, _ in self.terms for key in mono})

    def __str__(self) -> str:
        return _text(self)

    __repr__ = __str__


def _restore(terms: Terms, atoms: Mapping[str, Atom]) -> Dim:
    _atoms.update(atoms)
    return _poly(dict(terms))


def _graded(term: tuple[Monomial, int]) -> tuple[int, Monomial]:
    """Graded order of monomials: compatible with multiplication, which division relies on."""
    return len(term[0]), term[0]


def _poly(terms: dict[Monomial, int]) -> Dim:
    """The canonical Dim of these terms."""
    kept = sorted((term for term in terms.items() if term[1]), key=_graded)
    if not kept:
        return 0
    if len(kept) == 1 and not kept[0][0]:
        return kept[0][1]
    key = tuple(kept)
    found = _polys.get(key)
    if found is None:
        found = Poly()
        found.terms, found._lower, found._upper = key, None, None
        atoms = {name for mono, _ in key for name in mono}
        found.weight = sum(len(mono) or 1 for mono, _ in key) + sum(
            sum(weight(arg) for arg in _atoms[name].args) for name in atoms
        )
        _polys[key] = found
    return found


def make_atom(kind: str, name: str, args: tuple[Dim, ...] = ()) -> Poly:
    """The polynomial that is this one atom.

    Composite atoms are named by a digest: a fixed size however deep they nest, and the same order in every process.
    """
    if args:
        text = repr([kind, *(arg if isinstance(arg, int) else arg.terms for arg in args)])
        key = f"{kind}:{blake2b(text.encode(), digest_size=16).hexdigest()}"
    else:
        key = f"{kind}:{name}"
    if key not in _atoms:
        _atoms[key] = Atom(kind, name, args)
    return _single(key)


def _single(key: str) -> Poly:
    poly = _poly({(key,): 1})
    assert isinstance(poly, Poly)
    return poly


def atom_of(dim: Dim) -> Atom | None:
    """The atom which `dim` is, or None where it is a number or a larger expression."""
    if isinstance(dim, int) or len(dim.terms) != 1:
        return None
    mono, coefficient = dim.terms[0]
    return _atoms[mono[0]] if coefficient == 1 and len(mono) == 1 else None


def terms(dim: Dim) -> list[tuple[int, tuple[Poly, ...]]]:
    """The summands of `dim`: coefficient and atoms (each a Poly of its own, repeated for powers; none: constant)."""
    if isinstance(dim, int):
        return [(dim, ())] if dim else []
    return [(coefficient, tuple(_single(key) for key in mono)) for mono, coefficient in dim.terms]


def symbol(name: str, own: bool = False) -> Poly:
    """The symbol of a model's `dim_param`, or (own) one the engine made up; the two never coincide.

    >>> symbol("batch") * 2 + 1
    2*batch + 1
    """
    return make_atom("own" if own else "symbol", name)


def weight(dim: Dim) -> int:
    """How large the expression is; 0 for a number."""
    return 0 if isinstance(dim, int) else dim.weight


# --- division ---------------------------------------------------------------------------------------------------------


def divide(a: Dim, b: Dim) -> Dim | None:
    """a / b where that is a polynomial (for every b other than 0), else None."""
    if b == 1:
        return a
    if isinstance(b, int):
        if b == 0:
            return None
        if isinstance(a, int):
            return None if a % b else a // b
        if any(coefficient % b for _, coefficient in a.terms):
            return None
        return _poly({mono: coefficient // b for mono, coefficient in a.terms})
    if isinstance(a, int):
        return 0 if a == 0 else None
    if a is b:
        return 1
    return _long_division(a, b)


def _long_division(a: Poly, b: Poly) -> Dim | None:
    rest: Dim = a
    lead, lead_coefficient = b.terms[-1]
    quotient: dict[Monomial, int] = {}
    while rest != 0:
        if isinstance(rest, int):
            return None
        mono, coefficient = rest.terms[-1]
        if coefficient % lead_coefficient:
            return None
        left = list(mono)
        for key in lead:
            if key not in left:
                return None
            left.remove(key)
        step = tuple(left)
        quotient[step] = coefficient // lead_coefficient
        rest = rest - _poly({step: quotient[step]}) * b
    return _poly(quotient)


def floordiv(a: Dim, b: Dim) -> Dim:
    """floor(a / b); b must not be the number 0.

    >>> s = symbol("s")
    >>> (s + 6) // 4 // 2, (4 * s + 6) // 4
    ((s + 6) // 8, s + 1)
    """
    if isinstance(a, int) and isinstance(b, int):
        return a // b
    exact = divide(a, b)
    if exact is not None:
        return exact
    if isinstance(a, int):
        return make_atom("//", "", (a, b))
    if isinstance(b, int) and b < 0:
        a, b = -a, -b
        assert isinstance(a, Poly)
    # (rest + k * b) // b == rest // b + k
    whole: Dim = 0
    rest: Dim = a
    for mono, coefficient in a.terms:
        if isinstance(b, int):
            part = _poly({mono: coefficient // b}) if not mono or coefficient % b == 0 else 0
        else:
            part = divide(_poly({mono: coefficient}), b) or 0
        if part != 0:
            whole, rest = whole + part, rest - part * b
    if isinstance(b, int):
        return whole + _divide_rest(rest, b)
    return whole + (_lowest_terms(rest, b) if rest != 0 else 0)


def _lowest_terms(a: Dim, b: Poly) -> Dim:
    """a // b without the numbers and atoms that divide every term of both."""
    if isinstance(a, Poly):
        both = a.terms + b.terms
        common: list[Dim] = [_single(key) for key in b.terms[0][0] if all(key in mono for mono, _ in both)]
        common.append(gcd(*(coefficient for _, coefficient in both)))
        for factor in common:
            over, under = divide(a, factor), divide(b, factor)
            if factor != 1 and over is not None and under is not None:
                return floordiv(over, under)
    return make_atom("//", "", (a, b))


def _divide_rest(rest: Dim, b: int) -> Dim:
    """rest // b for b > 1, where no term of `rest` is a multiple of b and its constant is in 0..b-1."""
    if isinstance(rest, int):
        return rest // b
    common = b
    for mono, coefficient in rest.terms:
        if mono:
            common = gcd(common, coefficient)
    if common > 1:  # (g*x + r) // (g*c) == (x + r//g) // c
        terms = {mono: coefficient // common for mono, coefficient in rest.terms}
        return floordiv(_poly(terms), b // common)
    if lower(rest) >= 0 and upper(rest) < b:
        return 0
    for mono, coefficient in rest.terms:  # (x // c + y) // b == (x + c*y) // (c*b)
        atom = _atoms[mono[0]] if len(mono) == 1 and coefficient == 1 else None
        if atom is not None and atom.kind == "//":
            x, c = atom.args
            if isinstance(c, int):
                return floordiv(x + (rest - _poly({mono: 1})) * c, b * c)
    return make_atom("//", "", (rest, b))


# --- what can be proved -----------------------------------------------------------------------------------------------


_CASES = 3
"""How many atoms of one expression a bound distinguishes cases of."""
_LARGE = 40
"""Weight above which it does not try: the cases multiply."""


def lower(dim: Dim) -> Bound:
    """A number which `dim` is never below; -inf where there is none."""
    if isinstance(dim, int):
        return dim
    if dim._lower is None:
        dim._lower = _lower_bound(dim, _CASES)
    return dim._lower


def upper(dim: Dim) -> Bound:
    """A number which `dim` never exceeds; inf where there is none."""
    if isinstance(dim, int):
        return dim
    if dim._upper is None:
        dim._upper = -_lower_bound(-dim, _CASES)
    return dim._upper


def _times(a: Bound, b: Bound) -> Bound:
    return 0 if a == 0 or b == 0 else a * b


def _lower_bound(dim: Dim, depth: int) -> Bound:
    if isinstance(dim, int):
        return dim
    total: Bound = 0
    for mono, coefficient in dim.terms:
        low: Bound = coefficient
        high: Bound = coefficient
        for key in mono:
            atom_low, atom_high = _range(_atoms[key])
            corners = [_times(x, y) for x in (low, high) for y in (atom_low, atom_high)]
            low, high = min(corners), max(corners)
        if low == -inf:
            total = -inf
            break
        total = total + low
    if depth and dim.weight <= _LARGE:
        for mono, coefficient in dim.terms:
            if len(mono) == 1 and _atoms[mono[0]].args:
                total = max(total, _lower_by_cases(dim, mono, coefficient, depth - 1))
    return total


def _lower_by_cases(dim: Poly, mono: Monomial, coefficient: int, depth: int) -> Bound:
    """A lower bound of `dim` from what the atom in the term `coefficient * mono` says of its own arguments."""
    atom = _atoms[mono[0]]
    rest = dim - _poly({mono: coefficient})
    if atom.kind == "min0":  # is x or 0, and never above either
        cases = (_lower_bound(rest + atom.args[0] * coefficient, depth), _lower_bound(rest, depth))
        return min(cases) if coefficient > 0 else max(cases)
    if atom.kind == "^":  # is one of its members
        return min(_lower_bound(rest + arg * coefficient, depth) for arg in atom.args)
    x, c = atom.args
    if atom.kind == "tail":  # is the size or the count, and never above the size
        whole = _lower_bound(rest + x * coefficient, depth)
        return min(whole, _lower_bound(rest + c * coefficient, depth)) if coefficient > 0 else whole
    if not isinstance(c, int):
        return -inf
    # (x - c + 1) / c <= x // c <= x / c
    bound = _lower_bound(rest * c + (x - (c - 1) if coefficient > 0 else x) * coefficient, depth)
    return bound if bound in (inf, -inf) else -(int(-bound) // c)


def _range(atom: Atom) -> tuple[Bound, Bound]:
    if atom.kind in ("symbol", "own"):
        return 0, inf
    if atom.kind == "min0":
        return min(lower(atom.args[0]), 0), 0
    if atom.kind == "^":
        return max(0, min(lower(arg) for arg in atom.args)), max(upper(arg) for arg in atom.args)
    a, b = atom.args
    if atom.kind == "tail":
        return 0, upper(a)
    if lower(a) >= 0 and lower(b) >= 0:
        most = upper(a)
        return 0, most if not isinstance(b, int) or most == inf else int(most) // b
    if isinstance(b, int):
        low, high = lower(a), upper(a)
        return low if low == -inf else int(low) // b, high if high == inf else int(high) // b
    return -inf, inf


# --- text -------------------------------------------------------------------------------------------------------------


def split_minimum(dim: Dim) -> tuple[Dim, Dim] | None:
    """(p, q) where `dim` is min(p, q)."""
    if isinstance(dim, Poly):
        for mono, coefficient in dim.terms:
            if len(mono) == 1 and coefficient > 0 and _atoms[mono[0]].kind == "min0":
                rest = dim - _poly({mono: coefficient})
                return rest + _atoms[mono[0]].args[0] * coefficient, rest
    return None


def _text(dim: Dim) -> str:
    if isinstance(dim, int):
        return str(dim)
    pair = split_minimum(dim)
    if pair is not None:
        return "min(" + ", ".join(sorted(map(_text, pair), key=lambda text: (len(text), text))) + ")"
    negated = split_minimum(-dim)
    if negated is not None:
        return "max(" + ", ".join(sorted((_text(-arg) for arg in negated), key=lambda text: (len(text), text))) + ")"
    parts = []
    for mono, coefficient in dim.terms:
        names = sorted(_atom_text(_atoms[key]) for key in mono)
        if len(names) > 1 or coefficient != 1:
            names = [f"({name})" if " " in name and not name.startswith("min(") else name for name in names]
        head = [str(abs(coefficient))] if abs(coefficient) != 1 or not names else []
        parts.append((not mono, -len(mono), "*".join(head + names), coefficient < 0))
    parts.sort()
    parts.sort(key=lambda part: part[3] and not part[0])
    text = "".join((" - " if negative else " + ") + part for _, _, part, negative in parts)
    return text[3:] if text.startswith(" + ") else "-" + text[3:]


def _atom_text(atom: Atom) -> str:
    if not atom.args:
        return atom.name if atom.kind == "symbol" else "?" + atom.name
    if atom.kind == "min0":
        return f"min({_text(atom.args[0])}, 0)"
    texts = [_text(arg) for arg in atom.args]
    if atom.kind == "tail":
        return f"tail({', '.join(texts)})"
    texts = [f"({text})" if " " in text or "*" in text else text for text in texts]
    return " // ".join(texts) if atom.kind == "//" else "(" + " ^ ".join(sorted(texts)) + ")"
