"""A graph seen as terms: any value, in any coordinates, expanded by one level on demand."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import NamedTuple

from fusion.dims import atoms, symbols
from fusion.facts import Facts, rearrange
from fusion.laws import clamps, contraction, noise, normalization, pieces, powers, reduction, ring, selection, softmax
from fusion.layout import Layout
from fusion.models.graph import Graph, Node, Value
from fusion.terms import Prod, Ref, leaf, number

Normalise = Callable[[Node, Ref, "View"], "Prod | None"]

LAWS: dict[str, Normalise] = {
    **dict.fromkeys(ring.SUMS, selection.normalise),
    **dict.fromkeys(softmax.OPERATORS, softmax.normalise),
    **dict.fromkeys(powers.OPERATORS, powers.normalise),
    **dict.fromkeys(reduction.OPERATORS, reduction.normalise),
    **dict.fromkeys(contraction.OPERATORS, contraction.normalise),
    **dict.fromkeys(normalization.OPERATORS, normalization.normalise),
    **dict.fromkeys(clamps.OPERATORS, clamps.normalise),
}
MERGED = ring.SUMS | ring.PRODUCTS | powers.OPERATORS
"""Operators that a product or sum opens where their result is private."""


OPENED = MERGED | reduction.COUNTED | normalization.OPERATORS | clamps.OPERATORS
"""Operators whose term is opened inside a product or sum: also reductions and clamps, whose count and
bounds meet the numbers around."""

LAYOUTS = frozenset({"Expand", "Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators that rearrange, whatever the sizes are."""

READ = frozenset(LAWS) | LAYOUTS | noise.OPERATORS
"""Operators that a view reads where it knows enough of their operands."""

PASSED = noise.OPERATORS | rearrange.RULES.keys()
"""Operators that a reference may be followed through."""

DEPTH = 60
"""How deep private arithmetic is opened; a chain of thousands of additions is no formula."""


class Peeled(NamedTuple):
    """A reference followed through layouts and noise to the nearest value that is neither.

    Attributes:
        ref: the source, in the same coordinates.
        private: whether every value on the way, both ends included, has one consumer.
        crossed: the nodes on the way.
    """

    ref: Ref
    private: bool
    crossed: tuple[Node, ...]


