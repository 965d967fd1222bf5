"""The library's face: optimize, find, why."""

from __future__ import annotations

import difflib
import importlib
import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fusion.diff import Diff, diff
from fusion.errors import FusionError, PatternError
from fusion.graph import Graph, paused_collection
from fusion.language import Pattern
from fusion.model import Model, load, save
from fusion.opset import convert
from fusion.report import explanation_to_dict, print_explanation, print_result, result_to_dict
from fusion.rewrite import NearMiss, Rewriter, Rewritten, verdict_of
from fusion.state import Miss
from fusion.targets import Target, target_named
from fusion.verdict import Verdict

NEAR_MISSES = 16
"""How many anchors of one pattern a run explains; `why` explains all."""


@dataclass(slots=True)
class Result:
    """What `optimize` did.

    Attributes:
        model: the rewritten model, of the kind that came in; None where it was written to a destination.
        matches: the rewrites, in order.
        near_misses: where a pattern nearly held, and what was unmet.
        timings: seconds by phase.
        nodes_before, nodes_after: nodes of all scopes.
        target: its name.
        notes: what was put right on loading, and why the model is not at the opset asked for; one sentence each.
    """

    model: Any
    matches: list[Rewritten]
    near_misses: list[NearMiss]
    timings: dict[str, float]
    nodes_before: int
    nodes_after: int
    target: str
    notes: list[str] = field(default_factory=list)
    original: Any = field(default=None, repr=False)
    rewritten: Any = field(default=None, repr=False)

    @property
    def counts(self) -> dict[str, int]:
        """Rewrites by pattern."""
        return dict(sorted(Counter(match.pattern for match in self.matches).items()))

    @property
    def diff(self) -> Diff:
        """The structural difference between what came in and what came out."""
        return diff(self.original, self.rewritten)

    def print(self) -> None:
        """Print a table of what was fused and what nearly was."""
        print_result(self)

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON-ready data."""
        return result_to_dict(self)


@dataclass(slots=True)
class Place:
    """A place in a model where a pattern was looked for.

    Attributes:
        pattern: its name.
        root: the value that would be its result.
        verdict: YES where it matches, NO where something differs, UNKNOWN where a fact is missing.
        misses: what is unmet.
        nodes: labels of the nodes of a match.
    """

    pattern: str
    root: str
    verdict: Verdict
    misses: tuple[Miss, ...] = ()
    nodes: tuple[str, ...] = ()


@dataclass(slots=True)
class Explanation:
    """Where patterns match in a model, where they nearly do, and why not."""

    places: list[Place]

    def print(self) -> None:
        """Print a table of the places."""
        print_explanation(self)

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON-ready data."""
        return explanation_to_dict(self)


def optimize(
    source: Any,
    destination: str | os.PathLike[str] | None = None,
    *,
    target: str = "ort-cpu",
    opset: int | None = None,
    when: str = "legal",
    patterns: Iterable[Pattern | str] | None = None,
    check: bool = False,
) -> Result:
    """Fuse what is equal and has a kernel on the target.

    Args:
        source: a path, ModelProto, gs.Graph or onnx_ir.Model.
        destination: where to write; without one the model comes back in `Result.model`, of the kind that came in.
        target: where the result must run, e.g. "ort-cpu" or "onnx".
        opset: take the model to this opset of the standard operators first, for fused ones that came with it. Where
            that is not known to be sound it stays at its own, and `Result.notes` says why. By default it stays.
        when: "legal" fuses whatever is equal and has a kernel.
        patterns: patterns or names of library patterns; all of the library by default.
        check: run both sides of every rewrite on the same inputs, and undo those that differ: they are among the near
            misses then. A rewrite that cannot be run on its own stays, and says why in `Rewritten.unchecked`.

    Raises:
        ModelError: the source is no valid model.
        OutputError: the destination cannot be written; nothing is left there.
        TargetError, PatternError: unknown names.
    """
    if when != "legal":
        raise FusionError(f"when={when!r} is unknown: only 'legal' is there (fuse what is equal and has a kernel)")
    with paused_collection():
        timings: dict[str, float] = {}
        started = time.perf_counter()
        aim = target_named(target)
        chosen = _chosen(patterns, aim)
        model = load(source)
        timings["load"] = time.perf_counter() - started
        notes = list(model.notes)
        if opset is not None:
            started = time.perf_counter()
            notes += filter(None, [convert(model, opset, aim)])
            timings["convert"] = time.perf_counter() - started
        started = time.perf_counter()
        graph = Graph(model)
        before = sum(1 for _ in graph.nodes())
        timings["index"] = time.perf_counter() - started
        rewriter = Rewriter(graph, chosen, aim, check=check)
        outcome = rewriter.run()
        timings.update(outcome.seconds)
        started = time.perf_counter()
        near = list(outcome.near)
        near.extend(_explained(rewriter, NEAR_MISSES, {miss.root for miss in near}))
        timings["explain"] = time.perf_counter() - started
        after = sum(1 for _ in graph.nodes())
        started = time.perf_counter()
        graph.commit()
        written = None
        if destination is not None:
            save(model, destination)
        else:
            written = model.export()
        timings["save"] = time.perf_counter() - started
    rewritten = destination if destination is not None else written
    return Result(written, outcome.rewritten, near, timings, before, after, aim.name, notes, source, rewritten)


