"""Guards: what exporters write around a softmax against NaN; it belongs inside the region of the softmax.

* `Where(IsNaN(p), 0, p)` gives 0 instead of NaN in rows that are masked everywhere.
* `Where(mask, 0, p)` gives 0 where the mask hides, also in rows that are masked everywhere.
* `x - max(x)` before a softmax changes nothing but the rounding; a softmax may be written out with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx import TensorProto

from fusion.laws import reduction
from fusion.schema import attribute, axes
from fusion.spell_layout import arrange

if TYPE_CHECKING:
    from fusion.facts import Facts
    from fusion.graph import Node, Value
    from fusion.plan import Softmax
    from fusion.spell import Beside, Speller
    from fusion.terms import Ref
    from fusion.view import View
    from fusion.writer import Written


def guarded(node: Node, facts: Facts) -> Value | None:
    """The value that a NaN guard passes on; None where `node` is no NaN guard."""
    found = replaced(node)
    return found[0] if found is not None and facts.number(found[1]) == 0.0 else None


def replaced(node: Node) -> tuple[Value, Value] | None:
    """The value in which `node` replaces NaN, and by what; None where it does something else."""
    if node.op != "Where" or node.domain:
        return None
    condition, other, value = node.inputs
    test = condition.producer if condition is not None else None
    if value is None or other is None or test is None or test.op != "IsNaN" or test.inputs[0] is not value:
        return None
    return value, other


def written_out(node: Node, facts: Facts) -> tuple[Value, int] | None:
    """(x, axis) where `node` is exp(x - max(x)) / sum(exp(x - max(x))), a softmax written out; else None.

    Without the maximum it is another function: it overflows.
    """
    if node.key != "Div" or node.inputs[0] is None or node.inputs[1] is None:
        return None
    power, total = node.inputs[0].producer, node.inputs[1].producer
    shifted = power.inputs[0] if power is not None and power.key == "Exp" else None
    if total is None or shifted is None or total.inputs[0] is not node.inputs[0] or shifted.producer is None:
        return None
    over = _reduced(total, "ReduceSum", facts)
    x, maximum = shifted.producer.inputs[0], shifted.producer.input(1)
    largest = maximum.producer if maximum is not None else None
    if shifted.producer.key != "Sub" or x is None or largest is None or largest.inputs[0] is not x or over is None:
        return None
    return (x, over) if _reduced(largest, "ReduceMax", facts) == over else None


def _reduced(node: Node, operator: str, facts: Facts) -> int | None:
    """The one axis that a reduction of this operator runs over and keeps."""
    along = axes(node, facts) if node.key == operator and attribute(node, "keepdims") != 0 else None
    return along[0] if along is not None and len(along) == 1 else None


def zeroed(node: Node, ref: Ref, view: View) -> tuple[Ref, Ref, bool] | None:
    """(what is kept, the condition, its value where it is kept) where `node` puts 0 for some elements; else None."""
    if node.key != "Where":
        return None
    for kept, other, keep in ((1, 2, True), (2, 1, False)):
        zero = node.inputs[other]
        if zero is not None and view.number(zero) == 0.0:
            source, condition = view.operand(ref, node, kept), view.beside(ref, node, 0)
            return None if source is None or condition is None else (source, condition, keep)
    return None


# -- spelling ---------------------------------------------------------------------------------------------------------


def spell(atom: Softmax, speller: Speller) -> Written:
    """Write a softmax, with what exporters write around it: the maximum subtracted before, NaN replaced after."""
    draw, writer = speller.draw, speller.writer
    (label,) = speller.labels(atom.letters)
    scores = speller.value(atom.child)
    axis = next((index for index, group in enumerate(scores.axes) if group == (label,)), None)
    # Below opset 13 a softmax flattens from its axis on, so only the last one is the axis alone.
    if axis is None or (axis != len(scores.axes) - 1 and writer.opset < 13):
        others = [group for group in scores.axes if label not in group]
        scores = arrange(writer, scores, (*others, (label,)))
        axis = len(scores.axes) - 1
    if draw.chance(6):
        scores = speller.elementwise("Sub", scores, reduction.reduce("ReduceMax", scores, (label,), speller))
    absent = writer.opset >= 13 and axis == len(scores.axes) - 1 and draw.chance(3)
    (given,) = writer.signed([axis], len(scores.axes))
    result = writer.node("Softmax", [scores], scores.axes, axis=None if absent else given)
    if not speller.may_guard():
        return result
    test = writer.node("IsNaN", [result], result.axes, dtype=TensorProto.BOOL)
    zero = writer.number(0.0, len(result.axes), result.dtype)
    return writer.node("Where", [test, zero, result], result.axes, dtype=result.dtype)


def spell_beside(scores: Written, entry: Beside, speller: Speller) -> Written:
    """Write one part of a `rest` capture around scores: added, or masked out."""
    if entry.fill is None:
        operands = (scores, entry.value) if speller.draw.choose(True, False) else (entry.value, scores)
        return speller.elementwise("Add", *operands)
    fill = speller.writer.number(entry.fill, len(scores.axes), scores.dtype)
    choices = (scores, fill) if entry.keep else (fill, scores)
    return speller.elementwise("Where", entry.value, *choices, dtype=scores.dtype)
