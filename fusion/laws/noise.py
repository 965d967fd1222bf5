"""Noise: nodes that change no number worth speaking of: Identity, Dropout at inference, Casts between floats or to the
same type.

A Cast from an integer or a boolean is not noise. Every crossing is recorded, so that an emission knows the dtypes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx import TensorProto

from fusion.laws.arrange import reshape, transpose

if TYPE_CHECKING:
    from fusion.facts import Facts
    from fusion.instances.spell import Speller
    from fusion.laws.writer import Written
    from fusion.models.graph import Node, Value

FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16})
OPERATORS = frozenset({"Identity", "Dropout", "Cast", "CastLike"})


def crossed(node: Node, value: Value, facts: Facts) -> Value | None:
    """The input that `value`, the first output of `node`, repeats; None where the node is not noise."""
    if node.domain or value.slot != 0 or not node.inputs:
        return None
    source = node.inputs[0]
    if node.op == "Identity":
        return source
    if node.op == "Dropout":
        training = node.input(2)
        if training is None or facts.number(training) == 0.0:
            return source
        return None
    if node.op in ("Cast", "CastLike") and source is not None:
        given, result = facts.dtype(source), facts.dtype(value)
        return source if given is not None and (given == result or {given, result} <= FLOATS) else None
    return None


def spell(value: Written, speller: Speller) -> Written:
    """Write, now and then, something after `value` that changes nothing."""
    if not speller.noisy or not speller.draw.chance(speller.noisy):
        return value
    draw, writer = speller.draw, speller.writer
    kind = draw.choose("Identity", "Dropout", "Cast", "Transpose", "Reshape")
    if kind == "Identity":
        return writer.node("Identity", [value], value.axes)
    if kind == "Dropout":
        rate = {"ratio": 0.1} if writer.opset < 12 else {}
        return writer.node("Dropout", [value], value.axes, **rate)
    if kind == "Cast":
        there = writer.node("Cast", [value], value.axes, dtype=TensorProto.DOUBLE, to=TensorProto.DOUBLE)
        return writer.node("Cast", [there], value.axes, dtype=value.dtype, to=value.dtype)
    if kind == "Transpose" and len(value.axes) > 1:
        order = draw.shuffled(range(len(value.axes)))[::-1]
        there = transpose(writer, value, order)
        return transpose(writer, there, [order.index(axis) for axis in range(len(order))])
    there = reshape(writer, value, (*value.axes, ()))
    return reshape(writer, there, value.axes)
