"""Factors of an axis: lists of digits in mixed radix, cut into groups, and read through one another.

A factor `(source axis, stride, size)` is a digit that counts `size` steps of `stride` along a source axis; a broadcast
factor has source axis None and stride 0. The factors of an axis are its digits, outermost first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

from fusion.dims import Dim, divide, equal, lower, product
from fusion.verdict import Verdict

Factor: TypeAlias = tuple[int | None, Dim, Dim]
Axis: TypeAlias = tuple[Factor, ...]


def merge_neighbours(factors: Iterable[Factor]) -> Axis:
    """The canonical form of one axis: no factor of size 1, neighbours that run on into each other merged."""
    merged: list[Factor] = []
    for factor in factors:
        axis, stride, size = factor
        if size == 1:
            continue
        if merged:
            last_axis, last_stride, last_size = merged[-1]
            if last_axis == axis and last_stride == stride * size:
                merged[-1] = (axis, stride, last_size * size)
                continue
        merged.append(factor)
    return tuple(merged)


def regroup(factors: Iterable[Factor], sizes: Iterable[Dim]) -> list[Axis] | None:
    """Cut a list of factors into groups of the given sizes, in order, splitting factors by exact division.

    None where a cut is not provably exact, or the sizes do not use up the factors.

    >>> regroup([(0, 1, 12)], [3, 4])
    [((0, 4, 3),), ((0, 1, 4),)]
    """
    left = list(merge_neighbours(factors))[::-1]
    groups: list[Axis] = []
    for size in sizes:
        need = size
        group: list[Factor] = []
        while need != 1:
            if not left:
                return None
            axis, stride, n = left.pop()
            rest = _quotient(need, n)
            if rest is not None:
                group.append((axis, stride, n))
                need = rest
                continue
            rest = _quotient(n, need)
            if rest is None:
                return None
            group.append((axis, stride * rest, need))
            left.append((axis, stride, rest))
            need = 1
        groups.append(tuple(group))
    return None if left else groups


def _quotient(a: Dim, b: Dim) -> Dim | None:
    """a / b; None where not exact, or where a is 0: a group of an empty axis has no size to go by."""
    return None if a == 0 else divide(a, b)


Decoded: TypeAlias = tuple[list[list[Factor]], list[tuple[int, Dim]]]
"""What each factor becomes, and how far the offsets of source axes move."""


def decode(digits: Axis, offset: Dim, parts: Sequence[Factor]) -> Decoded | None:
    """Read `offset + sum of (factor index * stride)` in the mixed radix whose digits are `digits`.

    None where a part cannot be told apart into digits, or digits might carry.
    """
    if not digits:
        return ([[] for _ in parts], []) if offset == 0 and not parts else None
    if len(digits) == 1:  # linear, whatever the offset and the strides
        axis, stride, _ = digits[0]
        if axis is None:
            return [[(None, 0, size)] for _, _, size in parts], []
        return [[(axis, stride * step, size)] for _, step, size in parts], [(axis, stride * offset)]
    place = product(size for _, _, size in digits[1:])
    high: list[list[Factor]] = []
    low: list[list[Factor]] = []
    for part in parts:
        cut = _straddle(part, place)
        if cut is None:
            return None
        high.append(cut[0])
        low.append(cut[1])
    below = [factor for group in low for factor in group]
    split = _split_offset(offset, below, place)
    if split is None:
        return None
    upper_digit = decode(digits[:1], split[0], [factor for group in high for factor in group])
    lower_digits = decode(digits[1:], split[1], below)
    if upper_digit is None or lower_digits is None:
        return None
    upper_images, lower_images = iter(upper_digit[0]), iter(lower_digits[0])
    images = []
    for above, under in zip(high, low, strict=True):
        image = [factor for _ in above for factor in next(upper_images)]
        image += [factor for _ in under for factor in next(lower_images)]
        images.append(image)
    return images, upper_digit[1] + lower_digits[1]


def _straddle(part: Factor, place: Dim) -> tuple[list[Factor], list[Factor]] | None:
    """Cut a factor into what counts multiples of `place` (in units of it) and what stays below; None if neither."""
    axis, stride, size = part
    above = divide(stride, place)
    if above is not None:
        return [(axis, above, size)], []
    backwards = _is_negative(stride)
    step = -stride if backwards else stride
    if lower(step) < 0:
        return None
    if divide(place, step * size) is not None or lower(place - 1 - step * (size - 1)) >= 0:
        return [], [part]
    within = divide(place, step)
    blocks = None if within is None else divide(size, within)
    if within is None or blocks is None:
        return None
    return [(axis, -1 if backwards else 1, blocks)], [(axis, stride, within)]


def _is_negative(stride: Dim) -> bool:
    return isinstance(stride, int) and stride < 0


def _split_offset(offset: Dim, low: Sequence[Factor], place: Dim) -> tuple[Dim, Dim] | None:
    """(multiple of `place`, rest) such that the rest and all of `low` together stay in 0..place-1; None if unproved."""
    least: Dim = 0
    most: Dim = 0
    for _, stride, size in low:
        if _is_negative(stride):
            least = least + stride * (size - 1)
        else:
            most = most + stride * (size - 1)
    if place == 0:
        return None
    if isinstance(offset, int) and isinstance(place, int) and isinstance(most, int) and isinstance(least, int):
        block = (offset + least) // place
        rest = offset - block * place
        return (block, rest) if rest + most < place else None
    exact = divide(offset, place)
    if exact is not None and least == 0 and _nested(low, place):
        return exact, 0
    start: Dim = 0 if exact is None else exact * place
    if lower(offset + least - start) >= 0 and lower(start + place - 1 - offset - most) >= 0:
        return 0 if exact is None else exact, offset - start
    return None


def _nested(parts: Sequence[Factor], place: Dim) -> bool:
    """Whether all factors can be ordered so that each runs inside one step of the one before: no sum carries then."""
    outer = place
    left = list(parts)
    while left:
        for i, (_, stride, size) in enumerate(left):
            others = left[:i] + left[i + 1 :]
            fits = divide(outer, stride * size) is not None
            if fits and all(divide(stride, inner * n) is not None for _, inner, n in others):
                outer, left = stride, others
                break
        else:
            return False
    return True


def digits(factors: Iterable[Factor], dim: Dim) -> list[Factor] | None:
    """The factors of one source axis from the outermost in, where they are the digits of that whole axis; else None.

    >>> digits([(0, 1, 4), (0, 4, 3)], 12)
    [(0, 4, 3), (0, 1, 4)]
    """
    ordered: list[Factor] = []
    inner: Dim = 1
    remaining = list(factors)
    while remaining:
        following = next((factor for factor in remaining if factor[1] == inner), None)
        if following is None:
            return None
        remaining.remove(following)
        ordered.insert(0, following)
        inner = inner * following[2]
    return ordered if equal(inner, dim) is Verdict.YES else None
