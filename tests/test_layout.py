"""Layouts against numpy: a chain of operators, applied to an array and to a layout, must read the same elements."""

from __future__ import annotations

from itertools import pairwise
from itertools import product as cartesian

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, given, settings

from fusion.dims import evaluate, minimum, symbol
from fusion.layout import Layout, regroup

B, S, T, H, D = (symbol(name) for name in "BSTHD")
NUMBERS = {B: 2, S: 5, T: 4, H: 3, D: 7}


def bound(layout, binding=None):
    """The layout with every symbol replaced by its number, not made canonical again."""
    value = lambda dim: evaluate(dim, binding or NUMBERS)  # noqa: E731
    axes = tuple(tuple((a, value(stride), value(size)) for a, stride, size in axis) for axis in layout.axes)
    return Layout(axes, tuple(map(value, layout.offsets)), tuple(map(value, layout.source)))


def gather(layout, array):
    """The elements of `array` which the layout reads, one per coordinate: its definition, written out."""
    assert array.shape == layout.source
    factors = [factor for axis in layout.axes for factor in axis]
    shape = [size for _, _, size in factors]
    indices = [np.full(shape, offset, dtype=np.int64) for offset in layout.offsets]
    for position, (axis, stride, size) in enumerate(factors):
        if axis is not None:
            steps = np.arange(size).reshape([-1 if i == position else 1 for i in range(len(shape))])
            indices[axis] = indices[axis] + stride * steps
    for index, size in zip(indices, array.shape, strict=True):
        assert index.size == 0 or (index.min() >= 0 and index.max() < size)
    gathered = array[tuple(indices)] if indices else np.broadcast_to(array, shape)
    return gathered.reshape(layout.shape)


def assert_canonical(layout):
    for axis in layout.axes:
        for factor in axis:
            assert factor[2] != 1
        for (a, stride, _), (b, inner, size) in pairwise(axis):
            assert not (a == b and stride == inner * size)
    assert hash(layout) == hash(Layout(layout.axes, layout.offsets, layout.source))


def numbered(shape):
    return np.arange(int(np.prod(shape, dtype=np.int64))).reshape(shape)


def factorisations(draw, total):
    """Random sizes with this product."""
    sizes = []
    while total > 1 and draw(st.integers(0, 4)):
        size = draw(st.sampled_from([n for n in range(1, total + 1) if total % n == 0]))
        sizes.append(size)
        total //= size
    return [*sizes, total]


@st.composite
def steps(draw, array, layout):
    """One random operator applied to both; the layout may be None."""
    rank = array.ndim
    kind = draw(st.sampled_from(["transpose", "unsqueeze", "squeeze", "reshape", "expand", "tile", "slice", "take"]))
    if kind == "transpose":
        perm = draw(st.permutations(range(rank)))
        return array.transpose(perm), layout.transpose(perm)
    if kind == "unsqueeze" and rank < 5:
        axes = draw(st.lists(st.integers(0, rank), max_size=1))
        return np.expand_dims(array, tuple(axes)), layout.unsqueeze(axes)
    if kind == "squeeze":
        axes = tuple(axis for axis, size in enumerate(array.shape) if size == 1)
        return array.squeeze(axes), layout.squeeze(axes)
    if kind == "reshape":
        sizes = factorisations(draw, array.size)
        return array.reshape(sizes), layout.reshape(sizes)
    if kind == "expand":
        target = [
            draw(st.sampled_from([1, 2, 3])) if size == 1 else draw(st.sampled_from([1, size])) for size in array.shape
        ]
        if draw(st.booleans()):
            target.insert(0, 2)
        return array * np.ones(target, dtype=np.int64), layout.expand(target)
    if kind == "tile":
        repeats = [draw(st.sampled_from([1, 1, 1, 2])) for _ in array.shape]
        return np.tile(array, repeats), layout.tile(repeats)
    if kind in ("slice", "take") and rank:
        axis = draw(st.integers(0, rank - 1))
        start = draw(st.integers(0, array.shape[axis] - 1))
        if kind == "take":
            return array.take(start, axis), layout.take(axis, start)
        step = draw(st.sampled_from([1, 1, 2, -1, 3]))
        most = -(-(array.shape[axis] - start) // step) if step > 0 else start + 1
        length = draw(st.integers(1, most))
        chosen = [start + step * i for i in range(length)]
        return array.take(chosen, axis), layout.slice(axis, start, length, step)
    return array, layout


@st.composite
def chains(draw, shape=None, length=6):
    """(array, layout) after random operators on a numbered source; operators no layout expresses are skipped."""
    shape = (
        shape if shape is not None else tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)))
    )
    array, layout = numbered(shape), Layout.identity(shape)
    for _ in range(draw(st.integers(0, length))):
        new_array, new_layout = draw(steps(array, layout))
        if new_layout is not None and new_array.size <= 2000:
            array, layout = new_array, new_layout
    return shape, array, layout


