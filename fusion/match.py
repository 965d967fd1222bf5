"""Matching: a plan is walked down a value's term; what must hold at each step is an obligation.

Two policies run the same walk: *stop* gives up a branch at the first unmet obligation, *record* notes it as a miss and
goes on, so that the branch with the least unmet weight explains what keeps a subgraph from being the pattern.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, TypeVar

from onnx import TensorProto

from fusion import parts
from fusion import plan as p
from fusion.axes import Axes
from fusion.congruence import same
from fusion.describe import describe, describe_item, spell_dims
from fusion.graph import Node, Value
from fusion.language import letters_of
from fusion.laws import guards, linear, reduction, ring
from fusion.layout import Layout
from fusion.plan import SPELLINGS, UNARY, Plan, alike
from fusion.schema import attribute, extra_attributes
from fusion.spine import Spine
from fusion.state import Context, Entry, Miss, State
from fusion.terms import (
    Atom,
    Contract,
    Factors,
    Group,
    Item,
    Prod,
    Reduce,
    Ref,
    Sum,
    leaf,
    multiply,
    number,
    power,
    recut,
    references,
)
from fusion.verdict import Verdict
from fusion.view import MERGED, View

K = TypeVar("K", Reduce, Contract)

TOLERANCE: dict[int, float] = {TensorProto.FLOAT16: 1e-3, TensorProto.BFLOAT16: 8e-3, TensorProto.DOUBLE: 1e-7}
"""Relative error allowed in a constant, by the dtype it is computed in; 1e-5 for float: exporters round 1.41421."""

LOOSEST = max(TOLERANCE.values())

ELEMENTWISE = MERGED | UNARY | ring.LIKE_SUMS

FAR = 8
"""How much may be unmet in what is explained."""

RECORD_STEPS = 400
"""How far a recording search goes on one anchor; explanations need not be exhaustive."""


class _Factors(NamedTuple):
    """The factors of a plan's term by how they match: sorted out once, for a plan meets thousands of values.

    Attributes:
        formulas: in the order in which they are tried.
        variables: captures other than a scalar.
        scalar: the capture that takes up the coefficient.
        least, most: how many factors a value must have.
        opened: how many of these may be no value of the graph, such as a sum: no capture and no operator matches one.
    """

    formulas: list[tuple[Atom, float]]
    variables: list[tuple[p.Var, float]]
    scalar: tuple[str, float] | None
    least: int
    most: int
    opened: int


class _Summands(NamedTuple):
    """The summands of a plan's sum by how they match.

    Attributes:
        formulas: in the order in which they are tried.
        variables: captures other than a scalar, with their coefficients.
        scalar: the capture that takes up the constant.
        core: the one summand that must be there, where all others are optional.
        spine: the formula and the `rest` capture of a sum that is nothing else.
        least, most: how many summands a value must have.
    """

    formulas: list[Item]
    variables: list[tuple[p.Var, float]]
    scalar: tuple[p.Var, float] | None
    core: Prod | None
    spine: tuple[Item, p.Var] | None
    least: int
    most: int


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
        self._root: Value | None = None
        self._tolerance = 0.0
        self._place = ""
        self._products: dict[int, tuple[Factors, _Factors]] = {}
        self._sums: dict[int, tuple[Sum, _Summands]] = {}

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
                self.limit = min(self.limit, state.unmet)
                yield ref, state
        if not legible:
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
        note = Miss(kind, f"expected {expected}, found {found}", verdict, max(weight, 1), place)
        if note in state.misses:  # where a formula uses something twice, it is wrong once
            yield state
        elif self.steps <= RECORD_STEPS and state.unmet + note.weight <= self.limit:
            missed = state.copy()
            missed.misses = (*state.misses, note)
            yield missed

    def _close(self, expected: float, found: float) -> bool:
        if expected == found:
            return True
        if abs(expected - found) > LOOSEST * max(abs(expected), abs(found)) + 1e-12:
            return False
        if not self._tolerance:
            dtype = self.view.facts.dtype(self._root) if self._root is not None else None
            self._tolerance = TOLERANCE.get(dtype or 0, 1e-5)
        return math.isclose(expected, found, rel_tol=self._tolerance, abs_tol=1e-12)

    # -- products ---------------------------------------------------------------------------------------------------

    def child(self, term: Prod, given: Ref | Prod, context: Context, state: State) -> Iterator[State]:
        """Match an operand: a capture binds the value itself, a formula is matched against its term."""
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
        elif isinstance(single, p.Softmax) and isinstance(given, Ref) and self._is_written_out(given):
            for matched, _ in self.atom(single, self.view.source(given), context, state, False):
                yield matched
        elif isinstance(given, Ref):
            opened = (self.view.expand if self._factors_of(term.factors).formulas else self.view.factor)(given)
            yield from self.product(term, opened, context, state, given.value.name)
            if isinstance(single, Sum) and (grouped := ring.one_level(given, self.view)) not in (None, opened):
                yield from self.product(term, grouped, context, state, given.value.name)
        else:
            yield from self.product(term, given, context, state, "")

    def product(self, term: Prod, given: Prod, context: Context, state: State, place: str) -> Iterator[State]:
        """Match coefficient and factors; the one scalar capture among the factors takes up the coefficient."""
        single = term.single
        if isinstance(single, Sum):
            core, alone = self._core(single, state)
            if core is not None:
                yield from self.product(core, given, context, alone, place)
        formulas, variables, scalar, *_ = parts = self._factors_of(term.factors)
        if not self.record and not _may_fit(parts, given.factors):
            return
        if self.record and (spread := _spread(term)) is not None:
            whole = given.single
            ways: Iterator[tuple[State, float]] = iter(())
            if isinstance(whole, Sum):
                ways = self.sum(spread, whole, context, state, place)
            elif isinstance(whole, Ref):
                ways = self._no_sum(spread, whole, context, state)
            for matched, scale in ways:
                yield from self._coefficient(1.0, None, scale, matched, place)
        self._place = place or self._place
        if self.record and formulas:
            yield from self._unknown(term, given, state, place)
        if scalar is None and len(formulas) == 1 and not variables and given.coef != 1.0:
            given = _distribute(formulas[0], given)
        free = scalar is not None and scalar[0] not in state.bound
        whole = False
        for found, scale in self._formulas(formulas, list(given.factors), given.coef, context, state, free, place):
            rest, matched = found
            for done in self._variables(variables, rest, context, matched, place):
                for finished in self._coefficient(term.coef, scalar, given.coef * scale, done, place):
                    whole = whole or finished.misses is state.misses
                    yield finished
        if not whole and scalar is None and (opened := self._opened(given)) is not None:
            yield from self.product(term, opened, context, state, place)

    def _opened(self, given: Prod) -> Prod | None:
        """The product with the numbers of its shared factors taken out; None where none of them has one.

        In h + h erf(x) with h = x / 2, the number of the product is in h.
        """
        numbered = [self._behind(atom) for atom, _ in given.factors]
        if not any(numbered):
            return None
        parts = [number(given.coef)]
        for (atom, exponent), behind in zip(given.factors, numbered, strict=True):
            inner = leaf(atom) if behind is None else Prod(behind[1], ((behind[0], 1.0),))
            parts.append(power(inner, exponent) or Prod(1.0, ((atom, exponent),)))
        return multiply(*parts)

    def _behind(self, atom: Atom) -> tuple[Ref, float] | None:
        """The value that a factor is a number of times, and the number; None where it is no multiple."""
        if not isinstance(atom, Ref):
            return None
        ref, coef = linear.without_numbers(atom, self.view, shared=True)
        return None if ref == atom else (ref, coef)

    def _factors_of(self, factors: Factors) -> _Factors:
        known = self._products.get(id(factors))
        if known is not None:
            return known[1]
        formulas: list[tuple[Atom, float]] = []
        kept: list[tuple[Atom, float]] = []
        variables: list[tuple[p.Var, float]] = []
        scalar: tuple[str, float] | None = None
        optional = 0
        for atom, exponent in factors:
            if isinstance(atom, p.Kept):  # it binds captures only: what binds letters comes first
                kept.append((atom, exponent))
            elif not isinstance(atom, p.Var):
                formulas.append((atom, exponent))
            elif self.plan.captures[atom.name].kind == "scalar":
                scalar = (atom.name, exponent)
            else:
                variables.append((atom, exponent))
                optional += self.plan.captures[atom.name].kind != "tensor"
        formulas += kept
        most = len(formulas) + len(variables)
        opened = sum(not isinstance(atom, p.Op | p.Softmax | p.Fused | p.Kept) for atom, _ in formulas)
        parts = _Factors(formulas, variables, scalar, most - optional, most, opened)
        self._products[id(factors)] = factors, parts
        return parts

    def _formulas(
        self,
        formulas: list[tuple[Atom, float]],
        given: list[tuple[Atom, float]],
        coef: float,
        context: Context,
        state: State,
        free: bool,
        place: str,
    ) -> Iterator[tuple[tuple[list[tuple[Atom, float]], State], float]]:
        """Assign each formula a factor; yield the factors left, the state, and the scale the factors carry."""
        if not formulas:
            yield (given, state), 1.0
            return
        (atom, exponent), others = formulas[0], formulas[1:]
        found = False
        for index, (candidate, own) in enumerate(given):
            if own != exponent and not self._close(own, exponent):
                continue
            remaining = given[:index] + given[index + 1 :]
            for matched, scale in self.atom(atom, candidate, context, state, free):
                found = found or matched.misses is state.misses
                share = _power(scale, exponent)
                states: Iterator[State] = iter((matched,))
                if share is None:
                    states = self.miss(matched, "constant", describe(atom, exponent), f"{scale:g} times", 1, place)
                for current in states:
                    for rest, more in self._formulas(others, remaining, coef, context, current, free, place):
                        yield rest, (1.0 if share is None else share) * more
        if self.record and not found:
            for index, (candidate, own) in enumerate(given):
                remaining = given[:index] + given[index + 1 :]
                for matched, scale in self._nearly(atom, exponent, candidate, own, context, state, free):
                    for rest, more in self._formulas(others, remaining, coef, context, matched, free, place):
                        yield rest, (_power(scale, exponent) or 1.0) * more
            kinds = ", ".join(describe(candidate, own) for candidate, own in given) or f"the number {coef:g}"
            lost = p.weight(Prod(1.0, ((atom, exponent),)))
            for missed in self.miss(state, "operator", describe(atom, exponent), kinds, lost, place):
                for rest, more in self._formulas(others, given, coef, context, missed, free, place):
                    yield rest, more

    def _unknown(self, term: Prod, given: Prod, state: State, place: str) -> Iterator[State]:
        """A fact is missing that would tell whether a part of the formula is there."""
        for atom, _ in given.factors:
            fact = self.view.unknown(atom) if isinstance(atom, Ref) else ""
            if fact:
                lost = min(p.weight(term), 2)  # nothing speaks against it
                yield from self.miss(state, "dimension", "a formula", fact, lost, place, Verdict.UNKNOWN)

    def _nearly(
        self, atom: Atom, exponent: float, given: Atom, own: float, context: Context, state: State, free: bool
    ) -> Iterator[tuple[State, float]]:
        """Match, to explain, a factor of another exponent, or what lies below a function of one value."""
        wanted, found, place = describe(atom, exponent), describe(given, own), self._name(given)
        if own != exponent:
            for missed in self.miss(state, "constant", wanted, found, 1, place):
                yield from self.atom(atom, given, context, missed, free)
        node = given.value.producer if isinstance(given, Ref) else None
        if isinstance(given, Ref) and node is not None and node.key in ELEMENTWISE and not isinstance(atom, p.Op):
            operands = [index for index, value in enumerate(node.inputs) if value and self.view.number(value) is None]
            operand = self.view.operand(given, node, operands[0]) if len(operands) == 1 else None
            if operand is not None:
                opened = self.view.expand(operand).factors
                below = opened[0][0] if len(opened) == 1 else operand
                for missed in self.miss(state, "operator", wanted, found, 1, place):
                    yield from self.atom(atom, below, context, missed, free)

    def _variables(
        self,
        variables: list[tuple[p.Var, float]],
        given: list[tuple[Atom, float]],
        context: Context,
        state: State,
        place: str,
    ) -> Iterator[State]:
        """Bind each capture to a factor of its exponent; nothing may be left over."""
        if not variables:
            if not given:
                yield state
            else:
                left = ", ".join(describe(atom, exponent) for atom, exponent in given)
                yield from self.miss(state, "arity", "no further factor", left, len(given), place)
            return
        (variable, exponent), others = variables[0], variables[1:]
        name = variable.name
        for index, (candidate, own) in enumerate(given):
            if not isinstance(candidate, Ref) or (own != exponent and not self.record):
                continue
            remaining = given[:index] + given[index + 1 :]
            states: Iterator[State] = iter((state,))
            if own != exponent:
                states = self.miss(state, "constant", describe(variable, exponent), describe(candidate, own), 1, place)
            for current in states:
                for bound in self.bind(variable, candidate, context, current):
                    yield from self._variables(others, remaining, context, bound, place)
        if self.plan.captures[name].kind == "optional" and name not in state.bound:
            yield from self._variables(others, given, context, state, place)
        else:
            for missed in self.miss(state, "arity", f"a factor for {name}", "none", 1, place):
                yield from self._variables(others, given, context, missed, place)

    def _coefficient(
        self, expected: float, scalar: tuple[str, float] | None, found: float, state: State, place: str
    ) -> Iterator[State]:
        if scalar is None:
            if self._close(expected, found):
                yield state
            else:
                yield from self.miss(state, "constant", f"the factor {expected:g}", f"{found:g}", 1, place)
            return
        name, exponent = scalar
        value = found / expected
        if exponent != 1.0:
            if value <= 0:
                yield from self.miss(state, "constant", f"{name} ** {exponent:g}", f"{value:g}", 1, place)
                return
            value = value ** (1.0 / exponent)
        yield from self._bind_number(name, value, state, place)

    def _bind_number(self, name: str, value: float, state: State, place: str) -> Iterator[State]:
        capture = self.plan.captures[name]
        known = state.bound.get(name)
        if known is not None:
            if isinstance(known, float) and self._close(known, value):
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
                yield from self._scale(self.sum(atom, term, context, state, self._name(given)), scale)
            core, alone = self._core(atom, state)
            if core is not None and not isinstance(given, Sum):
                yield from self._scaled(core, given, context, alone)
            if self.record and isinstance(given, Ref):
                yield from self._no_sum(atom, given, context, state)
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
        elif isinstance(given, Ref):
            node = given.value.producer
            if isinstance(atom, p.Op) and node is not None:
                yield from _unscaled(self.operator(atom, node, given, context, state))
            elif isinstance(atom, p.Softmax) and node is not None:
                yield from _unscaled(self.softmax(atom, node, given, context, state))
            elif isinstance(atom, p.Fused) and node is not None:
                yield from _unscaled(self.fused(atom, node, given, context, state))

    def _no_sum(self, atom: Sum, given: Ref, context: Context, state: State) -> Iterator[tuple[State, float]]:
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
            yield from self.sum(atom, Sum(0.0, tuple(items)), context, missed, node.label)

    def _no_mean(self, atom: p.Mean, given: Ref, context: Context, state: State) -> Iterator[State]:
        """Match, to explain, another reduction as a mean."""
        node = given.value.producer
        lifted = reduction.lift(node, given, self.view) if node and node.op in alike(SPELLINGS["mean"]) else None
        if node is not None and lifted is not None:
            child, rank = lifted
            for missed in self.miss(state, "operator", "a mean", node.key, 1, node.label):
                yield from self.mean(atom, Reduce("mean", self.view.peel(child).ref, rank), context, missed)

    def _name(self, given: Atom) -> str:
        """The value a factor is, or the one that was being matched when it was met."""
        return given.value.name if isinstance(given, Ref) else self._place

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
                    yield from self._scale(self.sum(single, atom, context, state, self._name(given)), expanded.coef)
            if self.record and isinstance(given, Ref):
                yield from self._no_sum(single, given, context, state)
            return
        for matched in self.product(term, expanded, context, state, self._name(given)):
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
            lost = 1 if node.key in UNARY else p.weight(Prod(1.0, ((atom, 1.0),)))
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

    def softmax(self, atom: p.Softmax, node: Node, given: Ref, context: Context, state: State) -> Iterator[State]:
        """A softmax over exactly the axis of its letter."""
        if (passed := guards.guarded(node, self.view.facts)) is not None:
            ref = self.view.peel(Ref(passed, given.layout)).ref
            if ref.value.producer is not None:
                yield from self.softmax(atom, ref.value.producer, ref, context, state)
            return
        if zeroed := guards.zeroed(node, given, self.view):
            yield from self._zeroed(atom, zeroed, context, state)
            return
        states: Iterator[State] = iter((state,))
        replaced = guards.replaced(node) if self.record else None
        if replaced is not None:
            softmax, number = replaced
            below = Ref(softmax, given.layout)
            for missed in self.miss(state, "constant", "0 for NaN", number.name, 1, node.label):
                if softmax.producer is not None:
                    yield from self.softmax(atom, softmax.producer, below, context, missed)
            return
        written = guards.written_out(node, self.view.facts)
        if written is None and node.key != "Softmax":
            lost = 1 if node.key in alike(SPELLINGS["softmax"]) else p.weight(Prod(1.0, ((atom, 1.0),)))
            states = self.miss(state, "operator", "Softmax", node.key, lost, node.label)
            if lost > 1:
                yield from states
                return
        operand = node.inputs[0] if written is None else written[0]
        shape = self.view.facts.shape(operand) if operand is not None else None
        if operand is None or shape is None:
            return
        axis = attribute(node, "axis") if written is None else written[1]
        own = int(axis) % len(shape) if isinstance(axis, int) else len(shape) - 1
        positions = [position for letter in atom.letters for position in self.axes.positions(letter, context, state)]
        if written is None and node.version < 13 and own != len(shape) - 1:
            states = self.miss(state, "attribute", "softmax over the last axis", f"axis {own}", 1, node.label)
        elif not _covers(given.layout, positions, own):
            states = self.miss(
                state, "attribute", f"softmax over {' '.join(atom.letters)}", f"axis {own}", 1, node.label
            )
        for current in states:
            scores = _without_maximum(Ref(operand, given.layout), self.view, positions)
            yield from self.child(atom.child, scores, context, current)

    def _is_written_out(self, given: Ref) -> bool:
        """Whether a value is a softmax that is a quotient in the graph, which the ring would take apart."""
        node = self.view.source(given).value.producer
        return node is not None and guards.written_out(node, self.view.facts) is not None

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
        if first is None or len(atom.letters) != 1:
            return
        start = len(first.layout.axes) - given.rank
        outside = context.get(letter, state.letters.get(letter))
        bound = state
        if outside is None:
            if letters_of(self.plan.dims)[-1:] != (letter,):
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
        inside = tuple(range(start, len(first.layout.axes)))
        states: Iterator[State] = iter((bound,))
        if len(outside) != len(inside):
            states = self.miss(state, "dimension", f"a mean over {letter}", f"{given.rank} axes", 1, first.value.name)
        elif any(first.layout.depends(axis) for axis in outside):
            states = self.miss(state, "dimension", f"a mean over {letter}", "another axis", 1, first.value.name)
        for current in states:
            over = None if context or current is bound else self._over(first, outside)
            if over is not None and isinstance(child, Ref):
                child, inside = over, tuple(range(self.axes.rank, self.axes.rank + len(outside)))
            yield from self.child(atom.child, child, {**context, letter: inside}, current)

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
            lost = p.weight(Prod(1.0, ((atom, 1.0),)))
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
                    following.extend(self.product(argument, Prod(float(value), ()), context, current, node.label))
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

    # -- sums -------------------------------------------------------------------------------------------------------

    def sum(self, term: Sum, given: Sum, context: Context, state: State, place: str) -> Iterator[tuple[State, float]]:
        """Match a sum up to a number: yield the state and the scale of the graph's sum."""
        parts = self._summands_of(term)
        if not self.record and not parts.least <= len(given.items) <= parts.most:
            return
        for left, matched, scale in self._summands(parts.formulas, list(given.items), None, context, state, place):
            for done in self._addends(term, left, scale or 1.0, context, matched, place):
                for finished in self._constant(term, given.const, scale or 1.0, done, place):
                    yield finished, scale or 1.0

    def _spine(self, term: Sum, context: Context) -> Spine | None:
        """The way through scores where a sum is one formula and a `rest` capture."""
        parts = self._summands_of(term).spine
        return None if parts is None else Spine(self, *parts, context)

    def _core(self, term: Sum, state: State) -> tuple[Prod | None, State]:
        """The one summand that must be there, None where more must, and the state in which a number beside it is 0."""
        parts = self._summands_of(term)
        name = parts.scalar[0].name if parts.scalar is not None else ""
        if parts.core is None or not name or name in state.bound:
            return (None if name else parts.core), state
        alone = state.copy()
        alone.bound[name] = 0.0
        return parts.core, alone

    def _summands_of(self, term: Sum) -> _Summands:
        known = self._sums.get(id(term))
        if known is not None:
            return known[1]
        kinds = [(item, _variable(item), self._kind(item)) for item in term.items]
        formulas = [item for item, _, kind in kinds if kind == "formula"]
        formulas.sort(
            key=lambda item: not any(isinstance(atom, p.Mean) for atom, _ in item.factors)
        )  # they bind letters
        variables = [(own, item.coef) for item, own, kind in kinds if own is not None and kind != "scalar"]
        scalars = [(own, item.coef) for item, own, kind in kinds if own is not None and kind == "scalar"]
        least = sum(kind in ("formula", "tensor") for *_, kind in kinds)
        needed = [Prod(item.coef, item.factors) for item, own, kind in kinds if not self._may_be_absent(own, kind)]
        rest = [own for _, own, kind in kinds if own is not None and kind == "rest"]
        parts = _Summands(
            formulas,
            variables,
            scalars[0] if scalars else None,
            needed[0] if len(needed) == 1 and term.const == 0.0 else None,
            (formulas[0], rest[0]) if len(formulas) == len(rest) == 1 and len(term.items) == 2 else None,
            least,
            len(formulas) + len(variables),
        )
        self._sums[id(term)] = term, parts
        return parts

    def _may_be_absent(self, variable: p.Var | None, kind: str) -> bool:
        """Whether a summand may be missing: it is optional, or a number that may be 0."""
        if variable is None or kind != "scalar":
            return kind == "optional"
        capture = self.plan.captures[variable.name]
        return capture.low <= 0.0 <= capture.high

    def _kind(self, item: Item) -> str:
        variable = _variable(item)
        return self.plan.captures[variable.name].kind if variable is not None else "formula"

    def _summands(
        self, formulas: list[Item], given: list[Item], scale: float | None, context: Context, state: State, place: str
    ) -> Iterator[tuple[list[Item], State, float | None]]:
        if not formulas:
            yield given, state, scale
            return
        item, others = formulas[0], formulas[1:]
        found = False
        free = any(
            isinstance(atom, p.Var) and self.plan.captures[atom.name].kind == "scalar" for atom, _ in item.factors
        )
        for index, candidate in enumerate(given):
            remaining = given[:index] + given[index + 1 :]
            own = 1.0 if free else candidate.coef / item.coef
            fits = scale is None or free or self._close(own, scale)
            ways = [(state, own if scale is None else scale)] if fits else []
            if self.record and not free and not (scale is not None and fits):
                # The sum may be multiplied by another number than this summand says, if the summand is wrong.
                whole = 1.0 if scale is None else scale
                expected = describe_item(item._replace(coef=whole * item.coef))
                missed = self.miss(state, "constant", expected, describe_item(candidate), 1, place)
                ways.extend((current, whole) for current in missed)
            wanted = Prod(item.coef if free else 1.0, item.factors)
            offered = Prod(candidate.coef if free else 1.0, candidate.factors)
            for current, share in ways:
                for matched in self._item(wanted, offered, candidate, context, current, place):
                    found = found or matched.misses is state.misses
                    yield from self._summands(others, remaining, share, context, matched, place)
        if self.record and not found:
            kinds = ", ".join(describe_item(candidate) for candidate in given) or "nothing more"
            lost = p.weight(Prod(item.coef, item.factors))
            for without in self.miss(state, "operator", describe_item(item), kinds, lost, place):
                yield from self._summands(others, given, scale, context, without, place)

    def _item(
        self, wanted: Prod, offered: Prod, candidate: Item, context: Context, state: State, place: str
    ) -> Iterator[State]:
        single = wanted.single
        if isinstance(single, p.Var) and candidate.origin is not None:
            if self._close(candidate.share, candidate.coef) or offered.single is None:
                yield from self.bind(single, candidate.origin, context, state)
            return
        yield from self.product(wanted, offered, context, state, place)

    def _addends(
        self, term: Sum, given: list[Item], scale: float, context: Context, state: State, place: str
    ) -> Iterator[State]:
        """Bind the captures of a sum to the summands that are left."""
        yield from self._bind_addends(self._summands_of(term).variables, given, scale, context, state, place)

    def _bind_addends(
        self,
        variables: list[tuple[p.Var, float]],
        given: list[Item],
        scale: float,
        context: Context,
        state: State,
        place: str,
    ) -> Iterator[State]:
        if not variables:
            if not given:
                yield state
            else:
                left = ", ".join(describe_item(item) for item in given)
                yield from self.miss(state, "arity", "no further summand", left, len(given), place)
            return
        (variable, coef), others = variables[0], variables[1:]
        name = variable.name
        for index, item in enumerate(given):
            states: Iterator[State] = iter((state,))
            value = self._addend(item, scale * coef)
            if value is None:
                single = Prod(1.0, item.factors).single
                behind = self._behind(single)
                value = behind[0] if behind is not None else single if isinstance(single, Ref) else item.origin
                states = self.miss(state, "constant", f"{scale * coef:g} * {name}", describe_item(item), 1, place)
            if value is None:
                continue
            remaining = given[:index] + given[index + 1 :]
            for current in states:
                for bound in self.bind(variable, value, context, current):
                    yield from self._bind_addends(others, remaining, scale, context, bound, place)
        if self.plan.captures[name].kind == "optional" and name not in state.bound:
            yield from self._bind_addends(others, given, scale, context, state, place)
        else:
            for missed in self.miss(state, "arity", f"a summand for {name}", "none", 1, place):
                yield from self._bind_addends(others, given, scale, context, missed, place)

    def _addend(self, item: Item, share: float) -> Ref | None:
        """The value of which a summand is so many times; None where there is none."""
        if item.origin is not None and self._close(item.share, share):
            return item.origin
        single = Prod(1.0, item.factors).single
        behind = self._behind(single)
        if behind is not None and self._close(item.coef * behind[1], share):
            return behind[0]
        return single if isinstance(single, Ref) and self._close(item.coef, share) else None

    def _constant(self, term: Sum, found: float, scale: float, state: State, place: str) -> Iterator[State]:
        scalar = self._summands_of(term).scalar
        if scalar is not None:
            variable, coef = scalar
            yield from self._bind_number(variable.name, (found / scale - term.const) / coef, state, place)
        elif self._close(term.const, found / scale):
            yield state
        else:
            yield from self.miss(state, "constant", f"+ {term.const:g}", f"+ {found / scale:g}", 1, place)

    # -- captures ---------------------------------------------------------------------------------------------------

    def bind(self, variable: p.Var, given: Ref, context: Context, state: State) -> Iterator[State]:
        """Bind a tensor capture to the source of a reference, seen in the axes it is read along."""
        name = variable.name
        capture = self.plan.captures[name]
        if capture.kind == "scalar":
            value = self.view.number(given.value)
            if value is not None:
                yield from self._bind_number(name, value, state, given.value.name)
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


