"""What is different in the scopes of two models: they are walked in step, and nodes are paired.

A node finds its partner by the name of a value it computes; failing that, by doing the same to the same values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto, TensorProto, ValueInfoProto

from fusion.diff_regions import NodeView, Region, arithmetic, group, operator_name
from fusion.errors import ModelError
from fusion.external import is_external
from fusion.model import Model


@dataclass(frozen=True, slots=True)
class NodeChange:
    """A node of both models that is not the same in both.

    Attributes:
        before, after: the node in the first and in the second model.
        changes: one sentence per attribute or input that differs.
    """

    before: NodeView
    after: NodeView
    changes: tuple[str, ...]


@dataclass(slots=True)
class ScopeDiff:
    """What is different in one scope: the main graph, a body of If, Loop or Scan, or a function.

    Attributes:
        name: "main", "main / If_3.then_branch", "function domain::name".
        removed, added: nodes of the first or the second model only, in graph order.
        changed: nodes of both.
        regions: removed and added nodes that belong together.
        initializers: initializer → "added", "removed" or what changed.
        interface: one sentence per input or output that differs.
    """

    name: str
    removed: list[NodeView] = field(default_factory=list)
    added: list[NodeView] = field(default_factory=list)
    changed: list[NodeChange] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)
    initializers: dict[str, str] = field(default_factory=dict)
    interface: list[str] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Whether the scope is the same in both models."""
        return not (self.removed or self.added or self.changed or self.initializers or self.interface)

    def to_dict(self) -> dict[str, Any]:
        """Return the scope as plain data."""
        return {
            "name": self.name,
            "regions": [region.to_dict() for region in self.regions],
            "changed": [
                {"before": c.before.to_dict(), "after": c.after.to_dict(), "changes": list(c.changes)}
                for c in self.changed
            ],
            "initializers": self.initializers,
            "interface": self.interface,
        }


def scopes(a: Model, b: Model) -> list[ScopeDiff]:
    """Return the scopes that differ, the main graph first."""
    walk = _Walk(a, b)
    walk.graphs("main", a.proto.graph, b.proto.graph)
    walk.functions()
    return walk.scopes


