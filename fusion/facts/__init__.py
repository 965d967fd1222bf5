"""Facts about values: element type, shape, small integers, uniform numbers, constants, layouts.

Facts are lazy: a question walks back through producers as far as it needs to, and every answer is kept. They hold in
every run that succeeds, but for one thing: that a Reshape keeps the number of elements says nothing about the sizes of
an empty tensor, and is used as if it did. Nothing reads a payload above `constants.SMALL_PAYLOAD` bytes, except
`Facts.constant`, on demand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
from onnx import ValueInfoProto

from fusion.dims import Bound, Dim, Poly, atom_of, lower, substitute, symbol, weight
from fusion.facts import constants, dtypes, equalities, numbers, rearrange, shapes, values
from fusion.facts.integers import IntTensor
from fusion.layout import Layout
from fusion.models.graph import Graph, Node, Scope, Value

__all__ = ["Facts", "IntTensor"]

T = TypeVar("T")

_LARGE = 400
"""Weight above which a dimension gets a symbol of its own: nobody can use what it says."""

_DEPTH = 40
"""How many facts ask each other on Python's stack before the work list takes over."""


_Known: TypeAlias = dict[Value, T | None]
_Like: TypeAlias = Callable[[Value, _Known[T]], Value | None]


class _Table(Generic[T]):
    """One kind of fact: how to find it, and what was found.

    Args:
        rule: works the fact out.
        like: the input whose fact a value shares, given what is known by now; most keep shape and element type.
    """

    def __init__(self, rule: Callable[[Facts, Value], T | None], like: _Like[T] | None = None) -> None:
        self.rule = rule
        self.like = like
        self.known: _Known[T] = {}


class _TooDeep(Exception):
    """Raised where facts ask each other too deeply; names the one to find first."""

    def __init__(self, table: _Table[Any], value: Value) -> None:
        self.table, self.value = table, value
        super().__init__()


