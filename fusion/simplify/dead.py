"""Dead code: nodes from which no output can be reached, and initializers that nobody reads."""

from __future__ import annotations

from fusion.models.graph import Node, Scope, Value
from fusion.simplify.edits import Editor


def remove(editor: Editor, rule: str) -> None:
    """Remove what no output of the graph or of a function needs, and what is known to do nothing but compute it."""
    graph = editor.graph
    live: set[Node] = set()
    stack: list[Node] = []

    def need(value: Value | None) -> None:
        if value is not None and value.producer is not None and value.producer not in live:
            live.add(value.producer)
            stack.append(value.producer)

    def enter(scope: Scope) -> None:
        for value in scope.outputs:
            need(value)
        for node in scope.nodes:
            if node not in live and not editor.removable(node):
                live.add(node)
                stack.append(node)

    for scope in graph.scopes:
        if scope.parent is None:
            enter(scope)
    while stack:
        node = stack.pop()
        for value in node.inputs:
            need(value)
        for body in node.bodies:
            enter(body)
    dead = [node for scope in graph.scopes for node in scope.nodes if node not in live]
    for node in dead:
        editor.record(rule, node.label, node)
    editor.sweep(dead)
    for scope in graph.scopes:
        for value in [value for value in scope.values.values() if value.tensor is not None and not value.uses]:
            if editor.drop(value):
                editor.record(rule, value.name, None)
