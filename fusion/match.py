"""Matching: a plan is walked down a value's term; what must hold at each step is an obligation.

Two policies run the same walk: *stop* gives up a branch at the first unmet obligation, *record* notes it as a miss and
goes on, so that the branch with the least unmet weight explains what keeps a subgraph from being the pattern.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

from onnx import TensorProto

from fusion import parts
from fusion import plan as p
from fusion.axes import Axes
from fusion.congruence import same
from fusion.describe import spell_dims
from fusion.graph import Node, Value
from fusion.language import letters_of
from fusion.laws import guards, linear, reduction, ring, softmax
from fusion.layout import Layout
from fusion.plan import SPELLINGS, UNARY, Plan, alike, is_clamp
from fusion.products import Products
from fusion.schema import attribute, extra_attributes
from fusion.spine import Spine
from fusion.state import Context, Entry, Miss, State
from fusion.sums import Sums
from fusion.terms import (
    Atom,
    Clamp,
    Contract,
    Group,
    Item,
    Prod,
    Reduce,
    Ref,
    Sum,
    leaf,
    recut,
    references,
)
from fusion.verdict import Verdict
from fusion.view import View

Part = TypeVar("Part", contravariant=True)
K = TypeVar("K", Clamp, Contract, Reduce)

TOLERANCE: dict[int, float] = {TensorProto.FLOAT16: 1e-3, TensorProto.BFLOAT16: 8e-3, TensorProto.DOUBLE: 1e-7}
"""Relative error allowed in a constant, by the dtype it is computed in; 1e-5 for float: exporters round 1.41421."""

LOOSEST = max(TOLERANCE.values())

FAR = 8
"""How much may be unmet in what is explained."""

RECORD_STEPS = 600
"""How many captures and misses a recording search tries at one root; explanations need not be exhaustive."""


class Parts(Protocol[Part]):
    """Factors or summands, to which captures may be bound."""

    @property
    def noun(self) -> str:
        """What one of them is called."""

    def bindable(
        self, variable: p.Var, number: float, part: Part, state: State, place: str
    ) -> Iterator[tuple[Ref, State]]:
        """The value that a capture may bind of a part, and the state in which it does."""

    def described(self, part: Part) -> str:
        """A part in words."""


class Matcher:
    """Match one plan against one value.

    Args:
        view: the graph as terms.
        plan: what to match.
        record: note unmet obligations and go on.
        limit: the weight of what may be unmet; by default that of the plan.
    """

    def __init__(self, view: View, plan: Plan, *, record: bool = False, limit: int | None = None) -> None:
        self.view = view
        self.plan = plan
        self.record = record
        self.steps = 0
        self.axes = Axes(plan)
        self.most = plan.weight if limit is None else limit
        self.limit = 0
        self._lost: dict[int, tuple[Atom, int]] = {}
        self._root: Value | None = None
        self._tolerance = 0.0
        self.place = ""
        self.products = Products(self)
        self.sums = Sums(self)

    def match(self, value: Value) -> Iterator[tuple[Ref, State]]:
        """Yield the ways the plan matches at `value`: its reference with the axes split as the result names them."""
        root = self.view.root(value)
        self._root, self._tolerance = value, 0.0
        self.steps, self.limit = 0, self.most
        if root is None:
            yield from self._illegible(value, Layout.identity(()), "a known rank", f"{value.name} has none")
            return
        legible = False
        for ref, letters in self.axes.split(root, self.view):
            legible = True
            self.axes.rank = len(ref.layout.axes)
            start = State({}, letters, {})
            for state in self.child(self.plan.root, ref, {}, start):
                self.limit = state.unmet - 1  # what is no nearer tells nothing more
                yield ref, state
        if not legible and self.plan.inner:
            yield from self._illegible(value, root.layout, f"axes {spell_dims(self.plan.dims)}", "no such seams")

    def _illegible(self, value: Value, layout: Layout, expected: str, found: str) -> Iterator[tuple[Ref, State]]:
        """A fact is missing without which nothing can be said of the result."""
        for missed in self.miss(State({}, {}, {}), "dimension", expected, found, 1, value.name, Verdict.UNKNOWN):
            yield Ref(value, layout), missed

    # -- obligations ------------------------------------------------------------------------------------------------

    def miss(
        self,
        state: State,
        kind: str,
        expected: str,
        found: str,
        weight: int,
        place: str,
        verdict: Verdict = Verdict.NO,
    ) -> Iterator[State]:
        """The branch ends here (stop), or goes on with a note (record)."""
        if not self.record:
            return
        self.steps += 1
        if not self.may_miss(state, weight, place):
            return
        note = Miss(kind, f"expected {expected}, found {found}", verdict, weight, place)
        if note in state.misses:
            yield state
        elif state.unmet + weight <= self.limit:
            missed = state.copy()
            missed.misses = (*state.misses, note)
            yield missed

    def may_miss(self, state: State, weight: int, place: str) -> bool:
        """Whether a miss may be noted: there is room for it, or it is noted.

        Where a formula uses something twice, it is wrong once.
        """
        if self.steps > RECORD_STEPS:
            return False
        return state.unmet + weight <= self.limit or any(miss[3:] == (weight, place) for miss in state.misses)

    def lost(self, atom: Atom) -> int:
        """How much of the formula stays unmatched without a factor."""
        known = self._lost.get(id(atom))
        if known is None:
            known = self._lost[id(atom)] = atom, p.weight(leaf(atom))
        return known[1]

    def close(self, expected: float, found: float) -> bool:
        """Whether two constants are equal as closely as exporters round them."""
        if expected == found:
            return True
        if abs(expected - found) > LOOSEST * max(abs(expected), abs(found)) + 1e-12:
            return False
        if not self._tolerance:
            dtype = self.view.facts.dtype(self._root) if self._root is not None else None
            self._tolerance = TOLERANCE.get(dtype or 0, 1e-5)
        return math.isclose(expected, found, rel_tol=self._tolerance, abs_tol=1e-12)

    # -- operands ---------------------------------------------------------------------------------------------------

    def child(self, term: Prod, given: Ref | Prod, context: Context, state: State) -> Iterator[State]:
        """Match an operand: a capture binds the value itself, a formula is matched against its term."""
        if self.record and self.steps > RECORD_STEPS:
            return
        single = term.single
        if isinstance(single, p.Var) and isinstance(given, Ref):
            yield from self.bind(single, given, context, state)
        elif isinstance(single, p.Kept) and isinstance(given, Ref):
            yield from self.kept(single, self.view.source(given), context, state)
        elif isinstance(single, p.Join) and isinstance(given, Ref):
            yield from parts.match_join(self, single, given, context, state)
        elif isinstance(single, p.Concat) and isinstance(given, Ref):
            yield from parts.match_concat(self, single, given, context, state)
        elif isinstance(single, Sum) and isinstance(given, Ref) and (spine := self._spine(single, context)):
            yield from spine.walk(given, 1.0, (), state)
        elif isinstance(given, Ref):
            opened = (self.view.expand if self.products.plan_of(term.factors).formulas else self.view.factor)(given)
            whole = False
            for matched in self.products.match(term, opened, context, state, given.value.name):
                whole = whole or matched.misses is state.misses
                yield matched
            if self.record and whole:
                return
            if isinstance(single, Sum) and (grouped := ring.one_level(given, self.view)) not in (None, opened):
                yield from self.products.match(term, grouped, context, state, given.value.name)
        else:
            yield from self.products.match(term, given, context, state, "")

    def bind_number(self, name: str, value: float, state: State, place: str) -> Iterator[State]:
        capture = self.plan.captures[name]
        known = state.bound.get(name)
        if known is not None:
            if isinstance(known, float) and self.close(known, value):
                yield state
            else:
                yield from self.miss(state, "constant", f"{name} = {known}", f"{value:g}", 1, place)
        elif capture.low <= value <= capture.high:
            bound = state.copy()
            bound.bound[name] = float(value)
            yield bound
        else:
            wanted = f"{name} between {capture.low:g} and {capture.high:g}"
            yield from self.miss(state, "constant", wanted, f"{value:g}", 1, place)

    # -- atoms ------------------------------------------------------------------------------------------------------

    def atom(
        self, atom: Atom, given: Atom, context: Context, state: State, free: bool
    ) -> Iterator[tuple[State, float]]:
        """Match one factor; yield the state and the number by which the graph's factor is larger."""
        if isinstance(atom, Group):
            yield from self._scaled(atom.product, given, context, state)
        elif isinstance(atom, p.Kept):
            if isinstance(given, Ref):
                yield from _unscaled(self.kept(atom, given, context, state))
        elif isinstance(atom, Sum):
            for term, scale in _sums(given, self.view):
                yield from self._scale(self.sums.match(atom, term, context, state, self.name(given)), scale)
            core, alone = self.sums.core(atom, state)
            if core is not None and not isinstance(given, Sum):
                yield from self._scaled(core, given, context, alone)
            if self.record and isinstance(given, Ref):
                yield from self.no_sum(atom, given, context, state)
        elif isinstance(atom, p.Mean):
            for reduced, scale in _of_kind(given, self.view, Reduce):
                if reduced.kind == "mean":
                    yield from self._scale(_unscaled(self.mean(atom, reduced, context, state)), scale)
                    return
            if self.record and isinstance(given, Ref):
                yield from _unscaled(self._no_mean(atom, given, context, state))
        elif isinstance(atom, p.MatMul):
            for contraction, scale in _of_kind(given, self.view, Contract):
                yield from self._scale(self.matmul(atom, contraction, context, state, free), scale)
        elif is_clamp(atom) and (clamped := next(_of_kind(given, self.view, Clamp), None)):
            states = self.clamp(atom, clamped[0], context, state, self.name(given))
            yield from self._scale(_unscaled(states), clamped[1])
        elif isinstance(given, Ref):
            node = given.value.producer
            if isinstance(atom, p.Op) and node is not None:
                yield from _unscaled(self.operator(atom, node, given, context, state))
            elif isinstance(atom, p.Softmax) and node is not None:
                yield from _unscaled(self.softmax(atom, node, given, context, state))
            elif isinstance(atom, p.Fused) and node is not None:
                yield from _unscaled(self.fused(atom, node, given, context, state))

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
        for missed in self.miss(state, "operator", "a sum", node.key, 1, node.label):
            yield from self.sums.match(atom, Sum(0.0, tuple(items)), context, missed, node.label)

    def _no_mean(self, atom: p.Mean, given: Ref, context: Context, state: State) -> Iterator[State]:
        """Match, to explain, another reduction as a mean."""
        node = given.value.producer
        lifted = reduction.lift(node, given, self.view) if node and node.op in alike(SPELLINGS["mean"]) else None
        if node is not None and lifted is not None:
            child, rank = lifted
            for missed in self.miss(state, "operator", "a mean", node.key, 1, node.label):
                yield from self.mean(atom, Reduce("mean", self.view.peel(child).ref, rank), context, missed)

    def name(self, given: Atom) -> str:
        """The value a factor is, or the one that was being matched when it was met."""
        return given.value.name if isinstance(given, Ref) else self.place

    def _scale(self, found: Iterator[tuple[State, float]], scale: float) -> Iterator[tuple[State, float]]:
        for state, own in found:
            yield state, own * scale

    def _scaled(self, term: Prod, given: Atom, context: Context, state: State) -> Iterator[tuple[State, float]]:
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
                    yield from self._scale(
                        self.sums.match(single, atom, context, state, self.name(given)), expanded.coef
                    )
            if self.record and isinstance(given, Ref):
                yield from self.no_sum(single, given, context, state)
            return
        for matched in self.products.match(term, expanded, context, state, self.name(given)):
            yield matched, 1.0

    def kept(self, atom: p.Kept, given: Ref, context: Context, state: State) -> Iterator[State]:
        """An interior value that is an output too: it must be a value of the graph, the same wherever it is used."""
        known = state.kept.get(atom.slot)
        if known is not None and known.value is not given.value:
            yield from self.miss(state, "same value", known.value.name, given.value.name, 1, given.value.name)
            return
        kept = state.copy()
        kept.kept[atom.slot] = given
        yield from self.child(atom.child, given, context, kept)

    def operator(self, atom: p.Op, node: Node, given: Ref, context: Context, state: State) -> Iterator[State]:
        """An elementwise operator with its attributes at their defaults."""
        extra = extra_attributes(node, ())
        states: Iterator[State] = iter((state,))
        if node.key != atom.name or len(node.inputs) != 1:
            lost = 1 if node.key in UNARY else self.lost(atom)
            states = self.miss(state, "operator", atom.name, node.key, lost, node.label)
            if lost > 1:
                yield from states
                return
        elif extra:
            states = self.miss(state, "attribute", "default attributes", ", ".join(extra), 1, node.label)
        operand = self.view.operand(given, node, 0)
        if operand is None:
            return
        for current in states:
            yield from self.child(atom.child, operand, context, current)

    def clamp(self, atom: p.Op, given: Clamp, context: Context, state: State, place: str) -> Iterator[State]:
        """A clamp to [0, 1]."""
        states: Iterator[State] = iter((state,))
        if given.low != 0.0:
            found = f"from {given.low:g} times the upper bound"
            states = self.miss(state, "constant", "a clamp from 0", found, 1, place)
        for current in states:
            yield from self.child(atom.child, given.child, context, current)

    def softmax(self, atom: p.Softmax, node: Node, given: Ref, context: Context, state: State) -> Iterator[State]:
        """A softmax over exactly the axis of its letter."""
        if (passed := guards.guarded(node, self.view.facts)) is not None:
            opened = self.view.expand(Ref(passed, given.layout))
            yield from self.products.match(leaf(atom), opened, context, state, passed.name)
            return
        if zeroed := guards.zeroed(node, given, self.view):
            yield from self._zeroed(atom, zeroed, context, state)
            return
        replaced = guards.replaced(node) if self.record else None
        if replaced is not None:
            masked, number = replaced
            below = Ref(masked, given.layout)
            for missed in self.miss(state, "constant", "0 for NaN", number.name, 1, node.label):
                if masked.producer is not None:
                    yield from self.softmax(atom, masked.producer, below, context, missed)
            return
        written = softmax.written_out(node, given, self.view)
        if written is None and node.key not in SPELLINGS["softmax"] | alike(frozenset({"Softmax"})):
            yield from self.miss(state, "operator", "Softmax", node.key, self.lost(atom), node.label)
            return
        scores = self.view.operand(given, node, 0) if written is None else written[0]
        if scores is None:
            return
        last = len(scores.layout.source) - 1
        axis = attribute(node, "axis") if written is None else written[1]
        own = int(axis) % (last + 1) if isinstance(axis, int) else last
        state = self._bound_along(atom.letters[-1], scores.layout, own, context, state)
        positions = [position for letter in atom.letters for position in self.axes.positions(letter, context, state)]
        shifted = softmax.without_maximum(scores, self.view, positions)
        states: Iterator[State] = iter((state,))
        if written is None and node.key != "Softmax":
            states = self.miss(state, "operator", "Softmax", node.key, 1, node.label)
        elif written is None and node.version < 13 and own != last:
            states = self.miss(state, "attribute", "softmax over the last axis", f"axis {own}", 1, node.label)
        elif not _covers(scores.layout, positions, own):
            states = self.miss(
                state, "attribute", f"softmax over {' '.join(atom.letters)}", f"axis {own}", 1, node.label
            )
        elif written is not None and shifted == scores:
            states = self.miss(state, "operator", "exp(x - max(x))", "exp(x), which overflows", 1, node.label)
        for current in states:
            yield from self.child(atom.child, shifted, context, current)

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
        self, atom: p.Softmax, zeroed: tuple[Ref, Ref, bool], context: Context, state: State
    ) -> Iterator[State]:
        """A softmax that is 0 where a mask hides: the mask is one more part of what stands beside the scores."""
        source, condition, keep = zeroed
        ref = self.view.peel(source).ref
        single = atom.child.single
        spine = self._spine(single, context) if isinstance(single, Sum) else None
        if ref.value.producer is None or spine is None:
            return
        for matched in self.softmax(atom, ref.value.producer, ref, context, state):
            yield from spine.outermost(Entry("zero", condition, 1.0, keep), matched)

    def mean(self, atom: p.Mean, given: Reduce, context: Context, state: State) -> Iterator[State]:
        """A mean; inside it the letters stand for the axes reduced."""
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
            if one or len(spread) == given.rank:  # merged into one axis, or anywhere
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
            states = self.miss(state, "dimension", f"a mean over {name}", f"{given.rank} axes", 1, first.value.name)
        elif any(first.layout.depends(axis) for axis in outside):
            states = self.miss(state, "dimension", f"a mean over {name}", "another axis", 1, first.value.name)
        for current in states:
            over = None if context or current is bound else self._over(first, outside)
            if over is not None and isinstance(child, Ref):
                child, inside = over, tuple(range(self.axes.rank, self.axes.rank + len(outside)))
            letters = {own: inside[place : place + 1] for place, own in enumerate(atom.letters)}
            letters[letter] = inside[len(atom.letters) - 1 :]
            yield from self.child(atom.child, child, {**context, **letters}, current)

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
            for half in self.child(atom.left, left, inner, state):
                for whole in self.child(atom.right, right, inner, half):
                    yield whole, coef_left * coef_right

    def fused(self, atom: p.Fused, node: Node, given: Ref, context: Context, state: State) -> Iterator[State]:
        """A node that already is the pattern; its captures are matched against the arguments of the call."""
        read = atom.pattern.readers.get(node.key)
        rank = len(given.layout.source)
        captured = read(node, rank) if read is not None and rank else None
        if captured is None:
            lost = self.lost(atom)
            yield from self.miss(state, "operator", " or ".join(atom.pattern.readers), node.key, lost, node.label)
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
                        self.products.match(argument, Prod(float(value), ()), context, current, node.label)
                    )
                else:
                    shape = self.view.facts.shape(value)
                    layout = given.layout.broadcast_over(shape) if shape is not None else None
                    if layout is not None:
                        following.extend(self.child(argument, Ref(value, layout), context, current))
            states = following
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
            yield from self.miss(state, "dimension", f"{len(known)} axes for {letter}", str(count), 1, node.label)

    def _spine(self, term: Sum, context: Context) -> Spine | None:
        """The way through scores where a sum is one formula and a `rest` capture."""
        parts = self.sums.plan_of(term).spine
        return None if parts is None else Spine(self, *parts, context)

    def behind(self, atom: Atom) -> tuple[Ref, float] | None:
        """The value that a factor is a number of times, and the number; None where it is no multiple."""
        if not isinstance(atom, Ref):
            return None
        ref, coef = linear.without_numbers(atom, self.view, shared=True)
        return None if ref == atom else (ref, coef)

    # -- captures ---------------------------------------------------------------------------------------------------

    def bind(self, variable: p.Var, given: Ref, context: Context, state: State) -> Iterator[State]:
        """Bind a tensor capture to the source of a reference, seen in the axes it is read along."""
        self.steps += 1
        name = variable.name
        capture = self.plan.captures[name]
        if capture.kind == "scalar":
            value = self.view.number(given.value)
            if value is not None:
                yield from self.bind_number(name, value, state, given.value.name)
            return
        if variable.piece is not None:
            yield from parts.bind_piece(self, variable, given, context, state)
            return
        ref = self.view.source(given)
        viewed = self.axes.view(ref.layout, variable.dims, capture.loose, context, state)
        if isinstance(viewed, str):
            yield from self.miss(
                state, "dimension", f"{name} with axes {spell_dims(capture.dims)}", viewed, 1, ref.value.name
            )
            return
        known = state.bound.get(name)
        if known is None:
            bound = state.copy()
            bound.bound[name] = Ref(ref.value, viewed)
            yield bound
        elif isinstance(known, Ref) and (again := self.again(known, Ref(ref.value, viewed), state)):
            yield again
        elif isinstance(known, Ref) and known.value is ref.value:
            wanted = f"{name} = {ref.value.name} again, in the same axes"
            yield from self.miss(state, "same value", wanted, "other axes", 1, ref.value.name)
        elif self.record:
            was = known.value.name if isinstance(known, Ref) else str(known)
            unknown = self.view.unknown(ref)
            kind, verdict = ("dimension", Verdict.UNKNOWN) if unknown else ("same value", Verdict.NO)
            found = unknown or ref.value.name
            yield from self.miss(state, kind, f"{name} = {was} again", found, 1, ref.value.name, verdict)

    def assign(
        self,
        variables: Sequence[tuple[p.Var, float]],
        given: list[Part],
        parts: Parts[Part],
        context: Context,
        state: State,
        place: str,
    ) -> Iterator[State]:
        """Bind each capture, with its exponent or coefficient, to a part of its own; nothing may be left over."""
        if not variables:
            if not given:
                yield state
            else:
                left = ", ".join(map(parts.described, given))
                yield from self.miss(state, "arity", f"no further {parts.noun}", left, len(given), place)
            return
        (variable, number), others = variables[0], variables[1:]
        name = variable.name
        for index, part in enumerate(given):
            remaining = given[:index] + given[index + 1 :]
            for value, current in parts.bindable(variable, number, part, state, place):
                for bound in self.bind(variable, value, context, current):
                    yield from self.assign(others, remaining, parts, context, bound, place)
                    if bound is state:
                        return  # it was bound before, to this: no other part can be nearer
        if self.plan.captures[name].kind == "optional" and name not in state.bound:
            yield from self.assign(others, given, parts, context, state, place)
        else:
            for missed in self.miss(state, "arity", f"a {parts.noun} for {name}", "none", 1, place):
                yield from self.assign(others, given, parts, context, missed, place)

    def again(self, known: Ref, ref: Ref, state: State) -> State | None:
        """The state where a capture that is read again is the same numbers; None where that is not proved."""
        if known == ref:
            return state
        met: list[Value] = []
        if not same(self.view, known, ref, met):
            return None
        proved = state.copy()
        proved.proved[known.value] = (*state.proved.get(known.value, ()), *met)
        return proved


