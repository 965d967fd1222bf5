"""A difference as a page: every region drawn twice, before and after. One file, nothing is loaded from elsewhere."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import networkx as nx

from fusion.diff import Diff
from fusion.diff_regions import NodeView, Region
from fusion.errors import OutputError

# Of the drawing, in pixels.
CHARACTER, PADDING, HEIGHT, ROW, GAP = 6.6, 8, 22, 46, 12
LARGEST_DRAWING = 200  # nodes; a larger region is only counted
SHOWN_NAME = 34  # characters


@dataclass(frozen=True, slots=True)
class Box:
    """A node, or a value at the border, in a drawing."""

    x: float
    y: float
    width: float
    text: str
    hint: str
    kind: str  # "node", "new", "value"


@dataclass(frozen=True, slots=True)
class Drawing:
    """One side of a region: boxes and the curves between them."""

    width: float
    height: float
    boxes: list[Box]
    curves: list[str]


def write(difference: Diff, path: Path, title: str, limit: int) -> None:
    """Write the page; see `Diff.to_html`."""
    text = render(difference, title, limit)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


def render(difference: Diff, title: str, limit: int) -> str:
    """Return the page as HTML; at most `limit` regions are drawn, those that something went in for first."""
    regions = sorted(difference.regions, key=lambda region: not region.added)
    shown = regions[:limit]
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(files("fusion").joinpath("data/diff.html.jinja").read_text("utf-8"))
    before, after = difference.operators_before, difference.operators_after
    operators = [(op, before.get(op, 0), after.get(op, 0)) for op in sorted({**before, **after})]
    return template.render(
        title=title,
        difference=difference,
        operators=[row for row in operators if row[1] != row[2]],
        kinds=Counter(region.kind for region in regions).most_common(),
        regions=[_section(region, number) for number, region in enumerate(shown, 1)],
        more=len(regions) - len(shown),
        total=len(regions),
        listed=200,
    )


def _section(region: Region, number: int) -> dict[str, Any]:
    return {
        "number": number,
        "kind": region.kind,
        "laws": ", ".join(region.laws),
        "before": _draw(region.removed, region, "node"),
        "after": _draw(region.added, region, "new"),
        "removed": _count(region.removed),
        "added": _count(region.added),
        "outputs": ", ".join(region.outputs),
    }


def _count(nodes: Sequence[NodeView]) -> str:
    return ", ".join(f"{op} ×{n}" if n > 1 else op for op, n in Counter(n.operator for n in nodes).items())


def _draw(nodes: Sequence[NodeView], region: Region, kind: str) -> Drawing | None:
    """Lay one side of a region out in layers, each node below what it reads."""
    if not nodes or len(nodes) > LARGEST_DRAWING:
        return None
    graph: nx.DiGraph[str] = nx.DiGraph()
    boxes: dict[str, tuple[str, str, str]] = {}
    maker: dict[str, str] = {}
    for i, node in enumerate(nodes):
        boxes[f"n{i}"] = (node.operator.rpartition("::")[2], _hint(node), kind)
        graph.add_node(f"n{i}")
        maker.update({name: f"n{i}" for name in node.outputs if name})
    for i, node in enumerate(nodes):
        for name in dict.fromkeys((*node.inputs, *node.captures)):
            if name in maker and maker[name] != f"n{i}":
                graph.add_edge(maker[name], f"n{i}")
            elif name in region.inputs:
                boxes[f"i{name}"] = (_short(name), name, "value")
                graph.add_edge(f"i{name}", f"n{i}")
    for name in region.outputs:
        if name in maker:
            boxes[f"o{name}"] = (_short(name), name, "value")
            graph.add_edge(maker[name], f"o{name}")
    layers = [sorted(layer, key=list(boxes).index) for layer in nx.topological_generations(graph)]
    _sink_inputs(graph, layers)
    return _place([layer for layer in layers if layer], graph, boxes)


def _sink_inputs(graph: nx.DiGraph[str], layers: list[list[str]]) -> None:
    """Move what nothing precedes down to just above its first reader, so that edges stay short."""
    level = {name: depth for depth, layer in enumerate(layers) for name in layer}
    for name in [name for name in layers[0] if graph.out_degree(name)]:
        wanted = min(level[reader] for reader in graph.successors(name)) - 1
        if wanted > 0:
            layers[0].remove(name)
            layers[wanted].append(name)


def _place(layers: list[list[str]], graph: nx.DiGraph[str], boxes: dict[str, tuple[str, str, str]]) -> Drawing:
    widths = {name: len(boxes[name][0]) * CHARACTER + 2 * PADDING for name in boxes}
    totals = [sum(widths[n] for n in layer) + GAP * (len(layer) - 1) for layer in layers]
    width = max(totals)
    centre: dict[str, float] = {}
    for layer, total in zip(layers, totals, strict=True):
        # Each box as near below its sources as its neighbours leave room: that crosses few edges.
        wish = {n: _mean((centre[p] for p in graph.predecessors(n) if p in centre), width / 2) for n in layer}
        layer.sort(key=wish.__getitem__)
        x = (width - total) / 2
        for name in layer:
            centre[name] = x + widths[name] / 2
            x += widths[name] + GAP
    row = {name: depth * ROW for depth, layer in enumerate(layers) for name in layer}
    drawn = [Box(centre[n] - widths[n] / 2, row[n], widths[n], *boxes[n]) for layer in layers for n in layer]
    return Drawing(width, (len(layers) - 1) * ROW + HEIGHT, drawn, [_curve(centre, row, a, b) for a, b in graph.edges])


def _curve(centre: dict[str, float], row: dict[str, int], a: str, b: str) -> str:
    top, bottom = row[a] + HEIGHT, row[b]
    half = (top + bottom) / 2
    return f"M{centre[a]:.0f} {top} C{centre[a]:.0f} {half:.0f} {centre[b]:.0f} {half:.0f} {centre[b]:.0f} {bottom}"


def _mean(numbers: Iterable[float], default: float) -> float:
    values = list(numbers)
    return sum(values) / len(values) if values else default


def _hint(node: NodeView) -> str:
    lines = [node.label, *(f"{name} = {value}" for name, value in node.attributes.items())]
    return "\n".join([*lines, "reads " + ", ".join(node.inputs), "gives " + ", ".join(node.outputs)])


def _short(name: str) -> str:
    return name if len(name) <= SHOWN_NAME else "…" + name[1 - SHOWN_NAME :]
