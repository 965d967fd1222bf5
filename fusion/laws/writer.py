"""Writer: collects the nodes and constants of a graph that is being spelled, as an exporter of one opset writes them.

Axes have names here. A value's axes are groups of labels: `("B",)` is the axis B, `("H", "D")` are two axes merged into
one, `()` is an axis of size 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from fusion.laws.draw import Draw

Group = tuple[str, ...]
Axes = tuple[Group, ...]

AXES_SINCE = {"Squeeze": 13, "Unsqueeze": 13, "ReduceSum": 13}
"""The opset from which on an operator takes its axes as an input; 18 for the other reductions."""


@dataclass(frozen=True, slots=True)
class Written:
    """A value of the graph being written."""

    name: str
    axes: Axes
    dtype: int

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of all axes, in order."""
        return tuple(label for group in self.axes for label in group)


class Writer:
    """Nodes in order, constants and inputs of one graph.

    Args:
        draw: chooses among equal ways to write a node.
        opset: of the standard operators.
        dtype: the element type that is computed in.
        sizes: of every label.
        dynamic: label → name of the symbol that is declared in place of its size.
    """

    def __init__(
        self, draw: Draw, *, opset: int, dtype: int, sizes: Mapping[str, int], dynamic: Mapping[str, str] | None = None
    ) -> None:
        self.draw = draw
        self.opset = opset
        self.dtype = dtype
        self.sizes = dict(sizes)
        self.dynamic = dict(dynamic or {})
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []
        self.inputs: list[ValueInfoProto] = []
        self.types: dict[str, int] = {}
        """The element type of every value that a node computes."""
        self._where: dict[str, tuple[str, int]] = {}
        self._count = 0

    def shape(self, axes: Axes) -> tuple[int, ...]:
        """The sizes of axes."""
        return tuple(prod(self.sizes[label] for label in group) for group in axes)

    def extent(self, group: Group) -> int | None:
        """The size of an axis, None where it is not declared."""
        return None if any(label in self.dynamic for label in group) else prod(self.sizes[label] for label in group)

    def fresh(self, hint: str) -> str:
        """A name that is not taken."""
        self._count += 1
        return f"{hint}_{self._count}"

    # -- values -------------------------------------------------------------------------------------------------------

    def input(self, name: str, axes: Axes, dtype: int | None = None) -> Written:
        """A graph input."""
        kind = self.dtype if dtype is None else dtype
        self.inputs.append(self.info(name, axes, kind))
        for index, group in enumerate(axes):
            if len(group) == 1:
                self._where.setdefault(self.dynamic.get(group[0], group[0]), (name, index))
        return Written(name, axes, kind)

    def info(self, name: str, axes: Axes, dtype: int) -> ValueInfoProto:
        """The declaration of a value."""
        dims: list[int | str] = []
        for group in axes:
            extent = self.extent(group)
            dims.append("_".join(self.dynamic.get(label, label) for label in group) if extent is None else extent)
        return helper.make_tensor_value_info(name, dtype, dims)

    def stored(self, name: str, axes: Axes, array: np.ndarray[Any, Any]) -> Written:
        """A weight."""
        self.initializers.append(numpy_helper.from_array(array, name))
        return Written(name, axes, helper.np_dtype_to_tensor_dtype(array.dtype))

    def number(self, value: float, rank: int = 0, dtype: int | None = None) -> Written:
        """A constant number that broadcasts to a value of this rank without making it larger."""
        kind = self.dtype if dtype is None else dtype
        shape = self.draw.choose((), (1,), (1,) * rank)[:rank] if rank else ()
        array = np.full(shape, value, helper.tensor_dtype_to_np_dtype(kind))
        return Written(self.constant(array), ((),) * len(shape), kind)

    def integers(self, items: Sequence[int]) -> str:
        """A constant list of integers, such as axes or a shape."""
        return self.constant(np.array(items, np.int64))

    def constant(self, array: np.ndarray[Any, Any]) -> str:
        """A constant, as an initializer or as a node."""
        name = self.fresh("c")
        form = self.draw.choose("initializer", "node", "attribute")
        if form == "attribute" and self.opset >= 12 and array.dtype == np.float32 and array.ndim == 0:
            self.nodes.append(helper.make_node("Constant", [], [name], value_float=float(array)))
        elif form == "initializer":
            self.initializers.append(numpy_helper.from_array(array, name))
        else:
            self.nodes.append(helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array, name)))
        return name

    # -- nodes --------------------------------------------------------------------------------------------------------

    def node(self, op: str, inputs: Iterable[Written | str], result: Axes, /, **attributes: Any) -> Written:
        """Append a node whose one output has the axes `result`.

        Args:
            attributes: those that are None are left out; `dtype` is the element type of the output, where it is not
                that of the first input, and `domain` the operator's.
        """
        operands = list(inputs)
        names = [operand if isinstance(operand, str) else operand.name for operand in operands]
        dtype, domain = attributes.pop("dtype", None), attributes.pop("domain", "")
        if dtype is None:
            dtype = next((operand.dtype for operand in operands if isinstance(operand, Written)), self.dtype)
        output = self.fresh(op.lower())
        self.types[output] = dtype
        given = {name: value for name, value in attributes.items() if value is not None}
        self.nodes.append(helper.make_node(op, names, [output], domain=domain, **given))
        return Written(output, result, dtype)

    def along(self, op: str, value: Written, axes: Sequence[int], result: Axes, **attributes: Any) -> Written:
        """Append a node that works along axes: in an attribute or input by opset, from the front or the back."""
        rank = len(result) if op == "Unsqueeze" else len(value.axes)
        listed = self.signed(axes, rank)
        if self.opset >= AXES_SINCE.get(op, 18):
            return self.node(op, [value, self.integers(listed)], result, **attributes)
        return self.node(op, [value], result, axes=listed, **attributes)

    def signed(self, axes: Sequence[int], rank: int) -> list[int]:
        """The same axes, all counted from the front or all from the back."""
        return [axis - rank for axis in axes] if self.draw.choose(False, True) else list(axes)

    def size(self, group: Group) -> str | None:
        """The size of an axis as a list of one, computed from shapes; None where no input has its labels as axes."""
        found = [self._where.get(self.dynamic.get(label, label)) for label in group]
        known = [place for place in found if place is not None]
        if len(known) < len(found):
            return None
        total: Written | None = None
        for name, axis in known:
            shape = self.node("Shape", [name], ((),), dtype=TensorProto.INT64)
            part = self.node("Gather", [shape, self.constant(np.array(axis, np.int64))], (), axis=0)
            total = part if total is None else self.node("Mul", [total, part], ())
        assert total is not None, "an axis whose size is computed has a label"
        return self.along("Unsqueeze", total, [0], ((),)).name

    def model(self, outputs: Iterable[ValueInfoProto], nodes: Sequence[NodeProto] | None = None) -> ModelProto:
        """What was written, as a model with these outputs; `nodes` in place of those written."""
        body = self.nodes if nodes is None else nodes
        graph = helper.make_graph(body, "spelled", self.inputs, list(outputs), self.initializers)
        domains = sorted({node.domain for node in body} - {""})
        opsets = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
        version = helper.find_min_ir_version_for([helper.make_opsetid("", self.opset)])
        return helper.make_model(graph, opset_imports=opsets, ir_version=max(version, 8))
