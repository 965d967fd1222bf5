"""Rewriting: overlaps are resolved by gain, matches emitted and applied; again near what changed, to a fixpoint.

Deterministic: candidates are ordered by gain, then by position; nothing depends on hash order.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fusion.language import Emit, Pattern
from fusion.matching.search import Candidate, Search, is_stale
from fusion.matching.state import Miss, NearMiss
from fusion.models.graph import Graph, Node
from fusion.plan import Plan
from fusion.targets import Target
from fusion.writing.apply import apply
from fusion.writing.checked import apply_checked
from fusion.writing.emit import Builder
from fusion.writing.found import GAIN, Found, Narrow, New, NewNode, Unmet
from fusion.writing.outcome import Outcome, Rewritten

SWEEPS = 8
"""Upper bound of the fixpoint; rules shrink the graph, so it is rarely more than two."""
NEAR = 6
"""How far around a change anchors are tried again."""


@dataclass(frozen=True, slots=True)
class Emitted:
    """A match with the nodes that would be written for it."""

    found: Found
    nodes: list[NewNode]
    results: list[New]


class Rewriter:
    """Writes the fusions of one graph.

    Args:
        graph: the index.
        patterns: what to look for.
        target: where the result must run.
        check: run both sides of a rewrite, and undo it where they differ.
    """

    def __init__(self, graph: Graph, patterns: Sequence[Pattern], target: Target, *, check: bool = False) -> None:
        self.graph = graph
        self.search = Search(graph, patterns)
        self.target = target
        self.check = check
        self.outcome = Outcome()
        self.emissions = {plan.pattern: self._emissions(plan.pattern) for plan in self.search.plans}
        """The ways to write a pattern for the target, preferred first."""
        self.writable = [plan for plan in self.search.plans if self.emissions[plan.pattern]]
        """The plans that the target has an emission for."""
        self._again: set[str] = set()

    def run(self, *, last: bool = False) -> Outcome:
        """Rewrite to the fixpoint; the graph holds the edits, uncommitted. Run it again where others edited since.

        Args:
            last: the patterns that wait until nothing else is to be done, and only these.
        """
        search, seconds = self.search, self.outcome.seconds
        dirty: set[Node] | None = None
        learned = last
        plans = first = [plan for plan in self.writable if plan.pattern.is_last is last]
        if not last:
            search.failed.clear()
        for _ in range(SWEEPS):
            self.outcome.sweeps += 1
            started = time.perf_counter()
            candidates = search.candidates(plans, dirty)
            found = time.perf_counter()
            lacking = not learned and search.leaves_attention(candidates)
            made = [] if lacking else self._write(candidates)  # what a rewrite removes can say no more of sizes
            seconds["match"] += found - started
            seconds["rewrite"] += time.perf_counter() - found
            if made:
                dirty, plans = _around(made), self._affected(made)
            elif lacking or (not learned and search.leaves_attention()):
                learned, dirty, plans = True, None, first
                started = time.perf_counter()
                search.learn()
                seconds["match"] += time.perf_counter() - started
            else:
                break
            search.forget()
        done = {(made.pattern, made.root) for made in self.outcome.rewritten}
        self.outcome.near = [near for key, near in search.failed.items() if key not in done]
        return self.outcome

    def _affected(self, made: Sequence[Node]) -> list[Plan]:
        """The plans that new nodes can make match: those that read such a node, failed before, or had to wait."""
        operators = {node.key for node in made}
        failed = {near.pattern for near in self.search.failed.values()} | self._again
        self._again = set()
        plans = (plan for plan in self.writable if not plan.pattern.is_last)
        return [plan for plan in plans if plan.reads & operators or plan.pattern.name in failed]

    def found(self) -> list[tuple[Candidate, tuple[Miss, ...]]]:
        """The matches that do not overlap, the one with the larger gain kept; nothing is written.

        Each comes with what keeps its emission from being written; such a match does not keep others from being found.
        """
        chosen: list[tuple[Candidate, tuple[Miss, ...]]] = []
        taken: set[Node] = set()
        if self.search.leaves_attention():
            self.search.learn()
        for candidate in self.search.candidates(self.search.plans):
            if not taken.isdisjoint(candidate.region.core):
                continue
            emissions = self.emissions[candidate.plan.pattern]
            written = self._emit(candidate) if emissions else ()
            unmet = written if isinstance(written, tuple) else ()
            if not unmet:
                taken.update(candidate.region.core)
            chosen.append((candidate, unmet))
        return chosen

    def _emissions(self, pattern: Pattern) -> list[Emit]:
        return list(dict.fromkeys(e for name in self.target.names for e in pattern.emissions if name in e.targets))

    # -- writing ----------------------------------------------------------------------------------------------------

    def _write(self, candidates: Iterable[Candidate]) -> list[Node]:
        made: list[Node] = []
        new: set[Node] = set()
        taken: set[Node] = set()
        for candidate in candidates:
            if not taken.isdisjoint(candidate.region.core):
                continue
            if made and (is_stale(candidate) or _is_read(candidate, new)):
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
                self.search.note(candidate.plan, candidate.root, emitted)
        return made

    def _emit(self, candidate: Candidate) -> Emitted | tuple[Miss, ...]:
        """The first way to write a match that holds, other matches at its root included; else what is unmet."""
        first: tuple[Miss, ...] = ()
        for choice in self.search.choices(candidate):
            misses: list[Miss] = []
            for emission in self.emissions[choice.plan.pattern]:
                try:
                    try:
                        return self._written(choice, emission)
                    except Narrow as narrow:
                        return self._written(choice, emission, narrow.wide)
                except Unmet as unmet:
                    misses.append(unmet.miss)
            # Who has another way to be written need not hear of those that are not for it.
            first = first or tuple(miss for miss in misses if miss.kind != GAIN) or tuple(misses)
        return first

    def _written(self, choice: Candidate, emission: Emit, wide: int | None = None) -> Emitted:
        """What an emission makes of a match, computed in a wider dtype than the root's where one is given."""
        found = Found(self.search.view, choice.plan, choice.ref, choice.root, choice.state, choice.region, wide)
        builder = Builder(found, self.target)
        found.require(0 not in found.shape, "there is nothing to compute: the result has no elements")
        returned = emission.build(found, builder)
        outputs: tuple[New, ...] = returned if isinstance(returned, tuple) else (returned,)
        declared = 1 + len(choice.state.kept)  # what an emission keeps besides lies as it is
        results = [builder.in_root_axes(output) for output in outputs[:declared]]
        if wide is not None:
            results[0] = builder.Cast(results[0], to=found.root_dtype, dtype=found.root_dtype)
        results.extend(outputs[declared:])
        builder.tell_sizes()
        found.require_kept_dtype()
        found.require_order(builder.inputs)
        found.require_gain(builder.nodes)
        return Emitted(found, builder.nodes, results)

    def _apply(self, emitted: Emitted) -> list[Node]:
        found = emitted.found
        scope = found.node.scope.name
        replaced = tuple(node.label for node in found.region.core)
        name, root, unchecked = found.plan.pattern.name, found.root.name, ""
        if self.check:
            try:
                nodes, unchecked = apply_checked(self.graph, found, emitted.nodes, emitted.results)
            except Unmet as unmet:
                self.search.failed[name, root] = NearMiss(name, root, (unmet.miss,), found.plan.weight)
                return []
        else:
            nodes = apply(self.graph, found, emitted.nodes, emitted.results)
        self.search.facts.recomputed([value for node in nodes for value in node.outputs if value is not None])
        operators = tuple(node.key for node in nodes)
        checked = not unchecked if self.check else None
        self.outcome.rewritten.append(Rewritten(name, root, operators, replaced, scope, checked, unchecked))
        return nodes


def _is_read(candidate: Candidate, new: set[Node]) -> bool:
    """Whether a node of this sweep reads a value inside the match, so that it is not private any more."""
    finals = {candidate.root, *(ref.value for ref in candidate.state.kept.values())}
    inside = (value for node in candidate.region.core for value in node.outputs if value not in finals)
    return any(not new.isdisjoint(value.uses) for value in inside if value is not None)


def _around(nodes: Iterable[Node]) -> set[Node]:
    """The nodes within `NEAR` steps of these."""
    seen = set(nodes)
    edge = seen
    for _ in range(NEAR):
        beside: set[Node] = set()
        for node in edge:
            beside.update(value.producer for value in node.inputs if value is not None and value.producer is not None)
            for value in node.outputs:
                if value is not None and len(value.uses) <= 8:
                    beside.update(value.uses)
        edge = beside - seen
        seen |= edge
    return seen
