"""A graph that can be edited: edits are journalled, so that they can be undone, and written back into the protobuf.

The protobuf stays the truth: a graph without edits leaves it untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableSequence, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, TypeVar

from onnx import FunctionProto, GraphProto, TensorProto, helper

from fusion.models.index import Index, Node, Scope, Value, is_read, paused_collection, reads, versions
from fusion.models.order import nearest

if TYPE_CHECKING:
    from fusion.models.model import Model

__all__ = ["Graph", "Node", "Scope", "Value", "paused_collection"]

T = TypeVar("T")


class Graph(Index):
    """The index of one model, and its edits. `commit` ends its life.

    Attributes:
        constants: constants that rewrites added, by content.
    """

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.constants: dict[object, Value] = {}
        self._fresh = 0
        self._sequence = 0
        self._removed: list[Node] = []
        self._undo: list[Callable[[], None]] | None = None

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
        while name in self.names:
            self._fresh += 1
            name = f"{hint}_{self._fresh}"
        self.names.add(name)
        if self._undo is not None:
            self._undo.append(partial(self.names.discard, name))
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

    def declare(self, value: Value, data_type: int, sizes: Sequence[int | None]) -> None:
        """Say the type and sizes of a new value, None where one is unknown; a function has no place for it."""
        proto = value.scope.proto
        if isinstance(proto, GraphProto):
            value.info = helper.make_tensor_value_info(value.name, data_type, sizes)
            proto.value_info.append(value.info)
            self._journal(value.scope, proto.value_info.pop)

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
            if any(map(is_read, node.outputs)):
                continue
            read = reads(node)
            self._remove(node)
            removed.append(node)
            for value in read:
                if is_read(value):
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
        self._removed.append(node)
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
        edited = any(scope.edited for scope in self.scopes)
        for scope in reversed(self.scopes):  # bodies before the graphs that hold them
            if scope.edited and not _detached(scope):
                self._commit(scope)
        self._take_apart()
        return edited

    def _take_apart(self) -> None:
        """Cut the circles in which nodes and values refer to each other, so that no collector has to look for them."""
        for node in chain(self.nodes(), self._removed):
            node.inputs.clear()
            node.outputs.clear()
            node.bodies = ()
        for scope in self.scopes:
            scope.nodes.clear()
            scope.values.clear()
            scope.outputs.clear()
        self.by_op.clear()
        self._removed.clear()

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
        missing = {node.domain for node in nodes} - versions(imports).keys()
        imports.extend(helper.make_opsetid(domain, v) for domain, v in scope.opsets.items() if domain in missing)
        if isinstance(proto, GraphProto):
            _replace(proto.value_info, [info for info in proto.value_info if info.name in scope.values])
            _replace(proto.initializer, [tensor for tensor in proto.initializer if tensor.name in scope.values])
            present = {tensor.name for tensor in proto.initializer}
            added = [value for value in scope.values.values() if value.name not in present]
            proto.initializer.extend(value.tensor for value in added if value.tensor is not None)


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


def _detached(scope: Scope) -> bool:
    """Whether the scope belongs to a node that was removed."""
    owner = scope.owner
    return owner is not None and (owner not in owner.scope.nodes or _detached(owner.scope))


def _in_order(scope: Scope) -> list[Node]:
    """The nodes by position where that is a topological order, else the topological order nearest to it."""
    nodes = sorted(scope.nodes, key=attrgetter("position"))
    if all(producer.position < node.position for node in nodes for producer in _producers(node)):
        return nodes
    index = {node: place for place, node in enumerate(nodes)}
    needs = [{index[producer] for producer in _producers(node)} for node in nodes]
    return [nodes[place] for place in nearest(needs, [node.label for node in nodes], scope.name)]


def _producers(node: Node) -> list[Node]:
    """The nodes of the same scope whose results a node needs."""
    return [value.producer for value in reads(node) if value.producer is not None and value.scope is node.scope]
