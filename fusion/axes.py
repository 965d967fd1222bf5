"""Axes: which coordinate axes the letters of a pattern stand for, and a layout seen along them."""

from __future__ import annotations

from collections.abc import Iterator

from fusion.dims import Dim, product
from fusion.language import ELLIPSIS, Dims, letters_of
from fusion.layout import Layout
from fusion.state import Context, State
from fusion.terms import Ref
from fusion.view import View


class Axes:
    """The letters of a result over the coordinate axes of one root.

    Args:
        dims: the axes of the result.
    """

    def __init__(self, dims: Dims) -> None:
        self.dims = dims
        self.grouped = any(isinstance(token, tuple) for token in dims)
        self.rank = 0

    def split(self, root: Ref, view: View) -> Iterator[tuple[Ref, dict[str, tuple[int, ...]]]]:
        """Give the result's letters their coordinate axes; a group `(H E)` is split where the layout has a seam."""
        dims = self.dims
        if not self.grouped:
            yield root, {}
            return
        if len(dims) != len(root.layout.axes):
            return
        source = view.peel(root).ref
        for layout, letters in _split_groups(source.layout, dims, 0, 0):
            yield Ref(source.value, layout), letters

    def positions(self, letter: str, context: Context, state: State) -> tuple[int, ...]:
        """Coordinate axes of a letter; one still free takes its place in the result, counted from the right."""
        if letter in context:
            return context[letter]
        if letter not in state.letters:
            self._default_letters(state)
        return state.letters.get(letter, ())

    def _default_letters(self, state: State) -> None:
        letters = letters_of(self.dims)
        taken = {axis for axes in state.letters.values() for axis in axes}
        front, _, back = _around_ellipsis(letters)
        free = [axis for axis in range(self.rank) if axis not in taken]
        for letter in reversed(back):
            if letter not in state.letters and free:
                state.letters[letter] = (free.pop(),)
        for letter in front:
            if letter not in state.letters and free:
                state.letters[letter] = (free.pop(0),)
        state.letters.setdefault(ELLIPSIS, tuple(free))

    def view(
        self, layout: Layout, dims: Dims | None, loose: frozenset[str], context: Context, state: State
    ) -> Layout | str:
        """The layout in the axes of a capture, or what keeps it from being so."""
        if not context and not state.letters and dims == self.dims == (ELLIPSIS,):
            return layout
        order: list[int] = []
        spans: list[tuple[int, int]] = []
        for token in dims or (ELLIPSIS,):
            start = len(order)
            for letter in (token,) if isinstance(token, str) else token:
                axes = self.positions(letter, context, state)
                order.extend(axes)
                if letter == ELLIPSIS or letter in loose:
                    continue
                for axis in axes:
                    if not layout.depends(axis) and layout.shape[axis] != 1:
                        return f"it is broadcast over {letter}"
            if not isinstance(token, str):
                spans.append((start, len(order)))
        for axis in range(len(layout.axes)):
            if axis not in order and layout.depends(axis):
                return "it depends on another axis too"
        viewed = layout.permute(order)
        for start, stop in reversed(spans):
            viewed = viewed.merge(start, stop)
        return viewed


def _split_groups(
    layout: Layout, dims: Dims, token_index: int, axis: int
) -> Iterator[tuple[Layout, dict[str, tuple[int, ...]]]]:
    if token_index == len(dims):
        yield layout, {}
        return
    token = dims[token_index]
    if isinstance(token, str):
        for following, letters in _split_groups(layout, dims, token_index + 1, axis + 1):
            yield following, {token: (axis,), **letters}
        return
    sizes = [size for _, _, size in layout.axes[axis]]
    for cut in _cuts(sizes, len(token)):
        split = layout.split(axis, cut)
        if split is None:
            continue
        for following, letters in _split_groups(split, dims, token_index + 1, axis + len(token)):
            yield following, {**{letter: (axis + i,) for i, letter in enumerate(token)}, **letters}


def _cuts(sizes: list[Dim], parts: int) -> Iterator[list[Dim]]:
    """Ways to cut a list of factors into `parts` groups, groups of one or more first."""
    if parts == 1:
        yield [product(sizes)]
        return
    starts = [*range(1, len(sizes) + 1), 0]
    for start in starts:
        for others in _cuts(sizes[start:], parts - 1):
            yield [product(sizes[:start]), *others]


def _around_ellipsis(letters: tuple[str, ...]) -> tuple[list[str], bool, list[str]]:
    if ELLIPSIS not in letters:
        return [], False, list(letters)
    index = letters.index(ELLIPSIS)
    return list(letters[:index]), True, list(letters[index + 1 :])
