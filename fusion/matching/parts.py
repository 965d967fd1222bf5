"""Parts of an axis: a formula that is put together from pieces is matched piece by piece.

The value that a `join` or `concat` stands for is read one part at a time, each in the coordinates of that part; laws
then see what the graph computes there, however it is spelled: x cos + concat(-x₂, x₁) sin is, in its first half,
x₁ cos₁ - x₂ sin₁. Pieces of a capture are collected until they are all there, and must be pieces of one value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise
from typing import TYPE_CHECKING

from fusion import plan as p
from fusion.dims import Dim, divide
from fusion.language import ELLIPSIS, Dims
from fusion.layout import Factor, Layout
from fusion.matching.state import Context, State
from fusion.schema import axes as schema_axes
from fusion.terms import Prod, Ref

if TYPE_CHECKING:
    from fusion.matching.match import Matcher


def match_join(matcher: Matcher, atom: p.Join, given: Ref, context: Context, state: State) -> Iterator[State]:
    """Match the pieces of `given` along a letter of size `len(atom.parts)` that shares an axis with another one."""
    places = _places(atom.dims, len(given.layout.axes))
    at = next(index for index, token in enumerate(atom.dims) if not isinstance(token, str))
    count = len(atom.parts)
    if places is None:
        return
    (axis,) = places[at]
    other = divide(given.layout.shape[axis], count)
    inner = atom.dims[at].index(atom.letter)
    sizes: tuple[Dim, ...] = () if other is None else (count, other) if inner == 0 else (other, count)
    split = given.layout.split(axis, sizes) if sizes else None
    if split is None:
        found = f"one of {given.layout.shape[axis]}"
        lost = matcher.lost(atom)
        yield from matcher.miss(state, "dimension", f"an axis of {count} pieces", found, lost, given.value.name)
        return
    letters = dict(context)
    for index, token in enumerate(atom.dims):
        if isinstance(token, str):
            letters[token] = tuple(own + (own > axis) for own in places[index])
    for offset, letter in enumerate(atom.dims[at]):
        letters[letter] = (axis + offset,)
    cut = [split.slice(axis + inner, index, 1) for index in range(count)]
    refs = [Ref(given.value, layout) for layout in cut if layout is not None]
    if len(refs) == count:
        yield from _each(matcher, atom.parts, refs, [letters] * count, state)


def match_concat(matcher: Matcher, atom: p.Concat, given: Ref, context: Context, state: State) -> Iterator[State]:
    """Match the parts of a Concat along the last axis; a part may be several of its operands."""
    view = matcher.view
    peeled = view.peel(given).ref
    node = peeled.value.producer
    last = len(given.layout.axes) - 1
    along = schema_axes(node, view.facts) if node is not None and node.key == "Concat" else None
    if node is None or along is None or peeled.layout.whole(last) != along[0]:
        found = node.key if node is not None else peeled.value.name
        lost = matcher.lost(atom)
        yield from matcher.miss(state, "operator", "Concat along the last axis", found, lost, given.value.name)
        return
    starts: list[Dim] = [0]
    for operand in node.inputs:
        shape = view.facts.shape(operand) if operand is not None else None
        if shape is None:
            return
        starts.append(starts[-1] + shape[along[0]])
    letters = [{**context, letter: (last,)} if letter else context for letter in atom.letters]
    for inside in combinations(starts[1:-1], len(atom.parts) - 1):
        cuts = [given.layout.slice(last, a, b - a) for a, b in pairwise((0, *inside, starts[-1]))]
        refs = [Ref(given.value, layout) for layout in cuts if layout is not None]
        if len(refs) == len(atom.parts):
            yield from _each(matcher, atom.parts, refs, letters, state)


def _each(
    matcher: Matcher, parts: Sequence[Prod], refs: Sequence[Ref], contexts: Sequence[Context], state: State
) -> Iterator[State]:
    if not parts:
        yield state
        return
    first = matcher.view.peel(refs[0]).ref  # the whole may have readers, its parts may not
    given = refs[0] if isinstance(parts[0].single, p.Join | p.Concat) else first
    for matched in matcher.child(parts[0], given, contexts[0], state):
        yield from _each(matcher, parts[1:], refs[1:], contexts[1:], matched)


def _places(dims: Dims, rank: int) -> list[tuple[int, ...]] | None:
    """The axes of each token, `...` taking what is left."""
    spare = rank - len(dims) + (ELLIPSIS in dims)
    if spare < 0 or (spare and ELLIPSIS not in dims):
        return None
    places: list[tuple[int, ...]] = []
    axis = 0
    for token in dims:
        count = spare if token == ELLIPSIS else 1
        places.append(tuple(range(axis, axis + count)))
        axis += count
    return places


def bind_piece(matcher: Matcher, variable: p.Var, given: Ref, context: Context, state: State) -> Iterator[State]:
    """Bind one piece of a capture; with the last one the capture itself."""
    piece = variable.piece
    assert piece is not None
    ref = matcher.view.peel(given).ref
    known = state.parts.get((variable.name, piece.at))
    if known is not None:
        if again := matcher.again(known, ref, state):
            yield again
        else:
            name = f"piece {piece.at} of {variable.name}"
            wanted = f"{name} = {known.value.name} again"
            yield from matcher.miss(state, "same value", wanted, ref.value.name, 1, ref.value.name)
        return
    bound = state.copy()
    bound.parts[variable.name, piece.at] = ref
    parts = [bound.parts[key] for index in range(piece.size) if (key := (variable.name, index)) in bound.parts]
    if len(parts) < piece.size:
        yield bound
        return
    (axis,) = context[piece.letter]
    whole = joined([part.layout for part in parts], axis) if len({part.value for part in parts}) == 1 else None
    if whole is None:
        names = " and ".join(dict.fromkeys(part.value.name for part in parts))
        wanted = f"{piece.size} pieces of one {variable.name}"
        yield from matcher.miss(bound, "same value", wanted, f"pieces of {names}", 1, ref.value.name)
    else:
        yield from matcher.bind(variable._replace(piece=None), Ref(ref.value, whole), context, bound)


def joined(parts: Sequence[Layout], axis: int) -> Layout | None:
    """The layout whose elements along `axis` are these; None where they do not follow each other evenly.

    >>> whole = Layout.identity((2, 3))
    >>> joined([whole.slice(0, 0, 1), whole.slice(0, 1, 1)], 0) == whole
    True
    """
    first = parts[0]
    moved = [own for own, offset in enumerate(first.offsets) if parts[1].offsets[own] != offset]
    if len(moved) > 1 or any((part.axes, part.source) != (first.axes, first.source) for part in parts):
        return None
    factor: Factor = (None, 0, len(parts))
    if moved:
        factor = (moved[0], parts[1].offsets[moved[0]] - first.offsets[moved[0]], len(parts))
    whole = Layout((*first.axes[:axis], (factor,), *first.axes[axis + 1 :]), first.offsets, first.source)
    return whole if all(whole.slice(axis, index, 1) == part for index, part in enumerate(parts)) else None


def appended(first: Layout, second: Layout) -> Layout | None:
    """The layout that reads `first` and then `second` along the last axis; None where they are not neighbours.

    >>> whole = Layout.identity((2, 5))
    >>> appended(whole.slice(1, 0, 2), whole.slice(1, 2, 3)) == whole
    True
    """
    moved = [own for own, offset in enumerate(first.offsets) if second.offsets[own : own + 1] != (offset,)]
    if first.source != second.source or len(moved) != 1:
        return None
    size, other = first.shape[-1], second.shape[-1]
    stride = divide(second.offsets[moved[0]] - first.offsets[moved[0]], size)
    if stride is None:
        return None
    whole = Layout((*first.axes[:-1], ((moved[0], stride, size + other),)), first.offsets, first.source)
    last = len(whole.axes) - 1
    return whole if (whole.slice(last, 0, size), whole.slice(last, size, other)) == (first, second) else None
