"""The index over a ModelProto: scopes, nodes, values, who uses what; and edits that can be undone.

The protobuf stays the truth. Building the index reads it once, without copying a payload; `Graph.commit` writes edits
back, and a graph without edits leaves the protobuf untouched.
"""

from __future__ import annotations

import gc
import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto, TensorProto, ValueInfoProto, helper

from fusion.errors import ModelError

if TYPE_CHECKING:
    from fusion.model import Model


T = TypeVar("T")


class Value:
    """One tensor of a scope: an input, an initializer, or an output of a node.

    Attributes:
        name: unique in its scope and the scopes that can see it.
        producer: the node that computes it; None for inputs, initializers and formal parameters.
        slot: which output of the producer it is.
        uses: consumer → number of its input slots that read the value; consumers inside bodies count.
        is_output: whether it is an output of its scope (or of a body that captures it).
        is_input: whether it is an input of its scope.
        tensor: the initializer, or None; also None where it is an input too, because the caller may override it.
        info: the declared type, or None.
    """

    __slots__ = ("info", "is_input", "is_output", "name", "producer", "scope", "slot", "tensor", "uses")

    def __init__(self, name: str, scope: Scope) -> None:
        self.name = name
        self.scope = scope
        self.producer: Node | None = None
        self.slot = 0
        self.uses: dict[Node, int] = {}
        self.is_output = False
        self.is_input = False
        self.tensor: TensorProto | None = None
        self.info: ValueInfoProto | None = None

    @property
    def only_use(self) -> Node | None:
        """The single consumer, or None where there are none, several, or the value is a graph output."""
        if len(self.uses) == 1 and not self.is_output:
            return next(iter(self.uses))
        return None

    def __repr__(self) -> str:
        return f"Value({self.name!r})"


class Node:
    """One operator of a scope.

    Attributes:
        op: operator type.
        domain: its domain, "" for the standard operators.
        inputs, outputs: the values, None for an optional one that is left out.
        position: sort key of the order in the scope.
        bodies: scopes of its graph attributes.
    """

    __slots__ = ("bodies", "domain", "inputs", "op", "outputs", "position", "proto", "scope")

    def __init__(self, proto: NodeProto, scope: Scope, position: tuple[int, int]) -> None:
        self.proto = proto
        self.op: str = proto.op_type
        domain = proto.domain
        self.domain: str = "" if domain == "ai.onnx" else domain
        self.scope = scope
        self.position = position
        self.inputs: list[Value | None] = []
        self.outputs: list[Value | None] = []
        self.bodies: list[Scope] = []

    @property
    def key(self) -> str:
        """The operator with its domain: `Gelu`, `com.microsoft::Gelu`."""
        return f"{self.domain}::{self.op}" if self.domain else self.op

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


