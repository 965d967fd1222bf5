"""Axes: which coordinate axes the letters of a pattern stand for, and a layout seen along them."""

from __future__ import annotations

from collections.abc import Iterator

from fusion import plan as p
from fusion.dims import product
from fusion.language import ELLIPSIS, Dims, letters_of
from fusion.laws import contraction
from fusion.layout import Axis, Layout
from fusion.matching.state import Context, State
from fusion.plan import Plan
from fusion.radix import digits
from fusion.terms import Prod, Reduce, Ref, Sum
from fusion.view import View


class Axes:
    """The letters of a result over the coordinate axes of one root.

    Args:
        plan: whose result.
    """

    def __init__(self, plan: Plan) -> None:
        self.dims = plan.dims
        self.inner = plan.inner
        self.group = _group(plan)
        self.rank = 0

    def split(self, root: Ref, view: View) -> Iterator[tuple[Ref, dict[str, tuple[int, ...]]]]:
        """Give the result's letters their coordinate axes.

        A product with merged axes, such as `B S (H E)`, is matched in the coordinates of what it rearranges, cut where
        the root's own layout has a seam: the root may lie in any order and grouping of these axes. A normalization over
        a part of an axis, such as `N (G C) S`, is cut as the first mean below the root has it.
        """
        if not self.inner:
            yield from self._cut(root, view) if self.group is not None else ((root, {}),)
            return
        peeled = view.peel(root).ref
        axes: list[Axis] = []
        for axis in contraction.order(peeled.value.producer) or range(len(peeled.layout.source)):
            dim = peeled.layout.source[axis]
            own = [factor for factors in peeled.layout.axes for factor in factors if factor[0] == axis]
            cut = digits(own, dim) if dim != 1 else []
            if cut is None or peeled.layout.offsets[axis] != 0:
                return
            axes.extend((factor,) for factor in cut) if cut else axes.append(())
        if any(factor[0] is None for factors in peeled.layout.axes for factor in factors):
            return
        ref = Ref(peeled.value, Layout(tuple(axes), peeled.layout.offsets, peeled.layout.source))
        for letters in self._lettered(axes, peeled.layout):
            yield ref, letters

    def _cut(self, root: Ref, view: View) -> Iterator[tuple[Ref, dict[str, tuple[int, ...]]]]:
        """Cut the group's axis into what the first mean below the root depends on, and what it runs over."""
        at, rank = self.group or 0, len(root.layout.axes)
        mean = next(_means(view.expand(root), view), None)
        child = mean.child if mean is not None else None
        layout = child.layout if isinstance(child, Ref) else None
        if layout is None or rank < len(self.dims):
            return
        factors = layout.axes[at]
        kept = [factor for factor in factors if factor[0] is not None]
        if len(kept) == len(factors) or kept != list(factors[: len(kept)]):
            return
        cut = root.layout.split(at, [product(size for _, _, size in part) for part in (kept, factors[len(kept) :])])
        if cut is None:
            return
        letters = letters_of(self.dims)
        positions: dict[str, tuple[int, ...]] = {letter: (axis,) for axis, letter in enumerate(letters)}
        positions[letters[-1]] = tuple(range(len(letters) - 1, rank + 1))
        yield Ref(root.value, cut), positions

    def _lettered(self, axes: list[Axis], root: Layout) -> Iterator[dict[str, tuple[int, ...]]]:
        """The inner letters for these axes: the last two as they lie or swapped, the others in the order they have.

        Where there are more axes than letters, those that the root merges with the last letter are of its group, and
        all others the first one's; where there are fewer, a letter without axes is of size 1.
        """
        *front, row, last = self.inner
        count = len(axes) - 2
        if count < 0:
            return
        for at, over in ((count, count + 1), (count + 1, count)):
            merged = next((factors for factors in root.axes if axes[over] and axes[over][0] in factors), ())
            beside = [axis for axis in range(count) if axes[axis] and axes[axis][0] in merged]
            inner = [count - 1] if count > 1 else []
            for group in [beside, inner] if beside and beside != inner else [inner]:
                letters: dict[str, tuple[int, ...]] = dict.fromkeys(front, ())
                if front:
                    letters[front[-1]] = tuple(group)
                    letters[front[0]] = tuple(axis for axis in range(count) if axis not in group)
                yield {**letters, row: (at,), last: (over,)}

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
                if letter not in context and letter not in state.letters:
                    return f"no axis is left for {letter}"
                order.extend(axes)
                if letter == ELLIPSIS or letter in loose:
                    continue
                for axis in axes:
                    if not layout.depends(axis) and layout.shape[axis] != 1:
                        return f"it is broadcast over {letter}"
            if not isinstance(token, str) or (self.inner and len(order) != start + 1):
                spans.append((start, len(order)))
        for axis in range(len(layout.axes)):
            if axis not in order and layout.depends(axis):
                return "it depends on another axis too"
        viewed = layout.permute(order)
        for start, stop in reversed(spans):
            viewed = viewed.merge(start, stop)
        return viewed


def _group(plan: Plan) -> int | None:
    """The place of the merged axis in a result that normalizes over a part of it; None for any other result."""
    groups = [axis for axis, token in enumerate(plan.dims) if not isinstance(token, str)]
    return groups[0] if groups and not isinstance(plan.root.single, p.MatMul | p.Join | p.Concat) else None


def _means(term: Prod, view: View) -> Iterator[Reduce]:
    """The reductions among the factors and summands of a term."""
    for atom, _ in term.factors:
        inner = view.expand(atom).single if isinstance(atom, Ref) else atom
        if isinstance(inner, Reduce):
            yield inner
        elif isinstance(atom, Sum):
            for item in atom.items:
                yield from _means(Prod(item.coef, item.factors), view)


def _around_ellipsis(letters: tuple[str, ...]) -> tuple[list[str], bool, list[str]]:
    if ELLIPSIS not in letters:
        return [], False, list(letters)
    index = letters.index(ELLIPSIS)
    return list(letters[:index]), True, list(letters[index + 1 :])
