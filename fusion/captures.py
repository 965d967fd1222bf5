"""Captures: what a parameter of a pattern may bind, and the dimension specs that name its axes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fusion.errors import PatternError

Token = str | tuple[str, ...]
Dims = tuple[Token, ...]
ELLIPSIS = "..."


@dataclass(frozen=True, slots=True)
class Capture:
    """What a parameter of a pattern may bind.

    Attributes:
        kind: tensor, optional (may be absent: the neutral element), scalar (a number of the graph) or rest (everything
            else that is added to or masked out of a sum).
        dims: its axes; None where it has axes of its own, which the result need not have.
        loose: letters over which it may be broadcast.
        low, high: bounds of a scalar.
    """

    kind: str
    dims: Dims | None = None
    loose: frozenset[str] = frozenset()
    low: float = -math.inf
    high: float = math.inf


def tensor(spec: str) -> Capture:
    """A tensor with the axes of `spec`; a plain string means the same."""
    return Capture("tensor", *parse(spec))


def optional(spec: str) -> Capture:
    """A tensor that may be absent; then it is 0 where it is added, and 1 where it is multiplied."""
    return Capture("optional", *parse(spec))


def rest(spec: str) -> Capture:
    """Everything else that is added to, or masked out of, a sum: an ordered list, possibly empty.

    Each part may be broadcast over any of the axes.
    """
    return Capture("rest", *parse(spec))


def scalar(low: float = -math.inf, high: float = math.inf) -> Capture:
    """A number written in the graph, low <= number <= high."""
    return Capture("scalar", (), low=low, high=high)


def operand(*, absent: bool = False) -> Capture:
    """An operand of an `operator`, in axes of its own; `absent`: it may be left out."""
    return Capture("optional" if absent else "tensor")


def parse(spec: str) -> tuple[Dims, frozenset[str]]:
    tokens: list[Token] = []
    loose: set[str] = set()
    text = spec.replace("(", " ( ").replace(")", " ) ").split()
    group: list[str] | None = None
    for word in text:
        if word == "(":
            group = []
        elif word == ")":
            tokens.append(tuple(group or ()))
            group = None
        else:
            letter, _, one = word.partition("|")
            if one not in ("", "1") or not (letter == ELLIPSIS or letter.isidentifier()):
                raise PatternError(f"{word!r} is no dimension: write a letter, `...`, `(H D)` or `B|1`")
            if one:
                loose.add(letter)
            (tokens if group is None else group).append(letter)
    if group is not None:
        raise PatternError(f"{spec!r} opens a bracket that it does not close")
    return tuple(tokens), frozenset(loose)


def letters_of(dims: Dims) -> tuple[str, ...]:
    """The letters of a spec, groups opened."""
    return tuple(letter for token in dims for letter in ((token,) if isinstance(token, str) else token))
