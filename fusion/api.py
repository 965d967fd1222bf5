"""The library's face: optimize, find, why."""

from __future__ import annotations

import difflib
import importlib
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from rich.console import Console

from fusion.diffing.diff import Diff, diff
from fusion.errors import FusionError, PatternError
from fusion.language import Pattern
from fusion.matching.explain import STEPS, Explainer
from fusion.matching.state import Miss, NearMiss, verdict_of
from fusion.models.alike import unify
from fusion.models.graph import Graph, paused_collection
from fusion.models.model import load, save
from fusion.opset import convert
from fusion.report import Report, table
from fusion.simplify import GROUP, RULES, Simplifier
from fusion.targets import Target, target_named
from fusion.verdict import Verdict
from fusion.writing.outcome import Rewritten
from fusion.writing.rewrite import Rewriter

NEAR_MISSES = 16
"""How many anchors of one pattern a run explains; `why` explains all."""
SHOWN = 12
"""How many near misses a table shows; the JSON has all."""
ROUNDS = 4
"""Upper bound of how often fusing and simplifying take turns; the second round rarely finds anything."""


@dataclass(slots=True)
class Result(Report):
    """What `optimize` did.

    Attributes:
        target: its name.
        nodes_before, nodes_after: nodes of all scopes.
        timings: seconds by phase.
        matches: the fusions, in order.
        simplified: the simplifications, in order.
        near_misses: where a pattern nearly held, and what was unmet.
        notes: what was put right on loading, and why the model is not at the opset asked for; one sentence each.
        model: the rewritten model, of the kind that came in; None where it was written to a destination.
        original, rewritten: what came in, and what came out or where it was written.
    """

    target: str
    nodes_before: int
    nodes_after: int
    timings: dict[str, float]
    matches: list[Rewritten]
    simplified: list[Rewritten]
    near_misses: list[NearMiss]
    notes: list[str]
    model: Any = field(repr=False)
    original: Any = field(repr=False)
    rewritten: Any = field(repr=False)

    DERIVED: ClassVar[tuple[str, ...]] = ("counts", "simplifications")

    @property
    def counts(self) -> dict[str, int]:
        """Fusions by pattern."""
        return dict(sorted(Counter(match.pattern for match in self.matches).items()))

    @property
    def simplifications(self) -> dict[str, int]:
        """Simplifications by rule."""
        return dict(sorted(Counter(made.pattern for made in self.simplified).items()))

    @property
    def diff(self) -> Diff:
        """The structural difference between what came in and what came out."""
        return diff(self.original, self.rewritten)

    def show(self, out: Console) -> None:
        """Print what was fused, the time it took, what was checked, and the near misses."""
        title = f"fused for {self.target}"
        fused = table("pattern", ">count", "written as", ">nodes replaced", title=title, boxed=True)
        for pattern, count in self.counts.items():
            members = [match for match in self.matches if match.pattern == pattern]
            operators = dict.fromkeys(op.replace("::", ".") for match in members for op in match.operators)
            replaced = sum(len(match.replaced) for match in members)
            fused.add_row(pattern, str(count), ", ".join(operators), str(replaced))
        out.print(fused if self.matches else "nothing was fused", markup=False)
        phases = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in self.timings.items() if seconds >= 0.005)
        took = f"{sum(self.timings.values()):.2f} s" + (f" ({phases})" if phases else "")
        if self.simplified:
            out.print("simplified: " + ", ".join(f"{count} {rule}" for rule, count in self.simplifications.items()))
        out.print(f"{self.nodes_before} nodes before, {self.nodes_after} after; {took}")
        for note in self.notes:
            out.print(f"note: {note}", markup=False)
        refused = [near for near in self.near_misses if any(miss.kind == "check" for miss in near.misses)]
        unchecked = [match for match in self.matches if match.checked is False]
        checked = sum(match.checked is True for match in self.matches)
        if checked or unchecked or refused:
            counts = {"checked": checked, "not checked": len(unchecked), "refused": len(refused)}
            out.print(", ".join(f"{count} {what}" for what, count in counts.items() if count or what == "checked"))
        for match in unchecked[:SHOWN]:
            out.print(f"not checked: {match.pattern} at {match.root}: {match.unchecked}", markup=False)
        if self.near_misses:
            missed = table("pattern", "at", "because", title="nearly, but not", boxed=True)
            for near in sorted(self.near_misses, key=lambda near: near not in refused)[:SHOWN]:
                missed.add_row(near.pattern, near.root, _because(near.misses))
            out.print(missed, markup=False)
        if len(self.near_misses) > SHOWN:
            out.print(f"and {len(self.near_misses) - SHOWN} more: see `fusion why`")


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
class Explanation(Report):
    """Where patterns match in a model, where they nearly do, and why not."""

    places: list[Place]

    def show(self, out: Console) -> None:
        """Print a table of the places."""
        shown = table("pattern", "at", "answer", "because", boxed=True)
        for place in self.places:
            because = _because(place.misses) if place.misses else f"{len(place.nodes)} nodes"
            shown.add_row(place.pattern, place.root, place.verdict.value, because)
        nothing = "no place in this model comes near: none of the operators it needs is there in the right company"
        out.print(shown if self.places else nothing, markup=False)


