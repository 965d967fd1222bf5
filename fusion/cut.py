"""Cutting: a part of a graph as a model of its own, to be run apart from the rest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, ValueInfoProto, helper, numpy_helper

from fusion.errors import ModelError
from fusion.facts import Facts
from fusion.graph import Graph, Node, Value

Array = np.ndarray[Any, Any]

FED = 1 << 20
"""Bytes above which a constant is fed instead of written into the cut: a serialized model holds 2 GB."""


class Unchecked(Exception):
    """Two sides of a rewrite cannot be compared; the message says why."""


@dataclass(slots=True)
class Cut:
    """A part of a graph as a model of its own.

    Attributes:
        model: the model.
        inputs: the values that have to be fed, by name.
        asked: names of those inputs of which only the shape is asked.
        fed: constants that are fed because they are large.
    """

    model: ModelProto
    inputs: dict[str, Value]
    asked: set[str]
    fed: dict[str, Array]


def cut(graph: Graph, facts: Facts, outputs: Sequence[Value], stops: Iterable[Value]) -> Cut:
    """Return the model that computes `outputs` from `stops`, from constants, and from what side paths read.

    Where only the shape of a value is asked for, nothing behind the value is needed: it becomes an input. So does what
    If, Loop and Scan compute. Payloads are read here, and the graph's edits need not be committed.

    Raises:
        Unchecked: the element type or the rank of an input is unknown, or a payload cannot be read.
    """
    return _Cutter(graph, facts, set(stops)).run(outputs)


class _Cutter:
    def __init__(self, graph: Graph, facts: Facts, stops: set[Value]) -> None:
        self.graph = graph
        self.facts = facts
        self.stops = stops
        self.nodes: dict[Node, None] = {}
        self.inputs: dict[str, Value] = {}
        self.constants: dict[str, Array] = {}
        self.asked: list[Value] = []

    def run(self, outputs: Sequence[Value]) -> Cut:
        for output in outputs:
            assert output.producer is not None
            self._collect(output.producer)
        asked: set[str] = set()
        while self.asked:
            value = self.asked.pop()
            if value.producer in self.nodes or value.name in self.inputs:
                continue
            if self.facts.shape(value) is None:
                self._reach(value)
            else:
                self.inputs[value.name] = value
                asked.add(value.name)
        fed = {name: array for name, array in self.constants.items() if array.nbytes > FED}
        weights = [numpy_helper.from_array(array, name) for name, array in self.constants.items() if name not in fed]
        inputs = [self._declared(value) for value in self.inputs.values()]
        inputs.extend(
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in fed.items()
        )
        made = helper.make_graph(self._protos(), "cut", inputs, [self._declared(value) for value in outputs], weights)
        versions = {"": 1, **dict.fromkeys((node.domain for node in self.nodes), 1), **outputs[0].scope.opsets}
        shell = self.graph.model.proto
        imports = [helper.make_opsetid(domain, version) for domain, version in versions.items()]
        model = helper.make_model(made, opset_imports=imports, functions=list(shell.functions))
        model.ir_version = shell.ir_version
        return Cut(model, self.inputs, asked, fed)

    def _collect(self, last: Node) -> None:
        """Take in a node and what it needs."""
        stack = [last]
        while stack:
            node = stack.pop()
            if node in self.nodes:
                continue
            self.nodes[node] = None
            for value in node.inputs:
                if value is not None and node.key in ("Shape", "Size"):
                    self.asked.append(value)
                elif value is not None:
                    stack.extend(self._behind(value))

    def _reach(self, value: Value) -> None:
        for node in self._behind(value):
            self._collect(node)

    def _behind(self, value: Value) -> list[Node]:
        """The node that has to compute a value; none where it is a constant or becomes an input."""
        if self.facts.is_constant(value):
            if value.name not in self.constants:
                self.constants[value.name] = self._payload(value)
        elif value in self.stops or value.producer is None or value.producer.bodies or value.name in self.inputs:
            self.inputs[value.name] = value
        else:
            return [value.producer]
        return []

    def _payload(self, value: Value) -> Array:
        try:
            array = self.facts.constant(value)
        except ModelError as error:
            raise Unchecked(str(error)) from None
        assert array is not None
        return array

    def _declared(self, value: Value) -> ValueInfoProto:
        dtype = self.facts.dtype(value)
        if dtype is None or self.facts.shape(value) is None:
            raise Unchecked(f"the {'element type' if dtype is None else 'rank'} of {value.name} is unknown")
        return helper.make_tensor_value_info(value.name, dtype, None)

    def _protos(self) -> list[NodeProto]:
        before = {
            node: [value.producer for value in node.inputs if value is not None and value.producer in self.nodes]
            for node in self.nodes
        }
        protos = []
        for node in TopologicalSorter(before).static_order():
            proto = NodeProto()
            proto.CopyFrom(node.proto)
            proto.input[:] = ["" if value is None else value.name for value in node.inputs]
            # One output of a Split may be an input of the cut while another one is computed.
            names = ["" if value is None else value.name for value in node.outputs]
            proto.output[:] = [f"{name} (not read)" if name in self.inputs else name for name in names]
            protos.append(proto)
        return protos
