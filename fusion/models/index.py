"""The index over a ModelProto: scopes, nodes, values, and who uses what. It copies no payload."""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

from onnx import FunctionProto, GraphProto, NodeProto, OperatorSetIdProto, TensorProto, ValueInfoProto

from fusion.errors import ModelError
from fusion.models.order import bodies

if TYPE_CHECKING:
    from fusion.models.model import Model


@dataclass(slots=True, eq=False, repr=False)
class Value:
    """One tensor of a scope: an input, an initializer, or an output of a node."""

    name: str  # unique in its scope and the scopes that can see it
    scope: Scope
    producer: Node | None = None  # None for inputs, initializers and formal parameters
    slot: int = 0  # which output of the producer it is
    uses: dict[Node, int] = field(default_factory=dict)  # consumer → its input slots; those inside bodies count
    is_output: bool = False  # of its scope, or of a body that captures it
    tensor: TensorProto | None = None  # the initializer; None where it is an input too, for callers may override it
    info: ValueInfoProto | None = None  # the declared type

    @property
    def only_use(self) -> Node | None:
        """The single consumer, or None where there are none, several, or the value is a graph output."""
        if len(self.uses) == 1 and not self.is_output:
            return next(iter(self.uses))
        return None

    def __repr__(self) -> str:
        return f"Value({self.name!r})"


