"""Derived initializers: weights packed or multiplied while they are written, one at a time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import IO, Any

import numpy as np
from onnx import TensorProto, numpy_helper

from fusion.models.payload import byte_size
from fusion.models.store import Store

Array = np.ndarray[Any, Any]


class Recipe(Store):
    """A store whose bytes are the concatenation of tensors, times a factor; see `Model.derive`.

    Attributes:
        shape: of the result.
        data_type: of the parts and the result.
    """

    def __init__(
        self,
        parts: Sequence[TensorProto],
        axis: int,
        transpose: Sequence[Sequence[int] | None] | None,
        array: Callable[[TensorProto], Array],
        factor: Array | None = None,
    ) -> None:
        super().__init__()
        types = {part.data_type for part in parts}
        if len(types) != 1 or TensorProto.STRING in types:
            raise ValueError(f"{len(parts)} parts: they need one element type, and not string")
        self.data_type: int = types.pop()
        self.parts: list[tuple[TensorProto, Sequence[int]]] = []
        shapes = []
        for part, order in zip(parts, transpose or [None] * len(parts), strict=True):
            identity = range(len(part.dims))
            order = order or identity
            if sorted(order) != list(identity):
                raise ValueError(f"{list(order)} is no permutation of the axes of {part.name!r}")
            copy = TensorProto()
            copy.CopyFrom(part)  # the graph may remove its own
            self.parts.append((copy, order))
            shapes.append([part.dims[index] for index in order])
        shape = shapes[0]
        if not -len(shape) <= axis < len(shape):
            raise ValueError(f"axis {axis} of tensors of rank {len(shape)}")
        self.axis = axis % len(shape)
        if len({(*dims[: self.axis], None, *dims[self.axis + 1 :]) for dims in shapes}) > 1:
            raise ValueError(f"shapes {shapes} differ beside axis {self.axis}")
        self.shape = (*shape[: self.axis], sum(dims[self.axis] for dims in shapes), *shape[self.axis + 1 :])
        if factor is not None and np.broadcast_shapes(self.shape, factor.shape) != self.shape:
            raise ValueError(f"a factor of shape {factor.shape} for a tensor of shape {self.shape}")
        self.array = array
        self.factor = factor

    def __len__(self) -> int:
        return byte_size(self.data_type, self.shape)

    def read(self, offset: int, length: int) -> bytes:
        """Return all the bytes: a derived payload has no part to be read alone."""
        assert not offset
        return bytes(self._bytes(length))

    def copy(self, offset: int, length: int, file: IO[bytes]) -> None:
        assert not offset
        file.write(self._bytes(length))

    def _bytes(self, length: int) -> bytes | memoryview:
        arrays = [self.array(part).transpose(order) for part, order in self.parts]
        whole = np.concatenate(arrays, self.axis)
        if self.factor is not None:
            whole = (whole * self.factor).astype(whole.dtype)
        if whole.nbytes == length and sys.byteorder == "little":
            return np.ascontiguousarray(whole).view(np.uint8).reshape(-1).data
        raw: bytes = numpy_helper.from_array(whole).raw_data  # several elements lie in one byte
        assert len(raw) == length
        return raw
