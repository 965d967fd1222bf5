"""The index over a ModelProto: scopes, nodes, values, who uses what; and edits that can be undone.

The protobuf stays the truth. Building the index reads it once, without copying a payload; `Graph.commit` writes edits
back, and a graph without edits leaves the protobuf untouched.
"""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableSequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, TypeVar

from onnx import FunctionProto, GraphProto, NodeProto, OperatorSetIdProto, TensorProto, ValueInfoProto, helper

from fusion.errors import ModelError
from fusion.order import bodies, nearest

if TYPE_CHECKING:
    from fusion.model import Model


T = TypeVar("T")


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


@dataclass(slots=True, eq=False, repr=False)
class Node:
    """One operator of a scope."""

    proto: NodeProto
    scope: Scope
    position: tuple[int, int]  # sort key of the order in the scope
    op: str = field(init=False)
    domain: str = field(init=False)  # "" for the standard operators
    key: str = field(init=False)  # the operator with its domain: `Gelu`, `com.microsoft::Gelu`
    inputs: list[Value | None] = field(default_factory=list)  # None for an optional one that is left out
    outputs: list[Value | None] = field(default_factory=list)
    bodies: list[Scope] = field(default_factory=list)  # of its graph attributes

    def __post_init__(self) -> None:
        self.op = self.key = self.proto.op_type
        self.domain = self.proto.domain
        if self.domain == "ai.onnx":
            self.domain = ""
        if self.domain:
            self.key = f"{self.domain}::{self.op}"

    @property
    def version(self) -> int:
        """The opset version of the node's domain in its scope; 1 where the model forgot to import it."""
        return self.scope.opsets.get(self.domain, 1)

    @property
    def label(self) -> str:
        """What to call the node in a message: its name, else the name of its first output."""
        if self.proto.name:
            return self.proto.name
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


