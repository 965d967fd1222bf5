"""Packed weights: several constants put together along an axis, read as one where they are pieces of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto, numpy_helper

from fusion.dims import Dim, product
from fusion.layout import merge_neighbours
from fusion.models.graph import Value
from fusion.writing.found import Captured, Found, New, Operand, Unmet

if TYPE_CHECKING:
    from fusion.writing.emit import Builder


def packed(
    op: Builder, found: Found, captures: Sequence[Captured | None], axis: int, absent: Sequence[Captured]
) -> Operand:
    """See `Builder.packed`."""
    if not any(captures):
        return None
    whole = _pieces_of(captures, axis)
    if whole is not None and whole.tensor is not None and whole.tensor.data_type == found.dtype:
        op.inputs.append(whole)
        return whole
    parts: list[tuple[TensorProto, tuple[int, int] | None]] = []
    for index, capture in enumerate(captures):
        if capture is None:
            size = absent[index].shape[1]
            if not isinstance(size, int):
                raise op.unmet(f"the size of {absent[index].name} is not a known number", absent[index].value)
            parts.append((numpy_helper.from_array(np.zeros(size, op.numpy)), None))
            continue
        tensor = capture.value.tensor
        if tensor is None or tensor.data_type != found.dtype:
            raise Unmet(
                f"{capture.name} ({capture.value.name}) is no stored weight of the result's dtype",
                place=capture.value.name,
            )
        read = [capture.ref.layout.whole(own) for own in range(len(capture.shape))]
        if read != list(range(len(tensor.dims))) and read != [1, 0]:
            raise Unmet(f"{capture.name} ({capture.value.name}) is not read whole", place=capture.value.name)
        parts.append((tensor, (1, 0) if read == [1, 0] else None))
    return New(found.dtype, parts=tuple(parts), axis=axis)


def _pieces_of(captures: Sequence[Captured | None], axis: int) -> Value | None:
    """The value that these captures are cut from along an axis, one after the other and nothing left out."""
    first = captures[0]
    end: Dim = 0
    for capture in captures:
        if capture is None or first is None or capture.value is not first.value:
            return None
        layout = capture.ref.layout
        if len(layout.axes) != len(layout.source):
            return None
        for own, factors in enumerate(layout.axes):
            cut = own == axis
            size = product(length for _, _, length in factors)
            if factors != merge_neighbours([(own, 1, size)]) or layout.offsets[own] != (end if cut else 0):
                return None
            if not cut and size != layout.source[own]:
                return None
        end = end + layout.shape[axis]
    return first.value if first is not None and end == first.ref.layout.source[axis] else None