class _Walk:
    """Goes through the scopes of two models in step."""

    def __init__(self, a: Model, b: Model) -> None:
        self.a, self.b = a, b
        self.scopes: list[ScopeDiff] = []

    def functions(self) -> None:
        there, here = ({_signature(f): f for f in m.proto.functions} for m in (self.a, self.b))
        empty = FunctionProto()
        for key in {**there, **here}:
            before, after = there.get(key, empty), here.get(key, empty)
            scope = ScopeDiff(f"function {key}")
            if key not in here or key not in there:
                scope.interface.append(f"the function is {'missing in' if key in there else 'new in'} the second model")
            elif (list(before.input), list(before.output)) != (list(after.input), list(after.output)):
                scope.interface.append("the formal inputs or outputs are others")
            self.nodes(scope, before.node, after.node, set(before.output))

    def graphs(self, name: str, a: GraphProto, b: GraphProto) -> None:
        scope = ScopeDiff(name)
        scope.interface += _interface("input", a.input, b.input)
        scope.interface += _interface("output", a.output, b.output)
        scope.initializers = dict(self.initializers(a, b))
        weights = ({t.name: t for t in a.initializer}, {t.name: t for t in b.initializer})
        self.nodes(scope, a.node, b.node, {o.name for o in a.output}, weights)

    def initializers(self, a: GraphProto, b: GraphProto) -> Iterator[tuple[str, str]]:
        there, here = {t.name: t for t in a.initializer}, {t.name: t for t in b.initializer}
        for name, tensor in there.items():
            other = here.get(name)
            if other is None:
                yield name, "removed"
            elif change := self.tensor_change(tensor, other):
                yield name, change
        for name, tensor in here.items():
            if name not in there:
                yield name, f"added: {_type(tensor)}"

    def nodes(
        self,
        scope: ScopeDiff,
        a: Sequence[NodeProto],
        b: Sequence[NodeProto],
        outputs: set[str],
        weights: tuple[Mapping[str, TensorProto], Mapping[str, TensorProto]] = ({}, {}),
    ) -> None:
        position = len(self.scopes)
        self.scopes.append(scope)
        pairs, gone, new, renamed = _pair(a, b)
        constants = tuple({**_constants(nodes), **tensors} for nodes, tensors in zip((a, b), weights, strict=True))
        for before, after in pairs:
            if before.SerializeToString() != after.SerializeToString():
                changes = tuple(self.node_changes(before, after, renamed, *constants))
                if changes:
                    scope.changed.append(NodeChange(_view(before), _view(after), changes))
            self.bodies(scope.name, before, after)
        if gone or new:
            scope.removed, scope.added = [_view(n) for n in gone], [_view(n) for n in new]
            helpers = [arithmetic(nodes, set(known)) for nodes, known in zip((a, b), weights, strict=True)]
            scope.regions = group(scope.removed, scope.added, helpers[0], helpers[1], outputs)
        if scope.empty:
            del self.scopes[position]

    def bodies(self, name: str, before: NodeProto, after: NodeProto) -> None:
        mine = {x.name: x.g for x in before.attribute if x.type == AttributeProto.GRAPH}
        for attribute in after.attribute:
            if attribute.name in mine:
                place = after.name or after.op_type
                self.graphs(f"{name} / {place}.{attribute.name}", mine[attribute.name], attribute.g)

    def node_changes(
        self,
        a: NodeProto,
        b: NodeProto,
        renamed: Mapping[str, str],
        constants_before: Mapping[str, TensorProto],
        constants_after: Mapping[str, TensorProto],
    ) -> Iterator[str]:
        there, here = {x.name: x for x in a.attribute}, {x.name: x for x in b.attribute}
        for name in {**there, **here}:
            if name not in here:
                if not self.is_default(b, there[name]):
                    yield f"attribute {name} = {_text(there[name])} removed"
            elif name not in there:
                if not self.is_default(a, here[name]):
                    yield f"attribute {name} = {_text(here[name])} added"
            elif not self.same_attribute(there[name], here[name]):
                yield f"attribute {name}: {_text(there[name])} became {_text(here[name])}"
        for slot in range(max(len(a.input), len(b.input))):
            before = a.input[slot] if slot < len(a.input) else ""
            after = b.input[slot] if slot < len(b.input) else ""
            if before == renamed.get(after, after):
                continue
            mine, theirs = constants_before.get(before), constants_after.get(after)
            if mine is None or theirs is None or self.tensor_change(mine, theirs):
                yield f"input {slot}: {before or 'none'} became {after or 'none'}"

    def is_default(self, node: NodeProto, attribute: AttributeProto) -> bool:
        """Whether a node without this attribute has it all the same."""
        try:
            schema = onnx.defs.get_schema(node.op_type, node.domain)
        except onnx.defs.SchemaError:
            return False
        default = schema.attributes[attribute.name].default_value if attribute.name in schema.attributes else None
        return default is not None and bool(default.type) and _bare(default) == _bare(attribute)

    def same_attribute(self, a: AttributeProto, b: AttributeProto) -> bool:
        if a.type == b.type == AttributeProto.GRAPH:
            return True  # compared as a scope of its own
        if a.type == b.type == AttributeProto.TENSOR:
            return not self.tensor_change(a.t, b.t)
        return _bare(a) == _bare(b)

    def tensor_change(self, a: TensorProto, b: TensorProto) -> str:
        """Return how two tensors differ; empty where they hold the same bits."""
        if (a.data_type, *a.dims) != (b.data_type, *b.dims):
            return f"{_type(a)} became {_type(b)}"
        # Two external tensors with the same entries are the same only in the same folder; an elided payload's entry
        # names the very bytes.
        elsewhere = is_external(a) and self.a.directory != self.b.directory
        if not elsewhere and a.SerializeToString(deterministic=True) == b.SerializeToString(deterministic=True):
            return ""
        try:
            same = self.a.array(a).tobytes() == self.b.array(b).tobytes()
        except ModelError:
            return "" if _place(a) == _place(b) else "external data that is not there: not compared"
        return "" if same else "values changed"


Pairs = list[tuple[NodeProto, NodeProto]]


def _pair(
    a: Sequence[NodeProto], b: Sequence[NodeProto]
) -> tuple[Pairs, list[NodeProto], list[NodeProto], Mapping[str, str]]:
    """Pair the nodes of two scopes, in one pass over each.

    Returns:
        The pairs, the nodes of `a` alone, the nodes of `b` alone, and values of `b` that have another name in `a`.
    """
    by_value = {name: i for i, node in enumerate(a) for name in node.output if name}
    values_after = {name for node in b for name in node.output}
    by_deed: dict[tuple[Any, ...], list[int]] | None = None
    renamed: dict[str, str] = {}
    paired = [False] * len(a)
    pairs: Pairs = []
    new: list[NodeProto] = []
    for node in b:
        known = [by_value[name] for name in node.output if name in by_value]
        if known:
            found = known[0] if operator_name(a[known[0]]) == operator_name(node) and not paired[known[0]] else None
        else:
            if by_deed is None:  # made late: most models keep their names
                by_deed = {}
                for i in reversed(range(len(a))):
                    if values_after.isdisjoint(a[i].output):
                        by_deed.setdefault(_deed(a[i], {}), []).append(i)
            candidates = by_deed.get(_deed(node, renamed))
            found = candidates.pop() if candidates else None
        if found is None:
            new.append(node)
            continue
        paired[found] = True
        renamed.update({y: x for x, y in zip(a[found].output, node.output, strict=False) if x != y})
        pairs.append((a[found], node))
    return pairs, [n for n, done in zip(a, paired, strict=True) if not done], new, renamed