class Graph:
    """The index of one model. Edits are journalled; `commit` ends the life of the index.

    Attributes:
        model: the model.
        scopes: the main graph first, bodies after the graph that holds them.
        by_op: nodes by `Node.key`, in order.
        constants: constants that rewrites added, by content.

    Args:
        model: the model, whose shell is indexed.

    Raises:
        ModelError: a node reads a value that nothing defines, or two nodes define the same value.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.scopes: list[Scope] = []
        self.by_op: dict[str, dict[Node, None]] = defaultdict(dict)
        self.constants: dict[object, Value] = {}
        self._names: set[str] = set()
        self._fresh = 0
        self._sequence = 0
        self._undo: list[Callable[[], None]] | None = None
        proto = model.proto
        opsets = _opsets(proto.opset_import)
        with paused_collection():
            self._index(Scope(proto.graph, opsets))
            for function in proto.functions:
                self._index(Scope(function, {**opsets, **_opsets(function.opset_import)}))

    @property
    def main(self) -> Scope:
        """The scope of the main graph."""
        return self.scopes[0]

    def nodes(self) -> Iterator[Node]:
        """All nodes of all scopes."""
        for scope in self.scopes:
            yield from scope.nodes

    # -- building ---------------------------------------------------------------------------------------------------

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
        self._names.update(values)

    def _index_nodes(self, scope: Scope) -> None:
        values, nodes, by_op = scope.values, scope.nodes, self.by_op
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
                        self._place(scope, f"node {proto.name or proto.op_type!r} reads {name!r}, ")
                        + "which no earlier node, input or initializer defines"
                    )
                inputs.append(value)
                uses = value.uses
                uses[node] = uses.get(node, 0) + 1
            for slot, name in enumerate(proto.output):
                if not name:
                    outputs.append(None)
                    continue
                value = self._define(scope, name)
                value.producer, value.slot = node, slot
                outputs.append(value)
            nodes[node] = None
            by_op[node.key][node] = None
            for body in bodies(proto) if proto.attribute else ():
                inner = Scope(body, scope.opsets, scope, node)
                node.bodies.append(inner)
                self._index(inner)

    def _define(self, scope: Scope, name: str) -> Value:
        if name in scope.values:
            raise ModelError(self._place(scope, f"the value {name!r} is defined twice"))
        value = scope.values[name] = Value(name, scope)
        return value

    def _place(self, scope: Scope, text: str) -> str:
        where = f"{self.model.path}: " if self.model.path else ""
        return f"{where}{scope.name}: {text}"

    # -- edits ------------------------------------------------------------------------------------------------------

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Undo every edit made inside the block if it raises."""
        done: list[Callable[[], None]] = []
        outer, self._undo = self._undo, done
        counters = self._fresh, self._sequence
        try:
            yield
            if outer is not None:
                outer.extend(done)
        except BaseException:
            for undo in reversed(done):
                undo()
            self._fresh, self._sequence = counters
            raise
        finally:
            self._undo = outer

    def _journal(self, scope: Scope, undo: Callable[[], None]) -> None:
        if self._undo is not None:
            self._undo.append(undo)
            if not scope.edited:
                self._undo.append(partial(setattr, scope, "edited", False))
        scope.edited = True

    def fresh(self, hint: str) -> str:
        """Return a value or node name that no scope uses, derived from `hint`, and reserve it."""
        name = hint
        while name in self._names:
            self._fresh += 1
            name = f"{hint}_{self._fresh}"
        self._names.add(name)
        if self._undo is not None:
            self._undo.append(partial(self._names.discard, name))
        return name

    def add_node(
        self,
        scope: Scope,
        op: str,
        inputs: Iterable[Value | None],
        outputs: Iterable[str | Value | None],
        *,
        at: Node,
        domain: str = "",
        name: str = "",
        attributes: Mapping[str, object] | None = None,
    ) -> Node:
        """Add a node at the place of `at`.

        Args:
            inputs: values, None for one that is left out.
            outputs: names of new values, values to take over from their present producer, or None.
        """
        self._sequence += 1
        proto = helper.make_node(op, [], [], name=name or None, domain=domain or None)
        for key, content in (attributes or {}).items():
            if content is not None:
                proto.attribute.append(helper.make_attribute(key, content))
        node = Node(proto, scope, (at.position[0], self._sequence))
        node.inputs = list(inputs)
        for value in node.inputs:
            if value is not None:
                value.uses[node] = value.uses.get(node, 0) + 1
        for slot, output in enumerate(outputs):
            made = self._new_value(scope, output) if isinstance(output, str) else output
            node.outputs.append(made)
            if made is not None:
                self._take_over(made, node, slot)
        proto.input.extend(_written(node.inputs))
        proto.output.extend(_written(node.outputs))
        scope.nodes[node] = None
        self.by_op[node.key][node] = None

        def undo() -> None:
            del scope.nodes[node], self.by_op[node.key][node]
            for value in node.inputs:
                if value is not None:
                    value.uses.pop(node, None)

        self._journal(scope, undo)
        return node

    def _new_value(self, scope: Scope, name: str) -> Value:
        value = scope.values[name] = Value(name, scope)
        self._journal(scope, partial(scope.values.__delitem__, name))
        return value

    def _take_over(self, value: Value, node: Node, slot: int) -> None:
        old, old_slot = value.producer, value.slot
        if old is not None:
            old.outputs[old_slot] = None
        value.producer, value.slot = node, slot

        def undo() -> None:
            value.producer, value.slot = old, old_slot
            if old is not None:
                old.outputs[old_slot] = value

        self._journal(value.scope, undo)

    def add_initializer(self, scope: Scope, tensor: TensorProto, at: Node) -> Value:
        """Add a constant to the scope: an initializer, or in a function, which has none, a Constant node."""
        value = self._new_value(scope, tensor.name)
        if isinstance(scope.proto, FunctionProto):
            self.add_node(scope, "Constant", [], [value], at=at, attributes={"value": tensor})
        else:
            value.tensor = tensor
        return value

    def remove_dead(self, nodes: Iterable[Node]) -> list[Node]:
        """Remove those of `nodes`, and what feeds only them, whose outputs nobody uses; return what was removed.

        Initializers that lose their last use go too. What was dead before is left alone unless named.
        """
        removed: list[Node] = []
        stack = list(nodes)
        while stack:
            node = stack.pop()
            if node not in node.scope.nodes:
                continue
            if any(value is not None and (value.uses or value.is_output) for value in node.outputs):
                continue
            self._remove(node)
            removed.append(node)
            for value in node.inputs:
                if value is None or value.uses or value.is_output:
                    continue
                if value.producer is not None:
                    stack.append(value.producer)
                elif value.tensor is not None and value.scope.values.get(value.name) is value:
                    self._drop(value)
        return removed

    def _remove(self, node: Node) -> None:
        scope = node.scope
        counts = {value: value.uses.pop(node) for value in node.inputs if value is not None and node in value.uses}
        for body in node.bodies:
            for inner in list(body.nodes):
                self._remove(inner)
        del scope.nodes[node], self.by_op[node.key][node]
        for output in node.outputs:
            if output is not None:
                self._drop(output)

        def undo() -> None:
            _put_back(scope.nodes, node, None)
            _put_back(self.by_op[node.key], node, None)
            for value, count in counts.items():
                _put_back(value.uses, node, count)

        self._journal(scope, undo)

    def _drop(self, value: Value) -> None:
        values = value.scope.values
        del values[value.name]
        self._journal(value.scope, partial(values.__setitem__, value.name, value))

    def import_opset(self, domain: str, version: int) -> None:
        """Import an operator domain that the model does not import yet, there and in its functions."""
        if domain in self.main.opsets:
            return
        # A body shares the versions of the graph or function it is in.
        changed = [scope.opsets for scope in self.scopes if scope.parent is None and domain not in scope.opsets]
        for opsets in changed:
            opsets[domain] = version

        def undo() -> None:
            for opsets in changed:
                del opsets[domain]

        self._journal(self.main, undo)

    # -- writing back -----------------------------------------------------------------------------------------------

    def commit(self) -> bool:
        """Write the edits into the protobuf; return whether there were any. The index is spent afterwards."""
        edited = [scope for scope in self.scopes if scope.edited]
        if not edited:
            return False
        for scope in reversed(self.scopes):  # bodies before the graphs that hold them
            if scope.edited and not _detached(scope):
                self._commit(scope)
        return True

    def _commit(self, scope: Scope) -> None:
        proto = scope.proto
        nodes = _in_order(scope)
        for node in nodes:
            if None in node.outputs:
                for slot, name in enumerate(node.proto.output):
                    if name and node.outputs[slot] is None:  # another node has taken it over
                        node.proto.output[slot] = ""
        _replace(proto.node, [node.proto for node in nodes])
        root = scope
        while root.parent is not None:
            root = root.parent
        imports = (root.proto if isinstance(root.proto, FunctionProto) else self.model.proto).opset_import
        missing = {node.domain for node in nodes} - _opsets(imports).keys()
        imports.extend(helper.make_opsetid(domain, v) for domain, v in scope.opsets.items() if domain in missing)
        if isinstance(proto, GraphProto):
            _replace(proto.value_info, [info for info in proto.value_info if info.name in scope.values])
            _replace(proto.initializer, [tensor for tensor in proto.initializer if tensor.name in scope.values])
            present = {tensor.name for tensor in proto.initializer}
            added = [value for value in scope.values.values() if value.name not in present]
            proto.initializer.extend(value.tensor for value in added if value.tensor is not None)


