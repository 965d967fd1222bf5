"""Pieces: what is read of a Concat within one operand is read of that operand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusion.dims import Dim
from fusion.layout import Layout
from fusion.schema import axes

if TYPE_CHECKING:
    from fusion.facts import Facts
    from fusion.graph import Node, Value


def part(node: Node, layout: Layout, facts: Facts) -> tuple[Value, Layout] | None:
    """The operand of a Concat in which everything lies that `layout` reads, and the layout over it."""
    along = axes(node, facts) if node.key == "Concat" else None
    if along is None:
        return None
    axis = along[0]
    least = most = layout.offsets[axis]
    for source, stride, size in (factor for factors in layout.axes for factor in factors):
        if source == axis and facts.lower(stride) >= 0:
            most = most + stride * (size - 1)
        elif source == axis:
            least = least + stride * (size - 1)
    start: Dim = 0
    for operand in node.inputs:
        shape = facts.shape(operand) if operand is not None else None
        if operand is None or shape is None:
            return None
        end = start + shape[axis]
        if facts.lower(least - start) >= 0 and facts.lower(end - 1 - most) >= 0:
            offsets = (*layout.offsets[:axis], layout.offsets[axis] - start, *layout.offsets[axis + 1 :])
            return operand, Layout(layout.axes, offsets, shape)
        start = end
    return None
