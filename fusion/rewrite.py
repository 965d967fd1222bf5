"""Rewriting: find anchors, match plans, resolve overlaps by gain, emit, apply; again near what changed, to a fixpoint.

Deterministic: candidates are ordered by gain, then by position; nothing depends on hash order.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from fusion import plan as p
from fusion.apply import apply
from fusion.checked import apply_checked
from fusion.emit import Builder
from fusion.facts import Facts
from fusion.found import Found, New, NewNode, Unmet
from fusion.graph import Graph, Node, Value
from fusion.language import Emit, Pattern
from fusion.laws.noise import FLOATS
from fusion.match import Matcher
from fusion.plan import SPELLINGS, Plan, compile_pattern
from fusion.region import Region, region_of, sources
from fusion.schema import axes as schema_axes
from fusion.state import Miss, State
from fusion.targets import Target
from fusion.terms import Ref
from fusion.verdict import Verdict
from fusion.view import MERGED, View

SWEEPS = 8
"""Upper bound of the fixpoint; rules shrink the graph, so it is rarely more than two."""
CLIMB, DISTANCE = 40, 10
"""How many values above an anchor are considered as roots, and across how much arithmetic."""
CHOICES = 8
"""How many ways to match at one root are tried where an emission refuses the first."""
PASSES = 8
"""Upper bound of the passes that learn equalities of sizes: two where axes have names, one a layer where none has."""
NEAR = 6
"""How far around a change anchors are tried again."""

PASSING = MERGED | {
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


@dataclass(frozen=True, slots=True)
class Emitted:
    """A match with the nodes that would be written for it."""

    found: Found
    nodes: list[NewNode]
    results: list[New]


@dataclass(frozen=True, slots=True)
class Rewritten:
    """One rewrite that was made.

    Attributes:
        pattern: its name.
        root: name of the value it computes.
        operators: the new nodes.
        replaced: labels of the nodes it replaced.
        scope: where.
        checked: whether both sides were run and agree; None where that was not asked for.
        unchecked: why they could not be run; empty where they were.
    """

    pattern: str
    root: str
    operators: tuple[str, ...]
    replaced: tuple[str, ...]
    scope: str
    checked: bool | None = None
    unchecked: str = ""


@dataclass(frozen=True, slots=True)
class NearMiss:
    """A place where a pattern nearly holds, and what is unmet."""

    pattern: str
    root: str
    misses: tuple[Miss, ...]
    weight: int

    @property
    def unmet(self) -> int:
        """The weight of what is unmet."""
        return sum(miss.weight for miss in self.misses)


@dataclass(slots=True)
class Outcome:
    """What a run did."""

    rewritten: list[Rewritten] = field(default_factory=list)
    near: list[NearMiss] = field(default_factory=list)
    sweeps: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))


class Rewriter:
    """Finds and writes fusions in one graph.

    Args:
        graph: the index.
        patterns: what to look for.
        target: where the result must run.
        check: run both sides of a rewrite, and undo it where they differ.
    """

    def __init__(self, graph: Graph, patterns: Sequence[Pattern], target: Target, *, check: bool = False) -> None:
        self.graph = graph
        self.facts = Facts(graph)
        self.view = View(graph, self.facts)
        self.target = target
        self.check = check
        self.plans = [plan for pattern in patterns for plan in plans_of(pattern)]
        self._matchers = {plan: Matcher(self.view, plan) for plan in self.plans}
        self._tops = {plan: _tops(plan) for plan in self.plans}
        self.outcome = Outcome()
        self._reached: dict[tuple[Node, frozenset[str], int], dict[Value, int]] = {}
        self._failed: dict[tuple[str, str], NearMiss] = {}
        self._again: set[str] = set()

    def run(self, *, last: bool = False) -> Outcome:
        """Rewrite to the fixpoint; the graph holds the edits, uncommitted. Run it again where others edited since.

        Args:
            last: the patterns that wait until nothing else is to be done, and only these.
        """
        dirty: set[Node] | None = None
        learned = last
        plans = first = [plan for plan in self.writable if plan.pattern.is_last is last]
        if not last:
            self._failed.clear()
        for _ in range(SWEEPS):
            self.outcome.sweeps += 1
            started = time.perf_counter()
            candidates = self.candidates(plans, dirty)
            if not learned and self._leaves_attention(candidates):  # before what a rewrite removes can say no more
                learned, dirty, plans = True, None, first
                self._learn()
                self.forget()
                candidates = self.candidates(plans)
            self.outcome.seconds["match"] += time.perf_counter() - started
            started = time.perf_counter()
            made = self._write(candidates)
            self.outcome.seconds["rewrite"] += time.perf_counter() - started
            if made:
                dirty, plans = _around(made), self._affected(made)
            elif not learned and self._leaves_attention():
                learned, dirty, plans = True, None, first
                self._learn()
            else:
                break
            self.forget()
        written = {(made.pattern, made.root) for made in self.outcome.rewritten}
        self.outcome.near = [near for key, near in self._failed.items() if key not in written]
        return self.outcome

    def forget(self) -> None:
        """Drop what an edit of the graph, or an equality, may have changed."""
        self.view.forget()
        self._reached.clear()

    def _affected(self, made: Sequence[Node]) -> list[Plan]:
        """The plans that new nodes can make match: those that read such a node, failed before, or had to wait."""
        operators = {node.key for node in made}
        failed = {near.pattern for near in self._failed.values()} | self._again
        self._again = set()
        plans = (plan for plan in self.writable if not plan.pattern.is_last)
        return [plan for plan in plans if plan.reads & operators or plan.pattern.name in failed]

    def _learn(self) -> None:
        """Learn equalities of sizes, until a pass finds none: a pass may need what the one before it found."""
        for _ in range(PASSES):
            if not self.facts.learn():
                break

    def _leaves_attention(self, candidates: Iterable[Candidate] = ()) -> bool:
        """Whether a softmax is left that no candidate covers: its axes may hang on equalities, which cost a pass."""
        covered = {node for candidate in candidates for node in candidate.region.core}
        plans = [plan for plan in self.plans if SPELLINGS["softmax"] in plan.anchors]
        return any(node not in covered for plan in plans for node in self.anchors(plan))

    # -- finding ----------------------------------------------------------------------------------------------------

    @property
    def writable(self) -> list[Plan]:
        """The plans that the target has an emission for."""
        return [plan for plan in self.plans if self.emissions(plan.pattern)]

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

    def found(self) -> list[tuple[Candidate, tuple[Miss, ...]]]:
        """The matches that do not overlap, the one with the larger gain kept; nothing is written.

        Each comes with what keeps its emission from being written; such a match does not keep others from being found.
        """
        chosen: list[tuple[Candidate, tuple[Miss, ...]]] = []
        taken: set[Node] = set()
        if self._leaves_attention():
            self._learn()
        for candidate in self.candidates(self.plans):
            if not taken.isdisjoint(candidate.region.core):
                continue
            emissions = self.emissions(candidate.plan.pattern)
            written = self._emit(candidate) if emissions else ()
            unmet = written if isinstance(written, tuple) else ()
            if not unmet:
                taken.update(candidate.region.core)
            chosen.append((candidate, unmet))
        return chosen

    def emissions(self, pattern: Pattern) -> list[Emit]:
        """The ways to write a pattern for the target, preferred first."""
        return list(dict.fromkeys(e for name in self.target.names for e in pattern.emissions if name in e.targets))

    def anchors(self, plan: Plan) -> list[Node]:
        """The nodes that may spell the part of the formula that is rarest in this graph; empty where one is absent."""
        choices: list[list[Node]] = []
        for spelled in plan.anchors:
            nodes = [node for op in sorted(spelled) for node in self.graph.by_op.get(op, ())]
            if not nodes:
                return []
            choices.append(nodes)
        nodes = min(choices, key=len)
        if any(node.op == "Concat" for node in nodes):  # of numbers, not of sizes
            nodes = [node for node in nodes if (out := node.outputs[0]) and self.facts.dtype(out) in FLOATS]
        if any(node.op == "Pow" for node in nodes):  # the root of a norm, not its squares
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
            for root in self.roots(plan, anchor):
                if root not in tried:
                    tried[root] = candidate = self._at(plan, root)
                    if candidate is not None:
                        covered.update(candidate.region.core)
                        for outer in refused:  # not missed after all: a part of it matches
                            self._failed.pop((plan.pattern.name, outer.name), None)
                        yield candidate
                if anchor in covered:
                    break
                refused.append(root)

    def _at(self, plan: Plan, root: Value) -> Candidate | None:
        for ref, state in self._matchers[plan].match(root):
            region = region_of(self.view, root, state)
            if isinstance(region, Region):
                return Candidate(plan, root, ref, state, region)
            self._note(plan, root, (region,))
        return None

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

    # -- writing ----------------------------------------------------------------------------------------------------

    def _write(self, candidates: Iterable[Candidate]) -> list[Node]:
        made: list[Node] = []
        new: set[Node] = set()
        taken: set[Node] = set()
        for candidate in candidates:
            if not taken.isdisjoint(candidate.region.core):
                continue
            if made and (_is_stale(candidate) or _is_read(candidate, new)):
                self._again.add(candidate.plan.pattern.name)
                taken.update(candidate.region.core)
                made.extend(candidate.region.core)  # to be matched anew in the next sweep, before what is less
                continue
            emitted = self._emit(candidate)
            nodes = self._apply(emitted) if isinstance(emitted, Emitted) else []
            if nodes:
                taken.update(candidate.region.core)
                made.extend(nodes)
                new.update(nodes)
            elif not isinstance(emitted, Emitted):
                self._note(candidate.plan, candidate.root, emitted)
        return made

    def _emit(self, candidate: Candidate) -> Emitted | tuple[Miss, ...]:
        """The first way to write a match that holds, other matches at its root included; else what is unmet."""
        first: tuple[Miss, ...] = ()
        for choice in self._choices(candidate):
            misses: list[Miss] = []
            for emission in self.emissions(choice.plan.pattern):
                found = Found(self.view, choice.plan, choice.ref, choice.root, choice.state, choice.region)
                builder = Builder(found)
                try:
                    returned = emission.build(found, builder)
                    outputs: tuple[New, ...] = returned if isinstance(returned, tuple) else (returned,)
                    results = [builder.in_root_axes(output) for output in outputs]
                    found.require_order(builder.inputs)
                    builder.require_kernels(self.target)
                    found.require_gain(builder.nodes)
                except Unmet as unmet:
                    misses.append(unmet.miss)
                    continue
                return Emitted(found, builder.nodes, results)
            first = first or tuple(misses)
        return first

    def _choices(self, candidate: Candidate) -> Iterator[Candidate]:
        yield candidate
        others = self._matchers[candidate.plan].match(candidate.root)
        for ref, state in islice(others, 1, CHOICES):
            region = region_of(self.view, candidate.root, state)
            if isinstance(region, Region) and set(region.core) <= set(candidate.region.core):
                choice = Candidate(candidate.plan, candidate.root, ref, state, region)
                if not _is_stale(choice):
                    yield choice

    def _apply(self, emitted: Emitted) -> list[Node]:
        found = emitted.found
        scope = found.node.scope.name
        replaced = tuple(node.label for node in found.region.core)
        name, root, unchecked = found.plan.pattern.name, found.root.name, ""
        if self.check:
            try:
                nodes, unchecked = apply_checked(self.graph, found, emitted.nodes, emitted.results)
            except Unmet as unmet:
                self._failed[name, root] = NearMiss(name, root, (unmet.miss,), found.plan.weight)
                return []
        else:
            nodes = apply(self.graph, found, emitted.nodes, emitted.results)
        self.facts.recomputed([value for node in nodes for value in node.outputs if value is not None])
        operators = tuple(node.key for node in nodes)
        checked = not unchecked if self.check else None
        self.outcome.rewritten.append(Rewritten(name, root, operators, replaced, scope, checked, unchecked))
        return nodes

    def _note(self, plan: Plan, root: Value, misses: tuple[Miss, ...]) -> None:
        """Remember why a match was not written, the reason nearest to success first."""
        key = (plan.pattern.name, root.name)
        if misses and key not in self._failed and not plan.pattern.is_last:  # any product is nearly one of these
            self._failed[key] = NearMiss(plan.pattern.name, root.name, misses, plan.weight)


_plans: dict[int, tuple[Pattern, list[Plan]]] = {}


def plans_of(pattern: Pattern) -> list[Plan]:
    """The compiled plans of a pattern, compiled once."""
    known = _plans.get(id(pattern))
    if known is None:
        known = _plans[id(pattern)] = (pattern, compile_pattern(pattern))
    return known[1]


def _tops(plan: Plan) -> Container[str]:
    """The operators that may compute the result, but for a rearrangement."""
    single = plan.root.single
    if isinstance(single, p.MatMul):
        return SPELLINGS["matmul"]
    if isinstance(single, p.Fused):
        return single.pattern.readers
    if isinstance(single, p.Op):
        return {single.name}
    if isinstance(single, p.Join | p.Concat):
        return SPELLINGS["sum"]
    if isinstance(plan.core, p.MatMul):
        return MERGED | SPELLINGS["matmul"] | {"Transpose"}
    if isinstance(plan.core, p.Fused):
        return MERGED | plan.core.pattern.readers.keys()
    return {"Softmax", "Div"} if isinstance(single, p.Softmax) else MERGED


def _is_stale(candidate: Candidate) -> bool:
    """Whether a rewrite of this sweep removed the root of a match, or a value that it has bound."""
    values = (candidate.root, *sources(candidate.state))
    return any(value.scope.values.get(value.name) is not value for value in values)


def _is_read(candidate: Candidate, new: set[Node]) -> bool:
    """Whether a node of this sweep reads a value inside the match, so that it is not private any more."""
    finals = {candidate.root, *(ref.value for ref in candidate.state.kept.values())}
    inside = (value for node in candidate.region.core for value in node.outputs if value not in finals)
    return any(reader in new for value in inside if value is not None for reader in value.uses)


def _around(nodes: Iterable[Node]) -> set[Node]:
    """The nodes within `NEAR` steps of these."""
    seen = set(nodes)
    edge = list(seen)
    for _ in range(NEAR):
        following: list[Node] = []
        for node in edge:
            beside = [value.producer for value in node.inputs if value is not None and value.producer is not None]
            for value in node.outputs:
                if value is not None and len(value.uses) <= 8:
                    beside.extend(value.uses)
            for other in beside:
                if other not in seen:
                    seen.add(other)
                    following.append(other)
        edge = following
    return seen


def verdict_of(misses: Sequence[Miss]) -> Verdict:
    """NO where something differs, UNKNOWN where only facts are missing."""
    return Verdict.UNKNOWN if all(miss.verdict is Verdict.UNKNOWN for miss in misses) else Verdict.NO
