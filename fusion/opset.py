"""Newer opsets: a model is taken to one node by node, or not at all.

Most operators mean the same in both opsets, and are left as they are: their schemas say so. For those that changed in
a known way onnx's version converter is asked, with a model of that node alone; what it answers replaces the node. So
weights stay where they are, and bodies, functions, other domains and metadata are not touched. An operator that
changed in any other way keeps the whole model where it is. See docs/decisions/0030.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import onnx.version_converter
from onnx import FunctionProto, GraphProto, TensorProto, defs, helper, numpy_helper

from fusion import registry
from fusion.errors import ModelError, TargetError
from fusion.facts import Facts
from fusion.models import check
from fusion.models.graph import Graph, Node, Value
from fusion.models.model import Model
from fusion.targets import Target

REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
CONVERTED = {f"Reduce{kind}" for kind in REDUCTIONS} | {
    "Softmax", "LogSoftmax", "Squeeze", "Unsqueeze", "Split", "Dropout", "Clip", "Slice", "TopK",
}  # fmt: skip
"""Operators whose changes the converter is known to answer rightly: the tests run them before and after."""
CHANGED = {
    ("Softmax", 13), ("LogSoftmax", 13), ("Hardmax", 13),  # over one axis, no longer over all from there on
    ("Split", 18),  # how many parts is said, no longer counted
    ("GridSample", 20),  # modes have other names
    ("Attention", 24),  # masks may be shorter than the keys
}  # fmt: skip
"""(operator, opset) where the meaning changed, and the form of the schema does not show it."""
NEUTRAL: dict[str, int | bytes] = {
    "allowzero": 0, "antialias": 0, "axis": 1, "batch_dims": 0, "block_size": 0, "ceil_mode": 0,
    "keep_aspect_ratio_policy": b"stretch", "largest": 1, "layout": 0, "left_window_size": -1, "mode": b"DCR",
    "noop_with_empty_axes": 0, "output_dtype": 0, "precision": 0, "reduction": b"none", "right_window_size": -1,
    "round_mode": b"up", "saturate": 1, "select_last_index": 0, "sorted": 1, "start": 0, "training_mode": 0,
}  # fmt: skip
"""Attributes that came later, with the default that means what the operator did before there was the attribute."""
OLDEST = 7  # below, elementwise operators broadcast by attributes


class _Stays(Exception):
    """Why the model stays at its opset."""


def convert(model: Model, opset: int, target: Target) -> str:
    """Take the model to an opset of the standard operators; return why it stays at its own, or "".

    Raises:
        TargetError: the target does not take that opset.
    """
    if opset > target.newest_opset:
        raise TargetError(f"opset {opset} is newer than {target.name} takes, which ends at {target.newest_opset}")
    graph = Graph(model)
    before = model.serialized()
    try:
        if not _Conversion(graph, opset, target).run():
            return ""
        graph.commit()
        for imports in (model.proto.opset_import, *(function.opset_import for function in model.proto.functions)):
            for imported in imports:
                if imported.domain in ("", "ai.onnx"):
                    imported.version = opset
        check.validate(model.proto, model.serialized(), model.label)
    except (_Stays, ModelError) as error:
        model.proto.ParseFromString(before)
        return f"the model stays at opset {graph.main.opsets.get('', 1)}: {error}"
    return ""


class _Conversion:
    def __init__(self, graph: Graph, opset: int, target: Target) -> None:
        self.graph = graph
        self.facts = Facts(graph)
        self.opset = opset
        self.target = target
        self._answers: dict[object, GraphProto] = {}
        self._constants: dict[object, Value] = {}

    def run(self) -> bool:
        """Convert every node; whether there was anything to do."""
        versions = {scope.opsets.get("", 0) for scope in self.graph.scopes} - {0}
        if not versions or versions == {self.opset}:
            return False
        if max(versions) > self.opset:
            raise _Stays(f"opset {self.opset} is older")
        if min(versions) < OLDEST:
            raise _Stays(f"conversions from below opset {OLDEST} are not known to be sound")
        # The whole is refused before anything is changed: what is left to do is what the converter answers for.
        asked = [node for node in self.graph.nodes() if not node.domain and not self._means_the_same(node)]
        for node in asked:
            self._replace(node, self._answer(node))
        return True

    def _means_the_same(self, node: Node) -> bool:
        """Whether a node may stay as it is; raises _Stays where nothing is known of it."""
        try:
            old, new = (defs.get_schema(node.op, version, "") for version in (node.version, self.opset))
        except defs.SchemaError:
            raise _Stays(f"{node.op} ({node.label}) is not of the standard at opset {node.version}") from None
        if old.since_version == new.since_version:
            return True
        dtypes = [None if value is None else self.facts.dtype(value) for value in node.inputs]
        same, step = True, new
        while same and step.since_version > old.since_version:
            before = defs.get_schema(node.op, step.since_version - 1, "")
            same, step = _is_compatible(node, dtypes, before, step), before
        self._require_kernel(node, dtypes)
        if not same and node.op not in CONVERTED:
            raise _Stays(f"{node.op} ({node.label}) changed between opset {node.version} and {self.opset}")
        return same

    def _require_kernel(self, node: Node, dtypes: Sequence[int | None]) -> None:
        """What ran on the target before must run there after."""
        if node.op not in CONVERTED and self.target.refuses(node.op, "", node.version, dtypes) is None:
            refused = self.target.refuses(node.op, "", self.opset, dtypes)
            if refused is not None:
                raise _Stays(refused)

    def _answer(self, node: Node) -> GraphProto:
        """What the converter makes of a node alone: its inputs are i0, i1, …, its outputs o0, o1, …."""
        if any(attribute.ref_attr_name for attribute in node.proto.attribute):
            raise _Stays(f"{node.op} ({node.label}) has attributes that are parameters of a function")
        attributes = tuple(sorted(attribute.SerializeToString() for attribute in node.proto.attribute))
        kinds = tuple(None if v is None else (self.facts.dtype(v), self.facts.rank(v)) for v in node.inputs)
        key = (node.op, node.version, attributes, kinds, tuple(value is None for value in node.outputs))
        if key not in self._answers:
            self._answers[key] = self._asked(node, kinds)
        return self._answers[key]

    def _asked(self, node: Node, kinds: Iterable[tuple[int | None, int | None] | None]) -> GraphProto:
        infos = []
        for slot, kind in enumerate(kinds):
            if kind is not None:
                dtype, rank = kind
                if dtype is None and node.op == "Clip":
                    raise _Stays(f"the element type of {node.label} is unknown")
                shape = None if rank is None else [f"d{slot}_{axis}" for axis in range(rank)]
                infos.append(helper.make_tensor_value_info(f"i{slot}", dtype or TensorProto.FLOAT, shape))
        alone = type(node.proto)()
        alone.CopyFrom(node.proto)
        alone.ClearField("metadata_props")
        for field, letter, values in ((alone.input, "i", node.inputs), (alone.output, "o", node.outputs)):
            del field[:]
            field.extend(f"{letter}{slot}" if value is not None else "" for slot, value in enumerate(values))
        outputs = [helper.make_empty_tensor_value_info(name) for name in alone.output if name]
        graph = helper.make_graph([alone], "alone", infos, outputs)
        asked = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", node.version)])
        try:
            answer = onnx.version_converter.convert_version(asked, self.opset).graph
        except Exception as error:  # RuntimeError, and what shape inference raises
            reason = str(error).strip().splitlines()[-1:]
            raise _Stays(f"onnx's converter refuses {node.op} ({node.label}): {' '.join(reason)}") from None
        if {i.name for i in answer.input} != {i.name for i in infos} or len(answer.output) != len(outputs):
            raise _Stays(f"onnx's converter gives {node.op} ({node.label}) other inputs or outputs")
        return answer

    def _replace(self, node: Node, answer: GraphProto) -> None:
        """Put an answer in the place of a node."""
        values: dict[str, Value | None] = {f"i{slot}": value for slot, value in enumerate(node.inputs)} | {"": None}
        outputs = {f"o{slot}": value for slot, value in enumerate(node.outputs) if value is not None}
        for tensor in answer.initializer:
            values[tensor.name] = self._constant(node, tensor)
        for new in answer.node:
            given: Mapping[str, Any] = {a.name: helper.get_attribute_value(a) for a in new.attribute}
            if new.op_type == "Constant":
                values[new.output[0]] = self._constant(node, given["value"])
                continue
            made: list[str | Value | None] = [
                outputs.get(name) or (self.graph.fresh(f"{node.proto.output[0]}_{new.op_type}") if name else None)
                for name in new.output
            ]
            reads = [values[name] for name in new.input]
            own = new.op_type == node.op
            name = self.graph.fresh(node.proto.name or node.op) if not own else node.proto.name
            added = self.graph.add_node(node.scope, new.op_type, reads, made, at=node, name=name, attributes=given)
            if own:
                added.proto.metadata_props.extend(node.proto.metadata_props)
                added.proto.doc_string = node.proto.doc_string
            values.update(zip(new.output, added.outputs, strict=True))
        self.graph.remove_dead([node])

    def _constant(self, node: Node, tensor: TensorProto) -> Value:
        """A small constant, such as axes; one for all nodes of a scope that want it."""
        array = numpy_helper.to_array(tensor)
        key = (node.scope, array.dtype, array.shape, array.tobytes())
        known = self._constants.get(key)
        if known is None or isinstance(node.scope.proto, FunctionProto):  # there it is a node, which has a place
            named = numpy_helper.from_array(array, self.graph.fresh(f"{node.op}_constant"))
            known = self._constants[key] = self.graph.add_initializer(node.scope, named, node)
        return known


def _is_compatible(node: Node, dtypes: Sequence[int | None], old: defs.OpSchema, new: defs.OpSchema) -> bool:
    """Whether a node of one schema means the same in the next: what was there is there, what is new says nothing."""
    if (node.op, new.since_version) in CHANGED or new.deprecated:
        return False
    optional = all(item.option != defs.OpSchema.FormalParameterOption.Single for item in new.inputs[len(old.inputs) :])
    outputs = [[item.name for item in schema.outputs[: len(node.outputs)]] for schema in (old, new)]
    if len(new.inputs) < len(old.inputs) or not optional or outputs[0] != outputs[1]:
        return False
    for slot, dtype in enumerate(dtypes[: len(old.inputs)]):
        if not (_types(old, slot) if dtype is None else {registry.type_name(dtype)}) <= _types(new, slot):
            return False
    if old.attributes.keys() - new.attributes.keys():
        return False
    for name, attribute in new.attributes.items():
        before = _default(old.attributes[name]) if name in old.attributes else NEUTRAL.get(name)
        given = any(item.name == name for item in node.proto.attribute)
        if not given and (attribute.required or _default(attribute) != before):
            return False
    return True


def _types(schema: defs.OpSchema, slot: int) -> set[str]:
    name = schema.inputs[slot].type_str
    return next((set(c.allowed_type_strs) for c in schema.type_constraints if c.type_param_str == name), {name})


def _default(attribute: defs.OpSchema.Attribute) -> object:
    return helper.get_attribute_value(attribute.default_value) if attribute.default_value.name else None