# -- helpers --------------------------------------------------------------------------------------------------------


def _unscaled(states: Iterator[State]) -> Iterator[tuple[State, float]]:
    for state in states:
        yield state, 1.0


def _sums(given: Atom, view: View) -> Iterator[tuple[Sum, float]]:
    if isinstance(given, Sum):
        yield given, 1.0
    elif isinstance(given, Ref):
        term = view.expand(given)
        if len(term.factors) == 1 and term.factors[0][1] == 1.0 and isinstance(term.factors[0][0], Sum):
            yield term.factors[0][0], term.coef


def _of_kind(given: Atom, view: View, kind: type[K]) -> Iterator[tuple[K, float]]:
    """The clamp, reduction or contraction that a factor is, and the number it is multiplied by."""
    if isinstance(given, kind):
        yield given, 1.0
    elif isinstance(given, Ref):
        term = view.expand(given)
        if len(term.factors) == 1 and term.factors[0][1] == 1.0 and isinstance(term.factors[0][0], kind):
            yield term.factors[0][0], term.coef


def _covers(layout: Layout, positions: list[int], axis: int) -> bool:
    """Whether these coordinates are the whole of one source axis, and nothing else reads that axis."""
    if layout.source[axis] == 1:
        return all(not layout.depends(position) for position in positions)
    return len(positions) == 1 and layout.whole(positions[0]) == axis


def _may_be_absent(argument: Prod, plan: Plan) -> bool:
    single = argument.single
    return isinstance(single, p.Var) and plan.captures[single.name].kind == "optional"