def _because(misses: tuple[Miss, ...]) -> str:
    unknown = " (a fact is missing)"
    return "; ".join(dict.fromkeys(m.text + (unknown if m.verdict is Verdict.UNKNOWN else "") for m in misses))


@paused_collection()
def optimize(
    source: Any,
    destination: str | os.PathLike[str] | None = None,
    *,
    target: str = "ort-cpu",
    opset: int | None = None,
    when: str = "legal",
    patterns: Iterable[Pattern | str] | None = None,
    same: Iterable[Sequence[str]] = (),
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
        same: groups of names of the inputs' dimensions that are one size in every run, where the model names each for
            itself: nothing in it proves that.
        check: run both sides of every rewrite on the same inputs, and undo those that differ: they are among the near
            misses then. A rewrite that cannot be run on its own stays, and says why in `Rewritten.unchecked`.

    Raises:
        ModelError: the source is no valid model.
        OutputError: the destination cannot be written; nothing is left there.
        TargetError, PatternError: unknown names.
        FusionError: no input has a dimension of a name in `same`.
    """
    if when != "legal":
        raise FusionError(f"when={when!r} is unknown: only 'legal' is there (fuse what is equal and has a kernel)")
    timings: dict[str, float] = {}

    @contextmanager
    def timed(phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        timings[phase] = time.perf_counter() - started

    with timed("load"):
        aim = target_named(target)
        chosen, rules = _chosen(patterns, aim)
        model = load(source)
        unify(model, same)
    notes = list(model.notes)
    if opset is not None:
        with timed("convert"):
            notes += filter(None, [convert(model, opset, aim)])
    with timed("index"):
        graph = Graph(model)
        before = sum(1 for _ in graph.nodes())
    rewriter = Rewriter(graph, chosen, aim, check=check)
    outcome = rewriter.outcome
    timings["simplify"] = _rewrite(rewriter, Simplifier(graph, rewriter.search.facts, rules, outcome.rewritten))
    timings.update(outcome.seconds)
    with timed("explain"):
        known = {miss.root for miss in outcome.near}
        near = [*outcome.near, *_explained(Explainer(rewriter.search), NEAR_MISSES, known)]
    after = sum(1 for _ in graph.nodes())
    rewriter.search.close()
    with timed("save"):
        graph.commit()
        if destination is not None:
            save(model, destination)
        written = None if destination is not None else model.export()
    rewritten = written if destination is None else destination
    fused = [made for made in outcome.rewritten if made.pattern not in RULES]
    simpler = [made for made in outcome.rewritten if made.pattern in RULES]
    return Result(aim.name, before, after, timings, fused, simpler, near, notes, written, source, rewritten)


@paused_collection()
def find(
    source: Any,
    patterns: Iterable[Pattern | str] | None = None,
    *,
    target: str = "ort-cpu",
    same: Iterable[Sequence[str]] = (),
) -> list[Place]:
    """The matches of patterns in a model, without rewriting it; also of patterns that the target has no emission for.

    Raises:
        ModelError, TargetError, PatternError, FusionError: as `optimize` does.
    """
    rewriter = _rewriter(source, patterns, target, same)
    return [place for place in _matches(rewriter, Explainer(rewriter.search)) if place.verdict is Verdict.YES]


@paused_collection()
def why(
    source: Any,
    pattern: Pattern | str | None = None,
    *,
    target: str = "ort-cpu",
    same: Iterable[Sequence[str]] = (),
) -> Explanation:
    """Where a pattern matches in a model and, for every place where it nearly does, what keeps it from it."""
    rewriter = _rewriter(source, None if pattern is None else [pattern], target, same)
    explainer = Explainer(rewriter.search)
    places = _matches(rewriter, explainer)
    matched = {place.root for place in places}
    for near in _explained(explainer, None, matched):
        places.append(Place(near.pattern, near.root, verdict_of(near.misses), near.misses))
    return Explanation(places)


def _rewrite(rewriter: Rewriter, simplifier: Simplifier) -> float:
    """Fuse and simplify until neither changes anything; return the seconds that simplifying took.

    Fusions come first: what they replace need not be simplified, and they see weights as the exporter wrote them.
    """
    seconds = 0.0
    rewriter.run()
    for _ in range(ROUNDS):
        started = time.perf_counter()
        changed = simplifier.run()
        seconds += time.perf_counter() - started
        if not changed:
            break
        fused = len(rewriter.outcome.rewritten)
        rewriter.search.forget()
        rewriter.run()
        if len(rewriter.outcome.rewritten) == fused:
            break
    rewriter.run(last=True)
    return seconds


def _rewriter(
    source: Any, patterns: Iterable[Pattern | str] | None, target: str, same: Iterable[Sequence[str]]
) -> Rewriter:
    aim = target_named(target)
    chosen, rules = _chosen(patterns, aim)
    if rules and patterns is not None:
        raise PatternError(f"{', '.join(rules)}: a simplification has no formula to look for")
    model = load(source)
    unify(model, same)
    return Rewriter(Graph(model), chosen, aim)


def _matches(rewriter: Rewriter, explainer: Explainer) -> list[Place]:
    places: list[Place] = []
    for candidate, unmet in rewriter.found():
        pattern, root = candidate.plan.pattern, candidate.root
        if not unmet:
            explainer.covered.update(candidate.region.core)
        # What is refused may be what was left of a larger match that others read.
        misses = (*unmet, *explainer.privacy(pattern, root)) if unmet else ()
        verdict = verdict_of(misses) if misses else Verdict.YES
        nodes = tuple(node.label for node in candidate.region.core)
        places.append(Place(pattern.name, root.name, verdict, misses, nodes))
    return places


def _explained(explainer: Explainer, limit: int | None, known: set[str]) -> list[NearMiss]:
    """The nearest misses around anchors; with a limit, only around so many of a pattern, and while its steps last."""
    found: dict[tuple[str, str], NearMiss] = {}
    for plan in explainer.search.plans:
        if limit is not None and plan.pattern.is_last:
            continue  # any product is nearly one of these
        end = explainer.steps + STEPS
        for anchor in explainer.anchors(plan) if limit is None else explainer.search.anchors(plan)[:limit]:
            if limit is not None and explainer.steps > end:
                break
            for near in explainer.explain(plan, anchor):
                key = (near.pattern, near.root)
                if near.root not in known and (key not in found or near.unmet < found[key].unmet):
                    found[key] = near
    return list(found.values())


def library() -> dict[str, Pattern]:
    """The patterns that ship with the package, by name."""
    registry: dict[str, Pattern] = importlib.import_module("fusion.patterns").registry()
    return registry


def _chosen(patterns: Iterable[Pattern | str] | None, aim: Target) -> tuple[Sequence[Pattern], Sequence[str]]:
    """The patterns asked for, and the names of the simplifications.

    Where nothing is asked for: of the library those that can be written for the target, and all simplifications.
    """
    known = library()
    if patterns is None:
        fit = [pattern for pattern in known.values() if not set(aim.names).isdisjoint(pattern.targets)]
        return fit, list(RULES)
    chosen: list[Pattern] = []
    rules: list[str] = []
    for pattern in patterns:
        if isinstance(pattern, Pattern):
            chosen.append(pattern)
        elif pattern in known:
            chosen.append(known[pattern])
        elif pattern in RULES or pattern == GROUP:
            rules.extend(RULES if pattern == GROUP else [pattern])
        else:
            names = [*known, GROUP, *RULES]
            close = difflib.get_close_matches(pattern, names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise PatternError(f"there is no pattern {pattern!r}{hint} Known: {', '.join(names)}")
    return chosen, rules
