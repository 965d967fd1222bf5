"""Searching: the anchors of a plan, the values above them that may be its result, and the matches there."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from fusion import plan as p
from fusion.facts import Facts
from fusion.language import Pattern
from fusion.laws import softmax
from fusion.laws.noise import FLOATS
from fusion.matching.match import Matcher
from fusion.matching.region import Region, region_of, sources
from fusion.matching.state import Miss, NearMiss, State
from fusion.models.graph import Graph, Node, Value
from fusion.plan import SPELLINGS, Plan, plans_of
from fusion.schema import axes as schema_axes
from fusion.terms import Ref
from fusion.view import MERGED, View

CLIMB, DISTANCE = 40, 10
"""How many values above an anchor are considered as roots, and across how much arithmetic."""
CHOICES = 8
"""How many ways to match at one root are tried where an emission refuses the first."""
PASSES = 8
"""Upper bound of the passes that learn equalities of sizes: two where axes have names, one a layer where none has."""

PASSING = MERGED | {
    "Clip",
    "Where",
    "IsNaN",
    "Transpose",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "Flatten",
    "Expand",
    "Identity",
    "Cast",
    "Dropout",
}
"""Operators that may stand between an anchor and its root without being named in a formula."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A match that has not been written yet."""

    plan: Plan
    root: Value
    ref: Ref
    state: State
    region: Region

    @property
    def order(self) -> tuple[int, tuple[int, int], str, str]:
        """Largest gain first, then position."""
        assert self.root.producer is not None
        return (-len(self.region.core), self.root.producer.position, self.plan.pattern.name, self.root.name)


