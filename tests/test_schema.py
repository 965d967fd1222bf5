"""Attributes with their defaults, and axes wherever an opset keeps them."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from onnx import AttributeProto, NodeProto, helper

from fusion import schema


@dataclass(frozen=True)
class Value:
    """A value of which only the facts matter."""

    rank: int | None
    items: tuple[object, ...] | None = None


class Facts:
    def rank(self, value: Any) -> int | None:
        rank: int | None = value.rank
        return rank

    def integers(self, value: Any) -> Any:
        return None if value.items is None else SimpleNamespace(items=value.items)


FACTS = Facts()


def node(op: str, version: int, *inputs: Value | None, domain: str = "", **attributes: object) -> Any:
    proto = helper.make_node(op, [], [], domain=domain)
    proto.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    return SimpleNamespace(op=op, domain=domain, version=version, inputs=list(inputs), proto=proto)


def axes(op: str, version: int, *inputs: Value | None, **attributes: object) -> tuple[int, ...] | None:
    return schema.axes(node(op, version, *inputs, **attributes), FACTS)


def referring(proto: NodeProto, name: str) -> None:
    """Let the node take an attribute from the function it stands in."""
    proto.attribute.append(AttributeProto(name=name, ref_attr_name="outer", type=AttributeProto.INT))


# -- attributes -------------------------------------------------------------------------------------------------------


def test_a_given_attribute_counts_before_the_default() -> None:
    assert schema.attribute(node("Softmax", 13, axis=2), "axis") == 2


@pytest.mark.parametrize(("version", "expected"), [(1, 1), (11, 1), (12, 1), (13, -1), (20, -1)])
def test_the_default_is_that_of_the_nodes_opset(version: int, expected: int) -> None:
    assert schema.attribute(node("Softmax", version), "axis") == expected


def test_strings_come_as_bytes() -> None:
    assert schema.attribute(node("Gelu", 20), "approximate") == b"none"


def test_an_attribute_without_default_is_none() -> None:
    assert schema.attribute(node("Transpose", 13), "perm") is None
    assert schema.attribute(node("Squeeze", 11), "axes") is None


def test_an_opset_newer_than_the_installed_onnx_has_the_newest_default() -> None:
    assert schema.attribute(node("Gelu", 1000), "approximate") == b"none"


def test_an_unknown_operator_has_no_defaults() -> None:
    assert schema.attribute(node("Nothing", 17), "axis") is None
    assert schema.attribute(node("LayerNormalization", 17, domain="elsewhere"), "axis") is None


def test_defaults_of_contrib_operators_come_from_the_runtime() -> None:
    skip = node("SkipLayerNormalization", 1, domain="com.microsoft")
    assert schema.attribute(skip, "epsilon") == pytest.approx(1e-12)
    assert schema.attribute(node("Attention", 1, domain="com.microsoft"), "scale") is None


@pytest.mark.parametrize("version", [1, 11, 16])
def test_layer_normalization_below_opset_17_has_the_runtimes_defaults(version: int) -> None:
    early = node("LayerNormalization", version)
    assert schema.attribute(early, "epsilon") == pytest.approx(1e-5)
    assert schema.attribute(early, "axis") == -1


def test_an_attribute_that_a_function_passes_in_is_not_known() -> None:
    inner = node("Softmax", 13)
    referring(inner.proto, "axis")
    assert schema.attribute(inner, "axis") is None
    assert schema.axes(node("Softmax", 13, Value(3)), FACTS) == (2,)
    inner.inputs = [Value(3)]
    assert schema.axes(inner, FACTS) is None


def test_extra_attributes_are_those_that_differ_from_the_default() -> None:
    assert schema.extra_attributes(node("Gemm", 13, alpha=1.0, transB=1)) == ["transB"]
    assert schema.extra_attributes(node("Gemm", 13, alpha=0.5, transB=1), ["transB"]) == ["alpha"]
    assert schema.extra_attributes(node("Gemm", 13, alpha=0.5, transB=1), ["transB", "alpha"]) == []


def test_what_is_default_in_one_opset_is_extra_in_another() -> None:
    assert schema.extra_attributes(node("Softmax", 11, axis=1)) == []
    assert schema.extra_attributes(node("Softmax", 13, axis=1)) == ["axis"]


def test_an_attribute_the_schema_does_not_know_is_extra() -> None:
    assert schema.extra_attributes(node("Relu", 14, invented=1)) == ["invented"]


def test_an_attribute_that_a_function_passes_in_is_extra_even_if_allowed() -> None:
    inner = node("Softmax", 13)
    referring(inner.proto, "axis")
    assert schema.extra_attributes(inner, ["axis"]) == ["axis"]


# -- axes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "version"),
    [("ReduceMean", 7), ("ReduceMean", 11), ("ReduceMean", 13), ("ReduceMax", 17), ("ReduceSum", 11), ("Squeeze", 11)],
)
def test_axes_as_attribute(op: str, version: int) -> None:
    assert axes(op, version, Value(4), axes=[-1, 1]) == (1, 3)


@pytest.mark.parametrize(
    ("op", "version"), [("ReduceMean", 18), ("ReduceMax", 18), ("ReduceSum", 13), ("Squeeze", 13), ("Squeeze", 25)]
)
def test_axes_as_input(op: str, version: int) -> None:
    assert axes(op, version, Value(4), Value(1, (-1, 1))) == (1, 3)


def test_axes_that_are_computed_are_unknown() -> None:
    assert axes("ReduceMean", 18, Value(4), Value(1, None)) is None
    assert axes("ReduceMean", 18, Value(4), Value(1, (None,))) is None
    assert axes("ReduceMean", 18, Value(4), Value(1, (True,))) is None


def test_a_reduction_without_axes_reduces_all() -> None:
    assert axes("ReduceMean", 13, Value(3)) == (0, 1, 2)
    assert axes("ReduceMean", 18, Value(3), None) == (0, 1, 2)
    assert axes("ReduceSum", 13, Value(3), Value(1, ())) == (0, 1, 2)
    assert axes("ReduceMean", 13, Value(None)) is None


def test_a_reduction_without_axes_may_be_told_to_do_nothing() -> None:
    assert axes("ReduceSum", 13, Value(3), Value(1, ()), noop_with_empty_axes=1) == ()
    assert axes("ReduceMean", 18, Value(3), noop_with_empty_axes=1) == ()
    assert axes("ReduceMean", 18, Value(3), Value(1, (0,)), noop_with_empty_axes=1) == (0,)


def test_negative_axes_need_the_rank_and_others_do_not() -> None:
    assert axes("ReduceMean", 13, Value(None), axes=[-1]) is None
    assert axes("ReduceMean", 13, Value(None), axes=[1]) == (1,)


def test_axes_that_are_invalid_are_unknown() -> None:
    assert axes("ReduceMean", 13, Value(3), axes=[3]) is None
    assert axes("ReduceMean", 13, Value(3), axes=[-4]) is None
    assert axes("ReduceMean", 13, Value(3), axes=[2, -1]) is None


def test_unsqueeze_counts_in_its_output() -> None:
    assert axes("Unsqueeze", 11, Value(2), axes=[-1, 0]) == (0, 3)
    assert axes("Unsqueeze", 13, Value(2), Value(1, (3, 1))) == (1, 3)


def test_squeeze_without_axes_is_for_the_caller_to_decide() -> None:
    assert axes("Squeeze", 11, Value(2)) is None
    assert axes("Squeeze", 13, Value(2)) is None


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax", "Hardmax"])
def test_the_softmax_family_flattens_below_opset_13(op: str) -> None:
    assert axes(op, 11, Value(4)) == (1, 2, 3)
    assert axes(op, 11, Value(4), axis=-1) == (3,)
    assert axes(op, 12, Value(4), axis=2) == (2, 3)
    assert axes(op, 13, Value(4)) == (3,)
    assert axes(op, 13, Value(4), axis=1) == (1,)
    assert axes(op, 11, Value(None), axis=1) is None


@pytest.mark.parametrize(
    ("op", "version"), [("LayerNormalization", 17), ("LayerNormalization", 11), ("RMSNormalization", 23)]
)
def test_normalizations_take_every_axis_from_theirs_on(op: str, version: int) -> None:
    assert axes(op, version, Value(4)) == (3,)
    assert axes(op, version, Value(4), axis=-3) == (1, 2, 3)


def test_slice_keeps_the_order_of_its_starts() -> None:
    starts, ends = Value(1, (0, 0)), Value(1, (1, 1))
    assert axes("Slice", 13, Value(3), starts, ends, Value(1, (2, 0))) == (2, 0)
    assert axes("Slice", 13, Value(3), starts, ends) == (0, 1)
    assert axes("Slice", 9, Value(3), starts=[0], ends=[1], axes=[-1]) == (2,)
    assert axes("Slice", 9, Value(3), starts=[0, 0], ends=[1, 1]) == (0, 1)


def test_single_axes() -> None:
    assert axes("Concat", 13, Value(None), Value(3), axis=-1) == (2,)
    assert axes("Gather", 13, Value(3)) == (0,)
    assert axes("ArgMax", 13, Value(3), axis=-1) == (2,)
    assert axes("OneHot", 11, Value(2)) == (2,)
    assert axes("CumSum", 14, Value(3), Value(0, (-2,))) == (1,)
    assert axes("MeanVarianceNormalization", 13, Value(4)) == (0, 2, 3)


def test_operators_without_axes_have_none() -> None:
    assert axes("Relu", 14, Value(3)) is None
    assert axes("Concat", 13, Value(3), axis="last") is None
    assert schema.axes(node("ReduceMean", 13, Value(3), domain="elsewhere"), FACTS) is None
