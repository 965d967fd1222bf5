"""What is different in the scopes of two models: they are walked in step, and nodes are paired.

A node finds its partner by the name of a value it computes; failing that, by doing the same to the same values.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from fusion import schema
from fusion.diffing.regions import NodeView, Region, arithmetic, group, operator_name
from fusion.errors import ModelError
from fusion.models.external import is_external
from fusion.models.model import Model


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
        regions: nodes of one model only, those together that belong together.
        changed: nodes of both.
        initializers: initializer → "added", "removed" or what changed.
        interface: one sentence per input or output that differs.
    """

    name: str
    regions: list[Region] = field(default_factory=list)
    changed: list[NodeChange] = field(default_factory=list)
    initializers: dict[str, str] = field(default_factory=dict)
    interface: list[str] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Whether the scope is the same in both models."""
        return not (self.regions or self.changed or self.initializers or self.interface)

    @property
    def removed(self) -> list[NodeView]:
        """Nodes of the first model only."""
        return [node for region in self.regions for node in region.removed]

    @property
    def added(self) -> list[NodeView]:
        """Nodes of the second model only."""
        return [node for region in self.regions for node in region.added]


@dataclass(frozen=True, slots=True)
class _Side:
    """One of the two models at the scope that is compared: its nodes, outputs and opsets, and constants by name."""

    nodes: Sequence[NodeProto]
    outputs: set[str]
    opsets: Mapping[str, int]
    constants: ChainMap[str, TensorProto]

    @staticmethod
    def of(function: FunctionProto) -> _Side:
        return _Side(function.node, set(function.output), opsets(function), ChainMap(dict(_constants(function.node))))

    def inside(self, body: GraphProto) -> _Side:
        """A graph that sees the values of this scope."""
        constants = {**dict(_constants(body.node)), **{t.name: t for t in body.initializer}}
        return _Side(body.node, {o.name for o in body.output}, self.opsets, self.constants.new_child(constants))


def scopes(a: Model, b: Model) -> list[ScopeDiff]:
    """Return the scopes that differ, the main graph first."""
    walk = _Walk(a, b)
    sides = [_Side((), set(), opsets(model.proto), ChainMap()) for model in (a, b)]
    walk.graphs("main", a.proto.graph, b.proto.graph, sides, ChainMap())
    walk.functions()
    return walk.scopes


def interface(
    kind: str,
    a: Iterable[ValueInfoProto],
    b: Iterable[ValueInfoProto],
    change: Callable[[ValueInfoProto, ValueInfoProto], str],
) -> Iterator[tuple[str, str]]:
    """Yield what differs between the declared inputs or outputs of two models: the name, empty for the order, and a
    sentence. `change` says how two of one name differ, or nothing."""
    there, here = {i.name: i for i in a}, {i.name: i for i in b}
    yield from ((name, f"{kind} {name!r} is missing in the second model") for name in there if name not in here)
    yield from ((name, f"{kind} {name!r} is new in the second model") for name in here if name not in there)
    if there.keys() == here.keys() and list(there) != list(here):
        yield "", f"the {kind}s are in another order: {', '.join(there)} became {', '.join(here)}"
    for name in there:
        if name in here and (text := change(there[name], here[name])):
            yield name, f"{kind} {name!r}: {text}"


def opsets(proto: ModelProto | FunctionProto) -> dict[str, int]:
    """Return the versions of the imported domains."""
    return {"" if o.domain == "ai.onnx" else o.domain: o.version for o in proto.opset_import}


def all_nodes(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """Yield nodes and those of their bodies."""
    for node in nodes:
        yield node
        for body in _bodies(node).values():
            yield from all_nodes(body.node)


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
                scope.interface.append(f"the function is {'missing' if key in there else 'new'} in the second model")
            elif (list(before.input), list(before.output)) != (list(after.input), list(after.output)):
                scope.interface.append("the formal inputs or outputs are others")
            self.nodes(scope, _Side.of(before), _Side.of(after), ChainMap())

    def graphs(
        self, name: str, a: GraphProto, b: GraphProto, around: Sequence[_Side], names: ChainMap[str, str]
    ) -> None:
        """Compare two graphs; `names` gives values of the second model their names in the first."""
        scope = ScopeDiff(name)
        for kind, before, after in (("input", a.input, b.input), ("output", a.output, b.output)):
            scope.interface += [sentence for _, sentence in interface(kind, before, after, _declared_change)]
        there, here = ({t.name: t for t in graph.initializer} for graph in (a, b))
        for key, tensor in there.items():
            change = self.tensor_change(tensor, here[key]) if key in here else "removed"
            if change:
                scope.initializers[key] = change
        scope.initializers |= {key: f"added: {_type(tensor)}" for key, tensor in here.items() if key not in there}
        self.nodes(scope, around[0].inside(a), around[1].inside(b), names.new_child())

    def nodes(self, scope: ScopeDiff, a: _Side, b: _Side, names: ChainMap[str, str]) -> None:
        position = len(self.scopes)
        self.scopes.append(scope)
        pairs, gone, new = _pair(a.nodes, b.nodes, names)
        for before, after in pairs:
            if before.SerializeToString() != after.SerializeToString():
                changes = tuple(self.node_changes(before, after, a, b, names))
                if changes:
                    scope.changed.append(NodeChange(_view(before), _view(after), changes))
            there, here = _bodies(before), _bodies(after)
            for name, body in here.items():
                if name in there:
                    place = f"{scope.name} / {after.name or after.op_type}.{name}"
                    self.graphs(place, there[name], body, (a, b), names)
        if gone or new:
            helpers = (arithmetic(a.nodes, a.constants), arithmetic(b.nodes, b.constants))
            scope.regions = group([_view(n) for n in gone], [_view(n) for n in new], helpers, a.outputs)
        if scope.empty:
            del self.scopes[position]

    def node_changes(self, x: NodeProto, y: NodeProto, a: _Side, b: _Side, names: Mapping[str, str]) -> Iterator[str]:
        there, here = {i.name: i for i in x.attribute}, {i.name: i for i in y.attribute}
        for name in {**there, **here}:
            if name not in here:
                if not _is_default(y, there[name], b.opsets):
                    yield f"attribute {name} = {_text(there[name])} removed"
            elif name not in there:
                if not _is_default(x, here[name], a.opsets):
                    yield f"attribute {name} = {_text(here[name])} added"
            elif not self.same_attribute(there[name], here[name]):
                yield f"attribute {name}: {_text(there[name])} became {_text(here[name])}"
        for slot in range(max(len(x.input), len(y.input))):
            before, after = (node.input[slot] if slot < len(node.input) else "" for node in (x, y))
            if before == names.get(after, after):
                continue
            mine, theirs = a.constants.get(before), b.constants.get(after)
            if mine is None or theirs is None or self.tensor_change(mine, theirs):
                yield f"input {slot}: {before or 'none'} became {after or 'none'}"

    def same_attribute(self, a: AttributeProto, b: AttributeProto) -> bool:
        if a.type != b.type or a.ref_attr_name or b.ref_attr_name:
            return _bare(a) == _bare(b)
        if a.type == AttributeProto.GRAPH:
            return True  # compared as a scope of its own
        return not self.tensor_change(a.t, b.t) if a.type == AttributeProto.TENSOR else _bare(a) == _bare(b)

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
            places = [sorted((entry.key, entry.value) for entry in tensor.external_data) for tensor in (a, b)]
            return "" if places[0] == places[1] else "external data that is not there: not compared"
        return "" if same else "values changed"


def _pair(
    a: Sequence[NodeProto], b: Sequence[NodeProto], names: ChainMap[str, str]
) -> tuple[list[tuple[NodeProto, NodeProto]], list[NodeProto], list[NodeProto]]:
    """Return the pairs of nodes of two scopes, the nodes of `a` alone and those of `b` alone, in one pass over each.

    Values of `b` that are found to have another name in `a` are added to `names`.
    """
    by_value = {name: i for i, node in enumerate(a) for name in node.output if name}
    values_after = {name for node in b for name in node.output if name}
    by_deed: dict[tuple[Any, ...], list[int]] | None = None
    alone = dict(enumerate(a))
    pairs, new = [], []
    for node in b:
        found = next((by_value[name] for name in node.output if name in by_value), None)
        if found is not None:
            if found not in alone or operator_name(a[found]) != operator_name(node):
                found = None
        else:
            if by_deed is None:  # made late: most models keep their names
                by_deed = {}
                for i in reversed(range(len(a))):
                    if values_after.isdisjoint(a[i].output):
                        by_deed.setdefault(_deed(a[i], {}), []).append(i)
            candidates = by_deed.get(_deed(node, names))
            found = candidates.pop() if candidates else None
        if found is None:
            new.append(node)
            continue
        outputs = zip(a[found].output, node.output, strict=False)
        names.update({after: before for before, after in outputs if before and after and before != after})
        pairs.append((alone.pop(found), node))
    return pairs, list(alone.values()), new


def _deed(node: NodeProto, names: Mapping[str, str]) -> tuple[Any, ...]:
    """Return what a node does, names of its outputs apart."""
    attributes = tuple(sorted(_bare(x) for x in node.attribute))
    return operator_name(node), len(node.output), tuple(names.get(i, i) for i in node.input), attributes


def _constants(nodes: Iterable[NodeProto]) -> Iterator[tuple[str, TensorProto]]:
    """Yield the values of Constant nodes that are tensors."""
    for node in nodes:
        if node.op_type == "Constant" and node.output:
            yield from ((node.output[0], x.t) for x in node.attribute if x.type == AttributeProto.TENSOR)


def _bodies(node: NodeProto) -> dict[str, GraphProto]:
    return {x.name: x.g for x in node.attribute if x.type == AttributeProto.GRAPH}


def _is_default(node: NodeProto, attribute: AttributeProto, versions: Mapping[str, int]) -> bool:
    """Whether a node without this attribute has it all the same."""
    if attribute.ref_attr_name or not attribute.type:
        return False
    domain = "" if node.domain == "ai.onnx" else node.domain
    default = schema.defaults(node.op_type, domain, versions.get(domain, 1)).get(attribute.name)
    return default is not None and bool(default == onnx.helper.get_attribute_value(attribute))


def _bare(attribute: AttributeProto) -> bytes:
    if attribute.doc_string:
        copy = AttributeProto()
        copy.CopyFrom(attribute)
        copy.doc_string = ""
        attribute = copy
    data: bytes = attribute.SerializeToString(deterministic=True)
    return data


def _view(node: NodeProto) -> NodeView:
    props = {p.key: p.value for p in node.metadata_props}
    listed = ([part.strip() for part in props.get(f"fusion.{key}", "").split(",")] for key in ("replaced", "laws"))
    replaced, laws = (tuple(filter(None, parts)) for parts in listed)
    return NodeView(
        name=node.name,
        operator=operator_name(node),
        inputs=tuple(node.input),
        outputs=tuple(node.output),
        attributes={x.name: _text(x) for x in node.attribute},
        captures=tuple(_captures(node)),
        pattern=props.get("fusion.pattern", ""),
        replaced=replaced,
        laws=laws,
    )


def _captures(node: NodeProto) -> Iterator[str]:
    """Yield the names that the bodies of a node mention; those of outer values are among them."""
    for body in _bodies(node).values():
        for inner in body.node:
            yield from inner.input
            yield from _captures(inner)
        yield from (output.name for output in body.output)


def _text(attribute: AttributeProto) -> str:
    """Return an attribute's value as a person would write it, large ones by their type."""
    if attribute.ref_attr_name:
        return f"@{attribute.ref_attr_name}"
    if attribute.type == AttributeProto.TENSOR:
        tensor = attribute.t
        small = tensor.data_location != TensorProto.EXTERNAL and len(tensor.dims) <= 1 and sum(tensor.dims) <= 8
        return str(onnx.numpy_helper.to_array(tensor).tolist()) if small else _type(tensor)
    if attribute.type == AttributeProto.GRAPH:
        return f"a graph of {len(attribute.g.node)} nodes"
    value = onnx.helper.get_attribute_value(attribute) if attribute.type else "a value without a type"
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _type(tensor: TensorProto) -> str:
    return f"{TensorProto.DataType.Name(tensor.data_type).lower()}{list(tensor.dims)}"


def _declared_change(a: ValueInfoProto, b: ValueInfoProto) -> str:
    said = [onnx.helper.printable_value_info(i).removeprefix(f"%{i.name}") for i in (a, b)]
    return f"{said[0]} became {said[1]}" if a.type != b.type else ""


def _signature(function: FunctionProto) -> str:
    overload = f":{function.overload}" if function.overload else ""
    return f"{function.domain}::{function.name}{overload}"
