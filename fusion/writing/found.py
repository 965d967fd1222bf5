"""What an emission sees of a match: its captures, sizes and element types, and the nodes that it asks for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
from onnx import TensorProto

from fusion.captures import parse
from fusion.dims import Dim, divide, lower, product
from fusion.facts import Facts
from fusion.laws.noise import FLOATS
from fusion.layout import Axis, Layout, merge_neighbours, regroup
from fusion.matching.parts import appended
from fusion.matching.region import Region
from fusion.matching.state import Miss, State
from fusion.models.graph import Node, Value
from fusion.plan import SPELLINGS, Plan
from fusion.terms import Ref
from fusion.verdict import Verdict
from fusion.verifying.compare import tolerance
from fusion.view import View
from fusion.writing.place import before, standing

DISPENSABLE = {"Pad": frozenset({"Conv", "AveragePool", "MaxPool"})}
"""Who may do without what stands before it, where that is no matter of layout."""

GAIN = "gain"
"""The kind of a miss that says: it could be written, and would save nothing."""


class Unmet(Exception):
    """An obligation of an emission that does not hold."""

    def __init__(self, text: str, *, kind: str = "requirement", verdict: Verdict = Verdict.NO, place: str = "") -> None:
        super().__init__(text)
        self.miss = Miss(kind, text, verdict, 1, place)


class Narrow(Unmet):
    """What lies in a wider type would be cast down: the fused node may compute in that type."""

    def __init__(self, text: str, wide: int | None, place: str) -> None:
        super().__init__(text, kind="dtype", place=place)
        self.wide = wide


@dataclass(eq=False, slots=True)
class New:
    """An output of a node that is still to be made, or a constant that is still to be added.

    Attributes:
        tensor: the constant.
        parts: weights, each with a permutation or None, that are put together along `axis` when the model is written.
        factor: what they are multiplied by then.
        lies: whether it lies as the root does, where the pattern's result has its axes in another order.
    """

    dtype: int | None
    shape: tuple[Dim, ...] | None = None
    tensor: TensorProto | None = None
    parts: tuple[tuple[TensorProto, tuple[int, int] | None], ...] = ()
    axis: int = 0
    factor: np.ndarray[Any, Any] | None = None
    lies: bool = False


Operand = Value | New | None


@dataclass(eq=False, slots=True)
class NewNode:
    """A node that is still to be made.

    Attributes:
        shared: whether later matches may use it too: it is made early.
        asking: the Shape node that it, or what reads it, stands for: it is made before that.
        least: how many outputs it must have, read or not.
    """

    op: str
    domain: str
    inputs: list[Operand]
    outputs: list[New]
    attributes: dict[str, object]
    shared: bool = False
    asking: Node | None = None
    least: int = 0

    def rounding(self) -> str | None:
        """Why an attribute, which is in single precision, would move a computation in double by more than rounding."""
        for name, number in self.attributes.items():
            if isinstance(number, float) and abs(float(np.float32(number)) - number) > tolerance(np.dtype(np.float64)):
                return f"the attribute {name} of {self.op} would round {number:.9g} to single precision"
        return None


@dataclass(eq=False)
class Found:
    """A match, as an emission sees it: captures are attributes.

    Attributes:
        root: the value matched; `ref` sees it with the axes of the result.
        plan: what matched.
        state: what it bound.
        wide: the dtype in which the fused node computes, where that is not the root's.
    """

    view: View
    plan: Plan
    ref: Ref
    root: Value
    state: State
    region: Region
    wide: int | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self.plan.captures:
            raise AttributeError(name)
        bound = self.state.bound.get(name)
        if isinstance(bound, Ref):
            return Captured(self, name, bound)
        return bound

    @property
    def facts(self) -> Facts:
        return self.view.facts

    @property
    def node(self) -> Node:
        """The node that computes the root."""
        assert self.root.producer is not None
        return self.root.producer

    @property
    def dtype(self) -> int:
        """The dtype in which the fused node computes: that of the root, where no wider one is needed."""
        return self.wide or self.root_dtype

    @property
    def root_dtype(self) -> int:
        """The dtype of the root."""
        dtype = self.facts.dtype(self.root)
        if dtype is None:
            raise Unmet(f"the dtype of {self.root.name} is unknown", kind="dtype", verdict=Verdict.UNKNOWN)
        return dtype

    @property
    def opset(self) -> int:
        """The version of the standard operators in the root's scope."""
        return self.node.scope.opsets.get("", 1)

    def require(self, holds: bool | Verdict | None, text: str, *, kind: str = "requirement") -> None:
        """Raise Unmet unless `holds`; None and UNKNOWN do not."""
        verdict = holds if isinstance(holds, Verdict) else Verdict.of(holds)
        if verdict is not Verdict.YES:
            raise Unmet(text, kind=kind, verdict=verdict, place=self.root.name)

    def computed_by(self, *operators: str) -> Node:
        """The node of the region that is one of these operators, which the pattern names with `operator(...)`."""
        nodes = (*self.region.core, *self.region.prefix)
        return next(node for node in reversed(nodes) if node.key in operators)

    @property
    def finals(self) -> list[Value]:
        """The values that new nodes compute: the root, then those that are kept, in their order."""
        return [self.root, *(self.state.kept[index].value for index in sorted(self.state.kept))]

    @property
    def place(self) -> Node:
        """The node in whose place new ones stand: the root's, or the first one left that reads what is kept."""
        if not self.state.kept:
            return self.node
        readers = [reader for value in self.finals[1:] for reader in value.uses if self._stays(reader)]
        inside = [self.node]
        for reader in readers:
            while reader.scope is not self.node.scope and reader.scope.owner is not None:
                reader = reader.scope.owner
            inside.append(reader)
        return min(inside, key=attrgetter("position"))

    def is_read(self, value: Value) -> bool:
        """Whether somebody reads a kept value when the region is gone."""
        return value.is_output or any(map(self._stays, value.uses))

    def _stays(self, reader: Node) -> bool:
        if reader in self.region.prefix:
            return any(map(self.is_read, filter(None, reader.outputs)))
        return reader not in self.region.core and reader not in self.region.asking

    def require_order(self, inputs: Iterable[Value]) -> None:
        """Every input is computed before the place of the new nodes: else they would close a cycle."""
        at = self.place
        late = [value.name for value in inputs if not before(value, at)]
        self.require(not late, f"{', '.join(late)} is computed after {at.label}")

    def require_kept_dtype(self) -> None:
        """A kept value is another output of the node that makes the result: both have one dtype."""
        for value in self.finals[1:]:
            dtype = self.facts.dtype(value)
            if dtype != self.dtype:
                raise Narrow(f"{value.name} has another dtype than {self.root.name}", dtype, value.name)

    def require_gain(self, nodes: Sequence[NewNode]) -> None:
        """A rewrite replaces more nodes than it adds; what it shares with other matches does not count."""
        own = sum(not node.shared for node in nodes)
        if own >= len(self.region.core):
            self.require_fewer(nodes)

    def require_fewer(self, nodes: Sequence[NewNode]) -> None:
        """A rewrite replaces more nodes than it adds, with the rearrangements before the core that nobody else reads.

        Other products count as nobody: they may read what lies before the rearrangement just as well, as other
        convolutions may read what is not padded yet.
        """
        needed = [operand for node in nodes for operand in node.inputs if isinstance(operand, Value)]
        kept: set[Node] = set()
        while needed:
            producer = needed.pop().producer
            if producer in self.region.prefix and producer not in kept:
                kept.add(producer)
                needed.extend(value for value in producer.inputs if value is not None)
        replaced = {*self.region.core}
        for node in reversed([node for node in self.region.prefix if node not in kept]):
            values = [value for value in node.outputs if value is not None]
            others = {reader for value in values for reader in value.uses if reader not in replaced}
            absorbing = DISPENSABLE.get(node.key, SPELLINGS["matmul"])
            if all(reader.key in absorbing for reader in others) and not any(v.is_output for v in values):
                replaced.add(node)
        if len(nodes) >= len(replaced):
            text = f"{len(nodes)} new nodes would replace {len(replaced)}"
            raise Unmet(text, kind=GAIN, place=self.root.name)

    def unrepeated(self, captured: Captured, letter: str) -> tuple[int, dict[str, Axis]]:
        """How often a capture is repeated along a letter, innermost, and what its letters run over without that."""
        axes = captured.by_letter()
        factors = axes.get(letter, ())
        often = factors[-1][2] if factors and factors[-1][0] is None else 1
        if not isinstance(often, int) or often == 1:
            return 1, axes
        return often, axes | {letter: factors[:-1]}

    def size(self, letter: str) -> int:
        """The size of a letter, of its axes together; raises Unmet where it is not a known number."""
        size = product(self.dims(letter))
        if not isinstance(size, int):
            text = f"the size of {letter} is not a known number ({size})"
            raise Unmet(text, kind="dimension", verdict=Verdict.UNKNOWN, place=self.root.name)
        return size

    def dims(self, letter: str) -> tuple[Dim, ...]:
        """The dimensions a letter of the result stands for."""
        positions = self.state.letters[letter]
        return tuple(self.ref.layout.shape[position] for position in positions)

    @property
    def widened(self) -> list[tuple[Node, int]]:
        """The nodes of a half-precision region that compute in a wider dtype, between casts, and in which."""
        if self.root_dtype in (TensorProto.FLOAT, TensorProto.DOUBLE):
            return []
        outputs = ((node, self.facts.dtype(value)) for node in self.region.core for value in node.outputs if value)
        return [(node, dtype) for node, dtype in outputs if dtype in FLOATS and dtype != self.root_dtype]

    @property
    def adds_wide(self) -> bool:
        """Whether sums of a half-precision region are computed in a wider dtype: they absorb other numbers there."""
        return any(node.key in SPELLINGS["sum"] for node, _ in self.widened)

    def require_one_dtype(self) -> None:
        """A half-precision region computes in half throughout: no part of it in a wider dtype, between casts."""
        for node, dtype in self.widened:
            raise self._wide(node, dtype)

    def softmax_dtype(self) -> int:
        """The dtype in which attention computes its softmax, and what stands beside it: float where that is wider than
        the products around it, else that of the result.

        Raises:
            Unmet: a product is computed in another dtype than the result.
        """
        for node, dtype in self.widened:
            if dtype != TensorProto.FLOAT or node.key in SPELLINGS["matmul"]:
                raise self._wide(node, dtype)
        return TensorProto.FLOAT if self.widened else self.root_dtype

    def _wide(self, node: Node, dtype: int) -> Unmet:
        found, wanted = TensorProto.DataType.Name(dtype), TensorProto.DataType.Name(self.root_dtype)
        return Unmet(f"{node.label} computes in {found}, the result is {wanted}", kind="dtype", place=node.label)

    def least(self, letter: str) -> float:
        """The smallest size that a letter can have."""
        return lower(product(self.dims(letter)))

    def count(self, letter: str) -> int:
        """How many axes a letter stands for."""
        return len(self.dims(letter))

    @property
    def shape(self) -> tuple[Dim, ...]:
        """The shape of the root."""
        return self.ref.layout.source

    @property
    def rank(self) -> int:
        """The rank of the root."""
        return len(self.ref.layout.source)