class Search:
    """Finds the matches of patterns in one graph.

    Args:
        graph: the index.
        patterns: what to look for.

    Attributes:
        failed: why a match was not written, by pattern and root, the reason nearest to success.
    """

    def __init__(self, graph: Graph, patterns: Sequence[Pattern]) -> None:
        self.graph = graph
        self.facts = Facts(graph)
        self.view = View(graph, self.facts)
        self.plans = [plan for pattern in patterns for plan in plans_of(pattern)]
        self.failed: dict[tuple[str, str], NearMiss] = {}
        self._matchers = {plan: Matcher(self.view, plan) for plan in self.plans}
        self._tops = {plan: _tops(plan) for plan in self.plans}
        self._reached: dict[tuple[Node, frozenset[str], int], dict[Value, int]] = {}

    def forget(self) -> None:
        """Drop what an edit of the graph, or an equality, may have changed."""
        self.view.forget()
        self._reached.clear()

    def close(self) -> None:
        """Let go of everything: matchers refer to themselves, and so would keep it until a collector finds them."""
        self.forget()
        self.facts.clear()

    def learn(self) -> None:
        """Learn equalities of sizes, until a pass finds none: a pass may need what the one before it found."""
        for _ in range(PASSES):
            if not self.facts.learn():
                break

    def leaves_attention(self, candidates: Iterable[Candidate] = ()) -> bool:
        """Whether a softmax is left that no candidate covers: its axes may hang on equalities, which cost a pass."""
        parts = {SPELLINGS["softmax"], SPELLINGS["matmul"]}
        if not any(self.anchors(plan) for plan in self.plans if parts.issubset(plan.anchors)):
            return False
        left = {node for op in SPELLINGS["softmax"] for node in self.graph.by_op.get(op, ())}
        return not left.issubset(node for candidate in candidates for node in candidate.region.core)

    def candidates(self, plans: Sequence[Plan], dirty: set[Node] | None = None) -> list[Candidate]:
        """All matches of the plans, best first; near `dirty` nodes only where given."""
        found: list[Candidate] = []
        by_pattern: dict[str, list[Candidate]] = {}
        for plan in sorted(plans, key=lambda plan: plan.refines is not None):
            base = by_pattern.get(plan.refines.name) if plan.refines is not None else None
            if base is None:
                matched = list(self._of_plan(plan, dirty))
            else:
                refined = (self._at(plan, candidate.root) for candidate in list(base))
                matched = [candidate for candidate in refined if candidate is not None]
            by_pattern.setdefault(plan.pattern.name, []).extend(matched)
            found.extend(matched)
        return sorted(found, key=lambda candidate: candidate.order)

    def anchors(self, plan: Plan) -> list[Node]:
        """The nodes that may spell the part of the formula that is rarest in this graph; empty where one is absent."""
        by_op = self.graph.by_op
        counts = [sum(len(by_op.get(op, ())) for op in spelled) for spelled in plan.anchors]
        if 0 in counts:
            return []
        spelled = plan.anchors[counts.index(min(counts))]
        nodes = [node for op in sorted(spelled) for node in by_op.get(op, ())]
        if "Concat" in spelled:  # of numbers, not of sizes
            nodes = [node for node in nodes if (out := node.outputs[0]) and self.facts.dtype(out) in FLOATS]
        if "Pow" in spelled:  # the root of a norm, not its squares
            nodes = [node for node in nodes if node.op != "Pow" or self._is_root(node)]
        names = {scope: scope.name for scope in {node.scope for node in nodes}}
        return sorted(nodes, key=lambda node: (names[node.scope], node.position))

    def _is_root(self, node: Node) -> bool:
        exponent = node.input(1)
        return exponent is not None and self.view.number(exponent) in (0.5, -0.5)

    def _of_plan(self, plan: Plan, dirty: set[Node] | None) -> Iterator[Candidate]:
        tried: dict[Value, Candidate | None] = {}
        covered: set[Node] = set()
        for anchor in self.anchors(plan):
            if anchor in covered or (dirty is not None and anchor not in dirty):
                continue
            refused: list[Value] = []
            telling: Candidate | None = None
            for root in self.roots(plan, anchor):
                if root not in tried:
                    tried[root] = candidate = self._at(plan, root)
                    if candidate is not None and candidate.region.asking:
                        telling = telling or candidate
                    elif candidate is not None:
                        covered.update(candidate.region.core)
                        for outer in refused:  # not missed after all: a part of it matches
                            self.failed.pop((plan.pattern.name, outer.name), None)
                        yield candidate
                if anchor in covered:
                    break
                refused.append(root)
            if telling is not None and anchor not in covered:
                covered.update(telling.region.core)
                yield telling

    def _at(self, plan: Plan, root: Value) -> Candidate | None:
        """The first match at a root; one that must tell others sizes, only where there is none that need not."""
        telling: Candidate | None = None
        for ref, state in self._matchers[plan].match(root):
            region = region_of(self.view, root, state)
            if not isinstance(region, Region):
                self.note(plan, root, (region,))
            elif not region.asking:
                return Candidate(plan, root, ref, state, region)
            else:
                telling = telling or Candidate(plan, root, ref, state, region)
        return telling

    def roots(self, plan: Plan, anchor: Node) -> list[Value]:
        """Values above an anchor that may be the pattern's result, outermost first."""
        fits = [value for value in self.above(plan, anchor) if self.may_be_root(plan, value)]
        return sorted(fits, key=lambda value: value.producer.position if value.producer else (0, 0), reverse=True)

    def above(self, plan: Plan, anchor: Node) -> dict[Value, int]:
        """Values that an anchor feeds through operators of the plan; plans of like operators ask together."""
        key = (anchor, plan.operators, plan.height)
        known = self._reached.get(key)
        if known is None:
            known = self._reached[key] = self._climb(plan, anchor)
        return known

    def _climb(self, plan: Plan, anchor: Node) -> dict[Value, int]:
        reached: dict[Value, int] = {}
        queue = [(value, 0, 0) for value in anchor.outputs[:1] if value is not None]
        for value, above, distance in queue:
            if len(reached) == CLIMB:
                break
            if value in reached:
                continue
            reached[value] = above
            if len(value.uses) > 6 or distance == DISTANCE:
                continue
            for node in value.uses:
                key = node.key
                step = key not in PASSING
                if (step and (above == plan.height or key not in plan.operators)) or node.scope is not anchor.scope:
                    continue
                output = node.outputs[0] if node.outputs else None
                if output is not None:
                    queue.append((output, above + step, distance + (key in MERGED)))
        return reached

    def may_be_root(self, plan: Plan, value: Value) -> bool:
        """Whether a value may be the result: its node may spell what stands last in the formula."""
        node = value.producer
        if node is None:
            return False
        if node.key in self._tops[plan]:
            return True
        if isinstance(plan.root.single, p.Join | p.Concat):
            return self._is_joined(value)
        return bool(plan.inner) and isinstance(plan.root.single, p.MatMul) and self.view.rearranges(node)

    def _is_joined(self, value: Value) -> bool:
        """Whether a value is several others side by side along its last axis, or merges axes there."""
        rank = self.facts.rank(value)
        if not rank or value.producer is None:
            return False
        through = self.facts.through(value)
        if through is None:
            return self._concatenates(value, rank - 1)
        source, layout = through
        own = [axis for axis, _, _ in layout.axes[-1]]
        moved = len(own) == 1 and own[0] != len(layout.source) - 1
        merged = len(own) > 1 or len(layout.source) > len(layout.axes)  # an axis of size 1 leaves no factor
        return merged or (moved and self._concatenates(source, own[0]))

    def _concatenates(self, value: Value, axis: int | None) -> bool:
        """Whether a value is several others side by side along this axis."""
        node = value.producer
        return node is not None and node.key == "Concat" and schema_axes(node, self.facts) == (axis,)

    def choices(self, candidate: Candidate) -> Iterator[Candidate]:
        """The match, then others at its root that replace no more nodes."""
        yield candidate
        others = self._matchers[candidate.plan].match(candidate.root)
        for ref, state in islice(others, 1, CHOICES):
            region = region_of(self.view, candidate.root, state)
            if isinstance(region, Region) and set(region.core) <= set(candidate.region.core):
                choice = Candidate(candidate.plan, candidate.root, ref, state, region)
                if not is_stale(choice):
                    yield choice

    def note(self, plan: Plan, root: Value, misses: tuple[Miss, ...]) -> None:
        """Remember why a match was not written, the reason nearest to success first."""
        key = (plan.pattern.name, root.name)
        if misses and key not in self.failed and not plan.pattern.is_last:  # any product is nearly one of these
            self.failed[key] = NearMiss(plan.pattern.name, root.name, misses, plan.weight)


def _tops(plan: Plan) -> Container[str]:
    """The operators that may compute the result, but for a rearrangement."""
    single = plan.root.single
    if isinstance(single, p.MatMul):
        return SPELLINGS["matmul"]
    if isinstance(single, p.Operator):
        return single.names
    if isinstance(single, p.Fused):
        return single.pattern.readers
    if isinstance(single, p.Op):
        return MERGED | SPELLINGS[single.name] if single.name in SPELLINGS else {single.name}
    if isinstance(single, p.Join | p.Concat):
        return SPELLINGS["sum"]
    if isinstance(plan.core, p.MatMul):
        return MERGED | SPELLINGS["matmul"] | {"Transpose"}
    if isinstance(plan.core, p.Fused):
        return MERGED | plan.core.pattern.readers.keys()
    return SPELLINGS["softmax"] | softmax.OPERATORS if isinstance(single, p.Softmax) else MERGED


def is_stale(candidate: Candidate) -> bool:
    """Whether a rewrite of this sweep removed the root of a match, or a value that it has bound."""
    values = (candidate.root, *sources(candidate.state))
    return any(value.scope.values.get(value.name) is not value for value in values)
