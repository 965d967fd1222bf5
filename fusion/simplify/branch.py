"""If with a constant condition: the branch that is taken moves into the scope around it."""

from __future__ import annotations

from onnx import TensorProto

from fusion.models.graph import Graph, Node, Value
from fusion.simplify.edits import Editor, write_name


def inline(editor: Editor, rule: str, node: Node) -> bool:
    """Replace an If whose condition is known by its branch; its outputs keep their names."""
    condition = node.input(0)
    known = None if condition is None else editor.facts.number(condition)
    if known is None:
        return False
    name = "then_branch" if known else "else_branch"
    attributes = [attribute for attribute in node.proto.attribute if attribute.name in ("then_branch", "else_branch")]
    taken = next((body for a, body in zip(attributes, node.bodies, strict=True) if a.name == name), None)
    if taken is None or len(taken.outputs) < len(node.outputs) or taken.proto.sparse_initializer:
        return False
    if any(value is not None and value.name in editor.annotated for value in node.outputs):
        return False
    graph = editor.graph
    inner = list(taken.nodes)
    with graph.transaction():
        editor.record(rule, node.label, node, [moved.key for moved in inner])
        for value in list(taken.values.values()):
            _move_value(graph, value, node)
        for moved in inner:
            _move_node(graph, moved, node)
        for output, value in zip(list(node.outputs), taken.outputs, strict=False):
            if output is not None:
                graph.add_node(node.scope, "Identity", [value], [output], at=node)
        editor.sweep([node])
    return True


def _move_value(graph: Graph, value: Value, owner: Node) -> None:
    """Give a value of a branch a name of its own in the scope around; both branches may use the same names."""
    branch, around = value.scope, owner.scope
    before = value.name, value.tensor, value.is_output
    del branch.values[value.name]
    value.name, value.scope, value.is_output = graph.fresh(value.name), around, False
    around.values[value.name] = value
    readers = list(value.uses)
    for reader in readers:
        _write_input(reader, value)
    if value.producer is not None:
        write_name(value.producer.proto.output, value.slot, value)
    if value.tensor is not None:
        named = TensorProto()
        named.CopyFrom(value.tensor)
        named.name = value.name
        value.tensor = named

    def undo() -> None:
        del around.values[value.name]
        (value.name, value.tensor, value.is_output), value.scope = before, branch
        branch.values[value.name] = value
        for reader in readers:
            _write_input(reader, value)
        if value.producer is not None:
            write_name(value.producer.proto.output, value.slot, value)

    graph._journal(around, undo)
    for reader in readers:  # bodies inside the branch capture it
        graph._journal(reader.scope, _nothing)


def _write_input(reader: Node, value: Value) -> None:
    for slot, read in enumerate(reader.inputs):
        if read is value:
            write_name(reader.proto.input, slot, value)


def _nothing() -> None:
    """What is to be undone where a scope is only marked as edited."""


def _move_node(graph: Graph, node: Node, owner: Node) -> None:
    branch, around = node.scope, owner.scope
    position = node.position
    del branch.nodes[node]
    graph._sequence += 1
    node.scope, node.position = around, (owner.position[0], graph._sequence)
    around.nodes[node] = None
    for body in node.bodies:
        body.parent = around

    def undo() -> None:
        del around.nodes[node]
        node.scope, node.position = branch, position
        branch.nodes[node] = None
        for body in node.bodies:
            body.parent = branch

    graph._journal(around, undo)
    graph._journal(branch, _nothing)
