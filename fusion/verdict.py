"""Three-valued answers: an UNKNOWN never matches, and is reported as a missing fact, not as a difference."""

from __future__ import annotations

from enum import Enum


class Verdict(Enum):
    """The answer to a question about a graph."""

    YES = "yes"
    NO = "no"
    UNKNOWN = "unknown"

    @staticmethod
    def of(answer: bool | None) -> Verdict:
        """Return YES or NO for a known answer, UNKNOWN for None."""
        if answer is None:
            return Verdict.UNKNOWN
        return Verdict.YES if answer else Verdict.NO

    def __and__(self, other: Verdict) -> Verdict:
        """Kleene conjunction: NO wins, then UNKNOWN."""
        if Verdict.NO in (self, other):
            return Verdict.NO
        if Verdict.UNKNOWN in (self, other):
            return Verdict.UNKNOWN
        return Verdict.YES