def _declared(items: Iterable[ValueInfoProto] | Iterable[str]) -> Iterator[tuple[str, ValueInfoProto | None]]:
    """The names of inputs or outputs with their types, which a function does not declare."""
    for item in items:
        yield (item, None) if isinstance(item, str) else (item.name, item)


def _written(values: list[Value | None]) -> list[str]:
    """The names of a new node's inputs or outputs; what is left out at the end is not written."""
    names = ["" if value is None else value.name for value in values]
    while names and not names[-1]:
        names.pop()
    return names


def _replace(repeated: MutableSequence[T], items: list[T]) -> None:
    del repeated[:]
    repeated.extend(items)


def _put_back(ordered: dict[Node, T], node: Node, content: T) -> None:
    """Insert a node at its place: what asks for the first or the next node must not see that it was away."""
    ordered[node] = content
    items = sorted(ordered.items(), key=lambda item: item[0].position)
    ordered.clear()
    ordered.update(items)


def _opsets(imports: Iterable[OperatorSetIdProto]) -> dict[str, int]:
    return {"" if entry.domain == "ai.onnx" else entry.domain: entry.version for entry in imports}


def _detached(scope: Scope) -> bool:
    """Whether the scope belongs to a node that was removed."""
    owner = scope.owner
    return owner is not None and (owner not in owner.scope.nodes or _detached(owner.scope))


def _in_order(scope: Scope) -> list[Node]:
    """The nodes by position where that is a topological order, else the topological order nearest to it."""
    nodes = sorted(scope.nodes, key=lambda node: node.position)
    index = {node: place for place, node in enumerate(nodes)}
    needs = [
        {index[value.producer] for value in _reads(node) if value.scope is scope and value.producer is not None}
        for node in nodes
    ]
    if all(max(needed, default=-1) < place for place, needed in enumerate(needs)):
        return nodes
    return [nodes[place] for place in nearest(needs, [node.label for node in nodes], scope.name)]


def _reads(node: Node) -> Iterator[Value]:
    """The values a node needs, those that its bodies capture included."""
    yield from (value for value in node.inputs if value is not None)
    for body in node.bodies:
        inner = (value for node in body.nodes for value in _reads(node))
        yield from (value for value in chain(inner, body.outputs) if value.scope is not body)
