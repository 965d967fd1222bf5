"""Explaining: what keeps a place from being a pattern that it nearly is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from fusion import plan as p
from fusion.language import Pattern
from fusion.laws.ring import LIKE_SUMS
from fusion.matching.match import FAR, Matcher
from fusion.matching.region import Region, region_of
from fusion.matching.search import CHOICES, Search
from fusion.matching.state import Miss, NearMiss, verdict_of
from fusion.models.graph import Node, Value
from fusion.plan import Plan, alike
from fusion.verdict import Verdict
from fusion.view import LAYOUTS, View

LIMITS = (0, 1, 2, 4, FAR)
"""How much may be wrong with a formula; more is looked for only where less is not found."""

STEPS = 3000
"""How many captures and misses are tried around one anchor: a bound on the time that no machine decides."""

CONE = 300
"""How many nodes below a root are known to belong to it; a formula has far fewer."""


BESIDE = 24
"""How many nodes below an anchor are asked for a missing fact."""


class Explainer:
    """Finds near misses in one graph.

    Args:
        search: of the graph, whose plans are explained.
    """

    def __init__(self, search: Search) -> None:
        self.search = search
        self.covered: set[Node] = set()
        """Nodes of matches: nothing nearly ends among them."""
        self.steps = 0
        """How much has been searched."""
        self._views: dict[Value, View] = {}
        self._known: dict[tuple[View, Plan, Value, int], tuple[Miss, ...] | None] = {}

    def anchors(self, plan: Plan) -> list[Node]:
        """The anchors of a plan, with what may stand in the place of the right one: Tanh where Erf should."""
        by_op = self.search.graph.by_op
        parts = [[node for op in sorted(alike(spelled)) for node in by_op.get(op, ())] for spelled in plan.anchors]
        nodes = min((nodes for nodes in parts if nodes), key=len, default=[])
        return sorted(nodes, key=lambda node: (node.scope.name, node.position))

    def explain(self, plan: Plan, anchor: Node) -> list[NearMiss]:
        """The nearest misses of a plan around an anchor; none where it matches, or where more than half is unmet.

        Readers from outside are left out of account at first. So what is wrong with a value that is what it should be
        is that it is read, and not what it looks like with its readers.
        """
        if anchor in self.covered:
            return []
        spelled = anchor.key in plan.operators or len(plan.anchors) > 1
        roots = self._roots(plan, anchor)
        most = min(FAR, plan.weight // 2 if spelled else (plan.weight - 1) // 2)
        end = self.steps + STEPS
        for limit in sorted({min(limit, most) for limit in LIMITS}):
            if self.steps > end:
                break
            reached = self._within(plan, roots, limit)
            found = [near for near in reached if near.misses]
            if not spelled:  # where a fact is missing, something should be there that speaks for the pattern
                found = [near for near in found if verdict_of(near.misses) is Verdict.NO]
            if found:
                best = min(found, key=lambda near: near.unmet)
                # A part of the formula may be nearer to it than the whole: then both are told.
                outer = roots[: [root.name for root in roots].index(best.root)]
                around = [near for near in self._within(plan, outer, min(limit + 1, most)) if near.misses]
                told = [best, *(near for near in around if not set(best.misses) <= set(near.misses))]
                return told + (self._unknown(plan, anchor) if limit else [])
            if reached:
                return []
        return self._unknown(plan, anchor)

    def _unknown(self, plan: Plan, anchor: Node) -> list[NearMiss]:
        """That a rank is unknown near the anchor of a plan: then not much can be told of what is there."""
        if anchor.key not in plan.operators:
            return []
        near = [anchor]
        for node in near:
            for value in filter(None, (*node.inputs, *node.outputs)):
                if self.search.facts.shape(value) is None:
                    text = f"expected a known rank, found none for {value.name}"
                    miss = Miss("dimension", text, Verdict.UNKNOWN, 1, value.name)
                    return [NearMiss(plan.pattern.name, value.name, (miss,), plan.weight)]
                if value.producer is not None and value.producer not in near and len(near) < BESIDE:
                    near.append(value.producer)
        return []

    def privacy(self, pattern: Pattern, root: Value) -> list[Miss]:
        """Who else reads what would be inside a larger match than the one at this root."""
        found: dict[Miss, None] = {}
        view = self._view(root)
        for plan in (plan for plan in self.search.plans if plan.pattern is pattern):
            for _, state in islice(Matcher(view, plan).match(root), CHOICES):
                region = region_of(view, root, state)
                if isinstance(region, Miss) and region.kind == "privacy":
                    found[region] = None
        return list(found)

    def _within(self, plan: Plan, roots: Sequence[Value], limit: int) -> list[NearMiss]:
        """For each root the nearest miss of at most so much weight; one without misses where the plan matches."""
        found: list[NearMiss] = []
        for root in roots:
            least = self._least(self._view(root), plan, root, limit)
            if least != ():  # with all readers fewer values are opened: asked only whether it is nearer
                closer = self._least(self.search.view, plan, root, _weight(least) - 1 if least else 0)
                least = least if closer is None else closer
            if least is not None:
                found.append(NearMiss(plan.pattern.name, root.name, least, plan.weight))
        return found

    def _roots(self, plan: Plan, anchor: Node) -> list[Value]:
        """Values above an anchor that may be the result, outermost first."""
        wide = replace(plan, operators=alike(plan.operators) | LIKE_SUMS, height=plan.height + 1)
        single = plan.root.single
        last = alike(frozenset({single.name})) if isinstance(single, p.Op) else LIKE_SUMS
        last |= alike(frozenset({"Softmax"})) if isinstance(single, p.Softmax) else frozenset()
        last |= LAYOUTS if plan.inner else frozenset()
        fits = [
            (value.producer.position, value)
            for value in self.search.above(wide, anchor)
            if value.producer is not None
            and value.producer not in self.covered
            and (value.producer.key in last or self.search.may_be_root(plan, value))
        ]
        return [value for _, value in sorted(fits, key=lambda found: found[0], reverse=True)]

    def _view(self, root: Value) -> View:
        """The graph as the nodes below a root see it."""
        if root not in self._views:
            cone: dict[Node, None] = {}
            stack = [root]
            while stack and len(cone) < CONE:
                node = stack.pop(0).producer
                if node is not None and node not in cone:
                    cone[node] = None
                    stack.extend(value for value in node.inputs if value is not None)
            self._views[root] = View(self.search.graph, self.search.facts, within=cone)
        return self._views[root]

    def _least(self, view: View, plan: Plan, root: Value, limit: int) -> tuple[Miss, ...] | None:
        """The least that is unmet at a root, nothing where it matches; None where it is more than `limit`."""
        key = view, plan, root, limit
        if key not in self._known:
            matcher = Matcher(view, plan, record=limit > 0, limit=limit)
            self._known[key] = _search(matcher, root)
            self.steps += 1 + matcher.steps
        return self._known[key]


def _search(matcher: Matcher, root: Value) -> tuple[Miss, ...] | None:
    best: tuple[Miss, ...] | None = None
    ways = matcher.match(root)
    for _, state in ways if matcher.record else islice(ways, CHOICES):
        misses = state.misses
        if not misses:
            region = region_of(matcher.view, root, state)
            misses = () if isinstance(region, Region) else (region,)
        if best is None or _weight(misses) < _weight(best):
            best = misses
    return best


def _weight(misses: Sequence[Miss]) -> int:
    return sum(miss.weight for miss in misses)