@settings(max_examples=500, deadline=None)
@given(chains())
def test_a_chain_of_operators_reads_what_numpy_reads(chain):
    shape, array, layout = chain
    assert layout.shape == array.shape
    assert_canonical(layout)
    np.testing.assert_array_equal(gather(layout, numbered(shape)), array)
    if layout.is_identity:
        np.testing.assert_array_equal(array, numbered(shape))


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_composition_reads_through_both(data):
    shape, middle, inner = data.draw(chains(length=4))
    assume(middle.size <= 200)
    _, outer_array, outer = data.draw(chains(shape=middle.shape, length=4))
    assert outer_array.shape == outer.shape
    both = outer.compose(inner)
    assume(both is not None)
    assert_canonical(both)
    np.testing.assert_array_equal(gather(both, numbered(shape)), gather(outer, middle))
    assert both.source == shape
    _, _, outermost = data.draw(chains(shape=outer.shape, length=3))
    left = outermost.compose(outer)
    if left is not None and left.compose(inner) is not None:
        right = outermost.compose(both)
        if right is not None:
            assert right == left.compose(inner)


@settings(max_examples=300, deadline=None)
@given(chains())
def test_identity_is_neutral_and_operators_are_compositions(chain):
    _, array, layout = chain
    assert Layout.identity(layout.shape).compose(layout) == layout
    assert layout.compose(Layout.identity(layout.source)) == layout
    order = tuple(reversed(range(array.ndim)))
    assert Layout.identity(layout.shape).transpose(order).compose(layout) == layout.transpose(order)
    flat = Layout.identity(layout.shape).reshape((array.size,))
    if flat is not None:
        assert flat.compose(layout) == layout.reshape((array.size,))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_coordinates_split_and_merge(data):
    shape, array, layout = data.draw(chains())
    assume(array.ndim)
    start = data.draw(st.integers(0, array.ndim - 1))
    stop = data.draw(st.integers(start + 1, array.ndim))
    sizes = array.shape
    merged = layout.merge(start, stop)
    expected = array.reshape((*sizes[:start], -1, *sizes[stop:]))
    np.testing.assert_array_equal(gather(merged, numbered(shape)), expected)
    assert merged.split(start, sizes[start:stop]) == layout
    assert_canonical(merged)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_broadcast_over_reads_the_operand(data):
    shape = data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4))
    keep = [size if data.draw(st.booleans()) else 1 for size in shape]
    operand_shape = tuple(keep[data.draw(st.integers(0, len(shape))) :])
    _, _, layout = data.draw(chains(shape=tuple(shape)))
    over = layout.broadcast_over(operand_shape)
    assert over is not None
    assert_canonical(over)
    full = np.broadcast_to(numbered(operand_shape), shape)
    np.testing.assert_array_equal(gather(over, numbered(operand_shape)), gather(layout, np.ascontiguousarray(full)))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_remap_renames_source_axes_and_appends_whole_ones(data):
    shape, _, layout = data.draw(chains())
    # u = v transposed, with one more axis in front: the element [x, ...] of u is x * size + v[...]
    perm = data.draw(st.permutations(range(len(shape))))
    size = int(np.prod(shape))
    plain = numbered(shape)
    u = np.stack([plain.transpose(perm), size + plain.transpose(perm)])
    axis_of = [1 + perm.index(axis) for axis in range(len(shape))]
    over = layout.remap(u.shape, axis_of, extra=(0,))
    expected = np.stack([gather(layout, plain), size + gather(layout, plain)], axis=-1)
    np.testing.assert_array_equal(gather(over, u), expected)
    assert over.whole(len(over.axes) - 1) == 0


