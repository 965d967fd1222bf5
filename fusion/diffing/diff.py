"""What is different between two models, as structure: nodes, initializers, interfaces, opsets, and what became what.

Nodes are the same node where they have the same operator and compute the value of the same name, or do the same to the
same values under another name. What only one model has is grouped into regions: these nodes became those.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from rich.text import Text

from fusion.diffing.regions import NodeView, Region, operator_name
from fusion.diffing.scopes import ScopeDiff, all_nodes, opsets, scopes
from fusion.models.model import Model, load
from fusion.report import Report, table

LISTED = 20  # how many entries of one kind a terminal shows
LISTED_OPERATORS = 12  # of one region


@dataclass(slots=True)
class Diff(Report):
    """The structural difference of two models.

    Attributes:
        operators_before, operators_after: how often each operator occurs, in all scopes.
        opsets: domain → version before and after, where they differ (None: not imported).
        scopes: the scopes that differ, the main graph first.
    """

    operators_before: dict[str, int]
    operators_after: dict[str, int]
    opsets: dict[str, tuple[int | None, int | None]]
    scopes: list[ScopeDiff]

    DERIVED: ClassVar[tuple[str, ...]] = ("nodes_before", "nodes_after")

    @property
    def empty(self) -> bool:
        """Whether nothing differs."""
        return not (self.scopes or self.opsets)

    @property
    def nodes_before(self) -> int:
        """Number of nodes of the first model, in all scopes."""
        return sum(self.operators_before.values())

    @property
    def nodes_after(self) -> int:
        """Number of nodes of the second model, in all scopes."""
        return sum(self.operators_after.values())

    @property
    def operators(self) -> list[tuple[str, int, int]]:
        """The operators that do not occur as often in both models, with both numbers."""
        before, after = self.operators_before, self.operators_after
        both = [(op, before.get(op, 0), after.get(op, 0)) for op in sorted({**before, **after})]
        return [row for row in both if row[1] != row[2]]

    @property
    def regions(self) -> list[Region]:
        """The regions of all scopes."""
        return [region for scope in self.scopes for region in scope.regions]

    def to_html(self, path: str | os.PathLike[str], *, title: str = "Model difference", limit: int = 60) -> None:
        """Write a page that shows the regions side by side; it needs no other file.

        Args:
            path: file to write; it appears only when it is complete.
            title: headline of the page.
            limit: how many regions are drawn; the page says how many more there are.

        Raises:
            OutputError: the file cannot be written.
        """
        from fusion.diffing.page import write  # only who wants a page pays for its libraries

        write(self, Path(path), title, limit)

    def show(self, out: Console) -> None:
        """Print the difference: operators, regions by kind, then what changed elsewhere."""
        if self.empty:
            out.print("no difference", style="green")
            return
        out.print(f"nodes {self.nodes_before} → {self.nodes_after}", style="bold", highlight=False)
        used = {op.rpartition("::")[0] for op in {**self.operators_before, **self.operators_after}}
        for domain, versions in self.opsets.items():
            if None not in versions or domain in used:  # else an import that no node needs
                words = ["not imported" if version is None else str(version) for version in versions]
                _line(out, f"opset of {domain or 'ai.onnx'}: {' → '.join(words)}")
        if self.operators:
            shown = table("operator", ">before", ">after")
            # What came in first, then what went, the largest numbers first.
            rows = sorted(self.operators, key=lambda row: (row[1] > row[2], -abs(row[1] - row[2]), row[0]))
            for op, before, after in rows[:LISTED]:
                shown.add_row(op, str(before or "–"), str(after or "–"), style="green" if after > before else "")
            out.print(shown, markup=False)
            _more(out, len(rows) - LISTED, "operators")
        for scope in self.scopes:
            if len(self.scopes) > 1 or scope.name != "main":
                out.print(Text(f"\n{scope.name}", style="bold"))
            _show_scope(scope, out)


def diff(a: Any, b: Any) -> Diff:
    """Compare two models as structures; nothing is run.

    Args:
        a: the model before: a path, bytes, ModelProto, gs.Graph or onnx_ir.Model. It need not be valid.
        b: the model after.

    Returns:
        The difference. Names of nodes, doc strings and metadata are no difference.

    Raises:
        ModelError: one of them cannot be read.
    """
    first, second = load(a, validate=False), load(b, validate=False)
    before, after = opsets(first.proto), opsets(second.proto)
    versions = {d: (before.get(d), after.get(d)) for d in {**before, **after} if before.get(d) != after.get(d)}
    return Diff(_histogram(first), _histogram(second), versions, scopes(first, second))


def operators_of(nodes: Iterable[NodeView]) -> str:
    """Return the operators of nodes, the frequent ones first: "Mul ×2, Add"; empty where there are none."""
    counts = Counter(n.operator for n in nodes)
    listed = [f"{op} ×{n}" if n > 1 else op for op, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    more = f", … ({sum(counts.values())} nodes)" if len(listed) > LISTED_OPERATORS else ""
    return ", ".join(listed[:LISTED_OPERATORS]) + more


def _histogram(model: Model) -> dict[str, int]:
    bodies = (model.proto.graph, *model.proto.functions)
    return dict(sorted(Counter(operator_name(node) for body in bodies for node in all_nodes(body.node)).items()))


def _show_scope(scope: ScopeDiff, out: Console) -> None:
    _list(out, scope.interface, "interface changes", LISTED)
    if scope.regions:
        # One row per kind of region, the same operators for the same operators; one for all that went for nothing.
        kinds = Counter((r.pattern, operators_of(r.added), operators_of(r.removed)) for r in scope.regions if r.added)
        shown = table(">regions", "became", "from")
        for (pattern, new, old), count in list(kinds.items())[:LISTED]:
            shown.add_row(str(count), Text(f"{pattern}: {new}" if pattern else new, style="green"), old or "–")
        if gone := operators_of(node for region in scope.regions if not region.added for node in region.removed):
            shown.add_row("", Text("nothing", style="dim"), gone)
        out.print(shown, markup=False, highlight=False)
        _more(out, len(kinds) - LISTED, "kinds of regions")
    _list(out, [f"~ {c.after.label}: {'; '.join(c.changes)}" for c in scope.changed], "changed nodes", LISTED // 2)
    if weights := scope.initializers:
        # "added: float[2]" and "float[2] became float[3]" count by their first word.
        said = Counter(w if w == "values changed" else w.split(":")[0].split(" ")[0] for w in weights.values())
        _line(out, f"initializers: {', '.join(f'{n} {what}' for what, n in said.items())}")
        others = [f"~ {name}: {w}" for name, w in weights.items() if not w.startswith(("added", "removed"))]
        _list(out, others, "initializers", LISTED)


def _list(out: Console, lines: list[str], what: str, limit: int) -> None:
    for line in lines[:limit]:
        out.print(Text(line, overflow="fold"))
    _more(out, len(lines) - limit, what)


def _more(out: Console, count: int, what: str) -> None:
    if count > 0:
        _line(out, f"… and {count} more {what}", "dim")


def _line(out: Console, text: str, style: str = "") -> None:
    out.print(text, style=style, markup=False, highlight=False)
