"""Mutants: models that differ from a spelled pattern in one place. It must notice, or the change must not matter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from fusion.draw import Draw

Array = np.ndarray[Any, np.dtype[Any]]

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


def mutants_of(
    model: ModelProto, feeds: Mapping[str, Array], interior: Sequence[str], results: Sequence[str], draw: Draw
) -> Iterator[Mutant]:
    """Yield one mutant of each kind that has a place in the model.

    Args:
        model: a spelled pattern.
        feeds: its inputs.
        interior: values inside the formula.
        results: values that it computes.
        draw: chooses the place.
    """
    for kind, (mutate, expects) in KINDS.items():
        change = _Change(model, feeds, interior, results, draw)
        text = mutate(change)
        if text:
            yield Mutant(kind, text, change.model, change.feeds, expects | change.expects)


class _Change:
    """A copy of a model, and where it can be changed."""

    def __init__(
        self,
        model: ModelProto,
        feeds: Mapping[str, Array],
        interior: Sequence[str],
        results: Sequence[str],
        draw: Draw,
    ) -> None:
        self.model = ModelProto()
        self.model.CopyFrom(model)
        self.feeds = dict(feeds)
        self.draw = draw
        self.graph = self.model.graph
        inside = {*interior, *results}
        self.nodes = [node for node in self.graph.node if set(node.output) & inside]
        self.interior = [name for node in self.nodes for name in node.output if name not in results]
        self.expects: frozenset[str] = frozenset()
        self.guards = _guards(self.graph)

    def at(self, node: NodeProto) -> NodeProto:
        """The node that is to be changed; what is left of a guard is a bias, and the scores have another reader."""
        self.expects = PRIVACY if node.output[0] in self.guards else frozenset()
        return node

    def pick(self, places: Sequence[Any]) -> Any:
        """One of the places, None where there are none."""
        return places[self.draw.index(len(places))] if places else None

    def read(self) -> Any:
        """A value that is to have another reader. One that only rearranges stays then, and less is saved."""
        name = self.pick(self.interior)
        laid = any(name in node.output and node.op_type in LAYOUTS for node in self.nodes)
        self.expects = frozenset({"gain"}) if laid else frozenset()
        return name

    def constants(self) -> dict[str, tuple[Callable[[Array], None], Array]]:
        """By name each constant's value, and how to set it."""
        found: dict[str, tuple[Callable[[Array], None], Array]] = {}
        for tensor in self.graph.initializer:
            found[tensor.name] = (_setter(tensor), numpy_helper.to_array(tensor))
        for node in self.graph.node:
            if node.op_type == "Constant":
                item = node.attribute[0]
                array = np.array(item.f, np.float32) if item.name == "value_float" else numpy_helper.to_array(item.t)
                found[node.output[0]] = (_replacer(node), array)
        return found

    def output(self, value: str) -> None:
        """Make a value an output of the graph."""
        self.graph.output.append(helper.make_empty_tensor_value_info(value))


def _guards(graph: GraphProto) -> set[str]:
    """The values by which a maximum is subtracted."""
    found: set[str] = set()
    for node in graph.node:
        if node.op_type == "ReduceMax" or found & set(node.input):
            found.update(node.output)
        if node.op_type == "Softmax":
            break
    return found


def _setter(tensor: TensorProto) -> Callable[[Array], None]:
    def put(array: Array) -> None:
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

    return put


def _replacer(node: NodeProto) -> Callable[[Array], None]:
    def put(array: Array) -> None:
        del node.attribute[:]
        node.attribute.append(helper.make_attribute("value", numpy_helper.from_array(array)))

    return put


# -- one change each --------------------------------------------------------------------------------------------------


def _constant(change: _Change) -> str:
    constants = change.constants()
    read = [name for node in change.nodes for name in node.input if name in constants]
    places = [name for name in read if constants[name][1].size == 1 and constants[name][1].dtype.kind in "fV"]
    name = change.pick(places)
    if name is None:
        return ""
    put, array = constants[name]
    factor = 0.5 if np.abs(array) > 1e4 else 1.5  # a mask's fill stays a finite number
    changed = (array * factor + (0.25 if float(array.reshape(-1)[0]) == 0.0 else 0.0)).astype(array.dtype)
    put(changed)
    return f"the constant {float(array.reshape(-1)[0]):g} became {float(changed.reshape(-1)[0]):g}"


def _operator(change: _Change) -> str:
    node = change.pick([node for node in change.nodes if node.op_type in OTHER])
    if node is None:
        return ""
    was, change.at(node).op_type = node.op_type, OTHER[node.op_type]
    return f"{was} -> {node.output[0]} became {node.op_type}"


