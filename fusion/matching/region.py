"""The region of a match: the nodes between its captures and its root, and the safety rules they must obey.

Values on the computed path are private: no consumer outside, no graph output. Who asks only for their sizes can be told
them otherwise. Layout prefixes and masks may be shared; they stay if somebody needs them and go if nobody does.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter

from fusion.matching.state import Miss, State, entries
from fusion.models.graph import Node, Value
from fusion.terms import Ref
from fusion.verdict import Verdict
from fusion.view import View

ABSORBED = 12
"""How far a side reader is followed to see whether it dies with the region."""


@dataclass(frozen=True, slots=True)
class Region:
    """Nodes of a match.

    Attributes:
        core: nodes on the computed path, in order.
        prefix: rearrangements and casts between a capture and the core.
        asking: Shape nodes outside that read a value of the region, of which the sizes are known.
    """

    core: tuple[Node, ...]
    prefix: tuple[Node, ...]
    asking: tuple[Node, ...] = ()


def region_of(view: View, root: Value, state: State) -> Region | Miss:
    """The region of a match, or the obligation it breaks."""
    rest = [entry for capture in state.bound.values() for entry in entries(capture)]
    stops = {*sources(state), *(value for entry in rest for value in entry.read)}
    kept = {ref.value for ref in state.kept.values()}
    producer = root.producer
    if producer is None:
        return Miss("privacy", f"{root.name} is computed by no node", Verdict.NO, 1, root.name)
    visited: dict[Node, None] = {producer: None}
    stack = [producer]
    while stack:
        node = stack.pop()
        for value in _needed(view, node):
            if value in stops or view.facts.is_constant(value) or view.number(value) is not None:
                continue
            if value.producer is None:
                return Miss(
                    "same value",
                    f"the region also reads {value.name}, which no capture binds",
                    Verdict.NO,
                    1,
                    value.name,
                )
            if value.producer not in visited:
                visited[value.producer] = None
                stack.append(value.producer)
    ordered = sorted(visited, key=attrgetter("position"))
    prefix: dict[Node, None] = {}
    for node in ordered:
        if node.scope is not producer.scope:
            return Miss("privacy", f"{node.label} is in another scope than {root.name}", Verdict.NO, 1, node.label)
        data = node.inputs[0] if node.inputs else None
        if node is producer or data is None:
            continue
        before = data in stops or data in kept or data.producer in prefix
        if before and (node.key == "Pad" or view.rearranges(node)):
            prefix[node] = None
    core = [node for node in ordered if node not in prefix]
    asking: dict[Node, None] = {}
    for node in core:
        for output in node.outputs:
            if output is None or output is root or output in kept:
                continue
            if output.is_output:
                return Miss("privacy", f"{output.name} inside the region is a graph output", Verdict.NO, 1, output.name)
            for reader in output.uses:
                if reader in visited or _dies(reader, visited, stops, ABSORBED):
                    continue
                if asks_sizes(view, reader) and reader.scope is producer.scope:
                    asking[reader] = None
                else:
                    return Miss(
                        "privacy",
                        f"{output.name} inside the region is also read by {reader.label}",
                        Verdict.NO,
                        1,
                        output.name,
                    )
    return Region(tuple(core), tuple(prefix), tuple(asking))


def asks_sizes(view: View, reader: Node) -> bool:
    """Whether a node asks only for sizes, and all of them are known."""
    output = reader.outputs[0] if reader.key == "Shape" else None
    sizes = None if output is None else view.facts.integers(output)
    return sizes is not None and len(sizes.items) > 0 and None not in sizes.items


def sources(state: State) -> list[Value]:
    """The values a match binds. A clamp binds none: it is about the scores themselves."""
    bound: list[Value] = []
    for capture in state.bound.values():
        if isinstance(capture, Ref):
            bound.append(capture.value)
        elif not isinstance(capture, float):
            bound.extend(entry.ref.value for entry in capture if entry.kind != "clamp")
    return bound


def grounds(state: State) -> list[Value]:
    """The values a match binds, or, of one that is equal in several places, what proves it so."""
    return [ground for value in sources(state) for ground in state.proved.get(value, (value,))]


def _needed(view: View, node: Node) -> list[Value]:
    """The inputs whose numbers a node computes with: of a rearrangement only the data, not the shape."""
    inputs = node.inputs[:1] if node.op != "Concat" and view.rearranges(node) else node.inputs
    return [value for value in inputs if value is not None]


def _dies(reader: Node, visited: dict[Node, None], stops: set[Value], depth: int) -> bool:
    """Whether a reader from outside is of use to the region only.

    What computes a capture stays: a bias that is made of the scores needs them.
    """
    if depth == 0:
        return False
    for value in reader.outputs:
        if value is None:
            continue
        if value.is_output or value in stops:
            return False
        if not all(use in visited or _dies(use, visited, stops, depth - 1) for use in value.uses):
            return False
    return True