class Scope:
    """A graph, a body of If/Loop/Scan, or a model-local function.

    Attributes:
        proto: the GraphProto or FunctionProto.
        parent: the scope whose values the body can see; None for the main graph and for functions.
        owner: the node the body belongs to.
        nodes: in order; edits keep it up to date only through `Graph`.
    """

    __slots__ = ("edited", "inputs", "nodes", "opsets", "outputs", "owner", "parent", "proto", "values")

    def __init__(self, proto: GraphProto | FunctionProto, parent: Scope | None, owner: Node | None) -> None:
        self.proto = proto
        self.parent = parent
        self.owner = owner
        self.nodes: dict[Node, None] = {}
        self.values: dict[str, Value] = {}
        self.opsets: Mapping[str, int] = parent.opsets if parent is not None else {}
        self.inputs: list[Value] = []
        self.outputs: list[Value] = []
        self.edited = False

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
        self.by_op: dict[str, dict[Node, None]] = {}
        self.constants: dict[object, Value] = {}
        self._names: set[str] = set()
        self._fresh = 0
        self._sequence = 0
        self._undo: list[Callable[[], None]] | None = None
        proto = model.proto
        with paused_collection():
            main = Scope(proto.graph, None, None)
            main.opsets = _opsets(proto.opset_import)
            self._index_graph(main)
            for function in proto.functions:
                scope = Scope(function, None, None)
                scope.opsets = {**main.opsets, **_opsets(function.opset_import)}
                self._index_function(scope)

    @property
    def main(self) -> Scope:
        """The scope of the main graph."""
        return self.scopes[0]

    def nodes(self) -> Iterator[Node]:
        """All nodes of all scopes."""
        for scope in self.scopes:
            yield from scope.nodes

    # -- building ---------------------------------------------------------------------------------------------------

    def _index_graph(self, scope: Scope) -> None:
        proto = scope.proto
        assert isinstance(proto, GraphProto)
        self.scopes.append(scope)
        for info in proto.input:
            value = self._define(scope, info.name)
            value.is_input, value.info = True, info
            scope.inputs.append(value)
        for tensor in proto.initializer:
            known = scope.values.get(tensor.name)
            if known is None:
                self._define(scope, tensor.name).tensor = tensor
        for sparse in proto.sparse_initializer:
            if sparse.values.name not in scope.values:
                self._define(scope, sparse.values.name)
        self._index_nodes(scope, proto.node)
        for info in proto.value_info:
            known = scope.values.get(info.name)
            if known is not None and known.info is None:
                known.info = info
        for info in proto.output:
            known = scope.find(info.name)
            if known is None:
                raise ModelError(self._place(scope, f"the output {info.name!r} is not produced by any node"))
            known.is_output = True
            known.info = known.info or info
            scope.outputs.append(known)

    def _index_function(self, scope: Scope) -> None:
        proto = scope.proto
        assert isinstance(proto, FunctionProto)
        self.scopes.append(scope)
        for name in proto.input:
            value = self._define(scope, name)
            value.is_input = True
            scope.inputs.append(value)
        self._index_nodes(scope, proto.node)
        for name in proto.output:
            known = scope.values.get(name)
            if known is None:
                raise ModelError(self._place(scope, f"the output {name!r} is not produced by any node"))
            known.is_output = True
            scope.outputs.append(known)

    def _index_nodes(self, scope: Scope, protos: Iterable[NodeProto]) -> None:
        values, nodes, by_op = scope.values, scope.nodes, self.by_op
        for position, proto in enumerate(protos):
            node = Node(proto, scope, (position, 0))
            inputs = node.inputs
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
                    node.outputs.append(None)
                    continue
                value = self._define(scope, name)
                value.producer, value.slot = node, slot
                node.outputs.append(value)
            nodes[node] = None
            by_op.setdefault(node.key, {})[node] = None
            for attribute in proto.attribute:
                if attribute.type == AttributeProto.GRAPH:
                    self._index_body(attribute.g, scope, node)
                elif attribute.type == AttributeProto.GRAPHS:
                    for body in attribute.graphs:
                        self._index_body(body, scope, node)

    def _index_body(self, proto: GraphProto, parent: Scope, owner: Node) -> None:
        body = Scope(proto, parent, owner)
        owner.bodies.append(body)
        self._index_graph(body)

    def _define(self, scope: Scope, name: str) -> Value:
        if name in scope.values:
            raise ModelError(self._place(scope, f"the value {name!r} is defined twice"))
        value = Value(name, scope)
        scope.values[name] = value
        self._names.add(name)
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
        except BaseException:
            for undo in reversed(done):
                undo()
            self._fresh, self._sequence = counters
            raise
        else:
            if outer is not None:
                outer.extend(done)
        finally:
            self._undo = outer

    def _journal(self, scope: Scope, undo: Callable[[], None]) -> None:
        self._touch(scope)
        if self._undo is not None:
            self._undo.append(undo)

    def _touch(self, scope: Scope) -> None:
        if self._undo is not None and not scope.edited:
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
        proto = helper.make_node(op, [], [], name=name or None, domain=domain or None)
        for key, value in (attributes or {}).items():
            if value is not None:
                proto.attribute.append(helper.make_attribute(key, value))
        self._sequence += 1
        node = Node(proto, scope, (at.position[0], self._sequence))
        for slot, output in enumerate(outputs):
            if isinstance(output, str):
                created = Value(output, scope)
                created.producer, created.slot = node, slot
                scope.values[output] = created
                node.outputs.append(created)
                self._journal(scope, partial(scope.values.__delitem__, output))
            else:
                if output is not None:
                    self._take_over(output, node, slot)
                node.outputs.append(output)
        for value_in in inputs:
            node.inputs.append(value_in)
            if value_in is not None:
                value_in.uses[node] = value_in.uses.get(node, 0) + 1
        scope.nodes[node] = None
        self.by_op.setdefault(node.key, {})[node] = None

        def undo() -> None:
            del scope.nodes[node], self.by_op[node.key][node]
            for used in node.inputs:
                if used is not None:
                    used.uses.pop(node, None)

        self._journal(scope, undo)
        return node

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
        if isinstance(scope.proto, FunctionProto):
            node = self.add_node(scope, "Constant", [], [tensor.name], at=at, attributes={"value": tensor})
            constant = node.outputs[0]
            assert constant is not None
            return constant
        value = Value(tensor.name, scope)
        value.tensor = tensor
        scope.values[tensor.name] = value
        self._journal(scope, partial(scope.values.__delitem__, tensor.name))
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
        captured = [(body, inner) for body in node.bodies for inner in list(body.nodes)]
        for _, inner in captured:
            self._remove(inner)
        del scope.nodes[node], self.by_op[node.key][node]
        gone = [value for value in node.outputs if value is not None]
        for value in gone:
            del scope.values[value.name]

        def undo() -> None:
            _put_back(scope.nodes, node, None)
            _put_back(self.by_op[node.key], node, None)
            for value, count in counts.items():
                _put_back(value.uses, node, count)
            for value in gone:
                scope.values[value.name] = value

        self._journal(scope, undo)

    def _drop(self, value: Value) -> None:
        scope = value.scope
        del scope.values[value.name]
        self._journal(scope, lambda: scope.values.__setitem__(value.name, value))

    def import_opset(self, domain: str, version: int) -> None:
        """Import an operator domain that the model does not import yet."""
        main = self.main
        if domain in main.opsets:
            return
        old = {scope: scope.opsets for scope in self.scopes if domain not in scope.opsets}
        shared = {**main.opsets, domain: version}
        for scope, opsets in old.items():
            scope.opsets = shared if opsets is old[main] else {**opsets, domain: version}

        def undo() -> None:
            for scope, opsets in old.items():
                scope.opsets = opsets

        self._journal(main, undo)

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
        ordered = _in_order(scope)
        for node in ordered:
            _write_names(node)
        protos = [node.proto for node in ordered]
        del proto.node[:]
        proto.node.extend(protos)
        imports = self.model.proto.opset_import if isinstance(proto, GraphProto) else proto.opset_import
        present = _opsets(imports)
        used = {node.domain for node in ordered}
        for domain, version in scope.opsets.items():
            if domain in used and domain not in present:
                imports.add(domain=domain, version=version)
        if isinstance(proto, FunctionProto):
            return
        kept = {value.name: value for value in scope.values.values() if value.tensor is not None}
        if any(tensor.name not in kept and tensor.name not in scope.values for tensor in proto.initializer):
            tensors = [t for t in proto.initializer if t.name in kept or t.name in scope.values]
            del proto.initializer[:]
            proto.initializer.extend(tensors)
        present_names = {tensor.name for tensor in proto.initializer}
        proto.initializer.extend(
            value.tensor for name, value in kept.items() if name not in present_names and value.tensor is not None
        )
        if any(info.name not in scope.values for info in proto.value_info):
            infos = [info for info in proto.value_info if info.name in scope.values]
            del proto.value_info[:]
            proto.value_info.extend(infos)


