"""Sums: the summands of a plan's sum against those of a value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from fusion import plan as p
from fusion.matching.describe import describe_item
from fusion.matching.state import Context, State
from fusion.terms import Item, Prod, Ref, Sum

if TYPE_CHECKING:
    from fusion.matching.match import Matcher


class SumPlan(NamedTuple):
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


class Sums:
    """Matches sums of one plan.

    Args:
        matcher: which the summands are matched by.
    """

    def __init__(self, matcher: Matcher) -> None:
        self.matcher = matcher
        self.plan = matcher.plan
        self.record = matcher.record
        self._known: dict[int, tuple[Sum, SumPlan]] = {}

    def match(self, term: Sum, given: Sum, context: Context, state: State, place: str) -> Iterator[tuple[State, float]]:
        """Match a sum up to a number: yield the state and the scale of the graph's sum."""
        parts = self.plan_of(term)
        if not self.record and not parts.least <= len(given.items) <= parts.most:
            return
        for left, matched, scale in self._summands(parts.formulas, list(given.items), None, context, state, place):
            for done in self.matcher.assign(parts.variables, left, _Share(self, scale or 1.0), context, matched, place):
                for finished in self._constant(term, given.const, scale or 1.0, done, place):
                    yield finished, scale or 1.0

    def plan_of(self, term: Sum) -> SumPlan:
        """The summands of a sum of the plan, sorted out."""
        known = self._known.get(id(term))
        if known is not None:
            return known[1]
        kinds = [(item, _variable(item), self._kind(item)) for item in term.items]
        formulas = [item for item, _, kind in kinds if kind == "formula"]
        formulas.sort(
            key=lambda item: not any(isinstance(atom, p.Reduction) for atom, _ in item.factors)
        )  # they bind letters
        variables = [(own, item.coef) for item, own, kind in kinds if own is not None and kind != "scalar"]
        scalars = [(own, item.coef) for item, own, kind in kinds if own is not None and kind == "scalar"]
        least = sum(kind in ("formula", "tensor") for *_, kind in kinds)
        needed = [Prod(item.coef, item.factors) for item, own, kind in kinds if not self._may_be_absent(own, kind)]
        rest = [own for _, own, kind in kinds if own is not None and kind == "rest"]
        parts = SumPlan(
            formulas,
            variables,
            scalars[0] if scalars else None,
            needed[0] if len(needed) == 1 and term.const == 0.0 else None,
            (formulas[0], rest[0]) if len(formulas) == len(rest) == 1 and len(term.items) == 2 else None,
            least,
            len(formulas) + len(variables),
        )
        self._known[id(term)] = term, parts
        return parts

    def core(self, term: Sum, state: State) -> tuple[Prod | None, State]:
        """The one summand that must be there, None where more must, and the state in which a number beside it is 0."""
        parts = self.plan_of(term)
        name = parts.scalar[0].name if parts.scalar is not None else ""
        if parts.core is None or not name or name in state.bound:
            return (None if name else parts.core), state
        alone = state.copy()
        alone.bound[name] = 0.0
        return parts.core, alone

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
            fits = scale is None or free or self.matcher.close(own, scale)
            ways = [(state, own if scale is None else scale)] if fits else []
            if self.record and not free and not (scale is not None and fits):
                # The sum may be multiplied by another number than this summand says, if the summand is wrong.
                whole = 1.0 if scale is None else scale
                expected = describe_item(item._replace(coef=whole * item.coef))
                missed = self.matcher.miss(state, "constant", expected, describe_item(candidate), 1, place)
                ways.extend((current, whole) for current in missed)
            wanted = Prod(item.coef if free else 1.0, item.factors)
            offered = Prod(candidate.coef if free else 1.0, candidate.factors)
            for current, share in ways:
                for matched in self._item(wanted, offered, candidate, context, current, place):
                    found = found or matched.misses is state.misses
                    yield from self._summands(others, remaining, share, context, matched, place)
        if self.record and not found:
            lost = (item.coef != 1.0) + sum(self.matcher.lost(atom) for atom, _ in item.factors)
            if not self.matcher.may_miss(state, lost, place):
                return
            kinds = ", ".join(describe_item(candidate) for candidate in given) or "nothing more"
            for without in self.matcher.miss(state, "operator", describe_item(item), kinds, lost, place):
                yield from self._summands(others, given, scale, context, without, place)

    def _item(
        self, wanted: Prod, offered: Prod, candidate: Item, context: Context, state: State, place: str
    ) -> Iterator[State]:
        single = wanted.single
        if isinstance(single, p.Var) and candidate.origin is not None:
            if self.matcher.close(candidate.share, candidate.coef) or offered.single is None:
                yield from self.matcher.bind(single, candidate.origin, context, state)
            return
        yield from self.matcher.products.match(wanted, offered, context, state, place)

    def _constant(self, term: Sum, found: float, scale: float, state: State, place: str) -> Iterator[State]:
        scalar = self.plan_of(term).scalar
        if scalar is not None:
            variable, coef = scalar
            yield from self.matcher.bind_number(variable.name, (found / scale - term.const) / coef, state, place)
        elif self.matcher.close(term.const, found / scale):
            yield state
        else:
            yield from self.matcher.miss(state, "constant", f"+ {term.const:g}", f"+ {found / scale:g}", 1, place)


@dataclass(frozen=True, slots=True)
class _Share:
    """The captures among the summands of a sum that is `scale` times the plan's: see `Matcher.assign`."""

    sums: Sums
    scale: float
    noun: ClassVar[str] = "summand"

    def bindable(
        self, variable: p.Var, coef: float, item: Item, state: State, place: str
    ) -> Iterator[tuple[Ref, State]]:
        """The value of which a summand is as many times as the capture says."""
        matcher, share = self.sums.matcher, self.scale * coef
        single = Prod(1.0, item.factors).single
        behind = matcher.behind(single)
        if item.origin is not None and matcher.close(item.share, share):
            yield item.origin, state
        elif behind is not None and matcher.close(item.coef * behind[1], share):
            yield behind[0], state
        elif isinstance(single, Ref) and matcher.close(item.coef, share):
            yield single, state
        else:
            value = behind[0] if behind is not None else single if isinstance(single, Ref) else item.origin
            wanted = f"{share:g} * {variable.name}"
            for missed in matcher.miss(state, "constant", wanted, describe_item(item), 1, place):
                if value is not None:
                    yield value, missed

    def described(self, item: Item) -> str:
        """A summand in words."""
        return describe_item(item)


def _variable(item: Item) -> p.Var | None:
    if len(item.factors) == 1 and item.factors[0][1] == 1.0 and isinstance(item.factors[0][0], p.Var):
        return item.factors[0][0]
    return None
