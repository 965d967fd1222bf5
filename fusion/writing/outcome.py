"""What a run has done."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from fusion.matching.state import NearMiss


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


@dataclass(slots=True)
class Outcome:
    """What a run did."""

    rewritten: list[Rewritten] = field(default_factory=list)
    near: list[NearMiss] = field(default_factory=list)
    sweeps: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
