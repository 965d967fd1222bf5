"""What only CUDA has kernels for: written as their sources read them, which is worked out here in numpy."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from building import Build, gelu, misses, numbers, operators, run
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

import fusion


class BiasSoftmax(OpRun):
    """Rows from `axis` on; a row of the bias serves so many rows of x in turn, or they are counted through again."""

    op_domain = "com.microsoft"

    def _run(self, x, bias, axis=None, is_inner_broadcast=None):
        width = int(np.prod(x.shape[axis:]))
        rows, own = x.reshape(-1, width), bias.reshape(-1, width)
        index = np.arange(len(rows))
        index = index // (len(rows) // len(own)) if is_inner_broadcast else index % len(own)
        e = rows + own[index]
        e = np.exp(e - e.max(1, keepdims=True))
        return ((e / e.sum(1, keepdims=True)).reshape(x.shape),)


class BiasSplitGelu(OpRun):
    """The left half times the Gelu of the right one, after the bias."""

    op_domain = "com.microsoft"

    def _run(self, x, bias):
        assert x.ndim == 3
        assert bias.shape == x.shape[2:]
        assert len(bias) in (2560, 5120, 10240)
        left, right = np.split(x + bias, 2, axis=-1)
        erf = np.vectorize(__import__("math").erf)
        return ((left * right * 0.5 * (1 + erf(right / np.sqrt(2)))).astype(x.dtype),)


def same(model, feeds):
    """The model for CUDA, which computes the same."""
    result = fusion.optimize(model, target="ort-cuda")
    (expected,) = run(model, feeds).values()
    (got,) = ReferenceEvaluator(result.model, new_ops=[BiasSoftmax, BiasSplitGelu]).run(None, feeds)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    return result


def masked(x, mask, axis=-1, opset=17):
    b = Build(opset)
    scores = b.add(b.input("mask", list(mask)), b.mul(b.input("x", list(x)), 0.5))
    return b.model(b.softmax(scores, axis=axis)), {"x": numbers(*x), "mask": numbers(*mask, seed=1)}


@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize(
    ("mask", "inner"),
    [((2, 1, 1, 7), 1), ((2, 3, 1, 7), 1), ((5, 7), 0), ((1, 3, 5, 7), 0), ((2, 3, 5, 7), 0), ((7,), 0), ((1, 7), 0)],
    ids=str,
)
def test_a_bias_before_a_softmax(mask, inner, opset):
    model, feeds = masked((2, 3, 5, 7), mask, opset=opset)
    (node,) = [node for node in same(model, feeds).model.graph.node if node.op_type == "BiasSoftmax"]
    assert {item.name: item.i for item in node.attribute} == {"axis": 3, "is_inner_broadcast": inner}


@pytest.mark.parametrize(
    ("x", "mask", "axis"),
    [
        ((2, 3, 5, 7), (2, 1, 5, 7), -1),  # broadcast in the middle
        ((2, 3, 5, 7), (2, 3, 5, 1), -1),  # along the softmax
        ((2, 1, 5, 7), (2, 3, 5, 7), -1),  # the mask is larger
        ((2, 3, 5, 7), (2, 3, 1, 7), -2),
    ],
    ids=str,
)
def test_what_the_kernel_cannot_broadcast_stays(x, mask, axis):
    assert "BiasSoftmax" not in operators(same(*masked(x, mask, axis)).model)


def test_sizes_that_may_be_0_are_not_divided_by():
    b = Build()
    y = b.softmax(b.add(b.input("x", ["B", 3, 7]), b.input("mask", ["B", 1, 7])), axis=-1)
    assert operators(fusion.optimize(b.model(y), target="ort-cuda").model) == {"Add": 1, "Softmax": 1}


def geglu(width, form, *, swapped=False, other=False, rank=3):
    """A projection with its bias, cut in two halves; one of them times the Gelu of the other."""
    b = Build(20)
    x = b.input("x", ["B", "S", 8][3 - rank :])
    bias = numbers(width, seed=2)
    h = b.add(b.matmul(x, numbers(8, width, scale=0.2)), bias)
    if form == "Split":
        halves = b.node("Split", h, np.array([width // 2] * 2), outputs=2, axis=-1)
    else:
        ends = [np.array([at * width // 2]) for at in range(3)]
        halves = [b.node("Slice", h, start, stop, np.array([-1])) for start, stop in pairwise(ends)]
    left, right = halves[::-1] if swapped else halves
    right = left if other else right
    right = gelu(b, right)
    return b.model(b.mul(left, right)), {"x": numbers(*(2, 3, 8)[3 - rank :], seed=3)}


@pytest.mark.parametrize("form", ["Split", "Slice"])
def test_one_half_times_the_gelu_of_the_other(form):
    model, feeds = geglu(2560, form)
    assert operators(same(model, feeds).model) == {"MatMul": 1, "BiasSplitGelu": 1}


@pytest.mark.parametrize("given", [{"swapped": True}, {"width": 2048}, {"rank": 2}, {"other": True}], ids=str)
def test_what_the_kernel_does_not_take(given):
    model, feeds = geglu(**{"width": 2560, "form": "Split"} | given)
    result = same(model, feeds)
    assert "BiasSplitGelu" not in operators(result.model)
    assert given.get("other") or misses(result, "bias_split_gelu")


def test_what_only_cuda_has_is_not_written_for_the_cpu():
    for model, _ in (masked((2, 3, 5, 7), (5, 7)), geglu(2560, "Split")):
        assert not {"BiasSoftmax", "BiasSplitGelu"} & set(operators(fusion.optimize(model).model))