def _attribute(change: _Change) -> str:
    """Another axis to reduce or to normalise over; another factor; another permutation of as many axes."""
    constants = change.constants()
    places: list[tuple[NodeProto, AttributeProto | None]] = []
    for node in change.nodes:
        for item in node.attribute:
            if (node.op_type, item.name) in (("Softmax", "axis"), ("Gemm", "alpha")) or len(item.ints) == 1:
                places.append((node, item))
        if node.op_type.startswith("Reduce") and len(node.input) > 1 and constants[node.input[1]][1].size == 1:
            places.append((node, None))
    node, item = change.pick(places) or (None, None)
    if node is None:
        return ""
    if item is None:
        put, axes = constants[change.at(node).input[1]]
        put(np.where(axes == 0, 1, axes - 1).astype(axes.dtype))
        return f"the axes of {node.op_type} -> {node.output[0]}"
    change.at(node)
    if item.name == "alpha":
        item.f *= 1.5
    elif item.name == "axis":
        item.i = item.i - 1 if item.i else 1
    else:
        item.ints[0] = item.ints[0] - 1 if item.ints[0] else 1
    return f"{item.name} of {node.op_type} -> {node.output[0]}"


def _order(change: _Change) -> str:
    node = change.pick([node for node in change.nodes if node.op_type in ORDERED and len(set(node.input[:2])) == 2])
    if node is None:
        return ""
    change.at(node).input[0], node.input[1] = node.input[1], node.input[0]
    return f"the operands of {node.op_type} -> {node.output[0]} changed places"


def _value(change: _Change) -> str:
    """One of several uses of an input reads another input."""
    inputs = {value.name: value for value in change.graph.input}
    uses = [(node, slot) for node in change.nodes for slot, name in enumerate(node.input) if name in inputs]
    repeated = [use for use in uses if sum(other.input[slot] == use[0].input[use[1]] for other, slot in uses) > 1]
    place = change.pick(repeated)
    if place is None:
        return ""
    node, slot = place
    was = node.input[slot]
    other = change.graph.input.add()
    other.CopyFrom(inputs[was])
    other.name = f"{was}_other"
    change.feeds[other.name] = np.flip(change.feeds[was]).copy()
    node.input[slot] = other.name
    return f"{node.op_type} -> {node.output[0]} reads {other.name} in place of {was}"


def _dimension(change: _Change) -> str:
    """A parameter that lacks an axis, or that has one more."""
    constants = change.constants()
    read = [name for node in change.nodes for name in node.input if name in constants]
    places = [name for name in read if constants[name][1].size > 1 and constants[name][1].dtype.kind in "fV"]
    name = change.pick(places)
    if name is None:
        return ""
    put, array = constants[name]
    changed = array[..., :1] if array.ndim == 1 or change.draw.choose(True, False) else array[:1]
    put(np.ascontiguousarray(changed))
    return f"{name} of shape {list(array.shape)} became {list(changed.shape)}"


def _shape(change: _Change) -> str:
    """An input of which not even the rank is known."""
    value = change.pick(change.graph.input)
    if value is None:
        return ""
    value.type.tensor_type.ClearField("shape")
    return f"{value.name} declares no shape"


def _consumer(change: _Change) -> str:
    name = change.read()
    if name is None:
        return ""
    change.graph.node.append(helper.make_node("Relu", [name], ["read"]))
    change.output("read")
    return f"{name} is read by another node too"


def _output(change: _Change) -> str:
    name = change.read()
    if name is None:
        return ""
    change.output(name)
    return f"{name} is a graph output too"


def _capture(change: _Change) -> str:
    """The body of an If reads a value."""
    name = change.read()
    if name is None:
        return ""
    bodies = {
        f"{branch}_branch": helper.make_graph(
            [helper.make_node("Identity", [name], [f"{branch}_read"])],
            branch,
            [],
            [helper.make_empty_tensor_value_info(f"{branch}_read")],
        )
        for branch in ("then", "else")
    }
    change.graph.initializer.append(numpy_helper.from_array(np.array(True), "condition"))
    change.graph.node.append(helper.make_node("If", ["condition"], ["read"], **bodies))
    change.output("read")
    return f"{name} is read inside the body of an If"


KINDS: Mapping[str, tuple[Callable[[_Change], str], frozenset[str]]] = {
    "constant": (_constant, frozenset({"constant", "operator"})),
    "operator": (_operator, frozenset({"operator", "constant", "arity"})),
    "attribute": (_attribute, frozenset({"attribute", "dimension", "constant", "same value"})),
    "order": (_order, frozenset({"operator", "constant", "arity", "dimension", "attribute"})),
    "value": (_value, frozenset({"same value", "operator", "arity"})),
    "dimension": (_dimension, frozenset({"dimension", "arity", "constant"})),
    "shape": (_shape, frozenset({"dimension"})),
    "consumer": (_consumer, PRIVACY),
    "output": (_output, PRIVACY),
    "capture": (_capture, PRIVACY),
}
"""How each kind is made, and the obligations one of which it breaks.

What is reduced over another axis lies in other axes than where it is used again, so it may be another value there.
"""