class View:
    """Terms of one graph, memoised until `forget`.

    Args:
        graph: the index.
        facts: what is known about its values.
        within: readers that count; None for all of them. Where leaving others out makes a formula hold, it is they who
            keep it from it.
    """

    def __init__(self, graph: Graph, facts: Facts, *, within: Container[Node] | None = None) -> None:
        self.graph = graph
        self.facts = facts
        self.within = within
        self._peeled: dict[Ref, Peeled] = {}
        self._expanded: dict[Ref, Prod] = {}
        self._numbers: dict[Value, float | None] = {}
        self._depth = 0

    def forget(self) -> None:
        """Drop what an edit of the graph may have changed."""
        self._peeled.clear()
        self._expanded.clear()
        self._numbers.clear()

    def root(self, value: Value) -> Ref | None:
        """The value in its own coordinates; None where its rank is unknown."""
        shape = self.facts.shape(value)
        return None if shape is None else Ref(value, Layout.identity(shape))

    def number(self, value: Value) -> float | None:
        """The number that all elements of `value` equal.

        A stored tensor counts only where it has one element: a weight of all ones is a weight.
        """
        known = self._numbers
        if value not in known:
            stored = value.tensor is not None or (value.producer is not None and value.producer.op == "Constant")
            known[value] = None if stored and not self._is_single(value) else self.facts.number(value)
        return known[value]

    def _is_single(self, value: Value) -> bool:
        """Whether a value has one element."""
        shape = self.facts.shape(value)
        return shape is not None and all(dim == 1 for dim in shape)

    def operand(self, ref: Ref, node: Node, index: int) -> Ref | None:
        """An operand of an elementwise node in the coordinates of its result `ref`."""
        value = node.inputs[index]
        shape = self.facts.shape(value) if value is not None else None
        if value is None or shape is None:
            return None
        layout = ref.layout.broadcast_over(shape)
        return None if layout is None else Ref(value, layout)

    def beside(self, ref: Ref, node: Node, index: int) -> Ref | None:
        """An operand beside one that provably has the shape of the result: each of its axes is 1 or full.

        Which of the two it is may be unknown; then the layout reads it as full, and its source says a shape that the
        value has only after an Expand. Such a reference is not followed through layouts.
        """
        strict = self.operand(ref, node, index)
        value = node.inputs[index]
        shape = self.facts.shape(value) if value is not None else None
        if strict is not None:
            return self.source(strict)
        if value is None or shape is None or len(shape) > len(ref.layout.source):
            return None
        full = ref.layout.source[len(ref.layout.source) - len(shape) :]
        layout = ref.layout.broadcast_over(tuple(1 if own == 1 else dim for own, dim in zip(shape, full, strict=True)))
        return None if layout is None else Ref(value, layout)

    def source(self, ref: Ref) -> Ref:
        """What `ref` reads behind layouts and noise."""
        node = ref.value.producer
        return ref if node is None or node.op not in PASSED else self.peel(ref).ref

    def peel(self, ref: Ref) -> Peeled:
        """Follow `ref` through layouts and noise."""
        node = ref.value.producer
        if node is None or node.op not in PASSED:
            return Peeled(ref, self._single(ref.value), ())
        known = self._peeled.get(ref)
        if known is None:
            known = self._peel(ref)
            self._peeled[ref] = known
        return known

    def _peel(self, ref: Ref) -> Peeled:
        value, layout = ref
        private, crossed = self._single(value), []
        while (node := value.producer) is not None:
            step = self.step(value, layout)
            if step is None:
                break
            value, layout = step
            private = private and self._single(value)
            crossed.append(node)
        return Peeled(Ref(value, layout), private, tuple(crossed))

    def step(self, value: Value, layout: Layout) -> tuple[Value, Layout] | None:
        """One step back through a layout operator or noise; None where `value` is something of its own."""
        node = value.producer
        if node is None or node.op not in PASSED:
            return None
        repeated = noise.crossed(node, value, self.facts)
        if repeated is not None:
            same = self.facts.shape(repeated)
            return (repeated, layout) if same is not None and len(same) == len(layout.source) else None
        through = self.facts.through(value)
        if through is None:
            return pieces.part(node, layout, self.facts)
        source, inner = through
        composed = layout.compose(inner)
        return None if composed is None else (source, composed)

    def rearranges(self, node: Node) -> bool:
        """Whether the node only rearranges or repeats its first input."""
        output = node.outputs[0] if node.outputs else None
        if output is None or node.op not in PASSED:
            return False
        return noise.crossed(node, output, self.facts) is not None or self.facts.through(output) is not None

    def factor(self, ref: Ref) -> Prod:
        """The term of an operand inside a sum or product: opened where it is private arithmetic, else a leaf."""
        constant = self.number(ref.value)
        if constant is not None:
            return number(constant)
        peeled = self.peel(ref)
        source = peeled.ref.value
        constant = self.number(source) if peeled.crossed else None
        if constant is not None:
            return number(constant)
        node = source.producer
        if node is not None and node.key in OPENED and peeled.private and not self._is_stored(source):
            return self.expand(peeled.ref)
        return leaf(peeled.ref)

    def _is_stored(self, value: Value, depth: int = 3) -> bool:
        """Whether a value is stored, or computed from such alone: one parameter, such as a weight of 1 + w."""
        node = value.producer
        if node is None or node.op == "Constant":
            return self.facts.is_constant(value)
        return depth > 0 and all(own is None or self._is_stored(own, depth - 1) for own in node.inputs)

    def expand(self, ref: Ref) -> Prod:
        """The term of a value, one level deep; a leaf where no law knows the operator."""
        node = ref.value.producer
        if node is None or (node.key not in LAWS and node.op not in PASSED):
            return leaf(ref)
        known = self._expanded.get(ref)
        if known is None:
            if self._depth > DEPTH:
                return leaf(self.peel(ref).ref)
            self._depth += 1
            try:
                known = self._expand(ref)
            finally:
                self._depth -= 1
            self._expanded[ref] = known
        return known

    def _expand(self, ref: Ref) -> Prod:
        source = self.source(ref)
        if source != ref:
            return self.expand(source)
        node = source.value.producer
        law = LAWS.get(node.key) if node is not None else None
        if node is None or law is None or source.value.slot != 0:
            return leaf(source)
        return law(node, source, self) or leaf(source)

    def unknown(self, ref: Ref) -> str:
        """The fact that is missing to read the node of a value as a term; empty where none is."""
        node = ref.value.producer
        if node is None or node.key not in READ or self.expand(ref) != leaf(ref):
            return ""
        for index, value in enumerate(node.inputs):
            if value is not None and self.facts.shape(value) is None:
                return f"{node.label} of {value.name}, whose rank is unknown"
            if value is not None and node.key in MERGED and self.operand(ref, node, index) is None:
                return f"{node.label} of {value.name}, which may be broadcast"
        if node.key in LAYOUTS | contraction.OPERATORS:
            return f"{node.label}, whose sizes are not known well enough to tell its axes{self._apart(node)}"
        return f"{node.label} over an unknown number of elements" if node.key in reduction.COUNTED else ""

    def _apart(self, node: Node) -> str:
        """The named sizes of the operand of a node that are broadcast together: were they one, more would be known."""
        shape = (self.facts.shape(node.inputs[0]) if node.inputs[0] is not None else None) or ()
        within = [map(str, symbols(atom)) for dim in shape for atom in atoms(dim)]
        joined = [sorted(name for name in names if not name.startswith("?")) for names in within]
        told = [f"{' and '.join(names)} may differ (see `same`)" for names in joined if len(names) > 1]
        return f": {', '.join(dict.fromkeys(told))}" if told else ""

    def _single(self, value: Value) -> bool:
        """Whether one consumer alone computes with the value; who asks for its shape or type is none."""
        return self.readers(value) == 1

    def readers(self, value: Value) -> int:
        """How many consumers compute with the value; a graph output counts as another, where all consumers count."""
        if self.within is not None:
            return sum(node in self.within and not _asks_only(node, value) for node in value.uses)
        if len(value.uses) == 1:
            return 1 + value.is_output
        return sum(not _asks_only(node, value) for node in value.uses) + value.is_output


def _asks_only(node: Node, value: Value) -> bool:
    """Whether a reader wants the shape or the element type of the value, not its numbers."""
    return node.op in ("Shape", "Size") or (node.op == "CastLike" and node.inputs[0] is not value)
