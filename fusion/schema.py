"""What an operator's schema says about one node: attribute values with their defaults, and axes wherever they are kept.

Defaults and the place of `axes` change with the opset; both are looked up for the opset that the node's scope imports.
They are onnx's; those of operators that only a runtime registers (`com.microsoft`, and the default domain's
LayerNormalization before opset 17) are the runtime's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from onnx import AttributeProto, GraphProto, SparseTensorProto, TensorProto, TypeProto, helper

from fusion import registry

if TYPE_CHECKING:
    from fusion.facts import Facts
    from fusion.models.graph import Node

Attribute = int | float | bytes | TensorProto | GraphProto | SparseTensorProto | TypeProto | list[Any]


def attribute(node: Node, name: str) -> Attribute | None:
    """Return the attribute's value: as given, else the schema's default for the node's opset, else None.

    None also stands for an attribute that refers to a parameter of the enclosing function: its value is not known here,
    and the default does not hold. `extra_attributes` always lists such an attribute, so a caller that asks it first
    never takes it for an absent one.
    """
    given = _given(node, name)
    if given is None:
        return defaults(node.op, node.domain, node.version).get(name)
    return _value(given)


def extra_attributes(node: Node, allowed: Iterable[str] = ()) -> list[str]:
    """Return the names of attributes that say something beyond the schema's defaults and are not in `allowed`.

    An attribute that the schema does not know is extra; so is, even if allowed, one that refers to a parameter of the
    enclosing function.
    """
    allowed = set(allowed)
    standard = defaults(node.op, node.domain, node.version)
    extra = []
    for item in node.proto.attribute:
        if item.ref_attr_name:
            extra.append(item.name)
        elif item.name not in allowed:
            # A given empty list is no default: Squeeze(axes=[]) and Squeeze() differ.
            default = standard.get(item.name)
            if default is None or default != _value(item):
                extra.append(item.name)
    return extra


@cache
def defaults(op: str, domain: str, version: int) -> dict[str, Attribute]:
    """Return the default of every attribute that has one; empty where no schema is known. Shared: do not modify."""
    for known in (registry.standard(), registry.current()):
        schema = known.schema(op, domain, version)
        if schema is not None:
            return {
                name: helper.get_attribute_value(AttributeProto.FromString(default))
                for name, default in schema.defaults.items()
            }
    return {}


# Operators with a list of axes: the attribute that has it, and the input that does in newer opsets.
_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
_LISTED: dict[str, tuple[str, int | None]] = {f"Reduce{kind}": ("axes", 1) for kind in _REDUCTIONS} | {
    "Squeeze": ("axes", 1),
    "Unsqueeze": ("axes", 1),
    "Slice": ("axes", 3),
    "Pad": ("axes", 3),
    "CenterCropPad": ("axes", None),
    "CumSum": ("axis", 1),
    "MeanVarianceNormalization": ("axes", None),
}
_PAIRED = {"Slice", "Pad", "CenterCropPad"}  # axes are paired with other inputs: their order counts
_FLATTENING = {"Softmax", "LogSoftmax", "Hardmax"}
_TRAILING = {"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"}
_STANDARD = {"", "com.microsoft"}


def axes(node: Node, facts: Facts) -> tuple[int, ...] | None:
    """Return the axes the node works along, each >= 0, or None where they are unknown or invalid.

    - Reduce*: the reduced axes, ascending; all of them where none are given, none with `noop_with_empty_axes`.
    - Squeeze, Unsqueeze: the axes, ascending, Unsqueeze's in its output. None for a Squeeze without axes: which axes it
      drops depends on the shape, and the caller, who knows the shape, decides.
    - Softmax, LogSoftmax, Hardmax: the axes that are normalised *together*. Below opset 13 the operator flattens from
      `axis` on, so that is every axis from there; only where it is one axis does it agree with the newer operator.
    - LayerNormalization, RMSNormalization, SimplifiedLayerNormalization: every axis from `axis` on.
    - Slice, Pad: in the order of `starts` or `pads`.
    - CumSum, MeanVarianceNormalization and operators with an attribute `axis` (Concat, Split, Gather, ArgMax, ...):
      that axis or those.
    """
    if node.domain not in _STANDARD:
        return None
    op, rank = node.op, _rank(node, facts)
    if op in _LISTED:
        listed = _listed(node, *_LISTED[op], facts)
        if not listed:
            return None if listed is None else _without_axes(node, rank, facts)
        if op == "Unsqueeze" and rank is not None:
            rank += len(listed)
        found = _normalised(listed, rank)
        return found if found is None or op in _PAIRED else tuple(sorted(found))
    axis = attribute(node, "axis")
    found = _normalised([axis], rank)
    if found is None or not (op in _TRAILING or (op in _FLATTENING and node.version < 13)):
        return found
    return None if rank is None else tuple(range(found[0], rank))


def _without_axes(node: Node, rank: int | None, facts: Facts) -> tuple[int, ...] | None:
    """Return the axes of an operator with a list of them that is left out, or empty, which means the same."""
    if node.op == "Slice":
        starts = _listed(node, "starts", 1, facts)
        return None if starts is None else tuple(range(len(starts)))
    if node.op == "MeanVarianceNormalization":
        default = attribute(node, "axes")
        return tuple(default) if isinstance(default, list) else None
    if attribute(node, "noop_with_empty_axes"):
        return ()
    if node.op in ("Squeeze", "Unsqueeze", "CumSum") or rank is None:
        return None
    return tuple(range(rank))


def _listed(node: Node, name: str, slot: int | None, facts: Facts) -> list[int] | None:
    """Return the integers of an attribute, or of an input where the opset moved it there; [] absent, None unknown."""
    given = _given(node, name)
    if given is not None:
        value = _value(given)
        return _integers(value) if isinstance(value, list) else None
    source = node.inputs[slot] if slot is not None and slot < len(node.inputs) else None
    if source is None:
        return []
    known = facts.integers(source)
    return None if known is None else _integers(known.items)


def _integers(items: Sequence[object]) -> list[int] | None:
    """Return the items where every one is an int (a bool is none), else None."""
    integers = [item for item in items if isinstance(item, int) and not isinstance(item, bool)]
    return integers if len(integers) == len(items) else None


def _rank(node: Node, facts: Facts) -> int | None:
    """Return the rank that negative axes count from, which for OneHot includes the new axis."""
    data = node.inputs[0] if node.inputs else None
    rank = None if data is None else facts.rank(data)
    if rank is None and node.op == "Concat":  # all its inputs have one rank: any that is known serves
        ranks = (facts.rank(value) for value in node.inputs[1:] if value is not None)
        rank = next((known for known in ranks if known is not None), None)
    if rank is not None and node.op == "OneHot":
        rank += 1
    return rank


def _normalised(listed: Sequence[object], rank: int | None) -> tuple[int, ...] | None:
    """Return the axes counted from the front, or None: a negative one of unknown rank, out of range, given twice."""
    result = []
    for axis in listed:
        if not isinstance(axis, int) or (axis < 0 if rank is None else not -rank <= axis < rank):
            return None
        result.append(axis if rank is None else axis % rank)
    return tuple(result) if len(set(result)) == len(result) else None


def _given(node: Node, name: str) -> AttributeProto | None:
    found: AttributeProto | None = next((item for item in node.proto.attribute if item.name == name), None)
    return found


def _value(item: AttributeProto) -> Attribute | None:
    if item.ref_attr_name:
        return None
    value: Attribute = helper.get_attribute_value(item)
    return value
