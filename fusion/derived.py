"""Derived initializers: packed weights, worked out from other initializers while they are written, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
from onnx import TensorProto, numpy_helper

from fusion.payload import Store, byte_size

Array = np.ndarray[Any, Any]


class Recipe(Store):
    """A store whose bytes are the concatenation of tensors; see `Model.derive`.

    Attributes:
        shape: of the result.
        data_type: of the parts and the result.
    """

    def __init__(
        self,
        parts: Sequence[TensorProto],
        axis: int,
        transpose: Sequence[Sequence[int] | None] | None,
        shape: Sequence[int] | None,
        array: Callable[[TensorProto], Array],
    ) -> None:
        super().__init__()
        self.parts = [_copy(part) for part in parts]  # the graph may remove its own
        self.transpose = list(transpose or [None] * len(parts))
        self.array = array
        shapes = self._part_shapes()
        rank = len(shapes[0])
        if not -rank <= axis < rank:
            raise ValueError(f"axis {axis} of tensors of rank {rank}")
        self.axis = axis % rank
        others = {(*s[: self.axis], *s[self.axis + 1 :]) for s in shapes if len(s) == rank}
        if len(others) > 1 or any(len(s) != rank for s in shapes):
            raise ValueError(f"shapes {shapes} differ beside axis {self.axis}")
        self.data_type: int = self.parts[0].data_type
        if {part.data_type for part in self.parts} != {self.data_type} or self.data_type == TensorProto.STRING:
            raise ValueError("the parts need one element type, and not string")
        whole = list(shapes[0])
        whole[self.axis] = sum(s[self.axis] for s in shapes)
        self.shape = tuple(whole if shape is None else shape)
        if prod(self.shape) != prod(whole):
            raise ValueError(f"{self.shape} does not hold the elements of {tuple(whole)}")

    def __len__(self) -> int:
        return byte_size(self.data_type, self.shape)

    def _part_shapes(self) -> list[tuple[int, ...]]:
        if not self.parts or len(self.parts) != len(self.transpose):
            raise ValueError(f"{len(self.parts)} parts and {len(self.transpose)} permutations")
        shapes = []
        for part, order in zip(self.parts, self.transpose, strict=True):
            dims = tuple(part.dims)
            if order is not None and sorted(order) != list(range(len(dims))):
                raise ValueError(f"{list(order)} is no permutation of the axes of {part.name!r}")
            shapes.append(dims if order is None else tuple(dims[axis] for axis in order))
        return shapes

    def read(self, offset: int, length: int) -> bytes:
        """Return all the bytes: a derived payload has no part to be read alone."""
        arrays = []
        for part, order in zip(self.parts, self.transpose, strict=True):
            values = self.array(part)
            arrays.append(values if order is None else values.transpose(order))
        raw: bytes = numpy_helper.from_array(np.concatenate(arrays, self.axis).reshape(self.shape)).raw_data
        if offset or len(raw) != length:
            raise ValueError(f"{len(raw)} bytes of data where the shape needs {length}")
        return raw


def _copy(tensor: TensorProto) -> TensorProto:
    copy = TensorProto()
    copy.CopyFrom(tensor)
    return copy
