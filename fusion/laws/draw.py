"""Draw: the choices of a speller, made by `random`, or by hypothesis, which then can shrink them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


class Draw:
    """A source of choices.

    Choice 0 is always the plainest, so that a search for a small failing example ends in a plain spelling.

    Args:
        index: given a count of at least 1, returns a number in 0..count-1.

    >>> Draw(lambda count: 0).choose("Sqrt", "Pow")
    'Sqrt'
    """

    def __init__(self, index: Callable[[int], int]) -> None:
        self.index = index

    @staticmethod
    def seeded(seed: int | str) -> Draw:
        """Choices that depend on the seed only."""
        return Draw(random.Random(seed).randrange)

    def choose(self, *options: T) -> T:
        """One of the options, the plainest of which comes first."""
        return options[self.index(len(options))] if len(options) > 1 else options[0]

    def chance(self, odds: int) -> bool:
        """True one time in `odds`."""
        return self.index(odds) == odds - 1

    def shuffled(self, items: Iterable[T]) -> list[T]:
        """The items in some order, their own being the plainest."""
        left = list(items)
        return [left.pop(self.index(len(left)) if len(left) > 1 else 0) for _ in range(len(left))]

    def number(self, *, positive: bool = False) -> float:
        """A coefficient as formulas have them."""
        magnitude = self.choose(2.0, 0.5, 3.0, 0.1, 1.702, 0.044715, 7.0, 0.125)
        return magnitude if positive or not self.chance(3) else -magnitude
