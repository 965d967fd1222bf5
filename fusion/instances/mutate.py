"""Mutants: models that differ from a spelled pattern in one place. It must notice, or the change must not matter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, helper, numpy_helper

from fusion.instances.instance import Instance
from fusion.instances.sample import Array
from fusion.laws.draw import Draw

OTHER = {
    "Add": "Sub", "Sub": "Add", "Sum": "Max", "Mul": "Div", "Div": "Mul", "Neg": "Reciprocal", "Reciprocal": "Neg",
    "Sqrt": "Exp", "Erf": "Tanh", "Tanh": "Erf", "Sigmoid": "Tanh", "Softmax": "LogSoftmax",
    "ReduceMean": "ReduceMax", "ReduceSum": "ReduceMax", "ReduceSumSquare": "ReduceL1", "ReduceL2": "ReduceL1",
}  # fmt: skip
"""For an operator another one with as many inputs and the same attributes."""

PRIVACY = frozenset({"privacy"})

LAYOUTS = frozenset({"Reshape", "Squeeze", "Transpose", "Unsqueeze"})

ORDERED = frozenset({"Sub", "Div", "Pow", "MatMul", "Gemm"})


@dataclass(frozen=True, slots=True)
class Mutant:
    """A model with one change.

    Attributes:
        kind: constant, operator, attribute, order, value, dimension, shape, consumer, output or capture.
        change: what was changed, for messages.
        model: the changed model.
        feeds: its inputs.
        expects: the kinds of obligations one of which the change breaks, if it breaks any.
    """

    kind: str
    change: str
    model: ModelProto
    feeds: dict[str, Array]
    expects: frozenset[str]


class _NoPlace(Exception):
    """A model has no place for a change of this kind."""


def mutants_of(instance: Instance, draw: Draw) -> Iterator[Mutant]:
    """Yield one mutant of each kind that has a place in the instance; `draw` chooses the place."""
    for kind, (mutate, expects) in KINDS.items():
        change = _Change(instance, draw)
        try:
            text = mutate(change)
        except _NoPlace:
            continue
        yield Mutant(kind, text, change.model, change.feeds, expects | change.expects)


class _Change:
    """A copy of a model, and where it can be changed."""

    def __init__(self, instance: Instance, draw: Draw) -> None:
        self.model = ModelProto()
        self.model.CopyFrom(instance.model)
        self.feeds = dict(instance.feeds)
        self.draw = draw
        self.graph = self.model.graph
        inside = {*instance.interior, *instance.results}
        self.nodes = [node for node in self.graph.node if set(node.output) & inside]
        self.interior = [name for node in self.nodes for name in node.output if name not in instance.results]
        self.constants: dict[str, Array] = {t.name: numpy_helper.to_array(t) for t in self.graph.initializer}
        for node in self.graph.node:
            if node.op_type == "Constant":
                value = helper.get_attribute_value(node.attribute[0])
                array = np.float32(value) if isinstance(value, float) else numpy_helper.to_array(value)
                self.constants[node.output[0]] = np.asarray(array)
        self.expects: frozenset[str] = frozenset()

    def pick(self, places: Sequence[Any]) -> Any:
        """One of the places.

        Raises:
            _NoPlace: there are none.
        """
        if not places:
            raise _NoPlace
        return places[self.draw.index(len(places))]

    def node(self, places: Sequence[NodeProto]) -> NodeProto:
        """The node that is to be changed; what is left of a guard is a bias, and the scores have another reader."""
        node: NodeProto = self.pick(places)
        self.expects = PRIVACY if node.output[0] in _guards(self.graph) else frozenset()
        return node

    def read(self) -> str:
        """A value that is to have another reader. One that only rearranges stays then, and less is saved."""
        name: str = self.pick(self.interior)
        laid = any(name in node.output and node.op_type in LAYOUTS for node in self.nodes)
        self.expects = frozenset({"gain"}) if laid else frozenset()
        return name

    def weight(self, *, single: bool) -> tuple[str, Array]:
        """The name and the numbers of a constant inside, of one element or of several."""
        read = [name for node in self.nodes for name in node.input if name in self.constants]
        floats = [name for name in read if self.constants[name].dtype.kind in "fV"]
        name = self.pick([name for name in floats if (self.constants[name].size == 1) == single])
        return name, self.constants[name]

    def put(self, name: str, array: Array) -> None:
        """Store other numbers in the place of a constant."""
        for kept in [node for node in self.graph.node if name in node.output]:
            self.graph.node.remove(kept)
        for tensor in [tensor for tensor in self.graph.initializer if tensor.name == name]:
            self.graph.initializer.remove(tensor)
        self.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))

    def output(self, value: str) -> None:
        """Make a value an output of the graph."""
        self.graph.output.append(helper.make_empty_tensor_value_info(value))


def _guards(graph: GraphProto) -> set[str]:
    """The values by which a maximum is subtracted."""
    found: set[str] = set()
    for node in graph.node:
        if node.op_type == "ReduceMax" or found & set(node.input):
            found.update(node.output)
        if node.op_type in ("Softmax", "Exp"):
            break
    return found


# -- one change each --------------------------------------------------------------------------------------------------


def _constant(change: _Change) -> str:
    name, array = change.weight(single=True)
    number = float(array.reshape(-1)[0])
    factor = 0.5 if abs(number) > 1e4 else 1.5  # a mask's fill stays a finite number
    changed = number * factor if number else 0.25
    change.put(name, np.full_like(array, changed))
    return f"the constant {number:g} became {changed:g}"


def _operator(change: _Change) -> str:
    node = change.node([node for node in change.nodes if node.op_type in OTHER])
    was, node.op_type = node.op_type, OTHER[node.op_type]
    return f"{was} -> {node.output[0]} became {node.op_type}"


def _attribute(change: _Change) -> str:
    """Another axis to reduce or to normalise over; another factor."""
    places: dict[str, tuple[NodeProto, AttributeProto | None]] = {}
    for node in change.nodes:
        for item in node.attribute:
            if (node.op_type, item.name) in (("Softmax", "axis"), ("Gemm", "alpha")) or len(item.ints) == 1:
                places[node.output[0]] = node, item
        if node.op_type.startswith("Reduce") and len(node.input) > 1 and change.constants[node.input[1]].size == 1:
            places[node.output[0]] = node, None
    node = change.node([node for node, _ in places.values()])
    item = places[node.output[0]][1]
    if item is None:
        axes = change.constants[node.input[1]]
        change.put(node.input[1], np.where(axes == 0, 1, axes - 1).astype(axes.dtype))
    elif item.name == "alpha":
        item.f *= 1.5
    elif item.name == "axis":
        item.i = item.i - 1 if item.i else 1
    else:
        item.ints[0] = item.ints[0] - 1 if item.ints[0] else 1
    return f"{'axes' if item is None else item.name} of {node.op_type} -> {node.output[0]}"


def _order(change: _Change) -> str:
    node = change.node([node for node in change.nodes if node.op_type in ORDERED and len(set(node.input[:2])) == 2])
    node.input[0], node.input[1] = node.input[1], node.input[0]
    return f"the operands of {node.op_type} -> {node.output[0]} changed places"


def _value(change: _Change) -> str:
    """One of several uses of an input reads another input."""
    inputs = {value.name: value for value in change.graph.input}
    uses = [(node, slot) for node in change.nodes for slot, name in enumerate(node.input) if name in inputs]
    names = [node.input[slot] for node, slot in uses]
    node, slot = change.pick([use for use, name in zip(uses, names, strict=True) if names.count(name) > 1])
    was = node.input[slot]
    other = change.graph.input.add()
    other.CopyFrom(inputs[was])
    other.name = f"{was}_other"
    change.feeds[other.name] = np.flip(change.feeds[was]).copy()
    node.input[slot] = other.name
    return f"{node.op_type} -> {node.output[0]} reads {other.name} in place of {was}"


def _dimension(change: _Change) -> str:
    """A parameter that has 1 in place of an axis."""
    name, array = change.weight(single=False)
    changed = array[..., :1] if array.ndim == 1 or change.draw.choose(True, False) else array[:1]
    change.put(name, changed)
    return f"{name} of shape {list(array.shape)} became {list(changed.shape)}"


def _shape(change: _Change) -> str:
    """An input of which not even the rank is known."""
    value = change.pick(change.graph.input)
    value.type.tensor_type.ClearField("shape")
    return f"{value.name} declares no shape"


def _consumer(change: _Change) -> str:
    name = change.read()
    change.graph.node.append(helper.make_node("Relu", [name], ["read"]))
    change.output("read")
    return f"{name} is read by another node too"


def _output(change: _Change) -> str:
    name = change.read()
    change.output(name)
    return f"{name} is a graph output too"


def _capture(change: _Change) -> str:
    """The body of an If reads a value."""
    name = change.read()
    bodies = {}
    for branch in ("then_branch", "else_branch"):
        node = helper.make_node("Identity", [name], [f"{branch}_read"])
        result = helper.make_empty_tensor_value_info(f"{branch}_read")
        bodies[branch] = helper.make_graph([node], branch, [], [result])
    change.graph.initializer.append(numpy_helper.from_array(np.array(True), "condition"))
    change.graph.node.append(helper.make_node("If", ["condition"], ["read"], **bodies))
    change.output("read")
    return f"{name} is read inside the body of an If"


KINDS: Mapping[str, tuple[Callable[[_Change], str], frozenset[str]]] = {
    "constant": (_constant, frozenset({"constant", "operator"})),
    "operator": (_operator, frozenset({"operator", "constant", "arity"})),
    "attribute": (_attribute, frozenset({"attribute", "dimension", "constant", "same value", "operator"})),
    "order": (_order, frozenset({"operator", "constant", "arity", "dimension", "attribute", "same value"})),
    "value": (_value, frozenset({"same value", "operator", "arity"})),
    "dimension": (_dimension, frozenset({"dimension", "arity", "constant"})),
    "shape": (_shape, frozenset({"dimension"})),
    "consumer": (_consumer, PRIVACY),
    "output": (_output, PRIVACY),
    "capture": (_capture, PRIVACY),
}
"""How each kind is made, and the obligations one of which it breaks.

What is reduced over another axis lies in other axes than where it is used again, so it may be another value there, or
not the maximum that is wanted.
"""
