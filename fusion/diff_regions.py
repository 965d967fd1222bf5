"""Regions of a difference: which removed nodes became which added ones.

A value that both models compute under one name is a border: a fused node takes over the name of what it replaces. A
value that only one model has lies inside a region and holds it together. Shape arithmetic and constants serve many
regions and hold nothing together; they go with the region that alone used them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

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
        pattern, replaced, laws: where it came from, if our rewriter made it.
    """

    name: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, str] = field(default_factory=dict)
    captures: tuple[str, ...] = ()
    pattern: str = ""
    replaced: tuple[str, ...] = ()
    laws: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """What to call the node: its name, else its operator and first output."""
        return self.name or f"{self.operator} → {next(iter(self.outputs), '')}"

    def to_dict(self) -> dict[str, Any]:
        """Return the node as plain data, without its provenance, which its region has."""
        return {
            "name": self.name,
            "operator": self.operator,
            "inputs": list(self.inputs),
            "outputs": list(self.outputs),
            "attributes": self.attributes,
        }


@dataclass(frozen=True, slots=True)
class Region:
    """Nodes that went for nodes.

    Attributes:
        pattern: the pattern that did it, or "".
        laws: the laws it used.
        removed, added: the nodes, in graph order; one of them may be empty.
        inputs: values the region reads from outside: what is added reads, else what was removed read.
        outputs: values that something outside reads, or that are outputs of the scope.
    """

    pattern: str
    laws: tuple[str, ...]
    removed: tuple[NodeView, ...]
    added: tuple[NodeView, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def kind(self) -> str:
        """The pattern, else the operators that came in, else "removed"."""
        return self.pattern or ", ".join(dict.fromkeys(n.operator for n in self.added)) or "removed"

    def to_dict(self) -> dict[str, Any]:
        """Return the region as plain data."""
        return {
            "kind": self.kind,
            "pattern": self.pattern,
            "laws": list(self.laws),
            "removed": [n.to_dict() for n in self.removed],
            "added": [n.to_dict() for n in self.added],
            "inputs": list(self.inputs),
            "outputs": list(self.outputs),
        }


def operator_name(node: NodeProto) -> str:
    """Return the operator type with its domain in front, the standard one apart."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"


def arithmetic(nodes: Iterable[NodeProto], constants: set[str]) -> set[str]:
    """Return the values of a scope that depend on shapes and constants only.

    Args:
        nodes: the scope's nodes, in order.
        constants: names of its initializers.
    """
    found: set[str] = set()
    for node in nodes:
        if node.op_type in SOURCES or (node.input and all(not i or i in found or i in constants for i in node.input)):
            found.update(node.output)
    return found


def group(
    removed: Sequence[NodeView],
    added: Sequence[NodeView],
    helpers_before: set[str],
    helpers_after: set[str],
    outputs: set[str],
) -> list[Region]:
    """Group removed and added nodes of one scope into regions; linear in their number.

    Args:
        removed: nodes of the first model only, in graph order.
        added: nodes of the second model only, in graph order.
        helpers_before: values of the first model that are constants or shape arithmetic (see `arithmetic`).
        helpers_after: the same of the second.
        outputs: output names of the scope.

    Returns:
        The regions, in the order of what they add; nodes that were removed for nothing come last.
    """
    nodes = [*removed, *added]
    border = {name for n in removed for name in n.outputs} & {name for n in added for name in n.outputs} - {""}
    sets = _Sets(_origins(removed, added))
    helpers = {i for i, n in enumerate(removed) if helpers_before.issuperset(n.outputs)}
    helpers |= {len(removed) + i for i, n in enumerate(added) if helpers_after.issuperset(n.outputs)}
    for side, start in ((removed, 0), (added, len(removed))):
        makers = {name: start + i for i, n in enumerate(side) for name in n.outputs if name}
        for i, node in enumerate(side):
            for name in (*node.inputs, *node.captures):
                maker = makers.get(name)
                if maker is not None and maker not in helpers and start + i not in helpers and name not in border:
                    sets.join(maker, start + i)
    makers_before = {name: i for i, n in enumerate(removed) for name in n.outputs}
    for i, node in enumerate(added):
        for name in node.outputs:
            if name in border:
                sets.join(makers_before[name], len(removed) + i)
    _adopt(nodes, len(removed), helpers, sets)
    return _regions(nodes, len(removed), sets, outputs)


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


def _origins(removed: Sequence[NodeView], added: Sequence[NodeView]) -> list[int]:
    """Return a number per node: which rewrite it belongs to, -1 where its provenance does not say."""
    rewrites: dict[tuple[str, tuple[str, ...]], int] = {}
    after = [rewrites.setdefault((n.pattern, n.replaced), len(rewrites)) if n.replaced else -1 for n in added]
    owner = {name: number for (_, names), number in rewrites.items() for name in names}
    return [owner.get(n.name, -1) if n.name else -1 for n in removed] + after


def _adopt(nodes: Sequence[NodeView], count: int, helpers: set[int], sets: _Sets) -> None:
    """Put every helper into the region of its users, where that is one."""
    for start, stop in ((0, count), (count, len(nodes))):
        users: dict[str, list[int]] = {}
        for i in range(start, stop):
            for name in {*nodes[i].inputs, *nodes[i].captures}:
                users.setdefault(name, []).append(i)
        for i in reversed(range(start, stop)):
            if i in helpers:
                homes = {sets.find(u) for name in nodes[i].outputs for u in users.get(name, ())}
                if len(homes) == 1:
                    sets.join(homes.pop(), i)


def _regions(nodes: Sequence[NodeView], count: int, sets: _Sets, outputs: set[str]) -> list[Region]:
    members: dict[int, list[int]] = {}
    for i in range(len(nodes)):
        members.setdefault(sets.find(i), []).append(i)
    readers = [_readers(nodes[:count]), _readers(nodes[count:])]
    regions: list[tuple[int, Region]] = []
    for group_ in members.values():
        before = tuple(nodes[i] for i in group_ if i < count)
        after = tuple(nodes[i] for i in group_ if i >= count)
        side, reads = (after, readers[1]) if after else (before, readers[0])
        made = {name: None for n in side for name in n.outputs if name}
        names = dict.fromkeys(name for n in side for name in (*n.inputs, *n.captures) if name and name not in made)
        inside = {id(n) for n in side}
        seen = {name for name in made if any(id(n) not in inside for n in reads.get(name, ()))}
        # A value nobody in the difference reads is read by a kept node, or is what the region is for.
        leaving = tuple(name for name in made if name in outputs or name in seen or name not in reads)
        pattern = next((n.pattern for n in after if n.pattern), "")
        laws = tuple(dict.fromkeys(law for n in after for law in n.laws))
        first = next((i for i in group_ if i >= count), len(nodes) + group_[0])
        regions.append((first, Region(pattern, laws, before, after, tuple(names), leaving)))
    return [region for _, region in sorted(regions, key=lambda r: r[0])]


def _readers(side: Iterable[NodeView]) -> dict[str, list[NodeView]]:
    readers: dict[str, list[NodeView]] = {}
    for node in side:
        for name in dict.fromkeys((*node.inputs, *node.captures)):
            readers.setdefault(name, []).append(node)
    return readers
