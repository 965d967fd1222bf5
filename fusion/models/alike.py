"""Dimensions that are one: a model may name each axis for itself, and only its user knows which of them are equal."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence

from onnx import GraphProto, TensorShapeProto

from fusion.errors import FusionError
from fusion.models.model import Model


def unify(model: Model, same: Iterable[Sequence[str]]) -> None:
    """Give the dimensions of each group the name of its first one, wherever the main graph declares them.

    Raises:
        FusionError: no input has a dimension of that name.
    """
    graph = model.proto.graph
    known = list(dict.fromkeys(dim.dim_param for dim in _dims(graph, "input") if dim.dim_param))
    names: dict[str, str] = {}
    for group in same:
        for name in group:
            if name not in known:
                close = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise FusionError(f"no input has a dimension {name!r}{hint} There are {', '.join(known) or 'none'}")
        first = names.get(group[0], group[0])
        names |= dict.fromkeys(group, first) | {old: first for old, new in names.items() if new in group}
    for dim in _dims(graph, "input", "output", "value_info"):
        if dim.dim_param in names:
            dim.dim_param = names[dim.dim_param]


def _dims(graph: GraphProto, *kinds: str) -> Iterator[TensorShapeProto.Dimension]:
    for kind in kinds:
        for info in getattr(graph, kind):
            yield from info.type.tensor_type.shape.dim
