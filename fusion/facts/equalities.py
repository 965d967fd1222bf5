"""Equalities between dimensions that every successful run obeys: MatMul contracts equal sizes, Reshape keeps the count.

Each is solved for one atom, the most derived one, which is then replaced in every fact. Only the main graph counts: a
body may never run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product as cartesian
from math import gcd, prod
from typing import TYPE_CHECKING

from fusion.dims import (
    Dim,
    Poly,
    atom_of,
    contains,
    divide,
    lower,
    product,
    stretched,
    substitute,
    terms,
    weight,
)
from fusion.facts.common import attribute_int, input_shape, listed_dims
from fusion.facts.pieces import split_sizes
from fusion.models.graph import Node
from fusion.schema import axes
from fusion.verdict import Verdict

if TYPE_CHECKING:
    from fusion.facts import Facts

_LARGE = 60
"""Weight above which a solution is not worth having."""


def learn(facts: Facts) -> bool:
    """Add to `facts.equal` what one pass over the main graph finds; return whether there was anything new."""
    before = len(facts.equal)
    for node in facts.graph.scopes[0].nodes:
        rule = _RULES.get(node.key)
        if rule is not None:
            for left, right, positive in rule(facts, node):
                _assume(facts, left, right, positive, nonempty=node.op == "Reshape")
    return len(facts.equal) > before


_COMBINATIONS = 64
"""How many ways to pick members of broadcasts are tried."""

Equality = tuple["Dim | None", "Dim | None", "list[Dim]"]
"""Two equal sizes, and dimensions which are at least 1 wherever this succeeds."""


def _contraction(facts: Facts, node: Node) -> Iterator[Equality]:
    a, b = input_shape(facts, node, 0), input_shape(facts, node, 1)
    if a and b:
        yield a[-1], b[-2 if len(b) > 1 else -1], []


def _gemm(facts: Facts, node: Node) -> Iterator[Equality]:
    a, b = input_shape(facts, node, 0), input_shape(facts, node, 1)
    if a is not None and b is not None and len(a) == len(b) == 2:
        yield a[0 if attribute_int(node, "transA") else 1], b[1 if attribute_int(node, "transB") else 0], []


def _concat(facts: Facts, node: Node) -> Iterator[Equality]:
    """All axes but one are equal. The result shows which one was chosen to stand for all."""
    along = axes(node, facts)
    output = node.outputs[0]
    result = None if output is None else facts.shape(output)
    if along is None or result is None:
        return
    for i in range(len(node.inputs)):
        dims = input_shape(facts, node, i)
        if dims is not None and len(dims) == len(result):
            for axis, (dim, chosen) in enumerate(zip(dims, result, strict=True)):
                if axis not in along:
                    yield dim, chosen, []


def _elementwise(facts: Facts, node: Node) -> Iterator[Equality]:
    """A table cut to a length is as long as what it is combined with: min(64, t) beside t says that t is at most 64."""
    output = node.outputs[0]
    result = None if output is None else facts.shape(output)
    for i in range(len(node.inputs)) if result else ():
        dims = input_shape(facts, node, i)
        for dim, whole in zip(reversed(dims or ()), reversed(result or ()), strict=False):
            if isinstance(dim, Poly) and dim != whole and stretched(dim, whole) is Verdict.NO:
                yield dim, whole, []


def _reshape(facts: Facts, node: Node) -> Iterator[Equality]:
    """The number of elements stays. Where the target has a -1, none of its other entries is 0."""
    before, output = input_shape(facts, node, 0), node.outputs[0]
    after = None if output is None else facts.shape(output)
    if before is None or after is None or None in before:
        return
    target = listed_dims(facts, node, 1) or []
    positive = [dim for dim, item in zip(after, target, strict=False) if item != -1] if -1 in target else []
    yield product(dim for dim in before if dim is not None), product(after), positive


def _convolution(facts: Facts, node: Node) -> Iterator[Equality]:
    dims, kernel = input_shape(facts, node, 0), input_shape(facts, node, 1)
    if dims is not None and kernel is not None and len(dims) > 1 and len(kernel) > 1 and kernel[1] is not None:
        yield dims[1], kernel[1] * (attribute_int(node, "group") or 1), []


def _squeeze(facts: Facts, node: Node) -> Iterator[Equality]:
    dims, dropped = input_shape(facts, node, 0), axes(node, facts)
    if dims is not None and dropped is not None:
        for axis in dropped:
            yield dims[axis], 1, []


def _split(facts: Facts, node: Node) -> Iterator[Equality]:
    """The parts are as long as the whole, also where an exporter wrote down the sizes that it saw."""
    dims, along = input_shape(facts, node, 0), axes(node, facts)
    if dims is not None and along is not None:
        parts = split_sizes(facts, node, dims[along[0]])
        if None not in parts:
            yield dims[along[0]], sum(dim for dim in parts if dim is not None), []


_RULES = {
    **dict.fromkeys(("Add", "Mul", "Sub", "Where"), _elementwise),
    "Concat": _concat,
    "Conv": _convolution,
    "Gemm": _gemm,
    "MatMul": _contraction,
    "Reshape": _reshape,
    "Split": _split,
    "Squeeze": _squeeze,
}


def _assume(facts: Facts, left: Dim | None, right: Dim | None, positive: list[Dim], nonempty: bool) -> None:
    """Let two dimensions be equal from now on, if their equality can be solved for an atom."""
    if left is None or right is None or left is right:
        return
    difference = facts.dim(left) - facts.dim(right)
    if isinstance(difference, int):
        return
    reduced = _reduced(difference, [facts.dim(dim) for dim in positive])
    solved = _solve(reduced)
    if solved is None and nonempty:
        solved = _solve(_without_common_factors(reduced), derived=True)
    if solved is not None:
        facts.assume(*solved)
    elif nonempty:
        picked = _picked(facts.dim(left), facts.dim(right)) or _picked(facts.dim(right), facts.dim(left))
        for atom, value in picked.items():
            facts.assume(atom, facts.dim(value))


def _reduced(difference: Dim, positive: Iterable[Dim]) -> Dim:
    """Zero remains zero without factors that are not: numbers, and dimensions known to be at least 1."""
    for factor in positive:
        while factor not in (0, 1):
            quotient = divide(difference, factor)
            if quotient is None:
                break
            difference = quotient
        for coefficient, atoms in terms(factor):  # of a product each factor is at least 1
            if coefficient != 0 and len(terms(factor)) == 1:
                for atom in atoms:
                    difference = divide(difference, atom) or difference
    common = gcd(*(coefficient for coefficient, _ in terms(difference)))
    return divide(difference, common) or difference


def _without_common_factors(difference: Dim) -> Dim:
    """Zero remains zero where none of the atoms that all terms share is."""
    shared = [factors for _, factors in terms(difference)]
    for atom in shared[0] if shared else ():
        difference = divide(difference, atom) or difference
    return difference


def _picked(product_of_broadcasts: Dim, count: Dim) -> dict[Poly, Dim]:
    """What each broadcast equals, where picking one member of every broadcast gives the same count.

    No broadcast is below a member of it, unless something is empty; so if one were above its pick, the count would be.
    """
    parts = terms(product_of_broadcasts)
    if len(parts) != 1:
        return {}
    coefficient, factors = parts[0]
    members = {factor: _members(factor) for factor in factors}
    broadcasts = [factor for factor in factors if members[factor]]
    rest = product((coefficient, *(factor for factor in factors if not members[factor])))
    if not broadcasts or prod(len(members[factor]) for factor in broadcasts) > _COMBINATIONS:
        return {}
    for picks in cartesian(*(members[factor] for factor in broadcasts)):
        if product((rest, *picks)) == count:
            return dict(zip(broadcasts, picks, strict=True))
    return {}


def _members(dim: Poly) -> tuple[Dim, ...]:
    atom = atom_of(dim)
    return atom.args if atom is not None and atom.kind == "^" else ()


def _solve(difference: Dim, derived: bool = False) -> tuple[Poly, Dim] | None:
    """(atom, what it equals) where `difference` is 0; the most derived atom that can be told."""
    best: tuple[tuple[object, ...], Poly, Dim] | None = None
    for coefficient, factors in terms(difference):
        if len(factors) != 1:
            continue
        (atom,) = factors
        if derived and _rank(atom) < 2:
            continue
        value = divide(atom * coefficient - difference, coefficient)
        if value is None or contains(value, atom) or weight(value) > _LARGE or _rank(value) > _rank(atom):
            continue
        # Rather total = past + new than past = total - new: of the first everybody sees that it is not negative.
        merit = (_rank(atom), lower(value) >= 0, -weight(value), atom.terms)
        if best is None or merit > best[0]:
            best = merit, atom, value
    return None if best is None else (best[1], best[2])


def _rank(dim: Dim) -> int:
    """How derived the most derived atom is: a number, a symbol of the model, our own, a composite, a broadcast."""
    if isinstance(dim, int):
        return 0
    found = 0
    for _, factors in terms(dim):
        for factor in factors:
            atom = atom_of(factor)
            assert atom is not None
            kinds = {"symbol": 1, "own": 2, "^": 4}
            found = max(found, kinds.get(atom.kind, 3))
    return found


def close(equal: dict[Poly, Dim], atom: Poly, value: Dim) -> None:
    """Add an equality to a mapping whose right sides mention none of its left sides, and keep it so."""
    one = {atom: value}
    for known, old in equal.items():
        equal[known] = substitute(old, one)
    equal[atom] = value