def find(source: Any, patterns: Iterable[Pattern | str] | None = None, *, target: str = "ort-cpu") -> list[Place]:
    """The matches of patterns in a model, without rewriting it; also of patterns that the target has no emission for.

    Raises:
        ModelError, TargetError, PatternError: as `optimize` does.
    """
    return [place for place in _matches(_rewriter(source, patterns, target)) if place.verdict is Verdict.YES]


def why(source: Any, pattern: Pattern | str | None = None, *, target: str = "ort-cpu") -> Explanation:
    """Where a pattern matches in a model and, for every place where it nearly does, what keeps it from it."""
    rewriter = _rewriter(source, None if pattern is None else [pattern], target)
    places = _matches(rewriter)
    matched = {place.root for place in places}
    for near in _explained(rewriter, None, matched):
        places.append(Place(near.pattern, near.root, verdict_of(near.misses), near.misses))
    return Explanation(places)


def _rewriter(source: Any, patterns: Iterable[Pattern | str] | None, target: str) -> Rewriter:
    aim: Target = target_named(target)
    return Rewriter(Graph(load(source)), _chosen(patterns, aim), aim)


def _matches(rewriter: Rewriter) -> list[Place]:
    return [
        Place(
            candidate.plan.pattern.name,
            candidate.root.name,
            verdict_of(misses) if misses else Verdict.YES,
            misses,
            tuple(node.label for node in candidate.region.core),
        )
        for candidate, misses in rewriter.found()
    ]


def _explained(rewriter: Rewriter, limit: int | None, known: set[str]) -> list[NearMiss]:
    """The nearest misses around anchors, those that are nearer to the pattern than to nothing."""
    found: dict[tuple[str, str], NearMiss] = {}
    for plan in rewriter.plans:
        for anchor in rewriter.anchors(plan)[:limit]:
            near = rewriter.explain(plan, anchor)
            if near is None or near.root in known or near.unmet * 2 > near.weight:
                continue
            key = (near.pattern, near.root)
            if key not in found or near.unmet < found[key].unmet:
                found[key] = near
    return list(found.values())


def library() -> dict[str, Pattern]:
    """The patterns that ship with the package, by name."""
    registry: dict[str, Pattern] = importlib.import_module("fusion.patterns").registry()
    return registry


def _chosen(patterns: Iterable[Pattern | str] | None, aim: Target) -> Sequence[Pattern]:
    """The patterns asked for; of the library, where nothing is asked for, those that can be written for the target."""
    known = library()
    if patterns is None:
        return [pattern for pattern in known.values() if not set(aim.names).isdisjoint(pattern.targets)]
    chosen: list[Pattern] = []
    for pattern in patterns:
        if isinstance(pattern, Pattern):
            chosen.append(pattern)
        elif pattern in known:
            chosen.append(known[pattern])
        else:
            close = difflib.get_close_matches(pattern, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise PatternError(f"there is no pattern {pattern!r}{hint} Known: {', '.join(known)}")
    return chosen


__all__ = ["Explanation", "Model", "Place", "Result", "find", "library", "optimize", "why"]
