"""What is different between two models, as structure: nodes, initializers, interfaces, opsets, and what became what.

Nodes are the same node where they have the same operator and compute the value of the same name, or do the same to the
same values under another name. What only one model has is grouped into regions: these nodes became those.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnx import AttributeProto, ModelProto, NodeProto
from rich.console import Console

from fusion.diff_regions import Region, operator_name
from fusion.diff_scopes import ScopeDiff, scopes
from fusion.model import Model, load

LISTED = 20  # how many entries of one kind a terminal shows


@dataclass(slots=True)
class Diff:
    """The structural difference of two models.

    Attributes:
        scopes: the scopes that differ, the main graph first.
        opsets: domain → version before and after, where they differ (None: not imported).
        operators_before, operators_after: how often each operator occurs, in all scopes.
    """

    scopes: list[ScopeDiff] = field(default_factory=list)
    opsets: dict[str, tuple[int | None, int | None]] = field(default_factory=dict)
    operators_before: dict[str, int] = field(default_factory=dict)
    operators_after: dict[str, int] = field(default_factory=dict)

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
    def regions(self) -> list[Region]:
        """The regions of all scopes."""
        return [region for scope in self.scopes for region in scope.regions]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data, ready for JSON; removed and added nodes are in their regions."""
        return {
            "nodes_before": self.nodes_before,
            "nodes_after": self.nodes_after,
            "operators_before": self.operators_before,
            "operators_after": self.operators_after,
            "opsets": {domain: list(versions) for domain, versions in self.opsets.items()},
            "scopes": [scope.to_dict() for scope in self.scopes],
        }

    def to_json(self) -> str:
        """Return `to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def to_html(self, path: str | os.PathLike[str], *, title: str = "Model difference", limit: int = 60) -> None:
        """Write a page that shows the regions side by side; it needs no other file.

        Args:
            path: file to write; it appears only when it is complete.
            title: headline of the page.
            limit: how many regions are drawn; the page says how many more there are.

        Raises:
            OutputError: the file cannot be written.
        """
        from fusion.diff_page import write  # only who wants a page pays for its libraries

        write(self, Path(path), title, limit)

    def print(self, console: Console | None = None) -> None:
        """Print the difference: operators, regions by kind, then what changed elsewhere."""
        from fusion.diff_text import show

        show(self, console or Console(), LISTED)


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
    return compare_models(load(a, validate=False), load(b, validate=False))


def compare_models(a: Model, b: Model) -> Diff:
    """Compare two loaded models; see `diff`."""
    before, after = ({o.domain: o.version for o in m.proto.opset_import} for m in (a, b))
    opsets = {d: (before.get(d), after.get(d)) for d in {**before, **after} if before.get(d) != after.get(d)}
    return Diff(scopes(a, b), opsets, _histogram(a.proto), _histogram(b.proto))


def _histogram(model: ModelProto) -> dict[str, int]:
    counts: Counter[str] = Counter()
    todo: list[Iterable[NodeProto]] = [model.graph.node, *(f.node for f in model.functions)]
    while todo:
        for node in todo.pop():
            counts[operator_name(node)] += 1
            for attribute in node.attribute:
                if attribute.type == AttributeProto.GRAPH:
                    todo.append(attribute.g.node)
                elif attribute.type == AttributeProto.GRAPHS:
                    todo += [g.node for g in attribute.graphs]
    return dict(sorted(counts.items()))
