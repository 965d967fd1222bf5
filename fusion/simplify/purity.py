"""Which nodes may be merged, worked out before the model runs, or removed where nobody reads them.

What an operator of an unknown domain does besides computing its outputs nobody knows: it stays as it is. Quantisation
is structure that later tools look for: neither it nor what feeds it is touched.
"""

from __future__ import annotations

from fusion.models.graph import Graph, Node, Scope, Value

KNOWN = frozenset({"", "ai.onnx.ml", "com.microsoft"})
"""Domains whose operators do nothing but compute their outputs."""

RANDOM = frozenset(
    """Bernoulli Multinomial RandomNormal RandomNormalLike RandomUniform RandomUniformLike
    com.microsoft::BiasDropout com.microsoft::BitmaskBiasDropout com.microsoft::BitmaskDropout
    com.microsoft::Sampling""".split()  # noqa: SIM905
)
"""Operators that give another result each time."""

TRAINING = frozenset({"Dropout", "BatchNormalization"})
"""Operators that have a training mode, which draws numbers or updates statistics."""

QUANTISED = ("Quantize", "Dequantize", "DynamicQuantize", "QLinear", "FakeQuant")


def is_quantisation(node: Node) -> bool:
    """Whether the node is part of how a model is quantised."""
    return node.op.startswith(QUANTISED)


def feeds_quantisation(value: Value) -> bool:
    """Whether a quantising node reads the value: its scale, its zero point, or what it quantises."""
    return any(is_quantisation(reader) for reader in value.uses)


def is_mergeable(node: Node) -> bool:
    """Whether two such nodes with equal inputs and attributes compute the same."""
    if node.domain not in KNOWN or node.bodies or not node.inputs:
        return False
    return node.key not in RANDOM and node.op not in TRAINING and not is_quantisation(node)


class Removable:
    """Whether a node may go where nobody reads its outputs: it is known to do nothing else.

    Args:
        graph: its functions are looked into.
    """

    def __init__(self, graph: Graph) -> None:
        self._functions: dict[tuple[str, str], list[Scope]] = {}  # overloads share a name
        for scope in graph.scopes:
            proto = scope.proto
            if scope.owner is None and scope is not graph.main:
                self._functions.setdefault((proto.domain, proto.name), []).append(scope)
        self._known: dict[Scope, bool] = {}

    def __call__(self, node: Node) -> bool:
        if node.bodies:
            return node.domain in KNOWN and all(self._is_pure(body) for body in node.bodies)
        if node.domain in KNOWN and not self._functions:
            return True
        called = self._functions.get((node.domain, node.op))
        return node.domain in KNOWN if called is None else all(map(self._is_pure, called))

    def _is_pure(self, scope: Scope) -> bool:
        known = self._known.get(scope)
        if known is None:
            self._known[scope] = False  # a function that calls itself is none
            known = self._known[scope] = all(self(node) for node in scope.nodes)
        return known
