"""Atoms: one factor of a plan against one factor of a value. What is no arithmetic is matched here: functions, softmax,
means, contractions, and nodes that are fused already.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

from fusion import plan as p
from fusion.language import letters_of
from fusion.laws import guards, linear, reduction, ring, selection, softmax
from fusion.layout import Layout
from fusion.matching.describe import describe
from fusion.matching.state import Context, Entry, State
from fusion.models.graph import Node
from fusion.plan import SPELLINGS, UNARY, Plan, alike, is_clamp
from fusion.schema import attribute, extra_attributes
from fusion.terms import Atom, Clamp, Contract, Group, Item, Prod, Reduce, Ref, Sum, leaf, recut, references
from fusion.view import View

if TYPE_CHECKING:
    from fusion.matching.match import Matcher

K = TypeVar("K", Clamp, Contract, Reduce, Sum)


class Atoms:
    """Matches atoms of one plan.

    Args:
        matcher: which the operands are matched by.
    """

    def __init__(self, matcher: Matcher) -> None:
        self.matcher = matcher
        self.view = matcher.view
        self.plan = matcher.plan
        self.axes = matcher.axes
        self.record = matcher.record

    def match(
        self, atom: Atom, given: Atom, context: Context, state: State, free: bool
    ) -> Iterator[tuple[State, float]]:
        """Match one factor; yield the state and the number by which the graph's factor is larger."""
        if isinstance(atom, Group):
            yield from self._grouped(atom.product, given, context, state)
        elif isinstance(atom, p.Kept):
            if isinstance(given, Ref):
                yield from _times(self.matcher.kept(atom, given, context, state))
        elif isinstance(atom, Sum):
            for term, scale in _of_kind(given, self.view, Sum):
                yield from _scaled(self.matcher.sums.match(atom, term, context, state, self.matcher.name(given)), scale)
            core, alone = self.matcher.sums.core(atom, state)
            if core is not None and not isinstance(given, Sum):
                yield from self._grouped(core, given, context, alone)
            if self.record and isinstance(given, Ref):
                yield from self.no_sum(atom, given, context, state)
        elif isinstance(atom, p.Reduction):
            if (found := self._reduction(atom.kind, given)) is not None:
                yield from _times(self.reduction(atom, found[0], context, state), found[1])
            elif self.record:
                yield from _times(self._other_reduction(atom, given, context, state))
        elif isinstance(atom, p.MatMul):
            for contraction, scale in _of_kind(given, self.view, Contract):
                yield from _scaled(self.matmul(atom, contraction, context, state, free), scale)
        elif is_clamp(atom) and (clamped := next(_of_kind(given, self.view, Clamp), None)):
            states = self.clamp(atom, clamped[0], context, state, self.matcher.name(given))
            yield from _times(states, clamped[1])
        elif isinstance(given, Ref):
            node = given.value.producer
            if isinstance(atom, p.Op) and node is not None:
                yield from _times(self.operator(atom, node, given, context, state))
            elif isinstance(atom, p.Softmax) and node is not None:
                yield from _times(self.softmax(atom, node, given, context, state))
            elif isinstance(atom, p.Operator) and node is not None:
                yield from _times(self.result_of(atom, node, given, context, state))
            elif isinstance(atom, p.Fused) and node is not None:
                yield from _times(self.fused(atom, node, given, context, state))

    def _grouped(self, term: Prod, given: Atom, context: Context, state: State) -> Iterator[tuple[State, float]]:
        """Match a product kept together, up to a number."""
        single = term.single
        if isinstance(given, Ref):
            expanded = self.view.expand(given)
        elif isinstance(given, Group):
            expanded = given.product
        else:
            expanded = Prod(1.0, ((given, 1.0),))
        if isinstance(single, Sum):
            for atom, exponent in expanded.factors if len(expanded.factors) == 1 else ():
                if exponent == 1.0 and isinstance(atom, Sum):
                    yield from _scaled(
                        self.matcher.sums.match(single, atom, context, state, self.matcher.name(given)), expanded.coef
                    )
            if self.record and isinstance(given, Ref):
                yield from self.no_sum(single, given, context, state)
            return
        for matched in self.matcher.products.match(term, expanded, context, state, self.matcher.name(given)):
            yield matched, 1.0

    def operator(self, atom: p.Op, node: Node, given: Ref, context: Context, state: State) -> Iterator[State]:
        """An elementwise operator with its attributes at their defaults."""
        states: Iterator[State] = iter((state,))
        if node.key != atom.name or len(node.inputs) != 1:
            lost = 1 if node.key in UNARY else self.matcher.lost(atom)
            states = self.matcher.miss(state, "operator", atom.name, node.key, lost, node.label)
            if lost > 1:
                yield from states
                return
        elif extra := extra_attributes(node):
            states = self.matcher.miss(state, "attribute", "default attributes", ", ".join(extra), 1, node.label)
        operand = self.view.operand(given, node, 0)
        if operand is None:
            return
        for current in states:
            yield from self.matcher.child(atom.child, operand, context, current)

    def clamp(self, atom: p.Op, given: Clamp, context: Context, state: State, place: str) -> Iterator[State]:
        """A clamp to [0, 1]."""
        states: Iterator[State] = iter((state,))
        if given.low != 0.0:
            found = f"from {given.low:g} times the upper bound"
            states = self.matcher.miss(state, "constant", "a clamp from 0", found, 1, place)
        for current in states:
            yield from self.matcher.child(atom.child, given.child, context, current)

    def softmax(self, atom: p.Softmax, node: Node, given: Ref, context: Context, state: State) -> Iterator[State]:
        """A softmax over exactly the axis of its letter."""
        if (passed := guards.guarded(node, self.view.facts)) is not None:
            opened = self.view.expand(Ref(passed, given.layout))
            yield from self.matcher.products.match(leaf(atom), opened, context, state, passed.name)
            return
        for selected in selection.selections(node, given, self.view):
            if selected.fill == 0.0 and selected.coef == 1.0:
                yield from self._zeroed(atom, selected, context, state)
                return
        replaced = guards.replaced(node) if self.record else None
        if replaced is not None:
            masked, number = replaced
            below = Ref(masked, given.layout)
            for missed in self.matcher.miss(state, "constant", "0 for NaN", number.name, 1, node.label):
                if masked.producer is not None:
                    yield from self.softmax(atom, masked.producer, below, context, missed)
            return
        written = softmax.written_out(node, given, self.view)
        if written is None and node.key not in SPELLINGS["softmax"] | alike(frozenset({"Softmax"})):
            yield from self.matcher.miss(state, "operator", "Softmax", node.key, self.matcher.lost(atom), node.label)
            return
        scores = self.view.operand(given, node, 0) if written is None else written[0]
        if scores is None:
            return
        last = len(scores.layout.source) - 1
        axis = attribute(node, "axis") if written is None else written[1]
        own = int(axis) % (last + 1) if isinstance(axis, int) else last
        state = self._bound_along(atom.letters[-1], scores.layout, own, context, state)
        positions = [axis for letter in atom.letters for axis in self.axes.positions(letter, context, state)]
        shifted = softmax.without_maximum(scores, self.view, positions)
        states: Iterator[State] = iter((state,))
        if written is None and node.key != "Softmax":
            states = self.matcher.miss(state, "operator", "Softmax", node.key, 1, node.label)
        elif written is None and node.version < 13 and own != last:
            states = self.matcher.miss(state, "attribute", "softmax over the last axis", f"axis {own}", 1, node.label)
        elif not _covers(scores.layout, positions, own, whole=atom.beside is None):
            states = self.matcher.miss(
                state, "attribute", f"softmax over {' '.join(atom.letters)}", f"axis {own}", 1, node.label
            )
        elif written is not None and shifted == scores:
            states = self.matcher.miss(state, "operator", "exp(x - max(x))", "exp(x), which overflows", 1, node.label)
        for current in states:
            if atom.beside is not None:
                yield from self._beside(atom, atom.beside, scores, positions, own, context, current)
            else:
                yield from self.matcher.child(atom.child, shifted, context, current)

    def _beside(
        self,
        atom: p.Softmax,
        beside: Prod,
        scores: Ref,
        positions: list[int],
        axis: int,
        context: Context,
        state: State,
    ) -> Iterator[State]:
        """A softmax over scores and one number more, of which the share of the scores is read."""
        found = softmax.beside(scores, self.view, positions, axis)
        if found is None:
            name = scores.value.name
            lost = self.matcher.lost(atom)
            yield from self.matcher.miss(state, "operator", "scores and one number beside them", name, lost, name)
            return
        for current in self.matcher.child(atom.child, found[0], context, state):
            yield from self.matcher.child(beside, found[1], context, current)

    def _bound_along(self, letter: str, layout: Layout, axis: int, context: Context, state: State) -> State:
        """Let the last letter of the result, still free, stand for the coordinate axis that runs along an axis."""
        position = next((own for own in range(len(layout.axes)) if layout.whole(own) == axis), None)
        taken = letter in context or letter in state.letters or letters_of(self.plan.dims)[-1:] != (letter,)
        if taken or position is None:
            return state
        bound = state.copy()
        bound.letters[letter] = (position,)
        return bound

    def _zeroed(
        self, atom: p.Softmax, selected: selection.Selection, context: Context, state: State
    ) -> Iterator[State]:
        """A softmax that is 0 where a mask hides: the mask is one more part of what stands beside the scores."""
        ref = self.view.peel(selected.chosen).ref
        entry = Entry("zero", selected.condition, 1.0, selected.keep, read=selected.read)
        single = atom.child.single
        spine = self.matcher.spine(single, context) if isinstance(single, Sum) else None
        if ref.value.producer is None or spine is None:
            return
        for matched in self.softmax(atom, ref.value.producer, ref, context, state):
            yield from spine.outermost(entry, matched)

    def _reduction(self, kind: str, given: Atom) -> tuple[Reduce, float] | None:
        """The reduction of this kind that a factor is, and the number it is multiplied by."""
        reduced, scale = next(_of_kind(given, self.view, Reduce), (None, 1.0))
        if kind == "total":
            found = reduction.total(given if reduced is None else reduced, self.view)
            return found and (found[0], scale * found[1])
        return (reduced, scale) if reduced is not None and reduced.kind == kind else None

    def reduction(self, atom: p.Reduction, given: Reduce, context: Context, state: State) -> Iterator[State]:
        """A mean, maximum or sum; inside it the letters stand for the axes reduced."""
        child = given.child
        first = child if isinstance(child, Ref) else next(references(child), None)
        letter = atom.letters[-1]
        if first is None:
            return
        start = len(first.layout.axes) - given.rank
        spans = [context.get(own, state.letters.get(own)) for own in atom.letters]
        outside = None if None in spans else tuple(axis for span in spans for axis in span or ())
        bound = state
        if outside is None:
            if letters_of(self.plan.dims)[-1:] != (letter,) or len(spans) != 1:
                return
            spread = tuple(axis for axis in range(self.axes.rank) if not first.layout.depends(axis))
            if len(spread) != given.rank:
                spread = tuple(axis for axis in spread if first.layout.shape[axis] != 1)
            outside = tuple(range(self.axes.rank - given.rank, self.axes.rank))
            one = len(spread) > given.rank and spread == tuple(range(spread[0], self.axes.rank))
            long = sum(first.layout.shape[axis] != 1 for axis in range(start, start + given.rank))
            if one or len(spread) in (given.rank, long):  # merged into one axis, or anywhere, or beside axes of size 1
                outside = spread
            if outside[:1] < (0,):
                return
            bound = state.copy()
            bound.letters[letter] = outside
        if len(outside) != given.rank:
            sizes = [first.layout.shape[axis] for axis in outside]
            child = recut(child, start, start + given.rank, sizes) or child
            first = child if isinstance(child, Ref) else next(references(child))
        inside, name = tuple(range(start, len(first.layout.axes))), " ".join(atom.letters)
        states: Iterator[State] = iter((bound,))
        if len(outside) != len(inside):
            states = self.matcher.miss(
                state, "dimension", f"a {atom.kind} over {name}", f"{given.rank} axes", 1, first.value.name
            )
        elif any(first.layout.depends(axis) for axis in outside):
            wanted = f"a {atom.kind} over {name}"
            states = self.matcher.miss(state, "dimension", wanted, "another axis", 1, first.value.name)
        for current in states:
            over = None if context or current is bound else self._over(first, outside)
            if over is not None and isinstance(child, Ref):
                child, inside = over, tuple(range(self.axes.rank, self.axes.rank + len(outside)))
            letters = {own: inside[place : place + 1] for place, own in enumerate(atom.letters)}
            letters[letter] = inside[len(atom.letters) - 1 :]
            yield from self.matcher.child(atom.child, child, {**context, **letters}, current)

    def _over(self, child: Ref, reduced: tuple[int, ...]) -> Ref | None:
        """What a mean reads, in the coordinates that it would have if it ran over these axes of the root."""
        shape = self.view.facts.shape(child.value)
        if shape is None or len(shape) != self.axes.rank or any(axis >= len(shape) for axis in reduced):
            return None
        kept: list[int | None] = [None if axis in reduced else axis for axis in range(len(shape))]
        return Ref(child.value, Layout.identity(shape).remap(shape, kept, extra=reduced))

    def matmul(
        self, atom: p.MatMul, given: Contract, context: Context, state: State, free: bool
    ) -> Iterator[tuple[State, float]]:
        """A contraction, its operands either way round; numbers on an operand go to a free scale."""
        last = (len(given.left.layout.axes) - 1,)
        inner = {**context, atom.letters[-1]: last}
        for first, second in ((given.left, given.right), (given.right, given.left)):
            left, coef_left = linear.without_numbers(first, self.view) if free else (first, 1.0)
            right, coef_right = linear.without_numbers(second, self.view) if free else (second, 1.0)
            for half in self.matcher.child(atom.left, left, inner, state):
                for whole in self.matcher.child(atom.right, right, inner, half):
                    yield whole, coef_left * coef_right

    def fused(self, atom: p.Fused, node: Node, given: Ref, context: Context, state: State) -> Iterator[State]:
        """A node that already is the pattern; its captures are matched against the arguments of the call."""
        read = atom.pattern.readers.get(node.key)
        rank = len(given.layout.source)
        captured = read(node, rank) if read is not None and rank else None
        if captured is None:
            lost = self.matcher.lost(atom)
            yield from self.matcher.miss(
                state, "operator", " or ".join(atom.pattern.readers), node.key, lost, node.label
            )
            return
        states: list[State] = [state]
        for own, outer in atom.letters:
            count = captured.get(own)
            if isinstance(count, int) and len(outer) == 1:
                states = [s for current in states for s in self._trailing(outer[0], count, context, current, node)]
        for name, argument in atom.arguments:
            value = captured.get(name)
            following: list[State] = []
            for current in states:
                if argument is None or value is None:
                    if value is None and (argument is None or _may_be_absent(argument, self.plan)):
                        following.append(current)
                elif isinstance(value, float | int):
                    following.extend(
                        self.matcher.products.match(argument, Prod(float(value), ()), context, current, node.label)
                    )
                else:
                    shape = self.view.facts.shape(value)
                    layout = given.layout.broadcast_over(shape) if shape is not None else None
                    if layout is not None:
                        following.extend(self.matcher.child(argument, Ref(value, layout), context, current))
            states = following
        yield from states

    def result_of(self, atom: p.Operator, node: Node, given: Ref, context: Context, state: State) -> Iterator[State]:
        """The first output of a node of one of these operators, as it lies; its operands are in axes of their own."""
        states: list[State] = [state]
        if node.key not in atom.names or given.value.slot != 0:
            lost = self.matcher.lost(atom)
            yield from self.matcher.miss(state, "operator", describe(atom), node.key, lost, node.label)
            return
        if not given.layout.is_identity:
            place = given.value.name
            states = list(self.matcher.miss(state, "dimension", f"{node.key} as it lies", "rearranged", 1, place))
        for slot, operand in enumerate(atom.operands):
            value = node.input(slot)
            ref = None if value is None else self.view.root(value)
            if ref is not None:
                states = [own for current in states for own in self.matcher.child(operand, ref, context, current)]
            elif value is not None or not _may_be_absent(operand, self.plan):
                return
        yield from states

    def _trailing(self, letter: str, count: int, context: Context, state: State, node: Node) -> Iterator[State]:
        """Let a letter stand for the last `count` axes of the result."""
        known = context.get(letter, state.letters.get(letter))
        if known is None:
            bound = state.copy()
            bound.letters[letter] = tuple(range(self.axes.rank - count, self.axes.rank))
            yield bound
        elif len(known) == count:
            yield state
        else:
            yield from self.matcher.miss(
                state, "dimension", f"{len(known)} axes for {letter}", str(count), 1, node.label
            )

    # -- to explain --------------------------------------------------------------------------------------------------

    def no_sum(self, atom: Sum, given: Ref, context: Context, state: State) -> Iterator[tuple[State, float]]:
        """Match, to explain, the operands of a Max or Min as summands."""
        node = given.value.producer
        if node is None or node.key not in ring.LIKE_SUMS:
            return
        items: list[Item] = []
        for index in range(len(node.inputs)):
            operand = self.view.operand(given, node, index)
            if operand is not None:
                term = self.view.factor(operand)
                items.append(Item(term.coef, term.factors, operand))
        for missed in self.matcher.miss(state, "operator", "a sum", node.key, 1, node.label):
            yield from self.matcher.sums.match(atom, Sum(0.0, tuple(items)), context, missed, node.label)

    def _other_reduction(self, atom: p.Reduction, given: Atom, context: Context, state: State) -> Iterator[State]:
        """Match, to explain, another reduction as the one wanted."""
        node = given.value.producer if isinstance(given, Ref) else None
        reduced = next(_of_kind(given, self.view, Reduce), (None, 1.0))[0]
        if reduced is None and isinstance(given, Ref) and node and node.op in alike(SPELLINGS["mean"]):
            lifted = reduction.lift(node, given, self.view)
            reduced = lifted and Reduce(node.key, self.view.peel(lifted[0]).ref, lifted[1])
        if reduced is not None:
            found, place = node.key if node else describe(reduced), self.matcher.name(given)
            for missed in self.matcher.miss(state, "operator", f"a {atom.kind}", found, 1, place):
                yield from self.reduction(atom, reduced, context, missed)