def _may_fit(parts: _Factors, given: Factors) -> bool:
    """Whether the numbers of factors can agree: a cheap question that rules out most places."""
    if not parts.least <= len(given) <= parts.most:
        return False
    opened = parts.opened
    for atom, _ in given:
        if not isinstance(atom, Ref):
            opened -= 1
    return opened >= 0


def _distribute(formula: tuple[Atom, float], given: Prod) -> Prod:
    """Move the number before a sum into it where the formula is a bare sum: c (a + b) is c a + c b."""
    atom, exponent = formula
    if not isinstance(atom, Sum) or exponent != 1.0 or len(given.factors) != 1 or given.factors[0][1] != 1.0:
        return given
    inner = given.factors[0][0]
    if not isinstance(inner, Sum):
        return given
    items = tuple(Item(i.coef * given.coef, i.factors, i.origin, i.share * given.coef) for i in inner.items)
    return Prod(1.0, ((Sum(inner.const * given.coef, items), 1.0),))


def _spread(term: Prod) -> Sum | None:
    """c x (a + b) as c x a + c x b; None where the term is no product with a sum."""
    inner = [atom for atom, exponent in term.factors if isinstance(atom, Sum) and exponent == 1.0]
    if not inner or len(term.factors) == 1:
        return None
    rest = Prod(term.coef, tuple(factor for factor in term.factors if factor[0] is not inner[0]))
    parts = [multiply(rest, Prod(item.coef, item.factors)) for item in inner[0].items]
    parts += [multiply(rest, number(inner[0].const))] if inner[0].const else []
    return Sum(0.0, tuple(Item(part.coef, part.factors) for part in parts))


