"""What a search through a graph has bound, and what is unmet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fusion.models.graph import Value
from fusion.terms import Ref
from fusion.verdict import Verdict


class Miss(NamedTuple):
    """An unmet obligation.

    Attributes:
        kind: operator, arity, attribute, constant, same value, dimension, dtype, privacy, requirement, kernel or
            check.
        text: what was expected and what was found.
        verdict: NO, or UNKNOWN where a fact is missing.
        weight: how much of the formula stayed unmatched.
        place: the value or node it is about.
    """

    kind: str
    text: str
    verdict: Verdict
    weight: int
    place: str


@dataclass(frozen=True, slots=True)
class NearMiss:
    """A place where a pattern nearly holds, and what is unmet."""

    pattern: str
    root: str
    misses: tuple[Miss, ...]
    weight: int

    @property
    def unmet(self) -> int:
        """The weight of what is unmet."""
        return sum(miss.weight for miss in self.misses)


def verdict_of(misses: Sequence[Miss]) -> Verdict:
    """NO where something differs, UNKNOWN where only facts are missing."""
    return Verdict.UNKNOWN if all(miss.verdict is Verdict.UNKNOWN for miss in misses) else Verdict.NO


class Entry(NamedTuple):
    """One part of a `rest` capture, outermost first.

    Attributes:
        kind: "term" (coef * ref is added), "mask" (where ref is not `keep`, the score becomes `fill`), "clamp" (the
            score is at least `fill`) or "zero" (where ref is not `keep`, the softmax gives 0).
        ref: the value, in the axes of the capture.
        read: values that say what the part does, of which none is computed from the scores.
    """

    kind: str
    ref: Ref
    coef: float = 1.0
    keep: bool = True
    fill: float = 0.0
    read: tuple[Value, ...] = ()


Bound = Ref | float | tuple[Entry, ...]


def entries(bound: Bound | None) -> tuple[Entry, ...]:
    """The parts of a `rest` capture; nothing for any other (a reference is a tuple, too)."""
    return bound if isinstance(bound, tuple) and not isinstance(bound, Ref) else ()


@dataclass(slots=True)
class State:
    """What one branch of the search has bound. Copied where it branches.

    `parts` are the pieces of captures, by name and number; `proved` says of a value that is read in several places, and
    is the same there, what it is computed from in the same way.
    """

    bound: dict[str, Bound]
    letters: dict[str, tuple[int, ...]]
    kept: dict[int, Ref]
    misses: tuple[Miss, ...] = ()
    parts: dict[tuple[str, int], Ref] = field(default_factory=dict)
    proved: dict[Value, tuple[Value, ...]] = field(default_factory=dict)

    def copy(self) -> State:
        return State(
            dict(self.bound), dict(self.letters), dict(self.kept), self.misses, dict(self.parts), dict(self.proved)
        )

    @property
    def unmet(self) -> int:
        """The weight of what is unmet."""
        return sum(miss.weight for miss in self.misses)


Context = Mapping[str, tuple[int, ...]]
