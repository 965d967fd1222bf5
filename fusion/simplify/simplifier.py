"""Running the rules: every node once, inputs first, and again with new facts until nothing changes.

A rule sees what the rules before it made of a node's inputs, so that one visit settles a node; what a second pass finds
hangs on who else reads a value, or on sizes of which more is known once a graph says less about them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from onnx import TensorProto, numpy_helper

from fusion.facts import Facts, constants
from fusion.graph import Graph, Node, Scope, Value
from fusion.graph import _in_order as in_order
from fusion.rewrite import Rewritten
from fusion.simplify import branch, collapse, common, dead, folding, identity, sizes
from fusion.simplify.edits import Editor

PASSES = 8
"""Upper bound of the repetitions; the third rarely finds anything."""


class Simplifier:
    """Simplifies one graph.

    Args:
        graph: the index.
        facts: what is known about it.
        rules: names of the rules to use.
        rewritten: where what is done is noted.
    """

    def __init__(self, graph: Graph, facts: Facts, rules: Collection[str], rewritten: list[Rewritten]) -> None:
        self.graph = graph
        self.facts = facts
        self.editor = Editor(graph, facts, rewritten)
        self.rules = frozenset(rules)
        steps: list[tuple[str, Callable[[Node], bool]]] = [
            ("identity", self._pass_on),
            ("collapse", self._collapse),
            ("constant_folding", self._fold),
            ("constant_sizes", self._settle_sizes),
        ]
        self._steps = [step for name, step in steps if name in self.rules]

    def prepare(self) -> None:
        """What fusions profit from: dead readers go, and branches that are always taken open."""
        if "dead_code" in self.rules:
            dead.remove(self.editor, "dead_code")
        if "constant_branch" not in self.rules:
            return
        inlined = False
        for scope in self.graph.scopes:  # a branch is behind the scope around it, and what it holds moves there
            pending = self._ifs(scope)
            while pending:
                if branch.inline(self.editor, "constant_branch", pending.pop()):
                    inlined = True
                    pending = self._ifs(scope)
        if inlined:
            self._forget()

    def _ifs(self, scope: Scope) -> list[Node]:
        return [node for node in scope.nodes if node.key == "If"] if "If" in self.graph.by_op else []

    def run(self) -> bool:
        """Simplify to the fixpoint; return whether anything changed. The graph holds the edits, uncommitted."""
        start = self.editor.count
        for _ in range(PASSES):
            before = self.editor.count
            self.prepare()
            for scope in list(self.graph.scopes):
                if scope.parent is None:
                    self._visit(scope, common.Table())
            if self.editor.count == before:
                break
            self._forget()
        return self.editor.count > start

    def _forget(self) -> None:
        """A graph that says less about its sizes may say more about them: facts are found anew."""
        self.facts.forget([value for scope in self.graph.scopes for value in scope.values.values()])

    # -- one pass ---------------------------------------------------------------------------------------------------

    def _visit(self, scope: Scope, table: common.Table) -> None:
        merging = "common_subexpression" in self.rules
        if merging:
            for value in [value for value in scope.values.values() if value.tensor is not None]:
                self._merge_constant(value, table)
        settling = "constant_node" in self.rules
        for node in in_order(scope):
            if node not in scope.nodes:
                continue
            if node.key == "Constant":
                if settling:
                    self._settle(node)
                if merging and node.outputs[0] is not None:
                    self._merge_constant(node.outputs[0], table)
                continue
            for body in node.bodies:
                self._visit(body, common.Table(table))
            while any(step(node) for step in self._steps) and node in scope.nodes:
                pass
            if merging and node in scope.nodes:
                self._merge(node, table)

    def _pass_on(self, node: Node) -> bool:
        result, same = node.outputs[0], identity.same_value(self.facts, node)
        return result is not None and same is not None and self.editor.forward("identity", result, same)

    def _collapse(self, node: Node) -> bool:
        result, same = node.outputs[0], collapse.undone(self.facts, node)
        if result is not None and same is not None and self.editor.forward("collapse", result, same):
            return True
        return collapse.merged(self.editor, "collapse", node)

    def _fold(self, node: Node) -> bool:
        name = "constant_folding"
        return folding.integers(self.editor, name, node) or folding.fold(self.editor, name, node)

    def _settle_sizes(self, node: Node) -> bool:
        return sizes.settle_sizes(self.editor, "constant_sizes", node)

    def _settle(self, node: Node) -> None:
        """A Constant node as an initializer, where there can be one."""
        value = node.outputs[0]
        stored = None if value is None else constants.stored(value)
        if value is None or stored is None or self.editor.is_held(value):
            return
        if not isinstance(stored, TensorProto):
            array = constants.payload(self.graph, value)
            if array is None or array.dtype.kind == "O":
                return
            stored = numpy_helper.from_array(array)
        self.editor.settle("constant_node", value, stored)

    def _merge_constant(self, value: Value, table: common.Table) -> None:
        key = common.constant_key(self.facts, value)
        found = None if key is None else table.value(key, value)
        if found is not None:
            self.editor.forward("common_subexpression", value, found)

    def _merge(self, node: Node, table: common.Table) -> None:
        known = common.integer_key(self.facts, node)
        if known is not None:
            output = node.outputs[0]
            assert output is not None
            same = table.value(known, output)
            if same is not None and self.editor.forward("common_subexpression", output, same):
                return
        key = common.node_key(node)
        found = None if key is None else table.node(key, node)
        if found is None or len(found.outputs) < len(node.outputs):
            return
        pairs = list(zip(node.outputs, found.outputs, strict=False))
        if any(mine is not None and other is None for mine, other in pairs):
            return
        for mine, other in pairs:
            if mine is not None and other is not None and (mine.uses or mine.is_output):
                self.editor.forward("common_subexpression", mine, other)