def _put_back(ordered: dict[Node, T], node: Node, content: T) -> None:
    """Insert a node at its place: what asks for the first or the next node must not see that it was away."""
    ordered[node] = content
    items = sorted(ordered.items(), key=lambda item: item[0].position)
    ordered.clear()
    ordered.update(items)


def _opsets(imports: Iterable[object]) -> dict[str, int]:
    return {("" if o.domain == "ai.onnx" else o.domain): o.version for o in imports}  # type: ignore[attr-defined]


def _detached(scope: Scope) -> bool:
    """Whether the scope belongs to a node that was removed."""
    while scope.owner is not None:
        if scope.owner not in scope.owner.scope.nodes:
            return True
        scope = scope.owner.scope
    return False


def _write_names(node: Node) -> None:
    proto = node.proto
    inputs = ["" if value is None else value.name for value in node.inputs]
    while inputs and not inputs[-1] and len(inputs) > len(proto.input):
        inputs.pop()
    outputs = ["" if value is None else value.name for value in node.outputs]
    while outputs and not outputs[-1] and len(outputs) > len(proto.output):
        outputs.pop()
    if list(proto.input) != inputs:
        proto.input[:] = inputs
    if list(proto.output) != outputs:
        proto.output[:] = outputs


def _in_order(scope: Scope) -> list[Node]:
    """The nodes by position where that is a topological order, else the topological order nearest to it."""
    ordered = sorted(scope.nodes, key=lambda node: node.position)
    seen: set[Value] = set()
    for node in ordered:
        if any(value.scope is scope and value.producer is not None and value not in seen for value in _reads(node)):
            return _topological(scope)
        seen.update(value for value in node.outputs if value is not None)
    return ordered


def _reads(node: Node) -> Iterator[Value]:
    """The values a node needs, those that its bodies capture included."""
    for value in node.inputs:
        if value is not None:
            yield value
    for body in node.bodies:
        for inner in body.nodes:
            for value in _reads(inner):
                if value.scope is not body:
                    yield value
        for value in body.outputs:
            if value.scope is not body:
                yield value


def _topological(scope: Scope) -> list[Node]:
    waiting: dict[Node, int] = {}
    readers: dict[Node, list[Node]] = {}
    ready: list[tuple[tuple[int, int], int, Node]] = []
    serials = {node: serial for serial, node in enumerate(scope.nodes)}
    for node, serial in serials.items():
        needed = {v.producer for v in _reads(node) if v.scope is scope and v.producer is not None}
        waiting[node] = len(needed)
        for producer in needed:
            readers.setdefault(producer, []).append(node)
        if not needed:
            heapq.heappush(ready, (node.position, serial, node))
    ordered: list[Node] = []
    while ready:
        _, _, node = heapq.heappop(ready)
        ordered.append(node)
        for reader in readers.get(node, ()):
            waiting[reader] -= 1
            if not waiting[reader]:
                heapq.heappush(ready, (reader.position, serials[reader], reader))
    if len(ordered) < len(scope.nodes):
        stuck = ", ".join(sorted(node.label for node in scope.nodes if node not in set(ordered))[:5])
        raise ModelError(f"{scope.name}: the nodes form a cycle: {stuck}")
    return ordered
