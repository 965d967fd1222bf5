"""Common subexpressions: what is computed twice is computed once.

Two nodes are equal if they have one operator, one set of attributes and the same inputs; two small integer tensors, if
facts say the same of every element, however they were worked out; two constants, if they have the same bytes. What a
body sees of the scopes around it counts as well, if it is computed before the node that the body belongs to.
"""

from __future__ import annotations

from collections.abc import Hashable

from onnx import AttributeProto, TensorProto, helper

from fusion.facts import Facts, constants
from fusion.models.graph import Node, Value
from fusion.schema import defaults
from fusion.simplify.purity import feeds_quantisation

SMALL = 1024
"""Bytes up to which equal constants are merged; what is larger is not read for it."""
COMMUTATIVE = frozenset({"Add", "Mul", "And", "Or", "Xor", "Equal"})

PACKED = frozenset(
    {TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1, TensorProto.STRING, TensorProto.UNDEFINED}
)


class Table:
    """What is known to be computed in a scope, and in those around it.

    Args:
        around: the table of the scope around; None for a graph or function.
    """

    def __init__(self, around: Table | None = None) -> None:
        self.around = around
        self._nodes: dict[Hashable, Node] = {}
        self._values: dict[Hashable, Value] = {}

    def node(self, key: Hashable, node: Node) -> Node | None:
        """A node that was noted under this key before; the new one is noted where there is none."""
        found = self._find_node(key)
        if found is None:
            self._nodes[key] = node
        return found

    def value(self, key: Hashable, value: Value) -> Value | None:
        """A value that was noted under this key before; the new one is noted where there is none."""
        found = self._find_value(key)
        if found is None:
            self._values[key] = value
        return None if found is value else found

    def _find_node(self, key: Hashable) -> Node | None:
        found = self._nodes.get(key)
        if found is not None and found in found.scope.nodes:
            return found
        return None if self.around is None else self.around._find_node(key)

    def _find_value(self, key: Hashable) -> Value | None:
        found = self._values.get(key)
        if found is not None and found.scope.values.get(found.name) is found:
            return found
        return None if self.around is None else self.around._find_value(key)


def node_key(node: Node) -> Hashable:
    """What two nodes that compute the same have in common."""
    inputs = tuple(node.inputs)
    if node.op in COMMUTATIVE:
        inputs = tuple(sorted(inputs, key=id))
    return (node.key, inputs, _attributes(node) if node.proto.attribute else ())


def _attributes(node: Node) -> Hashable:
    """What the attributes say beyond their defaults."""
    standard = defaults(node.op, node.domain, node.version)
    said = []
    for attribute in node.proto.attribute:
        default = standard.get(attribute.name)
        if default is None or attribute.ref_attr_name or default != helper.get_attribute_value(attribute):
            bare = AttributeProto()
            bare.CopyFrom(attribute)
            bare.ClearField("doc_string")
            said.append((attribute.name, bare.SerializeToString(deterministic=True)))
    return tuple(sorted(said))


def integer_key(facts: Facts, output: Value) -> Hashable | None:
    """What is known of a small integer tensor, where every element is known."""
    known, dtype = facts.integers(output), facts.dtype(output)
    if known is None or dtype is None or any(item is None for item in known.items) or feeds_quantisation(output):
        return None
    return ("integers", dtype, known.shape, known.items)


def constant_key(facts: Facts, value: Value) -> Hashable | None:
    """The bytes of a small constant; None for one that is large, packed, or part of a quantisation."""
    stored = constants.stored(value)
    if stored is None or feeds_quantisation(value):
        return None
    if isinstance(stored, TensorProto):
        if stored.data_type in PACKED:
            return None
        if stored.HasField("raw_data") and stored.data_location != TensorProto.EXTERNAL:
            data = stored.raw_data
            return ("constant", stored.data_type, tuple(stored.dims), data) if len(data) <= SMALL else None
    array = constants.small(facts.graph, value)
    if array is None or array.nbytes > SMALL or array.dtype.kind == "O":
        return None
    return ("constant", constants.dtype(stored), array.shape, array.tobytes())
