"""Arithmetic, comparisons and logic on small integer tensors, element by element; logic is Kleene's.

An operation gets the facts (for what is known never to be negative) and its operands; None is an unknown element.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto

from fusion.dims import Dim, equal, floordiv, maximum, minimum, product, upper
from fusion.facts.common import attribute_int
from fusion.facts.integers import Item, Items, Rule, Shape, input_items, objects
from fusion.models.graph import Node
from fusion.schema import axes
from fusion.verdict import Verdict

if TYPE_CHECKING:
    from fusion.facts import Facts


def _each(operation: Callable[..., Item]) -> Rule:
    """An elementwise rule from an operation on known or unknown elements."""

    def rule(facts: Facts, node: Node, slot: int, shape: Shape) -> Items | None:
        arrays = [input_items(facts, node, i) for i in range(len(node.inputs))]
        columns = []
        for array in arrays:
            # An operand of which nothing is known may not matter: False and anything is False.
            known = np.full((), None, dtype=object) if array is None else array
            columns.append(np.broadcast_to(known, shape).reshape(-1).tolist())
        return objects(operation(facts, *items) for items in zip(*columns, strict=True)).reshape(shape)

    return rule


def _arithmetic(operation: Callable[[Facts, Dim, Dim], Dim | None]) -> Callable[..., Item]:
    """An operation on any number of known integers, folded from the left."""

    def fold(facts: Facts, first: Item, *others: Item) -> Item:
        result = first
        for other in others:
            if result is None or other is None or isinstance(result, bool) or isinstance(other, bool):
                return None
            result = operation(facts, result, other)
        return result

    return fold


def _add(facts: Facts, a: Dim, b: Dim) -> Dim:
    return a + b


def _subtract(facts: Facts, a: Dim, b: Dim) -> Dim:
    return a - b


def _multiply(facts: Facts, a: Dim, b: Dim) -> Dim:
    return a * b


def _largest(facts: Facts, a: Dim, b: Dim) -> Dim:
    return a if facts.lower(a - b) >= 0 else maximum(a, b)


def _smallest(facts: Facts, a: Dim, b: Dim) -> Dim:
    return b if facts.lower(a - b) >= 0 else minimum(a, b)


def _divide(facts: Facts, a: Dim, b: Dim) -> Dim | None:
    """Integer division as ONNX does it, towards zero."""
    if b == 0:
        return None
    if isinstance(a, int) and isinstance(b, int):
        return a // b if (a < 0) == (b < 0) or a % b == 0 else a // b + 1
    return floordiv(a, b) if facts.lower(a) >= 0 and facts.lower(b) >= 0 else None


def _modulo(facts: Facts, a: Dim, b: Dim) -> Dim | None:
    if b == 0:
        return None
    return a - floordiv(a, b) * b if facts.lower(b) >= 0 and (isinstance(b, int) or facts.lower(a) >= 0) else None


def _mod(facts: Facts, node: Node, slot: int, shape: Shape) -> Items | None:
    return None if attribute_int(node, "fmod") else _each(_arithmetic(_modulo))(facts, node, slot, shape)


def _power(facts: Facts, a: Dim, b: Dim) -> Dim | None:
    return product([a] * b) if isinstance(b, int) and 0 <= b <= 8 else None


def _negate(facts: Facts, item: Item) -> Item:
    return None if item is None or isinstance(item, bool) else -item


def _absolute(facts: Facts, item: Item) -> Item:
    if item is None or isinstance(item, bool):
        return None
    return item if facts.lower(item) >= 0 else -item if upper(item) <= 0 else None


def _sign(facts: Facts, item: Item) -> Item:
    if item is None or isinstance(item, bool):
        return None
    return 1 if facts.lower(item) > 0 else -1 if upper(item) < 0 else 0 if item == 0 else None


def _compare(decide: Callable[[Facts, Dim, Dim], bool | None]) -> Callable[..., Item]:
    def compare(facts: Facts, a: Item, b: Item) -> Item:
        if a is None or b is None:
            return None
        return decide(facts, a, b)

    return compare


def _equal(facts: Facts, a: Dim, b: Dim) -> bool | None:
    verdict = equal(a, b)
    if verdict is Verdict.UNKNOWN and ((b == -1 and facts.lower(a) >= 0) or (a == -1 and facts.lower(b) >= 0)):
        return False
    return None if verdict is Verdict.UNKNOWN else verdict is Verdict.YES


def _less(facts: Facts, a: Dim, b: Dim) -> bool | None:
    difference = b - a
    return True if facts.lower(difference) > 0 else False if facts.lower(-difference) >= 0 else None


def _not(facts: Facts, item: Item) -> Item:
    return None if item is None else not item


def _and(facts: Facts, a: Item, b: Item) -> Item:
    if a is False or b is False:
        return False
    return None if a is None or b is None else bool(a and b)


def _or(facts: Facts, a: Item, b: Item) -> Item:
    if a is True or b is True:
        return True
    return None if a is None or b is None else bool(a or b)


def _where(facts: Facts, condition: Item, yes: Item, no: Item) -> Item:
    if condition is None:
        return yes if yes is not None and (yes is no or (type(yes) is type(no) and yes == no)) else None
    return yes if condition else no


def _cast(facts: Facts, node: Node, slot: int, shape: Shape) -> Items | None:
    """Between integers and booleans; a float source has no integers."""
    array = input_items(facts, node, 0)
    output = node.outputs[0]
    if array is None or output is None:
        return None
    if facts.dtype(output) == TensorProto.BOOL:
        return objects(_truth(item) for item in array.reshape(-1).tolist()).reshape(shape)
    return objects(int(i) if isinstance(i, bool) else i for i in array.reshape(-1).tolist()).reshape(shape)


def _truth(item: Item) -> bool | None:
    if item is None or isinstance(item, bool):
        return item
    verdict = equal(item, 0)
    return None if verdict is Verdict.UNKNOWN else verdict is Verdict.NO


def _reduce(operation: Callable[[Facts, Dim, Dim], Dim]) -> Rule:
    def rule(facts: Facts, node: Node, slot: int, shape: Shape) -> Items | None:
        array, along = input_items(facts, node, 0), axes(node, facts)
        if array is None or along is None or array.size == 0:
            return None
        fold = _arithmetic(operation)
        kept = [axis for axis in range(array.ndim) if axis not in along]
        rows = array.transpose([*kept, *along]).reshape(prod(array.shape[axis] for axis in kept), -1)
        return objects(fold(facts, *row) for row in rows.tolist()).reshape(shape)

    return rule


def _cumulative_sum(facts: Facts, node: Node, slot: int, shape: Shape) -> Items | None:
    array = input_items(facts, node, 0)
    if array is None or array.ndim != 1 or attribute_int(node, "exclusive") or attribute_int(node, "reverse"):
        return None
    total: Item = 0
    result = []
    for item in array.tolist():
        total = _arithmetic(_add)(facts, total, item)
        result.append(total)
    return objects(result)


RULES: dict[str, Rule] = {
    "Abs": _each(_absolute),
    "Add": _each(_arithmetic(_add)),
    "And": _each(_and),
    "Cast": _cast,
    "CastLike": _cast,
    "CumSum": _cumulative_sum,
    "Div": _each(_arithmetic(_divide)),
    "Equal": _each(_compare(_equal)),
    "Greater": _each(_compare(lambda facts, a, b: _less(facts, b, a))),
    "GreaterOrEqual": _each(_compare(lambda facts, a, b: _less(facts, b, a + 1))),
    "Less": _each(_compare(_less)),
    "LessOrEqual": _each(_compare(lambda facts, a, b: _less(facts, a, b + 1))),
    "Max": _each(_arithmetic(_largest)),
    "Min": _each(_arithmetic(_smallest)),
    "Mod": _mod,
    "Mul": _each(_arithmetic(_multiply)),
    "Neg": _each(_negate),
    "Not": _each(_not),
    "Or": _each(_or),
    "Pow": _each(_arithmetic(_power)),
    "ReduceMax": _reduce(_largest),
    "ReduceMin": _reduce(_smallest),
    "ReduceProd": _reduce(_multiply),
    "ReduceSum": _reduce(_add),
    "Sign": _each(_sign),
    "Sub": _each(_arithmetic(_subtract)),
    "Sum": _each(_arithmetic(_add)),
    "Where": _each(_where),
}
