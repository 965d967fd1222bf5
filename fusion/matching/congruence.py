"""Congruence: whether two references are the same numbers, seen through what computes them.

`Concat(f, f)` has two equal halves, and so has its cosine: an operator is the same function of the same operands, read
in the same coordinates. Stored tensors are compared by their payload.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fusion.layout import Layout
from fusion.models.graph import Node, Value
from fusion.schema import axes
from fusion.terms import Atom, Contract, Group, Prod, Reduce, Ref, Sum

if TYPE_CHECKING:
    from fusion.view import View

ELEMENTWISE = frozenset(
    """Abs Add And Cast Ceil Clip Cos Cosh Div Equal Erf Exp Floor Greater GreaterOrEqual Less LessOrEqual Log Max Min
    Mod Mul Neg Not Or Pow Reciprocal Relu Round Sigmoid Sign Sin Sinh Sqrt Sub Tanh Where""".split()  # noqa: SIM905
)
"""Operators whose element is a function of the elements of the operands there, and of nothing else."""

DEPTH = 12
"""How many operators are looked through."""


def same(view: View, a: Ref, b: Ref, met: list[Value] | None = None) -> bool:
    """Whether two references are provably equal, element by element, in their coordinates.

    Args:
        met: takes up the values, other than constants, that both are computed from in the same way.
    """
    return _same(_Proof(view, [] if met is None else met), a, b, DEPTH)


class _Proof(NamedTuple):
    view: View
    met: list[Value]


def _same(proof: _Proof, a: Ref, b: Ref, depth: int) -> bool:
    view = proof.view
    a, b = view.peel(a).ref, view.peel(b).ref
    if a == b:
        proof.met.append(a.value)
        return True
    if a.layout.shape != b.layout.shape:
        return False
    number = view.facts.number(a.value)
    if number is not None and number == view.facts.number(b.value):
        return True
    if a.value is b.value and view.facts.is_constant(a.value):
        return _same_payload(view, a, b)
    first, second = a.value.producer, b.value.producer
    if first is None or second is None or depth == 0 or not _same_function(first, second):
        return False
    if first.key in ELEMENTWISE:
        return _same_operands(proof, a, b, depth - 1)
    if first.key == "Gather":
        return _same_gathered(proof, a, b, depth - 1)
    left, right = view.expand(a), view.expand(b)
    return left.single != a and right.single != b and _same_products(proof, left, right, depth - 1)


def _same_function(a: Node, b: Node) -> bool:
    if a is b:
        return True
    attributes = [sorted(item.SerializeToString() for item in node.proto.attribute) for node in (a, b)]
    return a.key == b.key and a.version == b.version and attributes[0] == attributes[1]


def _same_operands(proof: _Proof, a: Ref, b: Ref, depth: int) -> bool:
    first, second = a.value.producer, b.value.producer
    if first is None or second is None or len(first.inputs) != len(second.inputs):
        return False
    for index, (own, other) in enumerate(zip(first.inputs, second.inputs, strict=True)):
        if own is None or other is None:
            if own is not other:
                return False
            continue
        left, right = proof.view.operand(a, first, index), proof.view.operand(b, second, index)
        if left is None or right is None or not _same(proof, left, right, depth):
            return False
    return True


def _same_gathered(proof: _Proof, a: Ref, b: Ref, depth: int) -> bool:
    """The same places, and the same rows: what is read of a row must be equal in all of them."""
    view, rows, places = proof.view, [], []
    for ref in (a, b):
        node = ref.value.producer
        data, indices = (node.inputs[0], node.inputs[1]) if node is not None else (None, None)
        along = axes(node, view.facts) if node is not None else None
        shapes = [view.facts.shape(value) if value is not None else None for value in (data, indices)]
        if data is None or indices is None or along is None or shapes[0] is None or shapes[1] is None:
            return False
        (axis,), count, after = along, len(shapes[1]), range(along[0] + 1, len(shapes[0]))
        read = ref.layout.remap(shapes[0], [*range(axis), *[None] * count, *after], extra=[axis])
        chosen = ref.layout.remap(shapes[1], [*[None] * axis, *range(count), *[None] * len(after)])
        rows.append(Ref(data, read))
        places.append(Ref(indices, chosen))
    return _same(proof, places[0], places[1], depth) and _same(proof, rows[0], rows[1], depth)


def _same_products(proof: _Proof, a: Prod, b: Prod, depth: int) -> bool:
    if a.coef != b.coef or len(a.factors) != len(b.factors):
        return False
    pairs = zip(a.factors, b.factors, strict=True)
    return all(own[1] == other[1] and _same_atoms(proof, own[0], other[0], depth) for own, other in pairs)


def _same_atoms(proof: _Proof, a: Atom, b: Atom, depth: int) -> bool:
    if isinstance(a, Ref) and isinstance(b, Ref):
        return _same(proof, a, b, depth)
    if isinstance(a, Group) and isinstance(b, Group):
        return _same_products(proof, a.product, b.product, depth)
    if isinstance(a, Sum) and isinstance(b, Sum):
        terms = [[Prod(item.coef, item.factors) for item in total.items] for total in (a, b)]
        if a.const != b.const or len(terms[0]) != len(terms[1]):
            return False
        return all(_same_products(proof, own, other, depth) for own, other in zip(*terms, strict=True))
    if isinstance(a, Contract) and isinstance(b, Contract):
        return _same(proof, a.left, b.left, depth) and _same(proof, a.right, b.right, depth)
    if isinstance(a, Reduce) and isinstance(b, Reduce) and (a.kind, a.rank) == (b.kind, b.rank):
        if isinstance(a.child, Ref) and isinstance(b.child, Ref):
            return _same(proof, a.child, b.child, depth)
        return (
            isinstance(a.child, Prod) and isinstance(b.child, Prod) and _same_products(proof, a.child, b.child, depth)
        )
    return False


def _same_payload(view: View, a: Ref, b: Ref) -> bool:
    """Whether a stored tensor holds the same at both places; on axes that both read alike, wherever that is."""
    if a.layout.axes != b.layout.axes:
        return False
    array = view.facts.constant(a.value)
    if array is None:
        return False
    left = right = array
    for axis, (own, other) in enumerate(zip(a.layout.offsets, b.layout.offsets, strict=True)):
        if own == other:
            continue
        steps = _steps(a.layout, axis)
        if steps is None or not isinstance(own, int) or not isinstance(other, int):
            return False
        left, right = left.take(steps + own, axis), right.take(steps + other, axis)
    return bool(np.array_equal(left, right))


def _steps(layout: Layout, axis: int) -> np.ndarray[tuple[int], np.dtype[np.int64]] | None:
    """The places along a source axis that a layout reads, without its offset; None where a size is not known."""
    steps = np.zeros(1, np.int64)
    for source, stride, size in (factor for factors in layout.axes for factor in factors):
        if source != axis:
            continue
        if not isinstance(stride, int) or not isinstance(size, int):
            return None
        steps = (steps[:, None] + stride * np.arange(size)).reshape(-1)
    return steps
