"""A difference as a page: every region drawn twice, before and after. One file, nothing is loaded from elsewhere."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2
import networkx as nx

from fusion.diffing.diff import Diff, operators_of
from fusion.diffing.regions import NodeView, Region
from fusion.errors import OutputError

# Of the drawing, in pixels.
CHARACTER, PADDING, HEIGHT, ROW, GAP = 6.6, 8, 22, 46, 12
LARGEST_DRAWING = 200  # nodes; a larger region is only counted
SHOWN_NAME, SHOWN_NUMBER = 34, 22  # characters
LISTED = 200  # other changes of one kind

SIZED = frozenset(
    {
        "Expand",
        "Pad",
        "ReduceMax",
        "ReduceMean",
        "ReduceSum",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
        "Unsqueeze",
    }
)
"""Operators whose inputs but the first are sizes and axes."""


def write(difference: Diff, path: Path, title: str, limit: int) -> None:
    """Write the page, the regions that something went in for first; see `Diff.to_html`."""
    regions = sorted(difference.regions, key=lambda region: not region.added)
    text = _template().render(
        title=title,
        difference=difference,
        kinds=Counter(region.kind for region in regions).most_common(),
        regions=regions[:limit],
        draw=draw,
        more=len(regions) - limit,
        total=len(regions),
        listed=LISTED,
    )
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["operators"] = operators_of
    return environment.from_string(files("fusion").joinpath("data/diff.html.jinja").read_text("utf-8"))


def draw(nodes: Sequence[NodeView], region: Region, kind: str) -> dict[str, Any] | None:
    """Lay one side of a region out in layers, each node below what it reads, in boxes of a kind ("node" or "new").

    What only computes sizes and axes is counted, and not drawn.

    Returns:
        Width, height, boxes, the curves between them, and how many nodes are not drawn; None where there are no nodes,
        too many, or a circle of them.
    """
    every, nodes = nodes, _without_sizes(nodes, region.outputs)
    if not nodes or len(nodes) > LARGEST_DRAWING:
        return None
    graph: nx.DiGraph[str] = nx.DiGraph()

    def box(key: str, text: str, hint: str, kind: str) -> str:
        graph.add_node(key, text=text, hint=hint, kind=kind, width=len(text) * CHARACTER + 2 * PADDING)
        return key

    maker = {name: f"n{i}" for i, node in enumerate(nodes) for name in node.outputs if name}
    for i, node in enumerate(nodes):
        box(f"n{i}", _caption(node), _hint(node), kind)
    for i, node in enumerate(nodes):
        for name in node.reads:
            if maker.get(name, f"n{i}") != f"n{i}":
                graph.add_edge(maker[name], f"n{i}")
            elif name in region.inputs:
                graph.add_edge(box(f"i{name}", _short(name), name, "value"), f"n{i}")
    for name in region.outputs:
        if name in maker:
            graph.add_edge(maker[name], box(f"o{name}", _short(name), name, "value"))
    if not nx.is_directed_acyclic_graph(graph):
        return None
    order = {key: i for i, key in enumerate(graph)}
    layers = [sorted(layer, key=order.__getitem__) for layer in nx.topological_generations(graph)]
    # What nothing precedes sinks to just above its first reader, so that edges stay short.
    level = {key: depth for depth, layer in enumerate(layers) for key in layer}
    for key in [key for key in layers[0] if graph.out_degree(key)]:
        wanted = min(level[reader] for reader in graph.successors(key)) - 1
        layers[0].remove(key)
        layers[wanted].append(key)
    return _place(graph, [layer for layer in layers if layer]) | {"sizes": len(every) - len(nodes)}


def _without_sizes(nodes: Sequence[NodeView], outputs: Sequence[str]) -> list[NodeView]:
    """The nodes, in order, but for those of which nothing is used but as sizes and axes."""
    uses: dict[str, list[tuple[int, bool]]] = {name: [] for name in outputs}
    for reader, node in enumerate(nodes):
        for slot, name in enumerate(node.inputs):
            uses.setdefault(name, []).append((reader, slot > 0 and node.operator in SIZED))
    hidden: set[int] = set()
    for index in reversed(range(len(nodes))):
        given = [name for name in nodes[index].outputs if name]
        read = [use for name in given for use in uses.get(name, ())]
        if read and not set(given) & set(outputs) and all(sized or reader in hidden for reader, sized in read):
            hidden.add(index)
    return [node for index, node in enumerate(nodes) if index not in hidden]


def _place(graph: nx.DiGraph[str], layers: list[list[str]]) -> dict[str, Any]:
    boxes = graph.nodes
    totals = [sum(boxes[key]["width"] + GAP for key in layer) - GAP for layer in layers]
    width = max(totals)
    for depth, (layer, total) in enumerate(zip(layers, totals, strict=True)):
        # Each box as near below its sources as its neighbours leave room: that crosses few edges.
        sources = {key: [_centre(boxes[source]) for source in graph.predecessors(key)] for key in layer}
        layer.sort(key=lambda key: fmean(sources[key] or [width / 2]))
        x = (width - total) / 2
        for key in layer:
            boxes[key].update(x=x, y=depth * ROW)
            x += boxes[key]["width"] + GAP
    curves = [_curve(boxes[a], boxes[b]) for a, b in graph.edges]
    drawn = [boxes[key] for layer in layers for key in layer]
    return {"width": width, "height": (len(layers) - 1) * ROW + HEIGHT, "boxes": drawn, "curves": curves}


def _centre(box: dict[str, Any]) -> float:
    return float(box["x"] + box["width"] / 2)


def _curve(a: dict[str, Any], b: dict[str, Any]) -> str:
    start, top, end, bottom = _centre(a), a["y"] + HEIGHT, _centre(b), b["y"]
    half = (top + bottom) / 2
    return f"M{start:.0f} {top} C{start:.0f} {half:.0f} {end:.0f} {half:.0f} {end:.0f} {bottom}"


def _caption(node: NodeView) -> str:
    """What is written into a node's box: its operator, or the number that it is."""
    number = next(iter(node.attributes.values()), "") if node.operator == "Constant" else ""
    return number if 0 < len(number) <= SHOWN_NUMBER else node.operator.rpartition("::")[2]


def _hint(node: NodeView) -> str:
    lines = [node.label, *(f"{name} = {value}" for name, value in node.attributes.items())]
    return "\n".join([*lines, "reads " + ", ".join(node.inputs), "gives " + ", ".join(node.outputs)])


def _short(name: str) -> str:
    return name if len(name) <= SHOWN_NAME else "…" + name[1 - SHOWN_NAME :]