@dataclass(eq=False, slots=True)
class Captured:
    """A tensor capture of a match."""

    found: Found
    name: str
    ref: Ref

    @property
    def value(self) -> Value:
        """The source: the nearest value that is not a rearrangement."""
        return self.ref.value

    @property
    def shape(self) -> tuple[Dim, ...]:
        """Its shape in the axes of the capture."""
        return self.ref.layout.shape

    def depends(self, axis: int) -> bool:
        """Whether it has an axis of the capture, and is not only broadcast over it."""
        return self.ref.layout.depends(axis)

    def axes(self, *groups: int | tuple[int, ...]) -> Captured:
        """The same in other axes: chosen, in another order, several of them merged. What is left out is broadcast."""
        spans = [(group,) if isinstance(group, int) else group for group in groups]
        layout = self.ref.layout.permute([axis for span in spans for axis in span])
        for index, span in enumerate(spans):
            layout = layout.merge(index, index + len(span))
        return Captured(self.found, self.name, Ref(self.ref.value, layout))

    def appended(self, other: Captured) -> Captured | None:
        """This and then `other` along the last axis, where they are neighbours in one value."""
        whole = appended(self.ref.layout, other.ref.layout) if self.value is other.value else None
        return None if whole is None else Captured(self.found, self.name, Ref(self.value, whole))

    def along(self, spec: str) -> Ref:
        """The capture in other axes of the same letters, such as `B H T D` of one declared as `B T (H D)`.

        Raises:
            Unmet: a merged axis cannot be split, because a size in it is unknown.
        """
        return self.laid(self.by_letter(), spec)

    def laid(self, axes: Mapping[str, Axis], spec: str) -> Ref:
        """The source read along these axes, in the order and grouping of `spec`."""
        wanted = [(token,) if isinstance(token, str) else token for token in parse(spec)[0]]
        made = (merge_neighbours(factor for letter in group for factor in axes[letter]) for group in wanted)
        return Ref(self.value, Layout(tuple(made), self.ref.layout.offsets, self.ref.layout.source))

    def by_letter(self) -> dict[str, Axis]:
        """What each letter of the capture runs over.

        Raises:
            Unmet: a merged axis cannot be split, because a size in it is unknown.
        """
        found = self.found
        axes: dict[str, Axis] = {}
        for token, factors in zip(found.plan.captures[self.name].dims or (), self.ref.layout.axes, strict=True):
            letters = (token,) if isinstance(token, str) else token
            sizes = [product(found.dims(letter)) if letter in found.state.letters else None for letter in letters]
            whole = product(size for _, _, size in factors)
            rest = divide(whole, product(size for size in sizes if size is not None))
            known = rest is not None and sizes.count(None) <= 1
            groups = regroup(factors, [rest if size is None else size for size in sizes]) if known else None  # type: ignore[misc]
            if groups is None:
                raise Unmet(
                    f"{self.name} ({self.value.name}) cannot be split into {' '.join(letters)}", kind="dimension"
                )
            axes.update(zip(letters, groups, strict=True))
        return axes

    def cut(self, letter: str, **parts: int) -> dict[str, Axis]:
        """What each letter of the capture runs over, one of them cut into several.

        Raises:
            Unmet: it cannot be split so.
        """
        axes = self.by_letter()
        groups = regroup(axes[letter], list(parts.values()))
        if groups is None:
            raise Unmet(f"{self.name} ({self.value.name}) cannot be split into {' '.join(parts)}", kind="dimension")
        return {**axes, **dict(zip(parts, groups, strict=True))}

    def standing(self, dtype: int | None) -> Value:
        """The value of the graph that lies in the axes of the capture, with this dtype.

        Raises:
            Unmet: there is none.
        """
        value = standing(self.found.view, self.ref, dtype, self.found.node)
        if value is None:
            raise Unmet(
                f"{self.name} ({self.value.name}) lies in other axes or another dtype than the fused node reads",
                kind="dimension",
                place=self.value.name,
            )
        return value