# --- symbols: the same with sizes that are products of dimensions -----------------------------------------------------


@st.composite
def symbolic_chains(draw, source=(B, S, 3 * H * D)):
    """Reshapes, transposes, whole-block slices and repeats of a value with symbolic sizes."""
    layout = Layout.identity(source)
    shape = tuple(evaluate(size, NUMBERS) for size in layout.shape)
    array = numbered(shape)
    for _ in range(draw(st.integers(1, 7))):
        kind = draw(st.sampled_from(["transpose", "merge", "split", "slice", "repeat"]))
        axis = draw(st.integers(0, len(layout.axes) - 1))
        dims = list(layout.shape)
        new = None
        if kind == "transpose":
            perm = draw(st.permutations(range(array.ndim)))
            new, new_array = layout.transpose(perm), array.transpose(perm)
        elif kind == "merge" and axis + 1 < array.ndim:
            dims[axis : axis + 2] = [dims[axis] * dims[axis + 1]]
            new, new_array = layout.reshape(dims), array.reshape([evaluate(size, NUMBERS) for size in dims])
        elif kind == "split":
            by = draw(st.sampled_from([3, H, D, H * D, B, S, B * S]))
            whole = dims[axis] // by
            dims[axis : axis + 1] = [whole, by] if draw(st.booleans()) else [by, whole]
            if all(isinstance(evaluate(size, NUMBERS), int) for size in dims):
                numbers = [evaluate(size, NUMBERS) for size in dims]
                if np.prod(numbers) == array.size:
                    new, new_array = layout.reshape(dims), array.reshape(numbers)
        elif kind == "slice":
            length = draw(st.sampled_from([H, D, H * D, 1, 2 * H * D]))
            start = draw(st.sampled_from([0, H, D, H * D, 2 * H * D, 1]))
            n, begin = evaluate(length, NUMBERS), evaluate(start, NUMBERS)
            if begin + n <= array.shape[axis]:
                new, new_array = layout.slice(axis, start, length), array.take(range(begin, begin + n), axis)
        else:
            new = layout.unsqueeze([axis]).expand((*dims[:axis], T, *dims[axis:]))
            new_array = np.repeat(np.expand_dims(array, axis), 4, axis)
        if new is not None and new_array.size < 20000:
            layout, array = new, new_array
    return layout, array


@settings(max_examples=500, deadline=None)
@given(symbolic_chains())
def test_a_symbolic_chain_reads_what_numpy_reads(chain):
    layout, array = chain
    assert_canonical(layout)
    numbers = bound(layout)
    np.testing.assert_array_equal(gather(numbers, numbered(numbers.source)).reshape(array.shape), array)


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_symbolic_composition(data):
    inner, middle = data.draw(symbolic_chains())
    outer, _ = data.draw(symbolic_chains(source=inner.shape))
    both = outer.compose(inner)
    assume(both is not None)
    assert_canonical(both)
    numbers = bound(both)
    np.testing.assert_array_equal(gather(numbers, numbered(numbers.source)), gather(bound(outer), middle))


def test_heads_are_split_and_merged():
    value = Layout.identity((B, S, H * D))
    heads = value.reshape((B, S, H, D)).transpose((0, 2, 1, 3))
    assert heads.axes == (((0, 1, B),), ((2, D, H),), ((1, 1, S),), ((2, 1, D),))
    assert heads.transpose((0, 2, 1, 3)).reshape((B, S, H * D)) == value
    batched = heads.reshape((B * H, S, D))
    assert batched.axes == (((0, 1, B), (2, D, H)), ((1, 1, S),), ((2, 1, D),))
    assert batched.reshape((B, H, S, D)) == heads


