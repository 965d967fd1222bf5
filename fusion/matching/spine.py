"""The main path through scores: from a softmax back to the product of queries and keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fusion import plan as p
from fusion.language import letters_of
from fusion.laws import linear, ring, selection
from fusion.matching.describe import spell_dims
from fusion.matching.state import Context, Entry, State
from fusion.matching.state import entries as entries_of
from fusion.models.graph import Node
from fusion.terms import Item, Prod, Ref, multiply, number
from fusion.verdict import Verdict

if TYPE_CHECKING:
    from fusion.matching.match import Matcher


class Spine:
    """Follow a score back through masks and biases to the one formula it is made of.

    Sums over scores are not opened as a whole: the main path is found, everything beside it is an ordered list, because
    order matters in rows that are masked everywhere.
    """

    def __init__(self, matcher: Matcher, formula: Item, variable: p.Var, context: Context) -> None:
        self.matcher = matcher
        self.formula = Prod(formula.coef, formula.factors)
        self.variable = variable
        self.name = variable.name
        self.context = context

    def walk(self, ref: Ref, coef: float, entries: tuple[Entry, ...], state: State) -> Iterator[State]:
        """Yield the states in which `coef * ref` is the formula plus what `entries` and the way down collect."""
        view = self.matcher.view
        ref = view.peel(ref).ref
        node = ref.value.producer
        if node is None or node.domain:
            return
        selected = list(selection.selections(node, ref, view))
        if selected or node.op == "Where":
            for found in selected:
                entry = Entry("mask", found.condition, 1.0, found.keep, found.fill * coef, found.read)
                yield from self.walk(found.chosen, found.coef * coef, (*entries, entry), state)
        elif node.op in ring.SUMS:
            yield from self._sum(node, ref, coef, entries, state)
        elif node.op == "Max":
            yield from self._clamp(node, ref, coef, entries, state)
        elif (scaled := linear.behind(node, ref, view)) is not None:
            yield from self.walk(scaled[0], coef * scaled[1], entries, state)
        else:
            given = multiply(number(coef), view.expand(ref))
            for matched in self.matcher.products.match(self.formula, given, self.context, state, ref.value.name):
                yield from self._bind(entries, matched)

    def _sum(self, node: Node, ref: Ref, coef: float, entries: tuple[Entry, ...], state: State) -> Iterator[State]:
        view = self.matcher.view
        whole = [view.operand(ref, node, index) for index in range(len(node.inputs))]
        beside = [view.beside(ref, node, index) for index in range(len(node.inputs))]
        signs = [-coef if node.op == "Sub" and index == 1 else coef for index in range(len(node.inputs))]
        tried = False
        for index, main in enumerate(whole):
            others = [(other, sign) for at, (other, sign) in enumerate(zip(beside, signs, strict=True)) if at != index]
            terms = tuple(Entry("term", other, sign) for other, sign in others if other is not None)
            if main is None or not _is_full(main, ref) or len(terms) < len(others):
                continue
            tried = True
            yield from self.walk(main, signs[index], (*entries, *terms), state)
        if not tried:
            shapes = [view.facts.shape(value) for value in node.inputs if value is not None]
            sizes = " and ".join("?" if shape is None else f"({', '.join(map(str, shape))})" for shape in shapes)
            found = f"{sizes}, which may be broadcast"
            wanted = "scores that have the shape of their sum"
            yield from self.matcher.miss(state, "dimension", wanted, found, 1, node.label, Verdict.UNKNOWN)

    def _clamp(self, node: Node, ref: Ref, coef: float, entries: tuple[Entry, ...], state: State) -> Iterator[State]:
        view = self.matcher.view
        for index in (0, 1) if len(node.inputs) == 2 and coef > 0 else ():
            scores, other = view.operand(ref, node, index), node.inputs[1 - index]
            least = view.number(other) if other is not None else None
            if scores is not None and least is not None:
                entry = Entry("clamp", scores, 1.0, True, least * coef)
                yield from self.walk(scores, coef, (*entries, entry), state)

    def _bind(self, entries: tuple[Entry, ...], state: State) -> Iterator[State]:
        capture = self.matcher.plan.captures[self.name]
        placed: list[Entry] = []
        for entry in entries:
            if entry.kind == "clamp":
                placed.append(entry)
                continue
            viewed = self.matcher.axes.view(
                entry.ref.layout, self.variable.dims, frozenset(letters_of(capture.dims or ())), self.context, state
            )
            if isinstance(viewed, str):
                wanted = f"{self.name} with axes {spell_dims(capture.dims)}"
                yield from self.matcher.miss(state, "dimension", wanted, viewed, 1, entry.ref.value.name)
                return
            placed.append(entry._replace(ref=Ref(entry.ref.value, viewed)))
        bound = state.copy()
        bound.bound[self.name] = (*placed, *entries_of(state.bound.get(self.name)))
        yield bound

    def outermost(self, entry: Entry, state: State) -> Iterator[State]:
        """Put one more part before those that are bound."""
        yield from self._bind((entry,), state)


def _is_full(main: Ref, result: Ref) -> bool:
    """Whether an operand has the shape of the result, but for leading axes of 1 that another one brought in."""
    own, full = main.layout.source, result.layout.source
    lead = len(full) - len(own)
    return full[lead:] == own and all(dim == 1 for dim in full[:lead])
