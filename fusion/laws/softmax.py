"""Softmax: e = exp(x) over the sum of e along one axis is a softmax of x, however the quotient is written."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from onnx import TensorProto

from fusion.laws import guards, pieces, reduction, ring
from fusion.laws.arrange import arrange
from fusion.layout import Layout, merge_neighbours
from fusion.schema import axes
from fusion.terms import Prod, Reduce, Ref, Sum

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fusion import plan as p
    from fusion.instances.spell import Speller
    from fusion.laws.writer import Written
    from fusion.models.graph import Node
    from fusion.view import View

OPERATORS = ring.PRODUCTS
"""Operators that may compute such a quotient."""


def normalise(node: Node, ref: Ref, view: View) -> Prod | None:
    """Return the product, or None where it is a softmax: that is a value of its own, not two factors."""
    term = ring.normalise(node, ref, view)
    return None if term is None or _quotient(term, view) is not None else term


def written_out(node: Node, ref: Ref, view: View) -> tuple[Ref, int] | None:
    """(x, axis) where `node` is exp(x) / Σ exp(x) along one axis of x; else None.

    Where x is not y - max(y), it overflows.
    """
    term = ring.normalise(node, ref, view) if node.key in OPERATORS else None
    return None if term is None else _quotient(term, view)


def _quotient(term: Prod, view: View) -> tuple[Ref, int] | None:
    """(x, axis) where a product is exp(x) / Σ exp(x)."""
    if len(term.factors) != 2:
        return None
    (power, one), (total, minus_one) = term.factors
    if one < minus_one:
        power, one, total, minus_one = total, minus_one, power, one
    if one != 1.0 or minus_one != -1.0:
        return None
    node = power.value.producer if isinstance(power, Ref) else None
    if not isinstance(power, Ref) or node is None or node.key != "Exp":
        return None
    summed, scores = reduction.total(total, view), view.operand(power, node, 0)
    shape = power.layout.source
    if scores is None or summed is None or summed[0].rank != 1 or not math.isclose(term.coef, summed[1]):
        return None
    for axis in range(len(shape)):
        kept: list[int | None] = [None if own == axis else own for own in range(len(shape))]
        if summed[0].child == Ref(power.value, power.layout.remap(shape, kept, extra=[axis])):
            return scores, axis
    return None


def without_maximum(ref: Ref, view: View, positions: Sequence[int]) -> Ref:
    """x where `ref` is x - max(x), the same along these axes, which a softmax over them does not see."""
    single = view.expand(ref).single
    if isinstance(single, Sum) and single.const == 0.0 and len(single.items) == 2:
        for kept, maximum in (single.items, single.items[::-1]):
            subtracted = maximum.factors[0][0]
            reduced = subtracted
            if isinstance(subtracted, Ref):
                reduced = view.expand(subtracted).single
            if kept.origin is not None and kept.coef == 1.0 and maximum.coef == -1.0 and isinstance(reduced, Reduce):
                inner = reduced.child
                if reduced.kind != "max" or not isinstance(inner, Ref) or any(map(inner.layout.depends, positions)):
                    continue
                if _reduces(inner, view.source(kept.origin), positions):
                    return kept.origin
    return ref


def _reduces(inner: Ref, source: Ref, positions: Sequence[int]) -> bool:
    """Whether a reduction of `inner` runs over these axes of `source`, and over nothing else of it.

    The maximum over others may be -inf, or far above, in a row where the own one is not.
    """
    axes, count = source.layout.axes, len(source.layout.axes)
    over = [factor for factors in inner.layout.axes[count:] for factor in factors]
    return (
        inner.value is source.value
        and inner.layout.offsets == source.layout.offsets
        and over == [factor for axis in positions for factor in axes[axis]]
        and all(inner.layout.axes[axis] == axes[axis] for axis in range(count) if axis not in positions)
    )


def beside(ref: Ref, view: View, positions: Sequence[int], axis: int) -> tuple[Ref, Ref] | None:
    """(x, y) where `ref` reads x of [x, y], one number y beside x along an axis of its value; else None.

    The maximum of both may have been subtracted: a softmax over both does not see it.

    Args:
        positions: the coordinate axes along which x is read.
        axis: of the value, along which they stand side by side.
    """
    root = view.root(ref.value)
    whole = root and _without_own_maximum(_to_pieces(root, view), view, [axis])
    joined = _without_own_maximum(_to_pieces(ref, view), view, positions)
    node, layout = joined.value.producer, joined.layout
    along = axes(node, view.facts) if node is not None and node.key == "Concat" else None
    part = pieces.part(node, layout, view.facts) if node is not None and along is not None else None
    if node is None or along is None or part is None or len(node.inputs) != 2:
        return None
    (joint,) = along
    if not whole or whole.value is not joined.value or whole.layout.whole(axis) != joint:
        return None
    single = part[1].source[joint] == 1
    read = [at for at in positions if part[1].whole(at) == joint or (single and not part[1].depends(at))]
    other = next((value for value in node.inputs if value is not part[0]), None)
    shape = view.facts.shape(other) if other is not None else None
    if other is None or shape is None or shape[joint] != 1 or len(read) != 1:
        return None
    factors = list(layout.axes)
    factors[read[0]] = merge_neighbours((None, 0, size) for _, _, size in layout.axes[read[0]])
    offsets = (*layout.offsets[:joint], 0, *layout.offsets[joint + 1 :])
    return Ref(*part), Ref(other, Layout(tuple(factors), offsets, shape))


def _without_own_maximum(ref: Ref, view: View, positions: Sequence[int]) -> Ref:
    """[x, y] where `ref` reads [x, y] - max(x, y), the maximum along the axis of these coordinates; else `ref`."""
    node = ref.value.producer
    if node is None or node.key != "Sub":
        return ref
    whole, most = view.operand(ref, node, 0), view.operand(ref, node, 1)
    most = most and view.peel(most).ref
    reduced = most.value.producer if most is not None else None
    lifted = reduction.lift(reduced, most, view) if most and reduced and reduced.key == "ReduceMax" else None
    if whole is None or lifted is None or lifted[1] != 1 or lifted[0].value is not whole.value:
        return ref
    own, inner = whole.layout, lifted[0].layout
    axis = inner.whole(len(own.axes))
    beside = [at for at in range(len(own.axes)) if at not in positions]
    same = all(inner.axes[at] == own.axes[at] for at in beside) and not any(map(inner.depends, positions))
    moved = [at for at, offset in enumerate(own.offsets) if inner.offsets[at] != offset]
    return _to_pieces(whole, view) if same and axis is not None and moved in ([], [axis]) else ref


def _to_pieces(ref: Ref, view: View) -> Ref:
    """Follow a reference through layouts and noise, as far as a Concat."""
    value, layout = ref
    while value.producer is not None and value.producer.key != "Concat":
        step = view.step(value, layout)
        if step is None:
            break
        value, layout = step
    return Ref(value, layout)


# -- spelling ---------------------------------------------------------------------------------------------------------


def spell(atom: p.Softmax, speller: Speller) -> Written:
    """Write a softmax, now and then with the maximum subtracted before, and then as a quotient.

    Where the formula is a softmax and nothing else, always so: else it would be the operator that it is to become.
    """
    draw, writer = speller.draw, speller.writer
    (label,) = speller.labels(atom.letters)
    scores = speller.value(atom.child)
    axis = next((index for index, group in enumerate(scores.axes) if group == (label,)), None)
    # Below opset 13 a softmax flattens from its axis on, so only the last one is the axis alone.
    if axis is None or (axis != len(scores.axes) - 1 and writer.opset < 13):
        others = [group for group in scores.axes if label not in group]
        scores = arrange(writer, scores, (*others, (label,)))
        axis = len(scores.axes) - 1
    if atom.beside is not None:
        return _spell_beside(atom.beside, scores, label, speller)
    if speller.is_whole(atom) or draw.chance(6):
        scores = speller.elementwise("Sub", scores, reduction.reduce("ReduceMax", scores, (label,), speller))
        if draw.choose(False, True):
            power = writer.node("Exp", [scores], scores.axes)
            total = reduction.reduce("ReduceSum", power, (label,), speller)
            return guards.spell(ring.fold([(power, False), (total, True)], 1.0, speller), speller)
    absent = writer.opset >= 13 and axis == len(scores.axes) - 1 and draw.chance(3)
    (given,) = writer.signed([axis], len(scores.axes))
    return guards.spell(writer.node("Softmax", [scores], scores.axes, axis=None if absent else given), speller)


def _spell_beside(other: Prod, scores: Written, label: str, speller: Speller) -> Written:
    """Write a softmax over scores and one number more behind them along the last axis, and cut that off again."""
    writer, others = speller.writer, [own for own in scores.labels if own != label]
    scores, last = arrange(writer, scores, tuple((own,) for own in (*others, label))), len(others)
    value = speller.value(other)
    column = arrange(writer, value, tuple(group if group[0] in value.labels else () for group in scores.axes))
    sizes = [writer.size((own,)) or writer.integers(writer.shape(((own,),))) for own in others]
    shape = writer.node("Concat", [*sizes, writer.integers([1])], ((),), dtype=TensorProto.INT64, axis=0)
    wide = writer.node("Expand", [column, shape], (*scores.axes[:-1], ()))
    joined = writer.node("Concat", [scores, wide], scores.axes, axis=writer.signed([last], last + 1)[0])
    if speller.draw.choose(False, True):
        most = reduction.reduce("ReduceMax", joined, scores.axes[-1], speller)
        joined = writer.node("Sub", [joined, most], joined.axes)
    weights = writer.node("Softmax", [joined], joined.axes, axis=-1)
    bounds = [writer.integers([bound]) for bound in (0, -1, last)]
    return writer.node("Slice", [weights, *bounds], scores.axes)
