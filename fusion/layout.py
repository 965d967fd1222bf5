"""Layout: an index map from coordinate axes to the axes of a source, as data.

Every coordinate axis is a list of factors `(source axis, stride, size)`, outermost first, and

    index[source axis a] = offset[a] + sum of (factor index * stride) over all factors on a

A broadcast factor has source axis None and stride 0. Strides count steps of one source axis, not memory, so no product
with unknown dimensions is formed. Kept canonical (no factor of size 1, neighbours merged), equal maps are equal tuples.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from fusion.dims import Dim, broadcast, lower, product, stretched
from fusion.radix import Axis, Factor, decode, merge_neighbours, regroup
from fusion.verdict import Verdict

__all__ = ["Axis", "Factor", "Layout", "merge_neighbours", "regroup"]


class Layout(NamedTuple):
    """An index map: for every coordinate, where in the source its element lies. Hashable; equal maps are equal tuples.

    The operations return None where the result is no such map, or cannot be proved to be one. Axis numbers must be in
    0..rank-1 (a new axis: in 0..new rank-1).

    >>> heads = Layout.identity((2, 5, 12)).reshape((2, 5, 4, 3))
    >>> heads.transpose((0, 2, 1, 3)).axes
    (((0, 1, 2),), ((2, 3, 4),), ((1, 1, 5),), ((2, 1, 3),))
    """

    axes: tuple[Axis, ...]
    """One entry per coordinate axis."""
    offsets: tuple[Dim, ...]
    """One per source axis."""
    source: tuple[Dim, ...]
    """The shape of the source."""

    @staticmethod
    def identity(shape: Sequence[Dim]) -> Layout:
        """The layout of a value over itself."""
        return _identity(tuple(shape))

    @property
    def shape(self) -> tuple[Dim, ...]:
        """The sizes of the coordinate axes."""
        return tuple(_size(axis) for axis in self.axes)

    @property
    def is_identity(self) -> bool:
        """Whether every coordinate axis is the source axis of the same number, whole."""
        return self == Layout.identity(self.source)

    # --- value operations: the layout of op(v) over the source of v ---------------------------------------------------

    def transpose(self, perm: Sequence[int]) -> Layout:
        """Axis i of the result is axis perm[i] of this."""
        return Layout(tuple(self.axes[axis] for axis in perm), self.offsets, self.source)

    def unsqueeze(self, axes: Sequence[int]) -> Layout:
        """Insert axes of size 1; `axes` are their places in the result."""
        result = list(self.axes)
        for axis in sorted(axes):
            result.insert(axis, ())
        return Layout(tuple(result), self.offsets, self.source)

    def squeeze(self, axes: Iterable[int]) -> Layout | None:
        """Drop axes. An operator that does so has succeeded only if their size is 1: a symbol is taken as 1 then.

        None where a size is a number other than 1.
        """
        dropped = set(axes)
        if any(lower(_size(self.axes[axis])) >= 2 for axis in dropped):
            return None
        kept = tuple(factors for axis, factors in enumerate(self.axes) if axis not in dropped)
        return Layout(kept, self.offsets, self.source)

    def reshape(self, dims: Sequence[Dim]) -> Layout | None:
        """The row-major elements regrouped to these sizes."""
        return _reshape(self, tuple(dims))

    def expand(self, dims: Sequence[Dim]) -> Layout | None:
        """numpy broadcasting of this shape and `dims` against each other."""
        shape = self.shape
        rank = max(len(shape), len(dims))
        target = (1,) * (rank - len(dims)) + tuple(dims)
        result: list[Axis] = []
        for axis, size in enumerate(target):
            factors = self.axes[axis - rank + len(shape)] if axis >= rank - len(shape) else ()
            grown = _expand(factors, size)
            if grown is None:
                return None
            result.append(grown)
        return Layout(tuple(result), self.offsets, self.source)

    def tile(self, repeats: Sequence[Dim]) -> Layout:
        """Repeat the whole of each axis."""
        pairs = zip(repeats, self.axes, strict=True)
        return self._with_axes(((None, 0, count), *factors) for count, factors in pairs)

    def slice(self, axis: int, start: Dim, length: Dim, step: int = 1) -> Layout | None:
        """`length` elements of `axis`: start, start + step, …"""
        decoded = decode(self.axes[axis], start, [] if length == 1 else [(axis, step, length)])
        if decoded is None:
            return None
        factors = (factor for image in decoded[0] for factor in image)
        axes = (*self.axes[:axis], merge_neighbours(factors), *self.axes[axis + 1 :])
        return Layout(axes, self._moved(decoded[1]), self.source)

    def take(self, axis: int, index: Dim) -> Layout | None:
        """The element `index` of `axis`; the axis disappears."""
        cut = self.slice(axis, index, 1)
        return None if cut is None else cut.squeeze((axis,))

    # --- coordinates --------------------------------------------------------------------------------------------------

    def compose(self, inner: Layout) -> Layout | None:
        """self: coordinates to axes of v; inner: axes of v to axes of u. The result: coordinates to axes of u.

        None where a factor of self does not provably fall on digits of the mixed radix in which inner reads that axis.
        """
        if len(self.source) != len(inner.axes):
            raise ValueError(f"a layout over {len(self.source)} axes cannot read a value of {len(inner.axes)} axes")
        return _compose(self, inner)

    def broadcast_over(self, operand_shape: Sequence[Dim]) -> Layout | None:
        """self: coordinates to v, where v is elementwise in an operand of this shape. The layout over the operand.

        None where it cannot be told whether an axis of the operand is 1 or full.
        """
        if operand_shape == self.source:
            return self
        if len(operand_shape) > len(self.source):
            raise ValueError(f"an operand of {len(operand_shape)} axes does not broadcast to {len(self.source)}")
        return _broadcast_over(self, tuple(operand_shape))

    def remap(self, source: Sequence[Dim], axis_of: Sequence[int | None], extra: Iterable[int] = ()) -> Layout:
        """Rename source axes: `axis_of[i]` is the new number of axis i, None where it is only broadcast from now on.

        For every axis in `extra`, a coordinate axis is appended which covers that axis of the new source whole.
        """
        offsets: list[Dim] = [0] * len(source)
        for old, new in enumerate(axis_of):
            if new is not None:
                offsets[new] = offsets[new] + self.offsets[old]
        axes = [[_rename(factor, axis_of) for factor in factors] for factors in self.axes]
        axes.extend([(axis, 1, source[axis])] for axis in extra)
        return Layout(tuple(merge_neighbours(factors) for factors in axes), tuple(offsets), tuple(source))

    def permute(self, order: Sequence[int]) -> Layout:
        """Choose and reorder coordinate axes; an axis left out must be broadcast (ValueError otherwise)."""
        for axis in range(len(self.axes)):
            if axis not in order and self.depends(axis):
                raise ValueError(f"axis {axis} of {self.axes} reads the source: it cannot be dropped")
        return Layout(tuple(self.axes[axis] for axis in order), self.offsets, self.source)

    def split(self, axis: int, sizes: Sequence[Dim]) -> Layout | None:
        """One coordinate axis cut into several, outermost first."""
        groups = regroup(self.axes[axis], sizes)
        return None if groups is None else self._with_axes((*self.axes[:axis], *groups, *self.axes[axis + 1 :]))

    def merge(self, start: int, stop: int) -> Layout:
        """The coordinate axes start..stop-1 as one; an axis of size 1 is inserted where there are none."""
        joined = tuple(factor for factors in self.axes[start:stop] for factor in factors)
        return self._with_axes((*self.axes[:start], joined, *self.axes[stop:]))

    def whole(self, axis: int) -> int | None:
        """The source axis which this coordinate axis covers exactly and alone, in order and from 0; None if none."""
        factors = self.axes[axis]
        if len(factors) != 1:
            return None
        source_axis, stride, size = factors[0]
        if source_axis is None or stride != 1 or self.offsets[source_axis] != 0:
            return None
        if lower(size - self.source[source_axis]) < 0:  # it never reads beyond the end, so not less is equal
            return None
        readers = sum(factor[0] == source_axis for factors in self.axes for factor in factors)
        return source_axis if readers == 1 else None

    def depends(self, axis: int) -> bool:
        """Whether the coordinate axis reads the source at all; False where it is only broadcast."""
        return any(source_axis is not None for source_axis, _, _ in self.axes[axis])

    def _moved(self, moves: Iterable[tuple[int, Dim]]) -> tuple[Dim, ...]:
        """The offsets after moving some of them by a distance."""
        offsets = list(self.offsets)
        for axis, distance in moves:
            offsets[axis] = offsets[axis] + distance
        return tuple(offsets)

    def _with_axes(self, axes: Iterable[Iterable[Factor]]) -> Layout:
        return Layout(tuple(merge_neighbours(factors) for factors in axes), self.offsets, self.source)


# Layers repeat: what was worked out for one serves all. The caches are bounded, and their keys are plain data.


@lru_cache(maxsize=8192)
def _identity(shape: tuple[Dim, ...]) -> Layout:
    axes = tuple(() if size == 1 else ((axis, 1, size),) for axis, size in enumerate(shape))
    return Layout(axes, (0,) * len(axes), shape)


@lru_cache(maxsize=8192)
def _reshape(layout: Layout, dims: tuple[Dim, ...]) -> Layout | None:
    if dims == layout.shape:
        return layout
    groups = regroup((factor for axis in layout.axes for factor in axis), dims)
    return None if groups is None else layout._with_axes(groups)


@lru_cache(maxsize=8192)
def _compose(outer: Layout, inner: Layout) -> Layout | None:
    moves: list[tuple[int, Dim]] = []
    images: dict[Factor, list[Factor]] = {}
    for axis, digits in enumerate(inner.axes):
        parts = [factor for factors in outer.axes for factor in factors if factor[0] == axis]
        decoded = decode(digits, outer.offsets[axis], parts)
        if decoded is None:
            return None
        images.update(zip(parts, decoded[0], strict=True))
        moves += decoded[1]
    axes = tuple(
        merge_neighbours(image for factor in factors for image in images.get(factor, [factor]))
        for factors in outer.axes
    )
    return Layout(axes, inner._moved(moves), inner.source)


@lru_cache(maxsize=8192)
def _broadcast_over(layout: Layout, operand: tuple[Dim, ...]) -> Layout | None:
    missing = len(layout.source) - len(operand)
    read = {axis for factors in layout.axes for axis, _, _ in factors}
    axis_of: list[int | None] = [None] * missing
    for axis, (size, whole) in enumerate(zip(operand, layout.source[missing:], strict=True)):
        if size == 1:
            axis_of.append(None)
        elif stretched(size, whole) is Verdict.NO:
            axis_of.append(axis)
        elif axis + missing not in read and layout.offsets[axis + missing] == 0:
            axis_of.append(axis)  # only index 0 is read, which is right for either size
        else:
            return None
    return layout.remap(operand, axis_of)


def _size(factors: Axis) -> Dim:
    if len(factors) == 1:
        return factors[0][2]
    return product(size for _, _, size in factors)


def _rename(factor: Factor, axis_of: Sequence[int | None]) -> Factor:
    axis, stride, size = factor
    new = None if axis is None else axis_of[axis]
    return (None, 0, size) if new is None else (new, stride, size)


def _expand(factors: Axis, size: Dim) -> Axis | None:
    """One axis broadcast against `size`."""
    if size == 1:
        return factors
    if not factors:
        return ((None, 0, size),)
    own = _size(factors)
    result = broadcast(own, size)
    if stretched(own, result) is not Verdict.NO:
        return None
    axis, stride, _ = factors[0]
    return ((axis, stride, result),) if len(factors) == 1 else factors