def test_packed_projection_is_an_offset():
    packed = Layout.identity((B, S, 3 * H * D))
    value = packed.slice(2, 2 * H * D, H * D).reshape((B, S, H, D))
    assert value.offsets == (0, 0, 2 * H * D)
    five = packed.reshape((B, S, 3, H, D)).take(2, 2)
    assert five == value
    interleaved = packed.reshape((B, S, H, 3, D)).take(3, 1)
    assert interleaved.axes[2:] == (((2, 3 * D, H),), ((2, 1, D),))
    assert interleaved.offsets == (0, 0, D)


def test_repeated_heads_are_a_broadcast_factor():
    value = Layout.identity((B, 2, T, D))
    repeated = value.unsqueeze((2,)).expand((B, 2, 4, T, D)).reshape((B, 8, T, D))
    assert repeated.axes[1] == ((1, 1, 2), (None, 0, 4))
    assert repeated.split(1, (2, 4)).axes[1:3] == (((1, 1, 2),), ((None, 0, 4),))
    assert repeated.depends(1)
    assert repeated.whole(1) is None
    assert [repeated.whole(axis) for axis in (0, 2, 3)] == [0, 2, 3]


def test_a_window_is_two_factors_per_image_axis():
    image = Layout.identity((B, 8, 8, D))
    windows = image.reshape((B, 2, 4, 2, 4, D)).transpose((0, 1, 3, 2, 4, 5)).reshape((4 * B, 16, D))
    assert windows.axes == (((0, 1, B), (1, 4, 2), (2, 4, 2)), ((1, 1, 4), (2, 1, 4)), ((3, 1, D),))


def test_expand_between_two_symbols_is_unknown():
    assert Layout.identity((S,)).expand((T,)) is None
    assert Layout.identity((1,)).expand((T,)).axes == (((None, 0, T),),)
    assert Layout.identity((8,)).expand((T,)).axes == (((0, 1, 8),),)
    assert Layout.identity((S,)).expand((minimum(S, 9),)).is_identity


def test_an_operand_of_unknown_size_is_unknown():
    value = Layout.identity((B, H, S, T))
    assert value.broadcast_over((S, T)).axes == (
        ((None, 0, B),),
        ((None, 0, H),),
        ((0, 1, S),),
        ((1, 1, T),),
    )
    assert value.broadcast_over((D, T)) is None
    assert value.broadcast_over((8, T)).axes[2] == ((0, 1, S),)  # 8 wins: S is 8 whenever this runs
    assert value.take(2, 0).broadcast_over((D, T)).axes[2] == ((1, 1, T),)  # index 0 of either


def test_slices_with_steps_and_backwards():
    value = Layout.identity((S,))
    assert value.slice(0, S - 1, S, -1).axes == (((0, -1, S),),)
    assert value.slice(0, S - 1, S, -1).offsets == (S - 1,)
    assert value.slice(0, S - 1, S, -1).slice(0, S - 1, S, -1) == value
    assert Layout.identity((2 * D,)).slice(0, 1, D, 2).axes == (((0, 2, D),),)


def test_what_cannot_be_told_is_none():
    assert Layout.identity((6, 4)).reshape((4, 6)) is None  # rows would run across axes: one index, two divisions
    assert Layout.identity((6, 4)).transpose((1, 0)).reshape((6, 4)) is None
    assert Layout.identity((S, D)).transpose((1, 0)).reshape((S, D)) is None
    assert Layout.identity((2, 3)).transpose((1, 0)).reshape((6,)).slice(0, 1, 3) is None
    assert Layout.identity((3, 0)).transpose((1, 0)).reshape((0,)) is None
    assert regroup([(0, 1, S)], [2, T]) is None


def test_permute_refuses_to_drop_what_is_read():
    value = Layout.identity((1, S)).expand((H, S))
    assert value.permute((1,)).axes == (((1, 1, S),),)
    with pytest.raises(ValueError, match="cannot be dropped"):
        value.permute((0,))


def test_gather_helper_agrees_with_a_loop():
    layout = Layout.identity((4, 6)).reshape((4, 2, 3)).transpose((1, 0, 2)).slice(1, 1, 2)
    array = numbered((4, 6))
    got = gather(layout, array)
    for i, j, k in cartesian(range(2), range(2), range(3)):
        assert got[i, j, k] == array[j + 1, i * 3 + k]
