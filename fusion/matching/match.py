"""Matching: a plan is walked down a value's term; what must hold at each step is an obligation.

Two policies run the same walk: *stop* gives up a branch at the first unmet obligation, *record* notes it as a miss and
goes on, so that the branch with the least unmet weight explains what keeps a subgraph from being the pattern.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

from onnx import TensorProto

from fusion import plan as p
from fusion.laws import linear, ring
from fusion.layout import Layout
from fusion.matching import parts
from fusion.matching.atoms import Atoms
from fusion.matching.axes import Axes
from fusion.matching.congruence import same
from fusion.matching.describe import spell_dims
from fusion.matching.products import Products
from fusion.matching.spine import Spine
from fusion.matching.state import Context, Miss, State
from fusion.matching.sums import Sums
from fusion.models.graph import Value
from fusion.plan import Plan
from fusion.terms import (
    Atom,
    Prod,
    Ref,
    Sum,
    leaf,
)
from fusion.verdict import Verdict
from fusion.view import View

Part = TypeVar("Part", contravariant=True)

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
        self.atoms = Atoms(self)
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
        elif isinstance(single, p.Operator) and isinstance(given, Ref):
            ref = self.view.source(given)  # not expanded: a law may read the operator
            if ref.value.producer is not None:
                yield from self.atoms.result_of(single, ref.value.producer, ref, context, state)
        elif isinstance(single, Sum) and isinstance(given, Ref) and (spine := self.spine(single, context)):
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

    def kept(self, atom: p.Kept, given: Ref, context: Context, state: State) -> Iterator[State]:
        """An interior value that is an output too: it must be a value of the graph, the same wherever it is used."""
        known = state.kept.get(atom.slot)
        if known is not None and known.value is not given.value:
            yield from self.miss(state, "same value", known.value.name, given.value.name, 1, given.value.name)
            return
        kept = state.copy()
        kept.kept[atom.slot] = given
        yield from self.child(atom.child, given, context, kept)

    # -- what the parts ask for -------------------------------------------------------------------------------------

    def name(self, given: Atom) -> str:
        """The value a factor is, or the one that was being matched when it was met."""
        return given.value.name if isinstance(given, Ref) else self.place

    def spine(self, term: Sum, context: Context) -> Spine | None:
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
        if capture.dims is None:
            bound = state.copy()
            bound.bound[name] = given
            yield bound
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
