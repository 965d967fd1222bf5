"""Attention in half precision whose softmax, and perhaps what stands beside it, is computed in float between casts."""

from __future__ import annotations

import numpy as np
import pytest
from building import FLOAT, HALF, Build, misses, numbers, operators, run
from onnx import helper
from onnx.reference import ReferenceEvaluator

import fusion

X = numbers(2, 5, 16, seed=1, dtype=HALF)
SMALLEST = float(np.finfo(np.float16).min)


def attention(opset=23, *, mask="", masked=FLOAT, scaled=FLOAT, product=HALF, softmax=FLOAT):
    """Two heads of 8: the products, the scale, the mask and the softmax each in the type that is given."""
    b = Build(opset, dtype=HALF)
    x = b.input("x", ["B", "S", 16])

    def head(seed, perm):
        projected = b.matmul(x, numbers(16, 16, seed=seed, dtype=HALF, scale=0.25))
        return b.transpose(b.reshape(projected, [0, 0, 2, 8]), perm=perm)

    have = HALF

    def to(value, wanted):
        nonlocal have
        value, have = (value if wanted == have else b.cast(value, to=wanted)), wanted
        return value

    q, k = head(1, [0, 2, 1, 3]), head(2, [0, 2, 3, 1])
    if product != HALF:
        q, k, have = b.cast(q, to=product), b.cast(k, to=product), product
    scores = to(b.matmul(q, k), scaled)
    scores = b.mul(scores, np.array(0.375, np.float16 if scaled == HALF else np.float32))
    if mask == "causal":
        keep = np.tril(np.ones((5, 5), bool))
        scores = b.where(keep, scores, np.array(SMALLEST, np.float16 if have == HALF else np.float32))
    elif mask:
        own = b.input("mask", ["B", 1, "S", "S"], HALF if mask == "half" else FLOAT)
        added = own if (masked == HALF) == (mask == "half") else b.cast(own, to=masked)
        scores = b.add(to(scores, masked), added)
    p = to(b.softmax(to(scores, softmax), axis=-1), HALF)
    y = b.reshape(b.transpose(b.matmul(p, head(3, [0, 2, 1, 3])), perm=[0, 2, 1, 3]), [0, 0, 16])
    return b.model((y, HALF, ["B", "S", 16]))


def fused(model, op="Attention"):
    """The fused node's attributes, None where there is none."""
    nodes = [node for node in model.graph.node if node.op_type == op]
    return {item.name: helper.get_attribute_value(item) for item in nodes[0].attribute} if nodes else None


def feeds(model):
    mask = np.where(np.random.default_rng(3).random((2, 1, 5, 5)) < 0.3, -100, 0)
    mask[..., 0] = 0
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    if "mask" not in types:
        return {"x": X}
    return {"x": X, "mask": mask.astype(helper.tensor_dtype_to_np_dtype(types["mask"]))}


def equal(model, result):
    """The reference implementation, and onnxruntime, compute the same before and after."""
    given = feeds(model)
    (expected,) = ReferenceEvaluator(model).run(None, given)
    (got,) = run(result, given).values()
    np.testing.assert_allclose(got.astype(float), expected.astype(float), rtol=0, atol=4e-3)
    if all(not node.domain for node in result.graph.node):
        (got,) = ReferenceEvaluator(result).run(None, given)
        np.testing.assert_allclose(got.astype(float), expected.astype(float), rtol=0, atol=4e-3)


@pytest.mark.parametrize("target", ["onnx", "ort-cpu"])
@pytest.mark.parametrize("scaled", [HALF, FLOAT])
def test_the_standard_operator_is_told_what_its_softmax_is_computed_in(target, scaled):
    model = attention(scaled=scaled)
    result = fusion.optimize(model, target=target, patterns=["multi_head_attention"])
    assert fused(result.model)["softmax_precision"] == FLOAT
    equal(model, result.model)


@pytest.mark.parametrize("target", ["onnx", "ort-cpu", "ort-cuda"])
def test_a_region_that_computes_in_half_precision_throughout_is_told_nothing(target):
    model = attention(scaled=HALF, softmax=HALF)
    result = fusion.optimize(model, target=target)
    found = fused(result.model) or fused(result.model, "MultiHeadAttention")
    assert found is not None
    assert "softmax_precision" not in found


@pytest.mark.parametrize("target", ["onnx", "ort-cpu", "ort-cuda"])
def test_a_product_in_float_is_not_taken_for_one_in_half_precision(target):
    """Scores of 70000 are finite in float, and infinite in half precision."""
    result = fusion.optimize(attention(product=FLOAT), target=target)
    assert fused(result.model) is None
    assert "computes in FLOAT" in str(misses(result, "multi_head_attention"))


@pytest.mark.parametrize("target", ["onnx", "ort-cpu"])
def test_a_mask_that_is_added_in_half_precision(target):
    model = attention(mask="half", masked=HALF, scaled=HALF)
    result = fusion.optimize(model, target=target)
    assert (fused(result.model) or {}).get("softmax_precision") == (FLOAT if target == "onnx" else None)
    assert "Softmax" not in operators(result.model)
    equal(model, result.model)


def test_a_mask_that_is_added_in_float_is_not_added_in_half_precision():
    """In a row that is masked everywhere -65504 leaves float scores what they are, and half ones equal."""
    result = fusion.optimize(attention(mask="half"), target="onnx")
    assert fused(result.model) is None
    assert "added in float" in str(misses(result, "multi_head_attention"))


@pytest.mark.parametrize("target", ["onnx", "ort-cpu", "ort-cuda"])
def test_a_mask_in_float_does_not_become_one_in_half_precision(target):
    """-1e9 would become -inf, and a row that is masked everywhere NaN."""
    result = fusion.optimize(attention(mask="float"), target=target)
    assert operators(result.model)["Softmax"] == 1
    assert "mask is added in a wider dtype" in str(misses(result, "multi_head_attention"))


@pytest.mark.parametrize("opset", [17, 23])
@pytest.mark.parametrize("mask", ["", "half", "causal"])
def test_with_cuda_a_kernel_must_be_one_that_computes_in_float(mask, opset):
    """Without bias and causal mask TensorRT's kernels may be chosen, which sum in half precision."""
    result = fusion.optimize(attention(opset, mask=mask), target="ort-cuda")
    if not mask:
        assert "Softmax" in operators(result.model)
        assert "half precision" in str(misses(result, "self_attention"))
        return
    assert fused(result.model)["num_heads"] == 2
    assert fused(result.model).get("unidirectional", 0) == (mask == "causal")
