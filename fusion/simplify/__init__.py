"""Simplification: what a graph computes twice, for nothing or ahead of time goes, and the outputs keep every bit."""

from __future__ import annotations

from fusion.simplify.rules import GROUP, RULES, Rule
from fusion.simplify.simplifier import Simplifier

__all__ = ["GROUP", "RULES", "Rule", "Simplifier"]
