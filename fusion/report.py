"""What a person reads: tables of what was fused, of what nearly was, and why not."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from fusion.api import Explanation, Result
    from fusion.rewrite import NearMiss
    from fusion.state import Miss

SHOWN = 12
"""How many near misses a table shows; the JSON has all."""


def print_result(result: Result, console: Console | None = None) -> None:
    """Print what was fused, the near misses, and the time it took."""
    out = console or Console()
    table = Table(title=f"fused for {result.target}", title_justify="left")
    table.add_column("pattern")
    table.add_column("count", justify="right")
    table.add_column("written as")
    table.add_column("nodes replaced", justify="right")
    written: dict[str, Counter[str]] = {}
    replaced: Counter[str] = Counter()
    for match in result.matches:
        written.setdefault(match.pattern, Counter()).update(match.operators)
        replaced[match.pattern] += len(match.replaced)
    for pattern, count in result.counts.items():
        operators = ", ".join(_short(operator) for operator in written[pattern])
        table.add_row(pattern, str(count), operators, str(replaced[pattern]))
    if result.matches:
        out.print(table)
    else:
        out.print("nothing was fused")
    out.print(f"{result.nodes_before} nodes before, {result.nodes_after} after; {_seconds(result.timings)}")
    for note in result.notes:
        out.print(f"note: {note}", markup=False)
    _print_checks(result, out)
    if result.near_misses:
        missed = Table(title="nearly, but not", title_justify="left")
        for column in ("pattern", "at", "because"):
            missed.add_column(column, overflow="fold")
        for near in sorted(result.near_misses, key=lambda near: not _is_refused(near))[:SHOWN]:
            missed.add_row(near.pattern, near.root, _because(near.misses))
        out.print(missed)
        if len(result.near_misses) > SHOWN:
            out.print(f"and {len(result.near_misses) - SHOWN} more: see `fusion why`")


def _print_checks(result: Result, out: Console) -> None:
    """Print how many rewrites were run before and after, which were undone, and which could not be run."""
    checked = sum(match.checked is True for match in result.matches)
    unchecked = [match for match in result.matches if match.checked is False]
    refused = sum(_is_refused(near) for near in result.near_misses)
    if checked or unchecked or refused:
        counts = {"checked": checked, "not checked": len(unchecked), "refused": refused}
        out.print(", ".join(f"{count} {what}" for what, count in counts.items() if count or what == "checked"))
    for match in unchecked[:SHOWN]:
        out.print(f"not checked: {match.pattern} at {match.root}: {match.unchecked}", markup=False)


def _is_refused(near: NearMiss) -> bool:
    return any(miss.kind == "check" for miss in near.misses)


def print_explanation(explanation: Explanation, console: Console | None = None) -> None:
    """Print where patterns match and what is unmet where they nearly do."""
    out = console or Console()
    table = Table(show_lines=False)
    for column in ("pattern", "at", "answer", "because"):
        table.add_column(column, overflow="fold")
    for place in explanation.places:
        because = f"{len(place.nodes)} nodes" if not place.misses else _because(place.misses)
        table.add_row(place.pattern, place.root, place.verdict.value, because)
    if explanation.places:
        out.print(table)
    else:
        out.print("no place in this model comes near: none of the operators it needs is there in the right company")


def result_to_dict(result: Result) -> dict[str, Any]:
    """The result as JSON."""
    return {
        "target": result.target,
        "notes": result.notes,
        "counts": result.counts,
        "nodes_before": result.nodes_before,
        "nodes_after": result.nodes_after,
        "timings": {phase: round(seconds, 6) for phase, seconds in result.timings.items()},
        "matches": [
            {
                "pattern": match.pattern,
                "root": match.root,
                "scope": match.scope,
                "operators": list(match.operators),
                "replaced": list(match.replaced),
                "checked": match.checked,
                "unchecked": match.unchecked,
            }
            for match in result.matches
        ],
        "near_misses": [
            {"pattern": near.pattern, "root": near.root, "misses": _misses(near.misses)} for near in result.near_misses
        ],
    }


def explanation_to_dict(explanation: Explanation) -> dict[str, Any]:
    """The explanation as JSON."""
    return {
        "places": [
            {
                "pattern": place.pattern,
                "root": place.root,
                "verdict": place.verdict.value,
                "nodes": list(place.nodes),
                "misses": _misses(place.misses),
            }
            for place in explanation.places
        ]
    }


def _misses(misses: tuple[Miss, ...]) -> list[dict[str, Any]]:
    return [
        {"kind": miss.kind, "text": miss.text, "verdict": miss.verdict.value, "place": miss.place} for miss in misses
    ]


def _because(misses: tuple[Miss, ...]) -> str:
    texts = [miss.text + (" (a fact is missing)" if miss.verdict.value == "unknown" else "") for miss in misses]
    return "; ".join(dict.fromkeys(texts))


def _short(operator: str) -> str:
    return operator.replace("com.microsoft::", "com.microsoft.")


def _seconds(timings: dict[str, float]) -> str:
    total = sum(timings.values())
    parts = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in timings.items() if seconds >= 0.005)
    return f"{total:.2f} s" + (f" ({parts})" if parts else "")