def _deed(node: NodeProto, names: Mapping[str, str]) -> tuple[Any, ...]:
    """Return what a node does, names of its outputs apart."""
    attributes = tuple(sorted(_bare(x) for x in node.attribute))
    return operator_name(node), len(node.output), tuple(names.get(i, i) for i in node.input), attributes


def _constants(nodes: Iterable[NodeProto]) -> dict[str, TensorProto]:
    """Return the values of Constant nodes that are tensors."""
    constants = (n for n in nodes if n.op_type == "Constant" and n.output)
    return {n.output[0]: a.t for n in constants for a in n.attribute if a.type == AttributeProto.TENSOR}


def _bare(attribute: AttributeProto) -> bytes:
    if attribute.doc_string:
        copy = AttributeProto()
        copy.CopyFrom(attribute)
        copy.doc_string = ""
        attribute = copy
    data: bytes = attribute.SerializeToString(deterministic=True)
    return data


def _view(node: NodeProto) -> NodeView:
    props = {p.key: p.value for p in node.metadata_props if p.key.startswith("fusion.")}
    split = {
        key: tuple(part for part in props.get(f"fusion.{key}", "").split(",") if part) for key in ("replaced", "laws")
    }
    return NodeView(
        name=node.name,
        operator=operator_name(node),
        inputs=tuple(node.input),
        outputs=tuple(node.output),
        attributes={x.name: _text(x) for x in node.attribute},
        captures=tuple(_captures(node)),
        pattern=props.get("fusion.pattern", ""),
        replaced=split["replaced"],
        laws=split["laws"],
    )


def _captures(node: NodeProto) -> Iterator[str]:
    """Yield the names that the bodies of a node mention; those of outer values are among them."""
    for attribute in node.attribute:
        for graph in [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs:
            for inner in graph.node:
                yield from inner.input
                yield from _captures(inner)
            yield from (o.name for o in graph.output)


def _text(attribute: AttributeProto) -> str:
    """Return an attribute's value as a person would write it, large ones by their type."""
    if attribute.type == AttributeProto.TENSOR:
        tensor = attribute.t
        small = tensor.data_location != TensorProto.EXTERNAL and len(tensor.dims) <= 1 and sum(tensor.dims) <= 8
        return str(onnx.numpy_helper.to_array(tensor).tolist()) if small else _type(tensor)
    if attribute.type == AttributeProto.GRAPH:
        return f"a graph of {len(attribute.g.node)} nodes"
    if attribute.ref_attr_name:
        return f"@{attribute.ref_attr_name}"
    value = onnx.helper.get_attribute_value(attribute)
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _type(tensor: TensorProto) -> str:
    return f"{TensorProto.DataType.Name(tensor.data_type).lower()}{list(tensor.dims)}"


def _place(tensor: TensorProto) -> list[tuple[str, str]]:
    return sorted((entry.key, entry.value) for entry in tensor.external_data)


def _interface(kind: str, a: Iterable[ValueInfoProto], b: Iterable[ValueInfoProto]) -> Iterator[str]:
    there, here = {i.name: i for i in a}, {i.name: i for i in b}
    yield from (f"{kind} {name!r} removed" for name in there if name not in here)
    yield from (f"{kind} {name!r} added" for name in here if name not in there)
    if there.keys() == here.keys() and list(there) != list(here):
        yield f"{kind}s in another order: {', '.join(there)} became {', '.join(here)}"
    for name, info in there.items():
        if name in here and info.type != here[name].type:
            yield f"{kind} {name!r}: {_declared(info)} became {_declared(here[name])}"


def _declared(info: ValueInfoProto) -> str:
    return str(onnx.helper.printable_value_info(info)).removeprefix(f"%{info.name}")


def _signature(function: FunctionProto) -> str:
    overload = f":{function.overload}" if function.overload else ""
    return f"{function.domain}::{function.name}{overload}"