class Facts:
    """What is known about the values of a graph.

    Args:
        graph: the index. After an edit call `forget` with the values it touched.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.equal: dict[Poly, Dim] = {}
        """Learned equalities: atom → what it equals. Applied to every dimension of every fact."""
        self._least: list[Dim] = []
        self._dims: set[Poly] = set()
        self._scopes: dict[Scope, str] = {}
        self._substituted: dict[Dim, Dim] = {}
        self._depth = 0
        self._dtypes = _Table[int](dtypes.dtype, dtypes.like)
        self._shapes = _Table[tuple[Dim, ...]](Facts._find_shape, shapes.like)
        self._integers = _Table[IntTensor](values.integers)
        self._numbers = _Table[float](numbers.number)
        self._layouts = _Table[Layout](Facts._find_layout)
        self._tables: tuple[_Table[Any], ...] = (
            self._dtypes,
            self._shapes,
            self._integers,
            self._numbers,
            self._layouts,
        )

    def dtype(self, value: Value) -> int | None:
        """The element type, a `TensorProto.DataType`; None where unknown or no tensor."""
        known = self._dtypes.known
        return known[value] if value in known else self._ask(self._dtypes, value)

    def shape(self, value: Value) -> tuple[Dim, ...] | None:
        """The dimensions; None where the rank is unknown. An unknown dimension is a symbol of its own."""
        known = self._shapes.known
        return known[value] if value in known else self._ask(self._shapes, value)

    def rank(self, value: Value) -> int | None:
        """The number of dimensions."""
        shape = self.shape(value)
        return None if shape is None else len(shape)

    def integers(self, value: Value) -> IntTensor | None:
        """The elements of an integer or boolean tensor of at most 64, as far as known; None where nothing is."""
        return self._ask(self._integers, value)

    def number(self, value: Value) -> float | None:
        """The number which all elements equal, rounded as the element type rounds; None where unknown or empty."""
        known = self._numbers.known
        return known[value] if value in known else self._ask(self._numbers, value)

    def constant(self, value: Value) -> np.ndarray[Any, Any] | None:
        """The payload of an initializer or Constant node, read now, however large; None for anything else."""
        return constants.payload(self.graph, value)

    def is_constant(self, value: Value) -> bool:
        """Whether `value` is an initializer the caller cannot override, or the output of a Constant node."""
        return constants.stored(value) is not None

    def layout(self, node: Node, slot: int = 0) -> Layout | None:
        """Output `slot` of `node` as a layout over input 0; None where the node computes, or it cannot be proved."""
        value = node.outputs[slot]
        return None if value is None else self._ask(self._layouts, value)

    def through(self, value: Value) -> tuple[Value, Layout] | None:
        """(data input, layout of `value` over it) where `value` is a rearrangement of one input; else None."""
        if value.producer is None or value.producer.op not in rearrange.RULES:
            return None
        layout = self._ask(self._layouts, value)
        if layout is None:
            return None
        source = value.producer.inputs[0]
        return None if source is None else (source, layout)

    def learn(self) -> bool:
        """Collect equalities between dimensions which every successful run obeys, in one pass over the main graph.

        Returns:
            Whether there was anything new; then the facts found so far are forgotten, and a further pass may find more.
        """
        known = len(self._dims)
        found = equalities.learn(self) or len(self._dims) > known
        if found:
            self.clear()
        return found

    def clear(self) -> None:
        """Drop all facts; equalities stay."""
        for table in self._tables:
            table.known.clear()

    def forget(self, values: Iterable[Value]) -> None:
        """Drop the facts about these values, not about what is computed from them: a rewrite keeps their meaning."""
        for value in values:
            for table in self._tables:
                table.known.pop(value, None)

    def recomputed(self, values: Iterable[Value]) -> None:
        """Drop how these values are computed, not what they are: a rewrite gave them a new producer."""
        for value in values:
            for table in (self._layouts, self._integers, self._numbers):
                table.known.pop(value, None)

    def assume(self, atom: Poly, value: Dim) -> None:
        """Replace `atom` by `value` in every fact found from now on."""
        equalities.close(self.equal, atom, value)
        smaller = atom_of(atom)
        if smaller is not None and smaller.kind == "min0" and value in (0, smaller.args[0]):
            self._least.append(smaller.args[0] if value == 0 else -smaller.args[0])
        self._substituted.clear()

    def not_negative(self, dim: Dim, scope: Scope) -> None:
        """Note that `dim` is at least 0 wherever what runs in `scope` succeeds."""
        if isinstance(dim, Poly) and scope.parent is None and lower(dim) < 0:  # a body may never run
            self._dims.add(dim)

    def dim(self, dim: Dim) -> Dim:
        """`dim` with the learned equalities applied."""
        if isinstance(dim, int) or not self.equal:
            return dim
        found = self._substituted.get(dim)
        if found is None:
            found = self._substituted[dim] = substitute(dim, self.equal, self._least)
        return found

    def lower(self, dim: Dim) -> Bound:
        """A number which `dim` is never below: what is the dimension of some value is at least 0."""
        known = lower(dim)
        return 0 if known < 0 and dim in self._dims else known

    # --- finding ------------------------------------------------------------------------------------------------------

    def _ask(self, table: _Table[T], value: Value) -> T | None:
        known = table.known
        if value in known:
            return known[value]
        if self._depth:
            return self._find(table, value)
        try:
            return self._find(table, value)
        except _TooDeep as deeper:
            self._settle([(table, value), (deeper.table, deeper.value)])
        return known[value]

    def _find(self, table: _Table[T], value: Value) -> T | None:
        if self._depth >= _DEPTH:
            raise _TooDeep(table, value)
        known, like = table.known, table.like
        chain = [value]
        while like is not None and (source := like(chain[-1], known)) is not None:
            chain.append(source)
            if source in known:
                break
        result = known.get(chain[-1])
        self._depth += 1
        try:
            for following in reversed(chain):  # where nothing is known of the source, its own declaration may say it
                if result is None:
                    result = table.rule(self, following)
                known[following] = result
        finally:
            self._depth -= 1
        return result

    def _settle(self, work: list[tuple[_Table[Any], Value]]) -> None:
        """Find facts with a work list, the last one first, so that a graph may be deeper than Python's stack."""
        while work:
            table, value = work[-1]
            try:
                if value not in table.known:
                    self._find(table, value)
                work.pop()
            except _TooDeep as deeper:
                work.append((deeper.table, deeper.value))

    def _find_layout(self, value: Value) -> Layout | None:
        return None if value.producer is None else rearrange.layout(self, value.producer, value.slot)

    def _find_shape(self, value: Value) -> tuple[Dim, ...] | None:
        tensor = constants.stored(value)
        if tensor is not None:
            return constants.shape(tensor)
        found: Sequence[Dim | None] | None = None
        if value.producer is not None:
            found = shapes.shape(self, value.producer, value.slot)
            declared = _declared(value.info) if found is None else None
            # A declared name is no fact: exporters invent names for what they cannot tell.
            if declared is not None:
                found = [dim if isinstance(dim, int) else None for dim in declared]
        else:
            found = _declared(value.info)
        if found is None:
            return None
        return tuple(self._named(value, axis, dim) for axis, dim in enumerate(found))

    def _named(self, value: Value, axis: int, dim: Dim | None) -> Dim:
        if isinstance(dim, int):
            return dim
        if dim is None or weight(dim) > _LARGE:
            dim = symbol(f"{self._prefix(value.scope)}{value.name}.{axis}", own=True)
        dim = self.dim(dim)
        self.not_negative(dim, value.scope)
        return dim

    def _prefix(self, scope: Scope) -> str:
        """What tells values of the same name in different scopes apart."""
        if not self._scopes:
            self._scopes = {scope: f"{number}:" if number else "" for number, scope in enumerate(self.graph.scopes)}
        return self._scopes.get(scope, "")


def _declared(info: ValueInfoProto | None) -> list[Dim | None] | None:
    """The declared shape, None where the rank is not declared."""
    if info is None or not info.type.HasField("tensor_type") or not info.type.tensor_type.HasField("shape"):
        return None
    dims: list[Dim | None] = []
    for dim in info.type.tensor_type.shape.dim:
        if dim.HasField("dim_value") and dim.dim_value >= 0:
            dims.append(dim.dim_value)
        else:
            dims.append(symbol(dim.dim_param) if dim.dim_param else None)
    return dims
