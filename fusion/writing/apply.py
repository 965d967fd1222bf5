"""Applying a rewrite: new nodes go in, the region goes out, and the new nodes say where they come from."""

from __future__ import annotations

from collections.abc import Sequence

from onnx import TensorProto

from fusion.laws import contraction, powers, reduction, ring
from fusion.models.graph import Graph, Node, Scope, Value
from fusion.writing.found import Found, New, NewNode, Operand
from fusion.writing.place import before

PATTERN, REPLACED, LAWS = "fusion.pattern", "fusion.replaced", "fusion.laws"
"""Keys of the provenance in a node's `metadata_props`."""


def apply(graph: Graph, found: Found, nodes: Sequence[NewNode], results: Sequence[New]) -> list[Node]:
    """Write one match; return the new nodes. Nothing is changed if it fails half way."""
    with graph.transaction():
        return _Application(graph, found).write(nodes, results)


class _Application:
    def __init__(self, graph: Graph, found: Found) -> None:
        self.graph = graph
        self.found = found
        self.scope: Scope = found.node.scope
        self.values: dict[int, Value] = {}

    def write(self, nodes: Sequence[NewNode], results: Sequence[New]) -> list[Node]:
        found = self.found
        finals, region, at = found.finals, found.region, found.place
        targets = {id(result): value for result, value in zip(results, finals, strict=False)}
        made: list[Node] = []
        told: list[Node] = []  # what is told may be of use only to what goes
        read = {id(operand) for new in nodes for operand in new.inputs}
        for new in nodes:
            inputs = [self.value(operand) for operand in new.inputs]
            if new.shared and id(new.outputs[0]) not in targets:
                made.extend(self._shared(new, inputs, new.asking or at))
                continue
            if new.asking is not None:
                name = self.graph.fresh(f"fusion_{new.op}")
                told.append(self._add(new, inputs, list(new.asking.outputs), new.asking, name))
                continue
            outputs: list[str | Value | None] = []
            for slot, output in enumerate(new.outputs):
                target = targets.get(id(output))
                if target is not None and (target is found.root or found.is_read(target)):
                    outputs.append(target)
                else:
                    named = slot < new.least or (target is None and id(output) in read)
                    outputs.append(self.graph.fresh(f"{found.root.name}_{new.op}") if named else None)
            name = self.graph.fresh(f"{found.plan.pattern.name}_{found.root.name}")
            node = self._add(new, inputs, outputs, at, name)
            for output, value in zip(new.outputs, node.outputs, strict=True):
                if value is not None:
                    self.values[id(output)] = value
            self._say_where_from(node)
            made.append(node)
        self.graph.remove_dead([*region.core, *region.prefix, *self._idle(), *region.asking, *told])
        for value in finals[1:]:
            assert value.producer in made or not value.uses, "a kept value has a new producer"
        return [node for node in (*made, *told) if node in self.scope.nodes]

    def _idle(self) -> list[Node]:
        """The readers of private values outside the region; a match is only there if they are of no use but to it."""
        inside = {*self.found.region.core, *self.found.region.prefix}
        idle: dict[Node, None] = {}
        private = [value for node in self.found.region.core for value in node.outputs]
        for value in private:
            for reader in value.uses if value is not None else ():
                if reader not in inside and reader not in idle:
                    idle[reader] = None
                    private.extend(reader.outputs)
        return list(idle)

    def value(self, operand: Operand) -> Value | None:
        """The value of an operand; a new constant is added, or found where an equal one was added before."""
        if operand is None or isinstance(operand, Value):
            return operand
        known = self.values.get(id(operand))
        if known is not None:
            return known
        if operand.parts:
            constant = self._packed(operand)
        else:
            assert operand.tensor is not None, "a new node's inputs are made before it"
            constant = self._constant(operand.tensor)
        self.values[id(operand)] = constant
        return constant

    def _packed(self, operand: New) -> Value:
        """Weights that are put together, or multiplied, when the model is written."""
        first = operand.parts[0][0].name or "packed"
        tensor = self.graph.model.derive(
            self.graph.fresh(f"{first}_{'packed' if operand.factor is None else 'folded'}"),
            [part for part, _ in operand.parts],
            operand.axis,
            transpose=[permutation for _, permutation in operand.parts],
            factor=operand.factor,
        )
        if operand.shape is not None:
            tensor.dims[:] = [int(str(dim)) for dim in operand.shape]
        return self.graph.add_initializer(self.scope, tensor, self.found.node)

    def _constant(self, tensor: TensorProto) -> Value:
        key = (id(self.scope), tensor.data_type, tuple(tensor.dims), tensor.raw_data)
        known = self.graph.constants.get(key)
        if known is not None and self.scope.values.get(known.name) is known:
            return known
        named = TensorProto()
        named.CopyFrom(tensor)
        named.name = self.graph.fresh(f"fusion_{tensor.name}")
        constant = self.graph.add_initializer(self.scope, named, self.found.node)
        self.graph.constants[key] = constant
        return constant

    def _shared(self, new: NewNode, inputs: list[Value | None], at: Node) -> list[Node]:
        for other in self._like(new, inputs):
            output = other.outputs[0]
            if output is not None and before(output, at):
                self.values[id(new.outputs[0])] = output
                return []
        producers = [value.producer for value in inputs if value is not None and value.producer is not None]
        own = [node for node in producers if node.scope is self.scope]
        place = max(own, key=lambda node: node.position) if own else next(iter(self.scope.nodes))
        if place.position > at.position:
            place = at
        source = next((value for value in inputs if value is not None), self.found.root)
        name = self.graph.fresh(f"{source.name}_{new.op}")
        node = self._add(new, inputs, [name], place, self.graph.fresh(f"fusion_{new.op}"))
        output = node.outputs[0]
        assert output is not None
        self.values[id(new.outputs[0])] = output
        self._declare(new, output)
        return [node]

    def _declare(self, new: NewNode, value: Value) -> None:
        """Say the sizes of what is reshaped to computed ones: a runtime that infers shapes sees none there.

        onnxruntime takes a width that it does not know for 0 behind the standard Attention, and refuses the model.
        """
        made = new.outputs[0]
        if new.op == "Reshape" and made.shape is not None and made.dtype is not None:
            self.graph.declare(value, made.dtype, [dim if isinstance(dim, int) else None for dim in made.shape])

    def _like(self, new: NewNode, inputs: list[Value | None]) -> list[Node]:
        first = next((value for value in inputs if value is not None), None)
        if first is None:
            return []
        return [
            node
            for node in first.uses
            if node.op == new.op
            and node.domain == new.domain
            and node.inputs == inputs
            and {a.name: (a.i, tuple(a.ints)) for a in node.proto.attribute}
            == {
                name: (value, ()) if isinstance(value, int) else (0, tuple(value))  # type: ignore[arg-type]
                for name, value in new.attributes.items()
            }
        ]

    def _add(
        self, new: NewNode, inputs: list[Value | None], outputs: Sequence[str | Value | None], at: Node, name: str
    ) -> Node:
        if new.domain:
            self.graph.import_opset(new.domain, 1)
        return self.graph.add_node(
            self.scope, new.op, inputs, outputs, at=at, domain=new.domain, name=name, attributes=new.attributes
        )

    def _say_where_from(self, node: Node) -> None:
        region = self.found.region
        provenance = {
            PATTERN: self.found.plan.pattern.name,
            REPLACED: ", ".join(part.label for part in region.core),
            LAWS: ", ".join(_laws(region.core)),
        }
        for key, text in provenance.items():
            node.proto.metadata_props.add(key=key, value=text)


_LAWS = {
    "ring": ring.SUMS | ring.PRODUCTS,
    "powers": powers.OPERATORS,
    "reduction": reduction.OPERATORS,
    "contraction": contraction.OPERATORS,
    "noise": {"Cast", "Identity", "Dropout"},
    "guards": {"Where", "IsNaN"},
}


def _laws(nodes: Sequence[Node]) -> list[str]:
    """The laws under which these nodes were read."""
    operators = {node.key for node in nodes}
    return [law for law, known in _LAWS.items() if not operators.isdisjoint(known)]
