"""The edits of a simplification: each one journalled, recorded, and such that outputs keep their names.

No rule touches the graph itself. `Editor.forward` lets one value stand for another, `Editor.settle` makes a value a
constant, `Editor.respell` gives a value another producer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableSequence, Sequence
from functools import partial
from typing import Any

import numpy as np
from onnx import FunctionProto, NodeProto, TensorProto, numpy_helper

from fusion.facts import Facts
from fusion.models.graph import Graph, Node, Scope, Value
from fusion.models.index import is_read
from fusion.simplify.purity import Removable
from fusion.writing.apply import PATTERN, REPLACED
from fusion.writing.outcome import Rewritten

Array = np.ndarray[Any, Any]

INITIALIZERS_ALONE = 4
"""The IR version from which an initializer need not be an input, which anybody may override, as well."""


class Editor:
    """Edits one graph, and remembers them.

    Attributes:
        graph, facts: what is edited, and what is known about it.
        rewritten: where what is done is noted.
        count: how many edits there were.
    """

    def __init__(self, graph: Graph, facts: Facts, rewritten: list[Rewritten]) -> None:
        self.graph = graph
        self.facts = facts
        self.rewritten = rewritten
        self.count = 0
        self._constants: dict[object, Value] = {}
        self.removable = Removable(graph)
        proto = graph.model.proto
        self.has_initializers = proto.ir_version >= INITIALIZERS_ALONE
        self.annotated = {
            name
            for annotation in proto.graph.quantization_annotation
            for name in (annotation.tensor_name, *(entry.value for entry in annotation.quant_parameter_tensor_names))
        }

    def record(self, rule: str, root: str, node: Node | None, operators: Sequence[str] = ()) -> None:
        """Remember one simplification."""
        self.count += 1
        scope = node.scope.name if node is not None else self.graph.main.name
        replaced = () if node is None else (node.label,)
        self.rewritten.append(Rewritten(rule, root, tuple(operators), replaced, scope))

    # -- what rules ask for -----------------------------------------------------------------------------------------

    def forward(self, rule: str, old: Value, new: Value) -> bool:
        """Let `new`, which equals it in every run, stand for `old`; False where a name would be lost.

        An output of the graph keeps its name: what computes `new` then computes `old` under that name.
        """
        node = old.producer
        if old is new or {old.name, new.name} & self.annotated or (node is None and old.tensor is None):
            return False
        if old.is_output and (
            new.is_output or new.producer is None or new.scope is not old.scope or node is None or len(node.outputs) > 1
        ):
            return False
        reads, stands = (new, old) if old.is_output else (old, new)
        if any(
            reader.scope is not stands.scope and reader.scope.find(stands.name) is not stands for reader in reads.uses
        ):
            return False
        with self.graph.transaction():
            self.record(rule, old.name, node)
            self.redirect(reads, stands)
            if old.is_output:
                assert new.producer is not None
                self._rename(new, old)
            self.sweep([] if node is None else [node])
            self.drop(old)
        return True

    def is_held(self, value: Value) -> bool:
        """Whether a constant of this name needs a Constant node: functions and old models have no initializers."""
        return isinstance(value.scope.proto, FunctionProto) or value.is_output or not self.has_initializers

    def settle(self, rule: str, value: Value, tensor: TensorProto) -> bool:
        """Make `value` a constant: an initializer of the same name, or a Constant node where there can be none."""
        node = value.producer
        if node is None or value.name in self.annotated:
            return False
        with self.graph.transaction():
            named = TensorProto()
            named.CopyFrom(tensor)
            named.name = value.name
            held = self.is_held(value)
            self.record(rule, value.name, node, ("Constant",) if held else ())
            if held:
                named.ClearField("name")
                made = self.graph.add_node(value.scope, "Constant", [], [value], at=node, attributes={"value": named})
                self._say_where_from(made, rule, node)
            else:
                self._detach(value, node)
                self._own(value, named)
            self.facts.recomputed([value])
            self.sweep([node])
        return True

    def respell(
        self, rule: str, node: Node, op: str, inputs: Sequence[Value | None], attributes: dict[str, object]
    ) -> Node:
        """Let another node compute the only output of `node`; it keeps the name and what was said about it."""
        output = node.outputs[0]
        assert output is not None
        with self.graph.transaction():
            self.record(rule, output.name, node, (op,))
            made = self.graph.add_node(
                node.scope, op, inputs, [output], at=node, name=node.proto.name, attributes=attributes
            )
            made.proto.doc_string = node.proto.doc_string
            made.proto.metadata_props.extend(p for p in node.proto.metadata_props if p.key not in (PATTERN, REPLACED))
            self._say_where_from(made, rule, node)
            self.facts.recomputed([output])
            self.sweep([node])
        return made

    def rewire(self, rule: str, node: Node, slot: int, value: Value) -> None:
        """Let `node` read `value` at an input, and what fed it before go if nobody else reads it."""
        old = node.inputs[slot]
        assert old is not None
        with self.graph.transaction():
            output = next(output.name for output in node.outputs if output is not None)
            self.record(rule, output, node, (node.key,))
            self._set_input(node, slot, value)
            self._say_where_from(node, rule, node)
            self.sweep([] if old.producer is None else [old.producer])
            self.drop(old)

    def constant(self, scope: Scope, array: Array, hint: str, at: Node) -> Value:
        """A new constant of the scope, or an equal one that was added before."""
        key = (scope, array.dtype.str, array.shape, array.tobytes())
        known = self._constants.get(key)
        if known is not None and scope.values.get(known.name) is known:
            return known
        tensor = numpy_helper.from_array(array, self.graph.fresh(f"fusion_{hint}"))
        if self.has_initializers:
            made = self.graph.add_initializer(scope, tensor, at)
        else:
            node = self.graph.add_node(scope, "Constant", [], [tensor.name], at=at, attributes={"value": tensor})
            made = node.outputs[0]  # type: ignore[assignment]
        self._constants[key] = made
        return made

    # -- what they are made of --------------------------------------------------------------------------------------

    def redirect(self, old: Value, new: Value) -> None:
        """Let every node that reads `old` read `new`."""
        for reader in list(old.uses):
            for slot, value in enumerate(reader.inputs):
                if value is old:
                    self._set_input(reader, slot, new)

    def sweep(self, nodes: Iterable[Node]) -> None:
        """Remove those of these nodes, and what feeds only them, that nobody reads and that do nothing else."""
        stack = list(nodes)
        while stack:
            node = stack.pop()
            if node not in node.scope.nodes or any(map(is_read, node.outputs)) or not self.removable(node):
                continue
            reads = [node, *_inside(node)]
            self.graph._remove(node)
            for value in (value for reader in reads for value in reader.inputs):
                if value is not None and not is_read(value):
                    if value.producer is not None:
                        stack.append(value.producer)
                    self.drop(value)

    def drop(self, value: Value) -> bool:
        """Remove an initializer if nobody reads it."""
        if is_read(value) or value.tensor is None or value.name in self.annotated:
            return False
        if value.scope.values.get(value.name) is not value:
            return False
        self.graph._drop(value)
        return True

    def _set_input(self, node: Node, slot: int, value: Value) -> None:
        old = node.inputs[slot]
        assert old is not None

        def put(new: Value, former: Value) -> None:
            node.inputs[slot] = new
            write_name(node.proto.input, slot, new)
            _count(former, node, -1)
            _count(new, node, 1)

        put(value, old)
        self.graph._journal(node.scope, partial(put, old, value))

    def _rename(self, value: Value, name: Value) -> None:
        """What computes `value`, which nobody reads any more, computes the graph output `name` instead."""
        node, slot, scope = value.producer, value.slot, value.scope
        assert node is not None
        self.graph._take_over(name, node, slot)
        node.outputs[slot] = name
        write_name(node.proto.output, slot, name)
        del scope.values[value.name]

        def undo() -> None:
            node.outputs[slot] = value
            write_name(node.proto.output, slot, value)
            scope.values[value.name] = value

        self.graph._journal(scope, undo)
        self.facts.recomputed([name])

    def _detach(self, value: Value, node: Node) -> None:
        slot = value.slot
        node.outputs[slot] = None
        value.producer = None

        def undo() -> None:
            node.outputs[slot] = value
            value.producer = node

        self.graph._journal(value.scope, undo)

    def _own(self, value: Value, tensor: TensorProto) -> None:
        value.tensor = tensor
        self.graph._journal(value.scope, partial(setattr, value, "tensor", None))

    def _say_where_from(self, node: Node, rule: str, replaced: Node) -> None:
        kept = [p for p in node.proto.metadata_props if p.key not in (PATTERN, REPLACED)]
        before = NodeProto(metadata_props=node.proto.metadata_props)
        del node.proto.metadata_props[:]
        node.proto.metadata_props.extend(kept)
        node.proto.metadata_props.add(key=PATTERN, value=rule)
        node.proto.metadata_props.add(key=REPLACED, value=replaced.label)

        def undo() -> None:
            del node.proto.metadata_props[:]
            node.proto.metadata_props.extend(before.metadata_props)

        self.graph._journal(node.scope, undo)


def _sees(reader: Node, value: Value) -> bool:
    return reader.scope is value.scope or reader.scope.find(value.name) is value


def _inside(node: Node) -> Iterator[Node]:
    """The nodes of the bodies of a node."""
    for body in node.bodies:
        for inner in body.nodes:
            yield inner
            yield from _inside(inner)


def _count(value: Value, node: Node, change: int) -> None:
    count = value.uses.get(node, 0) + change
    if count:
        value.uses[node] = count
    else:
        value.uses.pop(node, None)


def write_name(names: MutableSequence[str], slot: int, value: Value) -> None:
    """Say the name in the protobuf; a new node gets all of its names when the graph is committed."""
    if slot < len(names):
        names[slot] = value.name
