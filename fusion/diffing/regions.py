"""Regions of a difference: which removed nodes became which added ones.

A value that both models compute under one name is a border: a fused node takes over the name of what it replaces. A
value that only one model has lies inside a region and holds it together. Shape arithmetic and constants serve many
regions and hold nothing together; they go with the region that alone used them.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field

from onnx import NodeProto

# Operators whose result depends on no data but shapes and constants.
SOURCES = frozenset({"Constant", "Shape", "Size", "ConstantOfShape", "Range"})


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node as a difference shows it.

    Attributes:
        name, inputs, outputs: as in the graph.
        operator: "Add", "com.microsoft::BiasGelu".
        attributes: name → value in words.
        captures: names its bodies mention.
        pattern, replaced, laws: where it came from, if our rewriter made it; its region has them as data.
    """

    name: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, str]
    captures: tuple[str, ...] = field(repr=False)
    pattern: str = field(repr=False)
    replaced: tuple[str, ...] = field(repr=False)
    laws: tuple[str, ...] = field(repr=False)

    @property
    def label(self) -> str:
        """What to call the node: its name, else its operator and first output."""
        return self.name or f"{self.operator} → {next(iter(self.outputs), '')}"

    @property
    def reads(self) -> tuple[str, ...]:
        """The names it needs, those that its bodies mention included."""
        return tuple(dict.fromkeys(name for name in (*self.inputs, *self.captures) if name))


@dataclass(frozen=True, slots=True)
class Region:
    """Nodes that went for nodes.

    Attributes:
        kind: the pattern, else the operators that came in, else "removed".
        pattern: the pattern that did it, or "".
        laws: the laws it used.
        removed, added: the nodes, in graph order; one of them may be empty.
        inputs: values the region reads from outside: what is added reads, else what was removed read.
        outputs: values that something outside reads, or that are outputs of the scope.
    """

    kind: str
    pattern: str
    laws: tuple[str, ...]
    removed: tuple[NodeView, ...]
    added: tuple[NodeView, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def operator_name(node: NodeProto) -> str:
    """Return the operator type with its domain in front, the standard one apart."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"


def arithmetic(nodes: Iterable[NodeProto], constants: Container[str]) -> set[str]:
    """Return the values of a scope that depend on shapes and constants only; its nodes are in order."""
    found: set[str] = set()
    for node in nodes:
        if node.op_type in SOURCES or (node.input and all(not i or i in found or i in constants for i in node.input)):
            found.update(node.output)
    return found


def group(
    removed: Sequence[NodeView], added: Sequence[NodeView], helpers: tuple[set[str], set[str]], outputs: set[str]
) -> list[Region]:
    """Group removed and added nodes of one scope into regions; linear in their number.

    Args:
        removed: nodes of the first model only, in graph order.
        added: nodes of the second model only, in graph order.
        helpers: values of the first and of the second model that are constants or shape arithmetic.
        outputs: output names of the scope.

    Returns:
        The regions, in the order of what they add; nodes that were removed for nothing come last.
    """
    nodes = [*removed, *added]
    sides = [0] * len(removed) + [1] * len(added)
    makers: dict[tuple[int, str], int] = {}
    readers: dict[tuple[int, str], list[int]] = {}
    for i, (side, node) in enumerate(zip(sides, nodes, strict=True)):
        makers.update(((side, name), i) for name in node.outputs if name)
        for name in node.reads:
            readers.setdefault((side, name), []).append(i)
    sets = _Sets(_origins(removed, added))
    idle = [helpers[side].issuperset(node.outputs) for side, node in zip(sides, nodes, strict=True)]
    border = []
    for (side, name), maker in makers.items():
        other = makers.get((1 - side, name))
        if other is not None:
            border.append((maker, other))
        elif not idle[maker]:
            for reader in readers.get((side, name), ()):
                if not idle[reader]:
                    sets.join(maker, reader)
    for maker, other in border:
        sets.join(maker, other)
    # A helper goes with its users where they are of one region; its users come after it.
    for i in reversed(range(len(nodes))):
        if idle[i]:
            homes = {sets.find(reader) for name in nodes[i].outputs for reader in readers.get((sides[i], name), ())}
            if len(homes) == 1:
                sets.join(homes.pop(), i)
    members: dict[int, list[int]] = {}
    for i in range(len(nodes)):
        members.setdefault(sets.find(i), []).append(i)
    count = len(removed)
    # In the order of the first node that is added, else of the first that was removed.
    ordered = sorted(members.values(), key=lambda group: next((i for i in group if i >= count), len(nodes) + group[0]))
    return [_region(group, nodes, count, readers, outputs) for group in ordered]


def _region(
    members: Sequence[int],
    nodes: Sequence[NodeView],
    count: int,
    readers: dict[tuple[int, str], list[int]],
    outputs: set[str],
) -> Region:
    before = tuple(nodes[i] for i in members if i < count)
    after = tuple(nodes[i] for i in members if i >= count)
    side, shown = (1, after) if after else (0, before)
    made = dict.fromkeys(name for n in shown for name in n.outputs if name)
    inputs = dict.fromkeys(name for n in shown for name in n.reads if name not in made)
    inside = set(members)
    # A value nobody in the difference reads is read by a kept node, or is what the region is for.
    leaving = [
        name
        for name in made
        if name in outputs or (side, name) not in readers or not inside.issuperset(readers[side, name])
    ]
    pattern = next((n.pattern for n in after if n.pattern), "")
    kind = pattern or ", ".join(dict.fromkeys(n.operator for n in after)) or "removed"
    laws = dict.fromkeys(law for n in after for law in n.laws)
    return Region(kind, pattern, tuple(laws), before, after, tuple(inputs), tuple(leaving))


def _origins(removed: Sequence[NodeView], added: Sequence[NodeView]) -> list[int]:
    """Return a number per node: which rewrite it belongs to, -1 where its provenance does not say."""
    rewrites: dict[tuple[str, tuple[str, ...]], int] = {}
    after = [rewrites.setdefault((n.pattern, n.replaced), len(rewrites)) if n.replaced else -1 for n in added]
    owner = {name: number for (_, names), number in rewrites.items() for name in names}
    return [owner.get(n.name, -1) if n.name else -1 for n in removed] + after


class _Sets:
    """Union-find; two sets that different rewrites made are never joined."""

    def __init__(self, origins: list[int]) -> None:
        self.parent = list(range(len(origins)))
        self.origin = origins
        first: dict[int, int] = {}
        for i, origin in enumerate(origins):
            if origin >= 0:
                self.join(first.setdefault(origin, i), i)

    def find(self, i: int) -> int:
        while self.parent[i] != i:
            self.parent[i] = i = self.parent[self.parent[i]]
        return i

    def join(self, i: int, j: int) -> None:
        i, j = sorted((self.find(i), self.find(j)))
        origins = {self.origin[i], self.origin[j]} - {-1}
        if i != j and len(origins) < 2:
            self.parent[j] = i
            self.origin[i] = max(self.origin[i], self.origin[j])
