"""Guards: what exporters write around a softmax against NaN; it belongs inside the region of the softmax.

`Where(IsNaN(p), 0, p)` gives 0 instead of NaN in rows that are masked everywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx import TensorProto

if TYPE_CHECKING:
    from fusion.facts import Facts
    from fusion.instances.spell import Beside, Speller
    from fusion.laws.writer import Written
    from fusion.models.graph import Node, Value


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


# -- spelling ---------------------------------------------------------------------------------------------------------


def spell(result: Written, speller: Speller) -> Written:
    """Write, now and then, what replaces NaN after a softmax."""
    if not speller.may_guard():
        return result
    writer = speller.writer
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
