"""Nodes that compute nothing: the input which output 0 equals, bit for bit, in every run."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import TensorProto

from fusion.dims import equal
from fusion.facts import Facts, constants, rearrange
from fusion.facts.dtypes import INTEGERS
from fusion.facts.pieces import pads
from fusion.models.graph import Node, Value
from fusion.schema import attribute
from fusion.verdict import Verdict


def same_value(facts: Facts, node: Node) -> Value | None:
    """The input that output 0 of a node equals; None where the node computes something, or nobody knows."""
    rule = RULES.get(node.key)
    return None if rule is None else rule(facts, node)


def _input(facts: Facts, node: Node) -> Value | None:
    return node.input(0)


def _dropout(facts: Facts, node: Node) -> Value | None:
    """Dropout outside training, whose mask nobody reads."""
    if any(value is not None for value in node.outputs[1:]):
        return None
    if node.version < 7:
        return node.input(0) if attribute(node, "is_test") == 1 else None
    training = node.input(2)
    return node.input(0) if training is None or facts.number(training) == 0 else None


def _cast(facts: Facts, node: Node) -> Value | None:
    source, result = node.input(0), node.outputs[0]
    if source is None or result is None:
        return None
    dtype = facts.dtype(result)
    if dtype is not None and dtype == facts.dtype(source):
        return source
    return round_trip(facts, node)


def round_trip(facts: Facts, node: Node) -> Value | None:
    """The value that a Cast of a Cast gives back: what was cast to a type that holds all of its numbers."""
    source, result = node.input(0), node.outputs[0]
    if source is None or result is None or source.producer is None or source.producer.key != "Cast":
        return None
    first = source.producer.input(0)
    if first is None or not is_lossless(facts.dtype(first), facts.dtype(source)):
        return None
    return first if facts.dtype(first) == facts.dtype(result) else None


_DIGITS: dict[int | None, tuple[int, int]] = {
    TensorProto.FLOAT16: (11, 15),
    TensorProto.BFLOAT16: (8, 127),
    TensorProto.FLOAT: (24, 127),
    TensorProto.DOUBLE: (53, 1023),
}
"""Binary digits and the largest exponent of float types."""
_BITS: dict[int | None, tuple[int, bool]] = {
    TensorProto.BOOL: (1, False),
    TensorProto.INT64: (63, True),
    TensorProto.INT32: (31, True),
    TensorProto.INT16: (15, True),
    TensorProto.INT8: (7, True),
    TensorProto.UINT64: (64, False),
    TensorProto.UINT32: (32, False),
    TensorProto.UINT16: (16, False),
    TensorProto.UINT8: (8, False),
}
"""Binary digits of integer types, and whether they have a sign."""


def is_lossless(source: int | None, target: int | None) -> bool:
    """Whether every number of one type is a number of the other, and casts to it and back are exact."""
    if source in _DIGITS and target in _DIGITS:
        return all(a <= b for a, b in zip(_DIGITS[source], _DIGITS[target], strict=True))
    if source in _BITS and target in _DIGITS:
        return _BITS[source][0] <= min(_DIGITS[target])
    if source in _BITS and target in _BITS and target != TensorProto.BOOL:
        bits, signed = _BITS[source]
        more, signs = _BITS[target]
        return bits <= more and (signs or not signed)
    return source == target == TensorProto.BOOL


def _rearranged(facts: Facts, node: Node) -> Value | None:
    source, result = node.input(0), node.outputs[0]
    if source is None or result is None or any(value is not None for value in node.outputs[1:]):
        return None
    layout = facts.layout(node)
    return source if layout is not None and layout.is_identity else None


def _alone(facts: Facts, node: Node) -> Value | None:
    """An operator of any number of inputs, of which there is one."""
    return node.input(0) if len(node.inputs) == 1 else None


def _pad(facts: Facts, node: Node) -> Value | None:
    source = node.input(0)
    rank = None if source is None else facts.rank(source)
    around = None if rank is None or node.version < 2 else pads(facts, node, rank)
    return source if around is not None and all(pair == (0, 0) for pair in around) else None


def _neutral(
    slots: tuple[int, ...], test: Callable[[Facts, Value], bool], *, stored: bool = True
) -> Callable[[Facts, Node], Value | None]:
    """Arithmetic with an operand that changes no element, if the other operand has the shape of the result.

    Args:
        slots: where the operand may stand.
        test: whether it is neutral.
        stored: look only at constants; what is computed, masks apart, is hardly ever neutral.
    """

    def rule(facts: Facts, node: Node) -> Value | None:
        result = node.outputs[0]
        if len(node.inputs) != 2 or result is None:
            return None
        for slot in slots:
            operand, other = node.inputs[slot], node.inputs[1 - slot]
            if operand is None or other is None or (stored and constants.stored(operand) is None):
                continue
            if not test(facts, operand):
                continue
            if has_shape(facts, other, result) and facts.dtype(other) == facts.dtype(result) is not None:
                return other
        return None

    return rule


def has_shape(facts: Facts, value: Value, result: Value) -> bool:
    """Whether two values provably have one shape."""
    one, other = facts.shape(value), facts.shape(result)
    if one is None or other is None or len(one) != len(other):
        return False
    return all(equal(a, b) is Verdict.YES for a, b in zip(one, other, strict=True))


def _number(wanted: float) -> Callable[[Facts, Value], bool]:
    return lambda facts, value: facts.number(value) == wanted


def _zero(negative: bool) -> Callable[[Facts, Value], bool]:
    """A zero which leaves zeros of both signs as they are: -0.0 where it is added, +0.0 where it is subtracted."""

    def test(facts: Facts, value: Value) -> bool:
        if facts.number(value) != 0:
            return False
        if facts.dtype(value) in INTEGERS:
            return True
        array = constants.small(facts.graph, value)
        return array is not None and array.dtype.kind == "f" and bool((np.signbit(array) == negative).all())

    return test


def _where(facts: Facts, node: Node) -> Value | None:
    """A choice that is the same everywhere; not of floats, for onnxruntime's kernel makes 0.0 of -0.0."""
    condition, result = node.input(0), node.outputs[0]
    known = None if condition is None else facts.number(condition)
    if known is None or result is None or facts.dtype(result) not in INTEGERS | {TensorProto.BOOL}:
        return None
    chosen = node.input(1 if known else 2)
    return chosen if chosen is not None and has_shape(facts, chosen, result) else None


RULES: dict[str, Callable[[Facts, Node], Value | None]] = {
    **dict.fromkeys(rearrange.RULES, _rearranged),
    "Identity": _input,
    "Dropout": _dropout,
    "Cast": _cast,
    "CastLike": _cast,
    **dict.fromkeys(("Concat", "Sum", "Max", "Min", "Mean"), _alone),
    "Pad": _pad,
    "Add": _neutral((0, 1), _zero(negative=True)),
    "Sub": _neutral((1,), _zero(negative=False)),
    "Mul": _neutral((0, 1), _number(1.0)),
    "Div": _neutral((1,), _number(1.0)),
    "And": _neutral((0, 1), _number(1.0), stored=False),
    "Or": _neutral((0, 1), _number(0.0), stored=False),
    "Where": _where,
}
