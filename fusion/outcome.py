"""What a run has done, and what it nearly did."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from fusion.state import Miss
from fusion.verdict import Verdict


@dataclass(frozen=True, slots=True)
class Rewritten:
    """One rewrite that was made.

    Attributes:
        pattern: its name.
        root: name of the value it computes.
        operators: the new nodes.
        replaced: labels of the nodes it replaced.
        scope: where.
        checked: whether both sides were run and agree; None where that was not asked for.
        unchecked: why they could not be run; empty where they were.
    """

    pattern: str
    root: str
    operators: tuple[str, ...]
    replaced: tuple[str, ...]
    scope: str
    checked: bool | None = None
    unchecked: str = ""


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


@dataclass(slots=True)
class Outcome:
    """What a run did."""

    rewritten: list[Rewritten] = field(default_factory=list)
    near: list[NearMiss] = field(default_factory=list)
    sweeps: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))


def verdict_of(misses: Sequence[Miss]) -> Verdict:
    """NO where something differs, UNKNOWN where only facts are missing."""
    return Verdict.UNKNOWN if all(miss.verdict is Verdict.UNKNOWN for miss in misses) else Verdict.NO