@dataclass(slots=True, eq=False, repr=False, init=False)
class Node:
    """One operator of a scope. What is read often is read out of the protobuf once: each look into that makes objects.

    There are very many nodes, hence the constructor without defaults.
    """

    proto: NodeProto
    scope: Scope
    position: tuple[int, int]  # sort key of the order in the scope
    op: str
    domain: str  # "" for the standard operators
    key: str  # the operator with its domain: `Gelu`, `com.microsoft::Gelu`
    name: str
    inputs: list[Value | None]  # None for an optional one that is left out
    outputs: list[Value | None]
    bodies: tuple[Scope, ...]  # of its graph attributes

    def __init__(self, proto: NodeProto, scope: Scope, position: tuple[int, int]) -> None:
        self.proto = proto
        self.scope = scope
        self.position = position
        self.op = self.key = proto.op_type
        self.domain = domain = proto.domain
        if domain == "ai.onnx":
            self.domain = ""
        elif domain:
            self.key = f"{domain}::{self.op}"
        self.name = proto.name
        self.inputs = []
        self.outputs = []
        self.bodies = ()

    @property
    def version(self) -> int:
        """The opset version of the node's domain in its scope; 1 where the model forgot to import it."""
        return self.scope.opsets.get(self.domain, 1)

    @property
    def label(self) -> str:
        """What to call the node in a message: its name, else the name of its first output."""
        if self.name:
            return self.name
        named = [value.name for value in self.outputs if value is not None]
        return f"{self.op} -> {named[0]}" if named else self.op

    def input(self, index: int) -> Value | None:
        """The value of an input slot, None where it is absent or left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def __repr__(self) -> str:
        return f"Node({self.key}, {self.label!r})"


@dataclass(slots=True, eq=False, repr=False)
class Scope:
    """A graph, a body of If/Loop/Scan, or a model-local function."""

    proto: GraphProto | FunctionProto
    opsets: dict[str, int]  # version per domain; a body shares those of the graph or function it is in
    parent: Scope | None = None  # the scope whose values a body can see
    owner: Node | None = None  # the node a body belongs to
    nodes: dict[Node, None] = field(default_factory=dict)  # in order, but for those that edits added
    values: dict[str, Value] = field(default_factory=dict)
    outputs: list[Value] = field(default_factory=list)
    edited: bool = False

    @property
    def name(self) -> str:
        """Where the scope is, for messages: `graph`, `function F`, `body of NODE`."""
        if self.owner is not None:
            return f"body of {self.owner.label}"
        return f"function {self.proto.name}" if isinstance(self.proto, FunctionProto) else "graph"

    def find(self, name: str) -> Value | None:
        """The value of that name as this scope sees it."""
        scope: Scope | None = self
        while scope is not None:
            value = scope.values.get(name)
            if value is not None:
                return value
            scope = scope.parent
        return None


@contextmanager
def paused_collection() -> Iterator[None]:
    """Pause the garbage collector: building an index makes many objects and no garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Index:
    """The index of one model.

    Attributes:
        model: the model.
        scopes: the main graph first, bodies after the graph that holds them.
        by_op: nodes by `Node.key`, in order.
        names: of all values and nodes.

    Raises:
        ModelError: a node reads a value that nothing defines, or two nodes define the same value.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.scopes: list[Scope] = []
        self.by_op: dict[str, dict[Node, None]] = defaultdict(dict)
        self.names: set[str] = set()
        proto = model.proto
        opsets = versions(proto.opset_import)
        with paused_collection():
            self._index(Scope(proto.graph, opsets))
            for function in proto.functions:
                self._index(Scope(function, {**opsets, **versions(function.opset_import)}))

    @property
    def main(self) -> Scope:
        """The scope of the main graph."""
        return self.scopes[0]

    def nodes(self) -> Iterator[Node]:
        """All nodes of all scopes."""
        for scope in self.scopes:
            yield from scope.nodes

    def _index(self, scope: Scope) -> None:
        proto, values = scope.proto, scope.values
        self.scopes.append(scope)
        for name, info in _declared(proto.input):
            self._define(scope, name).info = info
        if isinstance(proto, GraphProto):
            for tensor in proto.initializer:
                if tensor.name not in values:
                    self._define(scope, tensor.name).tensor = tensor
            for sparse in proto.sparse_initializer:
                if sparse.values.name not in values:
                    self._define(scope, sparse.values.name)
        self._index_nodes(scope)
        if isinstance(proto, GraphProto):
            for info in proto.value_info:
                known = values.get(info.name)
                if known is not None and known.info is None:
                    known.info = info
        for name, info in _declared(proto.output):
            known = scope.find(name)
            if known is None:
                raise ModelError(self._place(scope, f"the output {name!r} is not produced by any node"))
            known.is_output = True
            known.info = known.info or info
            scope.outputs.append(known)
        self.names.update(values)

    def _index_nodes(self, scope: Scope) -> None:
        values, nodes, by_op, names = scope.values, scope.nodes, self.by_op, self.names
        for position, proto in enumerate(scope.proto.node):
            node = Node(proto, scope, (position, 0))
            inputs, outputs = node.inputs, node.outputs
            for name in proto.input:
                if not name:
                    inputs.append(None)
                    continue
                value = values.get(name) or scope.find(name)
                if value is None:
                    raise ModelError(
                        self._place(scope, f"node {node.name or node.op!r} reads {name!r}, ")
                        + "which no earlier node, input or initializer defines"
                    )
                inputs.append(value)
                uses = value.uses
                uses[node] = uses.get(node, 0) + 1
            for slot, name in enumerate(proto.output):
                if not name:
                    outputs.append(None)
                    continue
                outputs.append(self._define(scope, name, node, slot))
            names.add(node.name)
            nodes[node] = None
            by_op[node.key][node] = None
            for body in bodies(proto):
                inner = Scope(body, scope.opsets, scope, node)
                node.bodies += (inner,)
                self._index(inner)

    def _define(self, scope: Scope, name: str, producer: Node | None = None, slot: int = 0) -> Value:
        if name in scope.values:
            raise ModelError(self._place(scope, f"the value {name!r} is defined twice"))
        value = scope.values[name] = Value(name, scope, producer, slot)
        return value

    def _place(self, scope: Scope, text: str) -> str:
        where = f"{self.model.path}: " if self.model.path else ""
        return f"{where}{scope.name}: {text}"


def _declared(items: Iterable[ValueInfoProto] | Iterable[str]) -> Iterator[tuple[str, ValueInfoProto | None]]:
    """The names of inputs or outputs with their types, which a function does not declare."""
    for item in items:
        yield (item, None) if isinstance(item, str) else (item.name, item)


def versions(imports: Iterable[OperatorSetIdProto]) -> dict[str, int]:
    """The version per domain that is imported."""
    return {"" if entry.domain == "ai.onnx" else entry.domain: entry.version for entry in imports}


def is_read(value: Value | None) -> bool:
    """Whether a node, or whoever runs the model, reads the value."""
    return value is not None and (bool(value.uses) or value.is_output)


def reads(node: Node) -> list[Value]:
    """The values a node needs, those that its bodies capture included."""
    read = [value for value in node.inputs if value is not None]
    for body in node.bodies:
        inner = [value for node in body.nodes for value in reads(node)]
        read += [value for value in chain(inner, body.outputs) if value.scope is not body]
    return read
