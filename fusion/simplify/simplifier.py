"""Running the rules: every node once, inputs first, and again with new facts until nothing changes.

A rule sees what the rules before it made of a node's inputs, so that one visit settles a node; what a second pass finds
hangs on who else reads a value, or on sizes of which more is known once a graph says less about them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TypeAlias

from onnx import TensorProto, numpy_helper

from fusion.facts import Facts, constants
from fusion.models.graph import Graph, Node, Scope, Value
from fusion.models.graph import _in_order as in_order
from fusion.simplify import branch, collapse, common, dead, folding, identity, sizes
from fusion.simplify.edits import Editor
from fusion.simplify.purity import is_mergeable
from fusion.writing.outcome import Rewritten

PASSES = 8
"""Upper bound of the repetitions; the third rarely finds anything."""


Step: TypeAlias = Callable[[Node], bool]
"""A rule, tried at a node: whether it changed anything."""


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
        self._steps: dict[str, tuple[Step, ...]] = {}
        self._counted: set[Value] = set()
        """Values of which facts may know integers: what sizes are worked out from."""
        self._single: dict[Value, tuple[Node, common.Table]] = {}
        """The only reader of a value, which nothing can be equal to until the value has another."""

    def run(self) -> bool:
        """Simplify to the fixpoint; return whether anything changed. The graph holds the edits, uncommitted."""
        start = self.editor.count
        for _ in range(PASSES):
            before = self.editor.count
            self._pass()
            if self.editor.count == before:
                break
            self._forget()
        return self.editor.count > start

    def _pass(self) -> None:
        if "dead_code" in self.rules:
            dead.remove(self.editor, "dead_code")
        if "constant_branch" in self.rules and self.graph.by_op.get("If"):
            self._open_branches()
        self._counted.clear()
        self._single.clear()
        for scope in list(self.graph.scopes):
            if scope.parent is None:
                self._visit(scope, common.Table())

    def _open_branches(self) -> None:
        before = self.editor.count
        pending = list(self.graph.by_op["If"])[::-1]  # a branch may hold further ones
        while pending:
            node = pending.pop()
            if node in node.scope.nodes:
                branch.inline(self.editor, "constant_branch", node)
        if self.editor.count > before:
            self._forget()

    def _forget(self) -> None:
        """A graph that says less about its sizes may say more about them: facts are found anew."""
        self.facts.forget([value for scope in self.graph.scopes for value in scope.values.values()])

    # -- one pass ---------------------------------------------------------------------------------------------------

    def _visit(self, scope: Scope, table: common.Table) -> None:
        merging = "common_subexpression" in self.rules
        for value in [value for value in scope.values.values() if value.tensor is not None]:
            self._count(value)
            if merging:
                self._merge_constant(value, table)
        for node in in_order(scope):
            if node not in scope.nodes:
                continue
            if node.key == "Constant":
                self._visit_constant(node, table)
                continue
            for body in node.bodies:
                self._visit(body, common.Table(table))
            steps = self._steps.get(node.key)
            if steps is None:
                steps = self._steps[node.key] = self._steps_of(node.key)
            for step in steps:
                if step(node) and node not in scope.nodes:
                    break
            else:
                if merging:
                    self._merge(node, table)

    def _steps_of(self, key: str) -> tuple[Step, ...]:
        """The rules that an operator may fall under, in order."""
        steps: list[tuple[str, bool, Step]] = [
            ("identity", key in identity.RULES, self._pass_on),
            ("collapse", key in collapse.OPERATORS, self._collapse),
            ("constant_folding", key in folding.INTEGERS, self._fold_integers),
            ("constant_folding", key in folding.OPERATORS, self._fold),
            ("constant_sizes", key in sizes.SLOTS, self._settle_sizes),
        ]
        return tuple(step for name, serves, step in steps if serves and name in self.rules)

    def _visit_constant(self, node: Node, table: common.Table) -> None:
        value = node.outputs[0]
        if value is None:
            return
        if "constant_node" in self.rules:
            self._settle(value)
        self._count(value)
        if "common_subexpression" in self.rules:
            self._merge_constant(value, table)

    def _count(self, value: Value) -> None:
        """Note a constant whose elements facts may know as integers."""
        if self.facts.integers(value) is not None:
            self._counted.add(value)

    def _is_counted(self, node: Node) -> bool:
        """Whether facts may know integers of a node's output: only from known ones, or from a shape."""
        if node.key not in folding.INTEGERS or len(node.outputs) != 1:
            return False
        if node.key in folding.SOURCES or not self._counted.isdisjoint(node.inputs):
            output = node.outputs[0]
            if output is not None and self.facts.integers(output) is not None:
                self._counted.add(output)
                return True
        return False

    def _forward(self, rule: str, old: Value, new: Value) -> bool:
        """Let one value stand for another; what was the only reader of either is equal to others from now on."""
        if not self.editor.forward(rule, old, new):
            return False
        for value in (old, new):
            node, table = self._single.pop(value, (None, None))
            if node is not None and table is not None and node in node.scope.nodes and is_mergeable(node):
                table.node(common.node_key(node), node)
        if new in self._counted:
            self._counted.add(old)  # an output keeps its name
        return True

    def _pass_on(self, node: Node) -> bool:
        result, same = node.outputs[0], identity.same_value(self.facts, node)
        return result is not None and same is not None and self._forward("identity", result, same)

    def _collapse(self, node: Node) -> bool:
        result, same = node.outputs[0], collapse.undone(self.facts, node)
        if result is not None and same is not None and self._forward("collapse", result, same):
            return True
        return collapse.merged(self.editor, "collapse", node)

    def _fold_integers(self, node: Node) -> bool:
        return self._is_counted(node) and folding.integers(self.editor, "constant_folding", node)

    def _fold(self, node: Node) -> bool:
        return folding.fold(self.editor, "constant_folding", node)

    def _settle_sizes(self, node: Node) -> bool:
        return sizes.settle_sizes(self.editor, "constant_sizes", node)

    def _settle(self, value: Value) -> None:
        """A Constant node as an initializer, where there can be one."""
        stored = constants.stored(value)
        if stored is None or self.editor.is_held(value):
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
            self._forward("common_subexpression", value, found)

    def _merge(self, node: Node, table: common.Table) -> None:
        output = node.outputs[0] if node.outputs else None
        if output is not None and self._is_counted(node):
            known = common.integer_key(self.facts, output)
            same = None if known is None else table.value(known, output)
            if same is not None and self._forward("common_subexpression", output, same):
                return
        first = node.input(0)
        if first is not None and len(first.uses) == 1:
            self._single[first] = node, table
            return
        if not is_mergeable(node):
            return
        found = table.node(common.node_key(node), node)
        if found is None or len(found.outputs) < len(node.outputs):
            return
        pairs = list(zip(node.outputs, found.outputs, strict=False))
        if any(mine is not None and other is None for mine, other in pairs):
            return
        for mine, other in pairs:
            if mine is not None and other is not None and (mine.uses or mine.is_output):
                self._forward("common_subexpression", mine, other)
