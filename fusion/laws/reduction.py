"""Reduction: ReduceMean, ReduceSum, ReduceSumSquare and ReduceL2 over known axes are means, times the count.

A global pool is a reduction over all axes after the second.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusion.dims import product
from fusion.laws import powers
from fusion.laws.arrange import arrange, ones
from fusion.schema import attribute, axes
from fusion.terms import Atom, Prod, Reduce, Ref, leaf, multiply, number, power

if TYPE_CHECKING:
    from fusion.instances.spell import Speller
    from fusion.laws.writer import Axes, Written
    from fusion.models.graph import Node
    from fusion.plan import Reduction
    from fusion.view import View

COUNTED = frozenset({"ReduceSum", "ReduceSumSquare", "ReduceL2"})
"""Reductions that are a mean times a number."""
KINDS = {"ReduceMean": "mean", "GlobalAveragePool": "mean", "ReduceMax": "max", "GlobalMaxPool": "max"}
POOLS = frozenset({"GlobalAveragePool", "GlobalMaxPool"})
OPERATORS = COUNTED | KINDS.keys()


def normalise(node: Node, ref: Ref, view: View) -> Prod | None:
    """Return the reduction over coordinate axes appended to those of `ref`.

    None where the axes or the shape are unknown, or where a sum counts an unknown number of elements.
    """
    operand = lift(node, ref, view)
    if operand is None:
        return None
    child, rank = operand
    if node.op in KINDS:
        return leaf(Reduce(KINDS[node.op], view.peel(child).ref, rank))
    count = product(child.layout.shape[-rank:])
    if not isinstance(count, int):
        return None
    if node.op == "ReduceSum":
        return multiply(number(count), leaf(Reduce("mean", view.peel(child).ref, rank)))
    # Not opened: what lies under a mean is matched in the coordinates of a value.
    square = power(leaf(view.peel(child).ref), 2.0)
    assert square is not None, "an integer power of a finite number is defined"
    total = multiply(number(count), leaf(Reduce("mean", square, rank)))
    return power(total, 0.5) if node.op == "ReduceL2" else total


def lift(node: Node, ref: Ref, view: View) -> tuple[Ref, int] | None:
    """Return the operand of a reduction with one coordinate axis more per reduced axis, and how many those are."""
    value = node.inputs[0]
    shape = view.facts.shape(value) if value is not None else None
    pooled = node.op in POOLS
    reduced = tuple(range(2, len(shape or ()))) if pooled else axes(node, view.facts)
    if value is None or shape is None or reduced is None or (pooled and not reduced):
        return None
    kept = [axis for axis in range(len(shape)) if axis not in reduced]
    if not pooled and attribute(node, "keepdims") == 0:
        axis_of: list[int | None] = list(kept)
    else:
        axis_of = [None if axis in reduced else axis for axis in range(len(shape))]
    return Ref(value, ref.layout.remap(shape, axis_of, extra=sorted(reduced))), len(reduced)


def total(atom: Atom, view: View) -> tuple[Reduce, float] | None:
    """The sum that a factor is, and how often: the mean of so many numbers, or a ReduceSum of nobody knows how many."""
    if isinstance(atom, Reduce):
        count = product(atom.child.layout.shape[-atom.rank :]) if isinstance(atom.child, Ref) else None
        return (atom._replace(kind="total"), 1.0 / count) if atom.kind == "mean" and isinstance(count, int) else None
    node = atom.value.producer if isinstance(atom, Ref) else None
    lifted = lift(node, atom, view) if isinstance(atom, Ref) and node is not None and node.key == "ReduceSum" else None
    return None if lifted is None else (Reduce("total", view.peel(lifted[0]).ref, lifted[1]), 1.0)


# -- spelling ---------------------------------------------------------------------------------------------------------


def spell(atom: Reduction, speller: Speller) -> Written:
    """Write a mean as ReduceMean, or as a sum, sum of squares or squared norm over the count where that is known."""
    draw, writer = speller.draw, speller.writer
    labels = speller.labels(atom.letters)
    term = atom.child
    if atom.kind != "mean":
        return reduce("ReduceMax" if atom.kind == "max" else "ReduceSum", speller.value(term), labels, speller)
    count = writer.extent(labels)
    squared = len(term.factors) == 1 and term.factors[0][1] == 2.0 and term.coef == 1.0
    if count is None or not draw.chance(4):
        return reduce("ReduceMean", speller.value(term), labels, speller)
    if squared and draw.choose(True, False):
        base = speller.atom(term.factors[0][0])[0]
        norm = draw.choose("ReduceSumSquare", "ReduceL2")
        total = reduce(norm, base, labels, speller)
        if norm == "ReduceL2":
            total = powers.spell(total, 2.0, speller)
    else:
        total = reduce("ReduceSum", speller.value(term), labels, speller)
    return speller.scaled(total, 1.0 / count)


def reduce(op: str, value: Written, labels: tuple[str, ...], speller: Speller) -> Written:
    """Write a reduction over axes, which stay with size 1: kept, or dropped and inserted again."""
    writer = speller.writer
    groups = [(label,) for label in labels]
    if not set(groups) <= set(value.axes):
        value = arrange(writer, value, tuple((label,) for label in value.labels))
    reduced = [value.axes.index(group) for group in groups]
    if reduced != sorted(reduced):
        # The axes a mean runs over are read in the order in which they lie.
        places, ordered = iter(groups), sorted(reduced)
        axes = tuple(next(places) if axis in ordered else group for axis, group in enumerate(value.axes))
        value, reduced = arrange(writer, value, axes), ordered
    return _reduced(op, value, reduced, _single(value.axes, reduced), speller)


def _reduced(op: str, value: Written, reduced: list[int], kept: Axes, speller: Speller) -> Written:
    writer = speller.writer
    if not speller.draw.chance(4):
        return writer.along(op, value, reduced, kept, keepdims=speller.draw.choose(None, 1))
    dropped = tuple(group for axis, group in enumerate(value.axes) if axis not in reduced)
    return ones(writer, writer.along(op, value, reduced, dropped, keepdims=0), kept)


def _single(axes: Axes, reduced: list[int]) -> Axes:
    return tuple(() if axis in reduced else group for axis, group in enumerate(axes))
