"""Equalities between dimensions that every successful run obeys."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusion.facts import Facts


def learn(facts: Facts) -> bool:
    """Add to `facts.equal` what one pass over the main graph finds; return whether there was anything new."""
    return False
