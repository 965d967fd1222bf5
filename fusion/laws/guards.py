"""Guards: what exporters write around a softmax against NaN; it belongs inside the region of the softmax.

* `Where(IsNaN(p), 0, p)` gives 0 instead of NaN in rows that are masked everywhere.
* `x - max(x)` before a softmax changes nothing but the rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusion.facts import Facts
    from fusion.graph import Node, Value


def guarded(node: Node, facts: Facts) -> Value | None:
    """The value that a NaN guard passes on; None where `node` is no NaN guard."""
    if node.op != "Where" or node.domain:
        return None
    condition, zero, value = node.inputs
    test = condition.producer if condition is not None else None
    if value is None or zero is None or test is None or test.op != "IsNaN" or test.inputs[0] is not value:
        return None
    return value if facts.number(zero) == 0.0 else None


def is_private(node: Node, value: Value) -> bool:
    """Whether nothing but the guard `node` and its own test reads `value`."""
    condition = node.inputs[0]
    test = condition.producer if condition is not None else None
    if value.is_output or condition is None or test is None:
        return False
    return set(value.uses) <= {node, test} and condition.only_use is node