def _power(scale: float, exponent: float) -> float | None:
    """The number to a power, None where that is no real number."""
    try:
        share = scale**exponent
    except (ZeroDivisionError, OverflowError):
        return None
    return None if isinstance(share, complex) else float(share)


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
    """The reduction or contraction that a factor is, and the number it is multiplied by."""
    if isinstance(given, kind):
        yield given, 1.0
    elif isinstance(given, Ref):
        term = view.expand(given)
        if len(term.factors) == 1 and term.factors[0][1] == 1.0 and isinstance(term.factors[0][0], kind):
            yield term.factors[0][0], term.coef


def _without_maximum(ref: Ref, view: View, positions: list[int]) -> Ref:
    """x where `ref` is x - max(x), the same along these axes, which a softmax over them does not see."""
    single = view.expand(ref).single
    if isinstance(single, Sum) and single.const == 0.0 and len(single.items) == 2:
        for kept, maximum in (single.items, single.items[::-1]):
            subtracted = maximum.factors[0][0]
            reduced = subtracted
            if isinstance(subtracted, Ref):
                reduced = view.expand(subtracted).single
            if kept.origin is not None and kept.coef == 1.0 and maximum.coef == -1.0 and isinstance(reduced, Reduce):
                inner = reduced.child
                if reduced.kind != "max" or not isinstance(inner, Ref) or any(map(inner.layout.depends, positions)):
                    continue
                if inner.value is view.source(kept.origin).value:
                    return kept.origin
    return ref


def _covers(layout: Layout, positions: list[int], axis: int) -> bool:
    """Whether these coordinates are the whole of one source axis, and nothing else reads that axis."""
    if layout.source[axis] == 1:
        return all(not layout.depends(position) for position in positions)
    return len(positions) == 1 and layout.whole(positions[0]) == axis


def _variable(item: Item) -> p.Var | None:
    if len(item.factors) == 1 and item.factors[0][1] == 1.0 and isinstance(item.factors[0][0], p.Var):
        return item.factors[0][0]
    return None


def _may_be_absent(argument: Prod, plan: Plan) -> bool:
    single = argument.single
    return isinstance(single, p.Var) and plan.captures[single.name].kind == "optional"
