"""A difference as text for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fusion.diff import Diff
from fusion.diff_regions import NodeView, Region
from fusion.diff_scopes import ScopeDiff


def show(difference: Diff, console: Console, limit: int) -> None:
    """Print `difference`; of every list at most `limit` entries, and how many more there are."""
    if difference.empty:
        console.print("no difference", style="green")
        return
    console.print(Text(f"nodes {difference.nodes_before} → {difference.nodes_after}", style="bold"))
    used = {op.rpartition("::")[0] for op in {**difference.operators_before, **difference.operators_after}}
    for domain, (before, after) in difference.opsets.items():
        if None in (before, after) and domain not in used:
            continue  # imports that no node needs
        words = [str(version) if version is not None else "not imported" for version in (before, after)]
        console.print(f"opset of {domain or 'ai.onnx'}: {' → '.join(words)}", highlight=False)
    _operators(difference, console, limit)
    for scope in difference.scopes:
        _scope(scope, console, limit, titled=len(difference.scopes) > 1 or scope.name != "main")


def _operators(difference: Diff, console: Console, limit: int) -> None:
    before, after = difference.operators_before, difference.operators_after
    changes = {op: (before.get(op, 0), after.get(op, 0)) for op in {**before, **after}}
    rows = [(op, x, y) for op, (x, y) in changes.items() if x != y]
    if not rows:
        return
    # What came in first, then what went, the largest numbers first.
    rows.sort(key=lambda row: (row[1] > row[2], -abs(row[1] - row[2]), row[0]))
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("operator")
    for title in ("before", "after"):
        table.add_column(title, justify="right")
    for op, x, y in rows[:limit]:
        table.add_row(escape(op), str(x or "–"), str(y or "–"), style="green" if y > x else "")
    console.print(table)
    _more(len(rows) - limit, "operators", console)


def _scope(scope: ScopeDiff, console: Console, limit: int, titled: bool) -> None:
    if titled:
        console.print(Text(f"\n{scope.name}", style="bold"))
    _list((_sentence(s) for s in scope.interface), len(scope.interface), "interface changes", console, limit)
    _regions(scope.regions, console, limit)
    changed = (_sentence(f"~ {c.after.label}: {'; '.join(c.changes)}") for c in scope.changed)
    _list(changed, len(scope.changed), "changed nodes", console, limit // 2)
    weights = scope.initializers
    if weights:
        said = Counter(
            change.split(":")[0].split(" ")[0] if change != "values changed" else change for change in weights.values()
        )
        console.print(f"initializers: {', '.join(f'{n} {what}' for what, n in said.items())}", highlight=False)
        others = [
            f"~ {name}: {change}" for name, change in weights.items() if not change.startswith(("added", "removed"))
        ]
        _list((_sentence(s) for s in others), len(others), "initializers", console, limit)


def _regions(regions: Sequence[Region], console: Console, limit: int) -> None:
    """One row per kind of region, the same operators for the same operators; one for all that went for nothing."""
    if not regions:
        return
    kinds: dict[tuple[str, str, str], list[Region]] = {}
    for region in regions:
        if region.added:
            key = (region.pattern, _operators_of(region.added), _operators_of(region.removed))
            kinds.setdefault(key, []).append(region)
    gone = [node for region in regions if not region.added for node in region.removed]
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("regions", justify="right")
    table.add_column("became")
    table.add_column("from")
    for (pattern, new, old), members in list(kinds.items())[:limit]:
        became = Text(f"{pattern}: {new}" if pattern else new, style="green")
        table.add_row(str(len(members)), became, Text(old))
    if gone:
        table.add_row("", Text("nothing", style="dim"), Text(_operators_of(gone)))
    console.print(table)
    _more(len(kinds) - limit, "kinds of regions", console)


def _operators_of(nodes: Iterable[NodeView]) -> str:
    counts = Counter(n.operator for n in nodes)
    listed = [f"{op} ×{n}" if n > 1 else op for op, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    shown = ", ".join(listed[:12])
    return f"{shown}, … ({sum(counts.values())} nodes)" if len(listed) > 12 else shown or "–"


def _sentence(text: str) -> Text:
    return Text(text, overflow="fold")


def _list(lines: Iterable[Text], count: int, what: str, console: Console, limit: int) -> None:
    for number, line in enumerate(lines):
        if number == limit:
            break
        console.print(line)
    _more(count - limit, what, console)


def _more(count: int, what: str, console: Console) -> None:
    if count > 0:
        console.print(f"… and {count} more {what}", style="dim", highlight=False)