def _times(states: Iterator[State], scale: float = 1.0) -> Iterator[tuple[State, float]]:
    for state in states:
        yield state, scale


def _scaled(found: Iterator[tuple[State, float]], scale: float) -> Iterator[tuple[State, float]]:
    for state, own in found:
        yield state, own * scale


def _of_kind(given: Atom, view: View, kind: type[K]) -> Iterator[tuple[K, float]]:
    """The clamp, reduction, contraction or sum that a factor is, and the number it is multiplied by."""
    if isinstance(given, kind):
        yield given, 1.0
    elif isinstance(given, Ref):
        term = view.expand(given)
        if len(term.factors) == 1 and term.factors[0][1] == 1.0 and isinstance(term.factors[0][0], kind):
            yield term.factors[0][0], term.coef


def _covers(layout: Layout, positions: list[int], axis: int, *, whole: bool) -> bool:
    """Whether these coordinates are one source axis, the whole of it or a part, and nothing else reads that axis."""
    if not whole:
        read = [(at, own) for at, factors in enumerate(layout.axes) for own, *_ in factors if own is not None]
        here = [own for at, own in read if at in positions]
        return here == [own for _, own in read if own == axis] and here in ([axis], [])
    if layout.source[axis] == 1:
        return all(not layout.depends(position) for position in positions)
    return len(positions) == 1 and layout.whole(positions[0]) == axis


def _may_be_absent(argument: Prod, plan: Plan) -> bool:
    single = argument.single
    return isinstance(single, p.Var) and plan.captures[single.name].kind == "optional"
