"""Uniform numbers: all elements of a value are the same number, rounded as its element type rounds."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from onnx import TensorProto, helper

from fusion.dims import lower
from fusion.facts import constants, values
from fusion.facts.common import input_number
from fusion.facts.dtypes import INTEGERS
from fusion.models.graph import Node, Value
from fusion.schema import attribute

if TYPE_CHECKING:
    from fusion.facts import Facts

Scalar: TypeAlias = Any
"""A numpy scalar of the element type, so that arithmetic rounds as a runtime does."""

_EXACT = 2**53
"""Beyond this a float does not hold every integer."""


def number(facts: Facts, value: Value) -> float | None:
    """The number all elements of `value` equal; None where they differ, nobody knows, or there are none."""
    if constants.stored(value) is not None:
        return _stored(facts, value)
    node = value.producer
    if node is None:
        return None
    rule = RULES.get(node.key)
    if rule is not None and (value.slot == 0 or node.op == "Split"):
        found = rule(facts, node)
        if found is not None:
            return found
    if node.key not in values.RULES or facts.dtype(value) in _FLOATS:
        return None
    small = facts.integers(value)
    if small is None or not small.items or any(item != small.items[0] for item in small.items):
        return None
    item = small.items[0]
    return float(item) if isinstance(item, int) and abs(item) <= _EXACT else None


def _stored(facts: Facts, value: Value) -> float | None:
    array = constants.small(facts.graph, value)
    if array is None or array.size == 0:
        return None
    first = array.reshape(-1)[0]
    if array.size > 1 and not bool((array == first).all()):
        return None
    return _exact(first)


def _exact(scalar: Scalar) -> float | None:
    """The scalar as a float, if no digit is lost and it is a number."""
    if np.iscomplexobj(scalar):
        return None
    result = float(scalar)
    if result != result or (isinstance(scalar, np.integer | int) and abs(int(scalar)) > _EXACT):
        return None
    return result


def _same(facts: Facts, node: Node) -> float | None:
    return input_number(facts, node, 0)


def _constant_of_shape(facts: Facts, node: Node) -> float | None:
    filled = attribute(node, "value")
    if isinstance(filled, TensorProto):
        return _exact(facts.graph.model.array(filled).reshape(-1)[0]) if prod(filled.dims) == 1 else None
    return 0.0 if not node.proto.attribute else None


def _concat(facts: Facts, node: Node) -> float | None:
    first = input_number(facts, node, 0)
    if first is None or any(input_number(facts, node, i) != first for i in range(1, len(node.inputs))):
        return None
    return first


def _where(facts: Facts, node: Node) -> float | None:
    condition = input_number(facts, node, 0)
    if condition is not None:
        return input_number(facts, node, 1 if condition else 2)
    yes = input_number(facts, node, 1)
    return yes if yes is not None and input_number(facts, node, 2) == yes else None


def _cast(facts: Facts, node: Node) -> float | None:
    source = input_number(facts, node, 0)
    output = node.outputs[0]
    if source is None or output is None:
        return None
    return _rounded(source, facts.dtype(output))


def _rounded(source: float, dtype: int | None) -> float | None:
    """The number after a cast to `dtype`; None where that is not defined the same everywhere."""
    if dtype == TensorProto.BOOL:
        return float(source != 0)
    kind = _numpy_type(dtype)
    if kind is None:
        return None
    if dtype in INTEGERS:
        if abs(source) > _EXACT or not np.iinfo(kind).min <= int(source) <= np.iinfo(kind).max:
            return None
        return float(int(source))
    with np.errstate(over="ignore"):
        rounded = float(np.asarray(source, dtype=np.float64).astype(kind))
    return None if np.isinf(rounded) and not np.isinf(source) else rounded


def _numpy_type(dtype: int | None) -> Any:
    if dtype is None or dtype in (TensorProto.STRING, TensorProto.UNDEFINED, TensorProto.BOOL):
        return None
    try:
        kind = np.dtype(helper.tensor_dtype_to_np_dtype(dtype))
    except KeyError:
        return None
    return kind if kind.kind in "iu" or dtype in _FLOATS else None


_FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)


def _arithmetic(operation: Callable[..., Scalar]) -> Callable[[Facts, Node], float | None]:
    """All operands known: computed in the element type of operand 0."""

    def rule(facts: Facts, node: Node) -> float | None:
        operands = []
        for i in range(len(node.inputs)):  # the first unknown one settles it
            operand = input_number(facts, node, i)
            if operand is None:
                return None
            operands.append(operand)
        first = node.input(0)
        dtype = None if first is None else facts.dtype(first)
        kind = _numpy_type(dtype)
        if kind is None:
            return None
        if dtype in INTEGERS:
            if not _defined(node, operands):
                return None
            exact = int(operation(*(int(operand) for operand in operands)))
            fits = np.iinfo(kind).min <= exact <= np.iinfo(kind).max and abs(exact) <= _EXACT
            return float(exact) if fits else None
        with np.errstate(all="ignore"):
            scalars = [np.asarray(operand).astype(kind)[()] for operand in operands]
            result = float(np.asarray(operation(*scalars)).astype(kind))
        return None if result != result else result

    return rule


def _defined(node: Node, operands: list[float]) -> bool:
    """Whether this integer arithmetic has one meaning: no float results, no division by 0 or with a sign."""
    if node.op == "Div":
        return operands[0] >= 0 and operands[1] > 0
    if node.op == "Pow":
        return 0 <= operands[1] <= 8
    return node.op in ("Add", "Sub", "Mul", "Max", "Min", "Neg", "Abs", "Sum")


def _divide(a: Scalar, b: Scalar) -> Scalar:
    return a // b if isinstance(a, int) else a / b


def _power(facts: Facts, node: Node) -> float | None:
    base, exponent = (None if value is None else facts.dtype(value) for value in (node.input(0), node.input(1)))
    if base in INTEGERS and exponent not in INTEGERS:
        return None  # rounded through a float, differently by runtime
    return _arithmetic(lambda a, b: a**b)(facts, node)


def _nonempty_reduction(facts: Facts, node: Node) -> float | None:
    """The largest or smallest of equal elements, unless there may be none."""
    source = node.input(0)
    shape = None if source is None else facts.shape(source)
    if shape is None or any(lower(dim) < 1 for dim in shape):
        return None
    return input_number(facts, node, 0)


def _logical(operation: Callable[[bool, bool], bool], absorbing: bool) -> Callable[[Facts, Node], float | None]:
    """And, Or: one operand may settle it."""

    def rule(facts: Facts, node: Node) -> float | None:
        operands = [input_number(facts, node, 0), input_number(facts, node, 1)]
        if float(absorbing) in operands:
            return float(absorbing)
        left, right = operands
        return None if left is None or right is None else float(operation(bool(left), bool(right)))

    return rule


def _not(facts: Facts, node: Node) -> float | None:
    operand = input_number(facts, node, 0)
    return None if operand is None else float(not operand)


def _compare(operation: Callable[[float, float], bool]) -> Callable[[Facts, Node], float | None]:
    def rule(facts: Facts, node: Node) -> float | None:
        left = input_number(facts, node, 0)
        right = None if left is None else input_number(facts, node, 1)
        return None if left is None or right is None else float(operation(left, right))

    return rule


_MOVES = """DepthToSpace Dropout Expand Flatten Gather GatherElements GatherND Identity Reshape Slice SpaceToDepth Split
    Squeeze Tile Transpose Unsqueeze""".split()  # noqa: SIM905

ELEMENTWISE: dict[str, Callable[[Facts, Node], float | None]] = {
    "Abs": _arithmetic(abs),
    "Add": _arithmetic(lambda a, b: a + b),
    "And": _logical(lambda a, b: a and b, absorbing=False),
    "Cast": _cast,
    "CastLike": _cast,
    "Ceil": _arithmetic(np.ceil),
    "Div": _arithmetic(_divide),
    "Equal": _compare(lambda a, b: a == b),
    "Exp": _arithmetic(np.exp),
    "Floor": _arithmetic(np.floor),
    "Greater": _compare(lambda a, b: a > b),
    "GreaterOrEqual": _compare(lambda a, b: a >= b),
    "Less": _compare(lambda a, b: a < b),
    "LessOrEqual": _compare(lambda a, b: a <= b),
    "Log": _arithmetic(np.log),
    "Max": _arithmetic(max),
    "Min": _arithmetic(min),
    "Mul": _arithmetic(lambda a, b: a * b),
    "Neg": _arithmetic(lambda a: -a),
    "Not": _not,
    "Or": _logical(lambda a, b: a or b, absorbing=True),
    "Pow": _power,
    "Reciprocal": _arithmetic(lambda a: a.dtype.type(1) / a),
    "Sqrt": _arithmetic(np.sqrt),
    "Sub": _arithmetic(lambda a, b: a - b),
    "Sum": _arithmetic(lambda *items: sum(items[1:], items[0])),
    "Where": _where,
}
"""Operators of which each element of the result is one of the operands' there: they ask for numbers and types only."""

RULES: dict[str, Callable[[Facts, Node], float | None]] = {
    **dict.fromkeys(_MOVES, _same),
    **ELEMENTWISE,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "ReduceMax": _nonempty_reduction,
    "ReduceMin": _nonempty_reduction,
}
