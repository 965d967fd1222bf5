"""IntTensor: a small integer or boolean tensor whose elements are dimensions, booleans, or unknown."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from fusion.dims import Dim
from fusion.models.graph import Node

if TYPE_CHECKING:
    from fusion.facts import Facts

Item: TypeAlias = "Dim | bool | None"
Items: TypeAlias = np.ndarray[Any, Any]
"""The elements as an object array of the tensor's shape: rearrangements are numpy's."""

MOST = 64
"""Elements beyond which a tensor is data, not shape arithmetic."""


@dataclass(frozen=True, slots=True)
class IntTensor:
    """The elements in row-major order; None is an unknown element."""

    shape: tuple[int, ...]
    items: tuple[Item, ...]

    def __post_init__(self) -> None:
        if len(self.items) != prod(self.shape):
            raise ValueError(f"{len(self.items)} elements do not fill the shape {self.shape}")

    @staticmethod
    def of(array: Items) -> IntTensor:
        """The tensor with the elements of an object array."""
        return IntTensor(array.shape, tuple(array.reshape(-1).tolist()))

    @property
    def array(self) -> Items:
        """A new object array with the elements."""
        return objects(self.items).reshape(self.shape)

    @property
    def numbers(self) -> tuple[int, ...] | None:
        """The elements, where all are known integers (a boolean is none)."""
        found = tuple(item for item in self.items if isinstance(item, int) and not isinstance(item, bool))
        return found if len(found) == len(self.items) else None

    @property
    def dims(self) -> list[Dim | None]:
        """The elements, None for one that is unknown or a boolean."""
        return [None if isinstance(item, bool) else item for item in self.items]


def objects(items: Iterable[object]) -> Items:
    """A flat object array; numpy must not look into the elements."""
    listed = list(items)
    array = np.empty(len(listed), dtype=object)
    array[:] = listed
    return array


Shape: TypeAlias = tuple[int, ...]
Rule: TypeAlias = Callable[["Facts", Node, int, Shape], "Items | None"]
"""The facts, the node, the output slot, the shape of the result → its elements; None where nothing is known."""


def input_items(facts: Facts, node: Node, slot: int) -> Items | None:
    """The elements of an input; None where nothing is known of them."""
    value = node.input(slot)
    found = None if value is None else facts.integers(value)
    return None if found is None else found.array
