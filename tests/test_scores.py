"""What is done to scores before masks and biases: caps, and factors that are tensors."""

from __future__ import annotations

import numpy as np
import pytest
from building import misses, operators, run
from onnx import helper
from onnx.reference import ReferenceEvaluator
from test_attention import CROSS, SMALLEST, Attention, same, softmax
from test_attention_forms import by_head
from test_masks import not_after

import fusion

FUSED = {"multi_head_attention": 1}


def attributes(model) -> dict[str, object]:
    """The attributes of the one attention."""
    (node,) = [node for node in model.graph.node if node.op_type in ("Attention", "MultiHeadAttention")]
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


# Caps --------------------------------------------------------------------------------------------------------------


def cap(b: Attention, scores: str, most: float = 2.0) -> str:
    return b.mul(b.tanh(b.div(scores, most)), most)


def capped(b: Attention, most: float, scale: float, mask=lambda b, scores: scores) -> str:
    """most tanh(scale q kᵀ / most), masked, of inputs by head."""
    q, k, v = by_head(b, CROSS)
    scores = b.mul(b.matmul(q, b.transpose(k, perm=[0, 1, 3, 2])), scale)
    return b.matmul(b.softmax(mask(b, cap(b, scores, most)), axis=-1), v)


def added(b: Attention, row: float) -> str:
    """An additive mask (2, 1, S, T) of which one row hides all with a number."""
    mask = np.where(np.arange(b.sizes.T) % 3 == 1, np.float32(SMALLEST), np.float32(0.5)) * np.ones((2, 1, b.sizes.S, 1))
    mask[1, 0, 2] = row
    return b.feed("mask", mask.astype(np.float32), ["B", 1, "S", "T"])


@pytest.mark.parametrize("target", ["onnx", "ort-cpu"])
@pytest.mark.parametrize("opset", [23, 24])
def test_capped_scores(opset, target):
    b = Attention(CROSS, opset)
    model = b.model(capped(b, 2.0, 1.5))
    result = same(model, b.feeds, target=target)
    assert result.counts == FUSED
    assert {"softcap": 2.0, "scale": 1.5}.items() <= attributes(result.model).items()
    q, k, v = (b.feeds[name].astype(np.float64) for name in "qkv")
    expected = softmax(2.0 * np.tanh(1.5 / 2.0 * q @ k.transpose(0, 1, 3, 2))) @ v
    (computed,) = run(result.model, b.feeds).values()
    np.testing.assert_allclose(computed, expected, atol=1e-5)


def test_a_cap_is_applied_before_masks():
    b = Attention(CROSS, 23)
    result = same(b.model(capped(b, 2.0, 1.5, lambda b, s: b.add(s, added(b, 0.0)))), b.feeds, target="onnx")
    assert result.counts == FUSED


def test_rows_masked_everywhere_by_the_standard():
    """onnxruntime gives 0 there; by the standard it is what the export gives."""
    b = Attention(CROSS, 23)
    model = b.model(capped(b, 2.0, 1.5, lambda b, s: b.add(s, added(b, SMALLEST))))
    result = fusion.optimize(model, target="onnx", patterns=["multi_head_attention"])
    (expected,) = run(model, b.feeds).values()
    (computed,) = ReferenceEvaluator(result.model).run(None, b.feeds)
    assert result.counts == FUSED
    np.testing.assert_allclose(computed, expected, atol=1e-5)


def causal(b: Attention, scores: str) -> str:
    return b.where(not_after(b), scores, SMALLEST)


@pytest.mark.parametrize("mask", [causal, lambda b, s: b.add(s, added(b, 0.0))], ids=["causal", "added"])
def test_capped_and_masked_scores_are_not_written_for_kernels_that_may_mask_first(mask):
    b = Attention(opset=23)
    result = same(b.model(b.whole(*b.qkv(), mask=lambda b, s: mask(b, cap(b, s)))), b.feeds)
    assert result.counts == {}
    assert any("capped by a tanh and then masked" in text for _, text in misses(result, "multi_head_attention"))


def test_a_causal_mask_of_capped_scores():
    b = Attention(opset=23)
    result = same(b.model(b.whole(*b.qkv(), mask=lambda b, s: causal(b, cap(b, s)))), b.feeds, target="onnx")
    assert {"softcap": 2.0, "is_causal": 1}.items() <= attributes(result.model).items()


def test_no_kernel_before_opset_23_caps_scores():
    b = Attention(CROSS)
    result = same(b.model(capped(b, 2.0, 1.5)), b.feeds)
    assert result.counts == {}
    assert any("the kernel caps none" in text for _, text in misses(result, "multi_head_attention"))


def test_projections_of_one_input_are_left_outside():
    b = Attention(opset=23)
    assert same(b.model(b.whole(*b.qkv(), mask=cap)), b.feeds).counts == FUSED


@pytest.mark.parametrize(("most", "scale", "counts"), [(-2.0, 1.5, FUSED), (2.0, -1.5, {}), (2.0, 0.0, {})])
def test_signs_of_cap_and_scale(most, scale, counts):
    """cap tanh(x / cap) is even in the cap; of the scale the operator takes a root."""
    b = Attention(CROSS, 23)
    assert same(b.model(capped(b, most, scale)), b.feeds).counts == counts


def test_a_negative_scale_is_none_of_the_standard_operator():
    b = Attention(CROSS, 23)
    q, k, v = by_head(b, CROSS)
    scores = b.mul(b.matmul(q, b.transpose(k, perm=[0, 1, 3, 2])), -0.5)
    result = same(b.model(b.matmul(b.softmax(scores, axis=-1), v)), b.feeds)
    assert operators(result.model)["MultiHeadAttention"] == 1


def test_a_cap_of_masked_scores_is_another_function():
    b = Attention(CROSS, 23)
    q, k, v = by_head(b, CROSS)
    scores = b.add(b.matmul(q, b.transpose(k, perm=[0, 1, 3, 2])), added(b, 0.0))
    attended = b.matmul(b.softmax(b.mul(b.tanh(b.div(scores, 2.0)), 2.0), axis=-1), v)
    assert same(b.model(attended), b.feeds, target="onnx").counts == {}
