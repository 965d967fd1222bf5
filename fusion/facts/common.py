"""What the rules of all facts share: reading a node's inputs and attributes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from fusion.dims import Dim
from fusion.models.graph import Node
from fusion.schema import attribute

if TYPE_CHECKING:
    from fusion.facts import Facts

Dims: TypeAlias = Sequence["Dim | None"]
"""Dimensions; None for one that is not known."""


def input_shape(facts: Facts, node: Node, slot: int) -> Dims | None:
    """The shape of an input; None where it is absent or its rank is unknown."""
    value = node.input(slot)
    return None if value is None else facts.shape(value)


def input_number(facts: Facts, node: Node, slot: int) -> float | None:
    """The number all elements of an input equal."""
    value = node.input(slot)
    return None if value is None else facts.number(value)


def listed_dims(facts: Facts, node: Node, slot: int) -> Dims | None:
    """The elements of an integer vector input; unknown ones are None, an unknown length is None."""
    value = node.input(slot)
    if value is None:
        return None
    found = facts.integers(value)
    if found is not None:
        return found.dims
    shape = facts.shape(value)
    return [None] * shape[0] if shape is not None and len(shape) == 1 and isinstance(shape[0], int) else None


def attribute_int(node: Node, name: str) -> int | None:
    """An integer attribute, given or by default."""
    found = attribute(node, name)
    return found if isinstance(found, int) else None


def attribute_ints(node: Node, name: str) -> list[int] | None:
    """A list of integers; None where it is absent."""
    found = attribute(node, name)
    return [item for item in found if isinstance(item, int)] if isinstance(found, list) else None
