"""What the tests of the laws compare with: a term's value by numpy, and a canonical form of terms and of graphs.

The canonical form is a polynomial, all multiplied out: it does not depend on how a law arranges what it finds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fusion import plan as p
from fusion.instances.spell import Speller
from fusion.laws import guards
from fusion.layout import Layout
from fusion.schema import axes
from fusion.terms import Contract, Group, Prod, Reduce, Ref, Sum
from fusion.view import View

# -- values -----------------------------------------------------------------------------------------------------------

FUNCTIONS = {"Tanh": np.tanh, "Exp": np.exp, "Sigmoid": lambda x: 1 / (1 + np.exp(-x))}


def evaluate(term: Prod, arrays: Mapping[str, np.ndarray], order: Sequence[str]) -> np.ndarray:
    """The value of a term; every array has one axis for each label of `order`, size 1 where it is broadcast."""
    result = np.asarray(term.coef)
    for atom, exponent in term.factors:
        result = result * _atom(atom, arrays, order) ** exponent
    return result


def _atom(atom, arrays, order):
    if isinstance(atom, p.Var):
        return arrays[atom.name]
    if isinstance(atom, Group):
        return evaluate(atom.product, arrays, order)
    if isinstance(atom, Sum):
        return atom.const + sum(evaluate(Prod(item.coef, item.factors), arrays, order) for item in atom.items)
    if isinstance(atom, p.Op):
        return FUNCTIONS[atom.name](evaluate(atom.child, arrays, order))
    if isinstance(atom, p.MatMul):
        product = evaluate(atom.left, arrays, order) * evaluate(atom.right, arrays, order)
        return product.sum(axis=order.index(atom.letters[0]), keepdims=True)
    child = evaluate(atom.child, arrays, order)
    axes = tuple(order.index(label) for label in atom.letters)
    if isinstance(atom, p.Reduction):
        return child.mean(axis=axes, keepdims=True)
    powers = np.exp(child)
    return powers / powers.sum(axis=axes, keepdims=True)


# -- polynomials ------------------------------------------------------------------------------------------------------

Monomial = tuple  # of (base, exponent), ordered
Poly = dict  # Monomial -> coefficient


def rounded(value: float) -> float:
    """To where two roundings still agree: Gemm keeps its factor in single precision, so that is done to all numbers."""
    return float(f"{float(np.float32(value)):.5g}")


def monomial(factors) -> Monomial:
    merged: dict = {}
    for base, exponent in factors:
        merged[base, exponent > 0] = merged.get((base, exponent > 0), 0.0) + exponent
    return tuple(sorted(((base, rounded(exponent)) for (base, _), exponent in merged.items()), key=repr))


def times(left: Poly, right: Poly) -> Poly:
    result: Poly = {}
    for a, first in left.items():
        for b, second in right.items():
            key = monomial((*a, *b))
            result[key] = result.get(key, 0.0) + first * second
    return {key: coef for key, coef in result.items() if abs(coef) > 1e-12}


def frozen(poly: Poly) -> tuple:
    return tuple(sorted(((key, rounded(coef)) for key, coef in poly.items()), key=repr))


def primitive(poly: Poly) -> tuple[float, Poly]:
    lead = poly[min(poly, key=repr)]
    return lead, {key: coef / lead for key, coef in poly.items()}


def raised(poly: Poly, exponent: float) -> Poly:
    if exponent == int(exponent) and 1 <= exponent <= 4:
        result = {(): 1.0}
        for _ in range(int(exponent)):
            result = times(result, poly)
        return result
    if len(poly) == 1:
        ((key, coef),) = poly.items()
        if exponent == int(exponent) or (len(key) == 1 and key[0][1] % 2 != 0 and coef > 0):
            return {monomial((base, own * exponent) for base, own in key): coef**exponent}
        if not key:
            return {(): coef**exponent}
    if exponent != int(exponent) or len(poly) > 1:
        lead, rest = primitive(poly)
        if lead > 0 or exponent == int(exponent):
            return {((frozen(rest), rounded(exponent)),): lead**exponent}
    return {((frozen(poly), rounded(exponent)),): 1.0}


def total(polys) -> Poly:
    result: Poly = {}
    for poly in polys:
        for key, coef in poly.items():
            result[key] = result.get(key, 0.0) + coef
    return {key: coef for key, coef in result.items() if abs(coef) > 1e-12}


def base(*parts) -> Poly:
    return {((parts, 1.0),): 1.0}


def contracted(left: Poly, right: Poly) -> Poly:
    (a, left), (b, right) = primitive(left), primitive(right)
    return {(((("contract", *sorted((frozen(left), frozen(right)), key=repr))), 1.0),): a * b}


def source(name: str, layout: Layout) -> Poly:
    """A graph input as it is read; over which axes it is broadcast does not matter."""
    axes = tuple(tuple(factor for factor in axis if factor[0] is not None) for axis in layout.axes)
    while axes and not axes[-1]:
        axes = axes[:-1]
    return base("input", name, axes, tuple(layout.offsets))


# -- of a term --------------------------------------------------------------------------------------------------------


def of_term(term: Prod, speller: Speller, coordinates: Sequence[str | None]) -> Poly:
    """The polynomial of a term; `coordinates` are labels, None for an axis that nothing below reads any more."""
    result: Poly = {(): term.coef}
    for atom, exponent in term.factors:
        result = times(result, raised(_of_atom(atom, speller, list(coordinates)), exponent))
    return result


def _of_atom(atom, speller, coordinates):
    if isinstance(atom, p.Var):
        written = speller._variable(atom)
        places = {}
        for axis, group in enumerate(written.axes):
            stride = 1
            for label in reversed(group):
                places[label] = (axis, stride, speller.writer.sizes[label])
                stride *= speller.writer.sizes[label]
        factors = [(places[c],) if c in places and places[c][2] != 1 else () for c in coordinates]
        return source(written.name, Layout(tuple(factors), (0,) * len(written.axes), ()))
    if isinstance(atom, Group):
        return of_term(atom.product, speller, coordinates)
    if isinstance(atom, Sum):
        items = [of_term(Prod(item.coef, item.factors), speller, coordinates) for item in atom.items]
        return total([{(): atom.const}, *items])
    if isinstance(atom, p.Op):
        return base(atom.name, frozen(of_term(atom.child, speller, coordinates)))
    if isinstance(atom, p.Softmax):
        return base("Softmax", coordinates.index(atom.letters[0]), frozen(of_term(atom.child, speller, coordinates)))
    inner = [None if label in atom.letters else label for label in coordinates] + list(atom.letters)
    if isinstance(atom, p.Reduction):
        return base("mean", len(atom.letters), frozen(of_term(atom.child, speller, inner)))
    return contracted(of_term(atom.left, speller, inner), of_term(atom.right, speller, inner))


# -- of a graph -------------------------------------------------------------------------------------------------------


def of_graph(view: View, ref: Ref) -> Poly:
    """The polynomial of a value, down to the graph's inputs."""
    return _of_prod(view, view.expand(ref))


