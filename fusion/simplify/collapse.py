"""Chains of rearrangements and casts: two nodes whose effect one node has, or none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fusion.facts import Facts, rearrange
from fusion.facts.common import attribute_ints
from fusion.layout import Layout
from fusion.models.graph import Node, Value
from fusion.schema import axes
from fusion.simplify.edits import Editor
from fusion.simplify.identity import is_lossless
from fusion.simplify.sizes import reshape_target

REGROUPS = frozenset({"Reshape", "Unsqueeze", "Squeeze", "Flatten"})
"""Operators that keep the elements in their order."""
OPERATORS = frozenset(rearrange.RULES) | {"Cast"}
"""What may be a link of such a chain."""
AXES_INPUT = 13
"""The opset from which Squeeze and Unsqueeze read their axes from an input."""


def undone(facts: Facts, node: Node) -> Value | None:
    """The value that a rearrangement of a rearrangement gives back."""
    below = _below(facts, node)
    if below is None:
        return None
    result, (source, layout) = node.outputs[0], below
    if layout is None or not layout.is_identity or result is None:
        return None
    return source if facts.shape(source) == facts.shape(result) else None


def _below(facts: Facts, node: Node) -> tuple[Value, Layout | None] | None:
    """What the input of a rearrangement rearranges, and the layout of the output over it."""
    middle, result = node.input(0), node.outputs[0] if len(node.outputs) == 1 else None
    producer = None if middle is None else middle.producer
    if middle is None or result is None or producer is None or producer.key not in rearrange.RULES:
        return None
    inner, outer = facts.through(middle), facts.through(result)
    if inner is None or outer is None:
        return None
    return inner[0], outer[1].compose(inner[1])


def merged(editor: Editor, rule: str, node: Node) -> bool:
    """Let one node do what `node` and the one before it do, where nobody else reads what is between."""
    middle = node.input(0)
    before = None if middle is None else middle.producer
    if middle is None or before is None or before.scope is not node.scope:
        return False
    if node.key == before.key == "Cast":
        source = before.input(0)
        if source is None or not is_lossless(editor.facts.dtype(source), editor.facts.dtype(middle)):
            return False
        editor.rewire(rule, node, 0, source)
        return True
    if middle.only_use is not node or len(node.outputs) != 1:
        return False
    if node.key == before.key == "Transpose":
        return _transposed(editor, rule, node, before)
    if node.key in REGROUPS and before.key in REGROUPS:
        return _regrouped(editor, rule, node, before)
    return False


def _transposed(editor: Editor, rule: str, node: Node, before: Node) -> bool:
    source = before.input(0)
    rank = None if source is None else editor.facts.rank(source)
    if rank is None:
        return False
    behind = list(range(rank))[::-1]
    first, second = (attribute_ints(each, "perm") or behind for each in (before, node))
    if sorted(first) != sorted(second) or sorted(first) != behind[::-1]:
        return False
    editor.respell(rule, node, "Transpose", [source], {"perm": [first[axis] for axis in second]})
    return True


def _regrouped(editor: Editor, rule: str, node: Node, before: Node) -> bool:
    facts, source, result = editor.facts, before.input(0), node.outputs[0]
    if source is None or result is None:
        return False
    joined = _joined_axes(facts, node, before)
    if joined is not None:
        if node.version >= AXES_INPUT:
            given = editor.constant(node.scope, np.array(joined, np.int64), "axes", node)
            editor.respell(rule, node, node.op, [source, given], {})
        else:
            editor.respell(rule, node, node.op, [source], {"axes": joined})
        return True
    have, want = facts.shape(source), facts.shape(result)
    if have is None or want is None or node.version < 5:
        return False
    target = reshape_target(want, have)
    if target is None:
        return False
    editor.respell(rule, node, "Reshape", [source, _vector(editor, target, node)], {})
    return True


def _vector(editor: Editor, items: Sequence[int], at: Node) -> Value:
    array: np.ndarray[Any, Any] = np.array(items, np.int64)
    return editor.constant(at.scope, array, "shape", at)


def _joined_axes(facts: Facts, node: Node, before: Node) -> list[int] | None:
    """The axes of one Unsqueeze or Squeeze that does what two do."""
    if node.op != before.op or node.op not in ("Unsqueeze", "Squeeze"):
        return None
    first, second = axes(before, facts), axes(node, facts)
    source, result = before.input(0), node.outputs[0]
    few = None if source is None else facts.rank(source)
    if first is None or second is None or few is None or result is None:
        return None
    if node.op == "Squeeze":
        kept = [axis for axis in range(few) if axis not in first]
        return sorted([*first, *(kept[axis] for axis in second)])
    total = few + len(first) + len(second)
    kept = [axis for axis in range(total) if axis not in second]
    return sorted([*second, *(kept[axis] for axis in first)])
