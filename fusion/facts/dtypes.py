"""Element types: what the operator's schema says, output by output."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from onnx import TensorProto, defs

from fusion.facts import constants
from fusion.models.graph import Node, Value
from fusion.schema import attribute

if TYPE_CHECKING:
    from fusion.facts import Facts

INTEGERS = frozenset(
    {
        TensorProto.INT64,
        TensorProto.INT32,
        TensorProto.INT16,
        TensorProto.INT8,
        TensorProto.UINT64,
        TensorProto.UINT32,
        TensorProto.UINT16,
        TensorProto.UINT8,
    }
)

_NAMES = {
    "float": TensorProto.FLOAT,
    "double": TensorProto.DOUBLE,
    **{name.lower(): number for name, number in TensorProto.DataType.items() if name not in ("FLOAT", "DOUBLE")},
}

# Operators of com.microsoft whose outputs have the element type of input 0.
_LIKE_INPUT = frozenset(
    """Attention BiasAdd BiasGelu BiasSoftmax BiasSplitGelu DecoderMaskedMultiHeadAttention FastGelu FusedConv
    FusedGemm FusedMatMul Gelu GroupNorm GroupQueryAttention MatMulNBits MultiHeadAttention NhwcConv
    PackedMultiHeadAttention QuickGelu RotaryEmbedding SkipGroupNorm SkipLayerNormalization
    SkipSimplifiedLayerNormalization SparseAttention TransposeMatMul""".split()  # noqa: SIM905
)


def like(value: Value, known: object) -> Value | None:
    """The input that has the element type of `value` by the operator's schema; None where that says something else."""
    node = value.producer
    if node is None or node.domain:
        return None
    source = _source(node.op, node.version, value.slot)
    return None if source is None else node.input(source)


def dtype(facts: Facts, value: Value) -> int | None:
    """The element type of `value`; declared types count where the operator does not say it."""
    found = constants.stored(value)
    if found is not None:
        return constants.dtype(found)
    computed = None if value.producer is None else _computed(facts, value.producer, value.slot)
    if computed is None and value.info is not None and value.info.type.HasField("tensor_type"):
        return value.info.type.tensor_type.elem_type or None
    return computed


def _computed(facts: Facts, node: Node, slot: int) -> int | None:
    if node.domain == "com.microsoft":
        if node.op == "EmbedLayerNormalization":
            return TensorProto.INT32 if slot == 1 else _of_input(facts, node, 2)
        if node.op.startswith("Skip") and slot in (1, 2):  # statistics, in a type of their own
            return None
        return _of_input(facts, node, 0) if node.op in _LIKE_INPUT else None
    if node.domain != "":
        return None
    if node.op == "Cast":
        to = attribute(node, "to")
        return to if isinstance(to, int) and to in _NAMES.values() else None
    if node.op == "ConstantOfShape":
        filled = attribute(node, "value")
        if filled is None:
            return TensorProto.FLOAT if not node.proto.attribute else None
        return filled.data_type if isinstance(filled, TensorProto) else None
    if node.op == "If":
        found = {facts.dtype(body.outputs[slot]) for body in node.bodies if slot < len(body.outputs)}
        return found.pop() if len(found) == 1 else None
    if _chooses(node.op, node.version) and any(a.name in _CHOICES for a in node.proto.attribute):
        chosen = attribute(node, "dtype") or attribute(node, "output_dtype")
        return chosen if isinstance(chosen, int) and chosen else None
    if node.op == "SimplifiedLayerNormalization" or (node.op == "LayerNormalization" and node.version < 17):
        # onnxruntime's own operators of the default domain: the result has the type of the scale.
        return _of_input(facts, node, 1) if slot == 0 else None
    rules = _rules(node.op, node.version)
    if not rules:
        return None
    fixed, source = rules[min(slot, len(rules) - 1)]
    return fixed if source is None else _of_input(facts, node, source)


def _of_input(facts: Facts, node: Node, slot: int) -> int | None:
    value = node.input(slot)
    return None if value is None else facts.dtype(value)


_CHOICES = ("dtype", "output_dtype")


@cache
def _chooses(op: str, version: int) -> bool:
    """Whether an attribute of the operator may name the element type of its result."""
    try:
        return any(name in defs.get_schema(op, version, "").attributes for name in _CHOICES)
    except defs.SchemaError:
        return True


@cache
def _source(op: str, version: int, slot: int) -> int | None:
    rules = _rules(op, version)
    return rules[min(slot, len(rules) - 1)][1] if rules and not _chooses(op, version) else None


@cache
def _rules(op: str, version: int) -> tuple[tuple[int | None, int | None], ...]:
    """Per formal output (element type, None) or (None, the input which has the same type)."""
    try:
        schema = defs.get_schema(op, version, "")
    except defs.SchemaError:
        return ()
    allowed = {item.type_param_str: item.allowed_type_strs for item in schema.type_constraints}
    rules: list[tuple[int | None, int | None]] = []
    for output in schema.outputs:
        name = output.type_str
        same = [slot for slot, formal in enumerate(schema.inputs) if formal.type_str == name and formal.is_homogeneous]
        types = [name] if "(" in name else allowed.get(name, [])
        if same:
            rules.append((None, same[0]))
        else:
            rules.append((_element(types[0]) if len(types) == 1 else None, None))
    return tuple(rules)


def _element(text: str) -> int | None:
    if not (text.startswith("tensor(") and text.endswith(")")):
        return None
    return _NAMES.get(text[7:-1])
