"""Blocks of models as exporters write them at several opsets: what has an operator is written, and the rest is left."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from building import INT64, Build, gelu, layer_norm, numbers, operators, same
from test_groupnorm import group_norm

OPSETS = (11, 14, 17, 18, 20)
X = {"x": numbers(2, 3, 8)}


def left(model):
    return {op: count for op, count in operators(model).items() if op not in ("MatMul", "Gather", "Slice", "Shape")}


def halves(b, value, size):
    """An axis cut in two as each opset writes it."""
    if b.opset < 13:
        return b.node("Split", value, outputs=2, axis=-1, split=[size, size])
    if b.opset < 18:
        return b.node("Split", value, np.array([size, size]), outputs=2, axis=-1)
    return b.node("Split", value, outputs=2, axis=-1, num_outputs=2)


def dropout(b, value):
    if b.opset < 12:
        return b.node("Dropout", value, ratio=0.1)
    return b.node("Dropout", value, np.float32(0.1), np.array(False))


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("target", ["ort-cpu", "ort-cuda", "onnx"])
def test_a_layer_norm_over_channels_before_space(target, opset):
    """ConvNeXt (Liu et al. 2022) writes it without transpositions; the difference is computed twice."""
    b = Build(opset)
    x = b.input("x", ["N", 6, "H", "W"])
    mean = b.mean(x, (1,))
    variance = b.mean(b.pow(b.sub(x, mean), 2.0), (1,))
    normed = b.div(b.sub(x, mean), b.sqrt(b.add(variance, 1e-6)))
    y = b.add(b.mul(numbers(6, 1, 1, seed=1), normed), numbers(6, 1, 1, seed=2))
    result = same(b.model(y), {"x": numbers(2, 6, 4, 5)}, target=target)
    there = opset >= 17 or target != "onnx"
    assert result.counts == ({"layer_norm": 1} if there else {})
    assert not there or left(result.model) == {"Transpose": 2, "LayerNormalization": 1}


@pytest.mark.parametrize(("opset", "kernel"), [(17, "Sigmoid"), (21, "Sigmoid"), (24, "Swish")])
def test_a_group_norm_and_its_activation(opset, kernel):
    b = Build(opset)
    y = group_norm(b, b.input("x", [2, 6, 4, 5]), (2, 6, 4, 5), 2, numbers(6, seed=1), numbers(6, seed=2))
    model = b.model(b.mul(y, b.sigmoid(y)))
    found = operators(same(model, {"x": numbers(2, 6, 4, 5)}, target="onnx").model)
    assert found["GroupNormalization"] == (opset >= 21)
    assert found[kernel] == 1
    assert operators(same(model, {"x": numbers(2, 6, 4, 5)}).model)["QuickGelu"] == 1


@pytest.mark.parametrize("opset", OPSETS)
def test_a_gelu_of_one_half_times_the_other(opset):
    b = Build(opset)
    projected = b.add(b.matmul(b.input("x", ["B", "S", 8]), numbers(8, 32)), numbers(32, seed=1))
    kept, gate = halves(b, projected, 16)
    assert left(same(b.model(b.mul(kept, gelu(b, gate))), X).model) == {"Add": 1, "Split": 1, "Gelu": 1, "Mul": 1}


@pytest.mark.parametrize("form", ["Pow", "Mul"])
@pytest.mark.parametrize("opset", OPSETS)
def test_the_square_of_a_relu_has_no_operator(opset, form):
    b = Build(opset)
    y = b.relu(b.matmul(b.input("x", ["B", "S", 8]), numbers(8, 16)))
    y = b.pow(y, 2.0) if form == "Pow" else b.mul(y, y)
    assert same(b.model(b.matmul(y, numbers(16, 8))), X).counts == {}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("opset", OPSETS)
def test_bias_dropout_residual_and_norm_are_one_node(opset, first):
    b = Build(opset)
    x = b.input("x", ["B", "S", 8])
    projected = b.add(b.matmul(x, numbers(8, 8, seed=3)), numbers(8, seed=4))
    dropped = dropout(b, projected)
    total = b.add(dropped, x) if first else b.add(x, dropped)
    result = same(b.model(layer_norm(b, total, numbers(8, seed=1), numbers(8, seed=2))), X)
    assert left(result.model) == {"SkipLayerNormalization": 1}


@pytest.mark.parametrize("order", list(permutations(("word", "position", "kind"))), ids="-".join)
@pytest.mark.parametrize("opset", OPSETS)
def test_embeddings_in_every_order(opset, order):
    """The positions have no batch; whichever two are added first, one sum and the norm with the other are left."""
    for grouped in (True, False):
        b = Build(opset)
        ids, kinds = b.input("ids", ["B", "S"], INT64), b.input("kinds", ["B", "S"], INT64)
        length = b.unsqueeze(b.node("Gather", b.shape(ids), np.array(1)), [0])
        position = b.node("Slice", np.arange(16)[None], np.array([0]), length, np.array([1]))
        parts = {"word": (20, ids), "position": (16, position), "kind": (2, kinds)}
        rows = {name: b.node("Gather", numbers(size, 8, seed=size), index) for name, (size, index) in parts.items()}
        first, second, third = (rows[name] for name in order)
        total = b.add(b.add(first, second), third) if grouped else b.add(first, b.add(second, third))
        y = dropout(b, layer_norm(b, total, numbers(8, seed=5), numbers(8, seed=6), eps=1e-12))
        feeds = {"ids": np.array([[1, 2, 3], [4, 5, 6]]), "kinds": np.array([[0, 1, 1], [0, 0, 1]])}
        found = left(same(b.model(y), feeds).model)
        found.pop("Unsqueeze"), found.pop("Dropout", None)
        assert found == {"Add": 1, "SkipLayerNormalization": 1}
