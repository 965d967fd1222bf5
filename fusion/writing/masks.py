"""Masks: what a value beside scores provably is over the rows (queries) and columns (keys) of the scores.

A mask is read from what computes it: a stored triangle however it is cut, `Trilu`, positions that are compared, and
arithmetic on these. What is proved is one straight line through rows and columns, and one number on either side of it:
a causal mask, a mask that hides nothing. Anything else is None: nobody knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np

from fusion.dims import Dim
from fusion.facts import Facts
from fusion.facts.dtypes import INTEGERS
from fusion.facts.numbers import ELEMENTWISE
from fusion.models.graph import Node, Value
from fusion.schema import attribute
from fusion.terms import Ref
from fusion.view import View

LARGEST_SCORE = 4096.0
"""What the magnitude of a score is taken to be below, where a mask writes a number that is not the smallest one.

A row that keeps a key then gives a hidden one at most exp(-104), which is 0 in float and nothing in double.
"""
ABSORBING = -2 * LARGEST_SCORE - 104.0
ABSORBED = -1e30
"""A number to which a score can be added and nothing changes, in float and in double."""

_PAYLOAD = 2**24
"""Elements up to which a mask is read: 4096 positions."""
_DEPTH = 24
"""How many operators a mask is read through."""


class Line(NamedTuple):
    """The integer row * i + column * j + constant at row i and column j; a row is longer by sizes that are symbols."""

    row: Dim
    column: Dim
    constant: Dim

    def plus(self, other: Line, factor: int = 1) -> Line:
        """self + factor * other."""
        return Line(
            self.row + factor * other.row,
            self.column + factor * other.column,
            self.constant + factor * other.constant,
        )

    def times(self, factor: int) -> Line:
        """factor * self."""
        return Line(factor * self.row, factor * self.column, factor * self.constant)


class Halves(NamedTuple):
    """The number `inside` where `line` is at most 0, else `outside`; one number everywhere where there is no line."""

    line: Line | None
    inside: float
    outside: float


Formula = Line | Halves | None

_ZERO = Line(0, 0, 0)
_AT_MOST = {"LessOrEqual": (1, 0), "Less": (1, 1), "GreaterOrEqual": (-1, 0), "Greater": (-1, 1)}
"""A comparison of a and b as sign * (a - b) + shift <= 0."""


def read(view: View, ref: Ref) -> Halves | None:
    """What `ref` is, of which the last two axes are rows and columns; None where nobody knows."""
    found = _Reader(view, ref.layout.shape[-2:]).read(ref, _DEPTH)
    return found if isinstance(found, Halves) else None


def keeps_a_key(view: View, ref: Ref, keep: bool) -> bool:
    """Whether each row of a mask has an element that is `keep`, wherever there are keys at all: the first one."""
    mask = read(view, ref)
    if mask is None or bool(mask.inside) != keep:
        return False
    line = mask.line
    return line is None or (isinstance(line.row, int) and line.row <= 0 and view.facts.lower(-line.constant) >= 0)


class _Reader:
    """Reads formulas over coordinates of which the last two have these sizes."""

    def __init__(self, view: View, sizes: Sequence[Dim]) -> None:
        self.view = view
        self.facts = view.facts
        self.sizes = sizes
        self.known: dict[Ref, Formula] = {}

    def read(self, ref: Ref, depth: int) -> Formula:
        """The formula of a value in these coordinates."""
        if ref not in self.known:
            self.known[ref] = self._read(ref, depth) if depth else None
        return self.known[ref]

    def _read(self, ref: Ref, depth: int) -> Formula:
        uniform = self._uniform(ref.value)
        if uniform is not None or self.facts.shape(ref.value) != ref.layout.source:
            return uniform
        ref = self.view.peel(ref).ref
        uniform, node = self._uniform(ref.value), ref.value.producer
        if uniform is not None:
            return uniform
        if self.facts.is_constant(ref.value):
            return self._stored(ref)
        if node is None or node.domain or ref.value.slot != 0:
            return None
        if node.op in ("Range", "CumSum"):
            return self._positions(node, ref)
        if node.op == "Trilu":
            return self._triangle(node, ref)
        if node.op not in ELEMENTWISE and node.op != "Mod":
            return None
        places = [self.view.operand(ref, node, index) for index in range(len(node.inputs))]
        return self._computed(node, [None if place is None else self.read(place, depth - 1) for place in places])

    def _uniform(self, value: Value) -> Formula:
        number = self.facts.number(value)
        if number is not None:
            return Halves(None, number, number)
        items = self.facts.integers(value)
        item = items.items[0] if items is not None and len(items.items) == 1 else None
        return None if item is None else Line(0, 0, item)

    def _places(self, ref: Ref) -> list[Line | None]:
        """Where along each axis of the value an element is read; None where other coordinates say."""
        lines: list[Line | None] = [Line(0, 0, offset) for offset in ref.layout.offsets]
        last = len(ref.layout.axes) - 1
        for coordinate, factors in enumerate(ref.layout.axes):
            for axis, stride, _ in factors:
                line = None if axis is None else lines[axis]
                if axis is None or line is None:
                    continue
                added = Line(stride, 0, 0) if coordinate == last - 1 else Line(0, stride, 0)
                lines[axis] = line.plus(added) if len(factors) == 1 and coordinate >= last - 1 else None
        return lines

    def _stored(self, ref: Ref) -> Formula:
        """A stored tensor: a triangle over two of its axes, or evenly spaced integers along one."""
        sizes, places = [int(str(dim)) for dim in ref.layout.source], self._places(ref)
        long = [axis for axis, size in enumerate(sizes) if size != 1]
        lines = [places[axis] for axis in long]
        if not 1 <= len(long) <= 2 or None in lines or not 0 < np.prod(sizes) <= _PAYLOAD:
            return None
        array = self.facts.constant(ref.value)
        if array is None or array.dtype.kind not in "biuf":
            return None
        array = array.reshape([sizes[axis] for axis in long])
        if array.ndim == 1:
            if self.facts.dtype(ref.value) not in INTEGERS:
                return None
            step = int(array[1]) - int(array[0])
            even = np.array_equal(array, int(array[0]) + step * np.arange(len(array)))
            return cast(Line, lines[0]).times(step).plus(Line(0, 0, int(array[0]))) if even else None
        inside, outside = array[-1, 0], array[0, -1]
        kept = array == inside
        diagonal = int(kept[0].sum()) - 1
        triangle = np.tri(sizes[long[0]], sizes[long[1]], diagonal, dtype=bool)
        if not np.array_equal(kept, triangle) or (array[~kept] != outside).any():
            return None
        above = cast(Line, lines[1]).plus(cast(Line, lines[0]), -1).plus(Line(0, 0, -diagonal))
        return self._halves(above, float(inside), float(outside))

    def _positions(self, node: Node, ref: Ref) -> Formula:
        """Range, and the sum of one integer again and again: evenly spaced integers."""
        places = self._places(ref)
        if self.facts.dtype(ref.value) not in INTEGERS:
            return None
        if node.op == "Range":
            start, step, place = self._integer(node, 0), self._integer(node, 2), places[0]
        else:
            axis, reverse = self._integer(node, 1), attribute(node, "reverse")
            step = self._integer(node, 0)
            start = 0 if attribute(node, "exclusive") else step
            place = places[axis] if isinstance(axis, int) and not reverse else None
        if place is None or start is None or not isinstance(step, int):
            return None
        return place.times(step).plus(Line(0, 0, start))

    def _triangle(self, node: Node, ref: Ref) -> Formula:
        """Trilu of one number."""
        if len(ref.layout.source) < 2:
            return None
        *_, row, column = self._places(ref)
        shift = 0 if node.input(1) is None else self._integer(node, 1)
        number = None if node.inputs[0] is None else self.facts.number(node.inputs[0])
        if row is None or column is None or shift is None or number is None:
            return None
        upper = attribute(node, "upper") != 0
        line = column.plus(row, -1).plus(Line(0, 0, -shift + int(upper)))
        return self._halves(line, 0.0, number) if upper else self._halves(line, number, 0.0)

    def _integer(self, node: Node, slot: int) -> Dim | None:
        value = node.input(slot)
        found = None if value is None else self._uniform(value)
        if isinstance(found, Halves):
            return int(found.inside) if found.inside.is_integer() else None
        return None if found is None else found.constant

    def _computed(self, node: Node, operands: list[Formula]) -> Formula:
        """What an elementwise operator makes of its operands."""
        lines = [self._line(operand) for operand in operands]
        if any(isinstance(operand, Line) for operand in operands):
            return self._of_lines(node, cast("list[Line]", lines)) if None not in lines else None
        rule = ELEMENTWISE.get(node.op)
        halves = [operand for operand in operands if isinstance(operand, Halves)]
        tests = {half.line for half in halves if half.line is not None}
        if rule is None or len(tests) > 1:
            return None
        sides = []
        for side in ("inside", "outside"):
            pairs = zip(node.inputs, operands, strict=True)
            given = {value: getattr(half, side) for value, half in pairs if half is not None}
            number = rule(cast(Facts, _Side(self.facts, given)), node)
            if number is None:
                return None
            sides.append(number)
        return Halves(None, sides[0], sides[0]) if sides[0] == sides[1] else Halves(tests.pop(), *sides)

    def _line(self, found: Formula) -> Line | None:
        """A formula as an integer by row and column, where it is one."""
        if isinstance(found, Halves):
            return Line(0, 0, int(found.inside)) if found.line is None and found.inside.is_integer() else None
        return found

    def _of_lines(self, node: Node, lines: list[Line]) -> Formula:
        if node.op in _AT_MOST:
            sign, shift = _AT_MOST[node.op]
            return self._halves(lines[0].plus(lines[1], -1).times(sign).plus(Line(0, 0, shift)), 1.0, 0.0)
        output = node.outputs[0]
        if output is None or self.facts.dtype(output) not in INTEGERS:
            return None
        if node.op in ("Add", "Sub"):
            return lines[0].plus(lines[1], 1 if node.op == "Add" else -1)
        if node.op in ("Mod", "Div"):
            return self._wrapped(node.op, *lines)
        return lines[0] if node.op == "Cast" else None

    def _wrapped(self, op: str, position: Line, width: Line) -> Line | None:
        """The column, or the row, of a position that is counted row by row."""
        rows, columns, start = position
        if start != 0 or columns != 1 or not rows == width.constant == self.sizes[1]:
            return None
        return Line(0, 1, 0) if op == "Mod" else Line(1, 0, 0)

    def _halves(self, line: Line, inside: float, outside: float) -> Halves | None:
        """The two sides of a line, in the direction in which columns grow; one where the other has no element."""
        row, column, constant = line
        if not isinstance(row, int) or not isinstance(column, int):
            return None
        if (column, row) < (0, 0):
            return self._halves(line.times(-1).plus(Line(0, 0, 1)), outside, inside)
        rows, columns = self.sizes
        if self.facts.lower(-(constant + column * (columns - 1) + max(row, 0) * (rows - 1))) >= 0:
            return Halves(None, inside, inside)
        if self.facts.lower(constant + min(row, 0) * (rows - 1)) >= 1:
            return Halves(None, outside, outside)
        return Halves(line, inside, outside)


class _Side(NamedTuple):
    """Facts on one side of a line, as rules for uniform numbers ask for them."""

    facts: Facts
    numbers: dict[Value | None, float]

    def number(self, value: Value) -> float | None:
        return self.numbers.get(value)

    def dtype(self, value: Value) -> int | None:
        return self.facts.dtype(value)
