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
from fusion.models.graph import Graph, Node, Value

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
    chosen: dict[Node, None] = {}
    inputs: dict[str, Value] = {}
    constants: dict[str, Array] = {}
    asked: set[str] = set()
    ends = set(stops)
    shapes: list[Value] = []
    pending = [output.producer for output in outputs if output.producer is not None]
    while pending or shapes:
        if pending:
            node = pending.pop()
            if node in chosen:
                continue
            chosen[node] = None
            read = [value for value in node.inputs if value is not None]
            if node.key in ("Shape", "Size"):
                shapes.extend(read)
                continue
        else:
            value = shapes.pop()
            if value.producer in chosen or value.name in inputs:
                continue
            if facts.shape(value) is not None:
                inputs[value.name] = value
                asked.add(value.name)
                continue
            read = [value]
        for value in read:
            if facts.is_constant(value):
                if value.name not in constants:
                    constants[value.name] = _payload(facts, value)
            elif value in ends or value.producer is None or value.producer.bodies or value.name in inputs:
                inputs[value.name] = value
            else:
                pending.append(value.producer)
    fed = {name: array for name, array in constants.items() if array.nbytes > FED}
    weights = [numpy_helper.from_array(array, name) for name, array in constants.items() if name not in fed]
    declared = [_declared(facts, value) for value in inputs.values()]
    declared.extend(
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in fed.items()
    )
    results = [_declared(facts, value) for value in outputs]
    made = helper.make_graph(_protos(chosen, inputs), "cut", declared, results, weights)
    versions = {"": 1, **dict.fromkeys((node.domain for node in chosen), 1), **outputs[0].scope.opsets}
    shell = graph.model.proto
    imports = [helper.make_opsetid(domain, version) for domain, version in versions.items()]
    model = helper.make_model(made, opset_imports=imports, functions=list(shell.functions))
    model.ir_version = shell.ir_version
    return Cut(model, inputs, asked, fed)


def _payload(facts: Facts, value: Value) -> Array:
    try:
        array = facts.constant(value)
    except ModelError as error:
        raise Unchecked(str(error)) from None
    assert array is not None
    return array


def _declared(facts: Facts, value: Value) -> ValueInfoProto:
    dtype = facts.dtype(value)
    if dtype is None or facts.shape(value) is None:
        raise Unchecked(f"the {'element type' if dtype is None else 'rank'} of {value.name} is unknown")
    return helper.make_tensor_value_info(value.name, dtype, None)


def _protos(nodes: dict[Node, None], inputs: dict[str, Value]) -> list[NodeProto]:
    """The nodes in an order in which they can run, with the names that their values have now."""
    before = {node: [v.producer for v in node.inputs if v is not None and v.producer in nodes] for node in nodes}
    protos = []
    for node in TopologicalSorter(before).static_order():
        proto = NodeProto()
        proto.CopyFrom(node.proto)
        proto.input[:] = ["" if value is None else value.name for value in node.inputs]
        # One output of a Split may be an input of the cut while another one is computed.
        names = ["" if value is None else value.name for value in node.outputs]
        proto.output[:] = [f"{name} (not read)" if name in inputs else name for name in names]
        protos.append(proto)
    return protos