def _of_prod(view: View, term: Prod) -> Poly:
    result: Poly = {(): term.coef}
    for atom, exponent in term.factors:
        result = times(result, raised(_of_graph_atom(view, atom), exponent))
    return result


def _of_graph_atom(view, atom):
    if isinstance(atom, Group):
        return _of_prod(view, atom.product)
    if isinstance(atom, Sum):
        return total([{(): atom.const}, *(_of_prod(view, Prod(item.coef, item.factors)) for item in atom.items)])
    if isinstance(atom, Reduce):
        child = atom.child if isinstance(atom.child, Prod) else view.expand(atom.child)
        return base(atom.kind, atom.rank, frozen(_of_prod(view, child)))
    if isinstance(atom, Contract):
        return contracted(of_graph(view, atom.left), of_graph(view, atom.right))
    assert isinstance(atom, Ref)
    number = view.number(atom.value)
    if number is not None:
        return {(): number}
    node = atom.value.producer
    if node is None:
        return source(atom.value.name, atom.layout)
    expanded = view.expand(atom)
    if expanded.single != atom:
        return _of_prod(view, expanded)
    passed = guards.guarded(node, view.facts)
    if passed is not None:
        return of_graph(view, Ref(passed, atom.layout))
    operand = view.operand(atom, node, 0)
    assert operand is not None
    if node.op in ("Div", "Mul"):
        return _of_quotient(view, atom)
    child = of_graph(view, operand)
    if node.op != "Softmax":
        return base(node.op, frozen(child))
    axis = next(a.i for a in node.proto.attribute if a.name == "axis") if node.proto.attribute else -1
    return _softmax(child, atom.layout, axis)


def _softmax(child: Poly, layout: Layout, axis: int) -> Poly:
    """A maximum that is subtracted before a softmax is not seen by it."""
    child = {key: coef for key, coef in child.items() if not (len(key) == 1 and key[0][0][0] == "max" and coef == -1.0)}
    rank = len(layout.source)
    coordinate = [c for c, factors in enumerate(layout.axes) if any(f[0] == axis % rank for f in factors)]
    return base("Softmax", coordinate[0] if coordinate else -1, frozen(child))


def _of_quotient(view: View, ref: Ref) -> Poly:
    """exp(x) over its sum; what else is a product is opened."""
    above = [view.source(view.operand(ref, ref.value.producer, slot)) for slot in (0, 1)]
    (power,) = [own for own in above if own.value.producer.op == "Exp"]
    below = next(own for own in above if own is not power)
    while below.value.producer.op != "ReduceSum":
        below = view.source(view.operand(below, below.value.producer, 1 if below.value.producer.op == "Div" else 0))
    (axis,) = axes(below.value.producer, view.facts)
    return _softmax(of_graph(view, view.operand(power, power.value.producer, 0)), power.layout, axis)
