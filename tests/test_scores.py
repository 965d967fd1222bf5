"""What is done to scores before masks and biases: caps, and factors that are tensors."""

from __future__ import annotations

import numpy as np
import pytest
from building import misses, operators, run
from onnx import helper
from onnx.reference import ReferenceEvaluator
from test_attention import CROSS, SMALLEST, Attention, Sizes, same, softmax
from test_attention_forms import by_head
from test_masks import not_after

import fusion

FUSED = {"multi_head_attention": 1}
CAPPED = {"capped_attention": 1}


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
    mask = np.where(np.arange(b.sizes.T) % 3 == 1, SMALLEST, 0.5) * np.ones((2, 1, b.sizes.S, 1))
    mask[1, 0, 2] = row
    return b.feed("mask", mask.astype(np.float32), ["B", 1, "S", "T"])


@pytest.mark.parametrize("opset", [23, 24])
def test_capped_scores(opset):
    b = Attention(CROSS, opset)
    result = same(b.model(capped(b, 2.0, 1.5)), b.feeds, target="onnx")
    assert result.counts == CAPPED
    assert {"softcap": 2.0, "scale": 1.5}.items() <= attributes(result.model).items()
    q, k, v = (b.feeds[name].astype(np.float64) for name in "qkv")
    expected = softmax(2.0 * np.tanh(1.5 / 2.0 * q @ k.transpose(0, 1, 3, 2))) @ v
    (computed,) = run(result.model, b.feeds).values()
    np.testing.assert_allclose(computed, expected, atol=1e-5)


def test_a_cap_is_applied_before_masks():
    b = Attention(CROSS, 23)
    result = same(b.model(capped(b, 2.0, 1.5, lambda b, s: b.add(s, added(b, 0.0)))), b.feeds, target="onnx")
    assert result.counts == CAPPED


def test_rows_masked_everywhere_by_the_standard():
    """onnxruntime gives 0 there; by the standard it is what the export gives."""
    b = Attention(CROSS, 23)
    model = b.model(capped(b, 2.0, 1.5, lambda b, s: b.add(s, added(b, SMALLEST))))
    result = fusion.optimize(model, target="onnx", patterns=["capped_attention"])
    (expected,) = run(model, b.feeds).values()
    (computed,) = ReferenceEvaluator(result.model).run(None, b.feeds)
    assert result.counts == CAPPED
    np.testing.assert_allclose(computed, expected, atol=1e-5)


def causal(b: Attention, scores: str) -> str:
    return b.where(not_after(b), scores, SMALLEST)


def test_capped_scores_are_not_written_for_kernels_that_may_mask_first():
    b = Attention(opset=23)
    result = same(b.model(b.whole(*b.qkv(), mask=lambda b, s: causal(b, cap(b, s)))), b.feeds)
    assert result.counts == {}


def test_a_causal_mask_of_capped_scores():
    b = Attention(opset=23)
    result = same(b.model(b.whole(*b.qkv(), mask=lambda b, s: causal(b, cap(b, s)))), b.feeds, target="onnx")
    assert {"softcap": 2.0, "is_causal": 1}.items() <= attributes(result.model).items()


def test_no_kernel_before_opset_23_caps_scores():
    b = Attention(CROSS)
    result = same(b.model(capped(b, 2.0, 1.5)), b.feeds, target="onnx")
    assert result.counts == {}
    assert any("comes with opset 23" in text for _, text in misses(result, "capped_attention"))


def test_projections_of_one_input_are_left_outside():
    b = Attention(opset=23)
    assert same(b.model(b.whole(*b.qkv(), mask=cap)), b.feeds, target="onnx").counts == CAPPED


@pytest.mark.parametrize(("most", "scale", "counts"), [(-2.0, 1.5, CAPPED), (2.0, -1.5, {}), (2.0, 0.0, {})])
def test_signs_of_cap_and_scale(most, scale, counts):
    """cap tanh(x / cap) is even in the cap; of the scale the operator takes a root."""
    b = Attention(CROSS, 23)
    assert same(b.model(capped(b, most, scale)), b.feeds, target="onnx").counts == counts


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


# Factors -----------------------------------------------------------------------------------------------------------

FACTORS = {
    "by head": [3, 1, 1],
    "by batch": ["B", 1, 1, 1],
    "by batch and head": ["B", 3, 1, 1],
    "by query": ["S", 1],
    "by head and query": [1, 3, "S", 1],
    "one number": [],
}


def fed(b: Attention, shape) -> str:
    """An input of factors, some of them negative and some 0."""
    sizes = [{"B": b.sizes.B, "S": b.sizes.S, "T": b.sizes.T}.get(dim, dim) for dim in shape]
    return b.feed("factor", np.round(np.linspace(-1.0, 2.0, int(np.prod(sizes))), 1).reshape(sizes).astype("f"), shape)


def times(b: Attention, factor: str, mask=lambda b, scores: scores) -> str:
    """softmax(0.5 factor q kᵀ) v of inputs by head."""
    q, k, v = by_head(b, b.sizes)
    scores = b.mul(b.mul(b.matmul(q, b.transpose(k, perm=[0, 1, 3, 2])), factor), 0.5)
    return b.matmul(b.softmax(mask(b, scores), axis=-1), v)


@pytest.mark.parametrize("target", ["onnx", "ort-cpu"])
@pytest.mark.parametrize("form", FACTORS)
def test_a_factor_that_is_the_same_for_all_keys(form, target):
    b = Attention(CROSS, 23)
    result = same(b.model(times(b, fed(b, FACTORS[form]))), b.feeds, target=target)
    assert result.counts == FUSED
    q, k, v, factor = (b.feeds[name].astype(np.float64) for name in ("q", "k", "v", "factor"))
    (computed,) = run(result.model, b.feeds).values()
    np.testing.assert_allclose(computed, softmax(0.5 * factor * (q @ k.transpose(0, 1, 3, 2))) @ v, atol=1e-5)


@pytest.mark.parametrize("form", [["T"], [3, 1, "T"], ["S", "T"], ["B", 3, "S", "T"]])
def test_a_factor_by_key_cannot_be_moved_into_queries(form):
    b = Attention(CROSS)
    result = same(b.model(times(b, fed(b, form))), b.feeds, patterns=["multi_head_attention"])
    assert result.counts == {}
    assert any("factor with axes" in text for _, text in misses(result, "multi_head_attention"))


def test_two_factors_are_more_than_one():
    b = Attention(CROSS)
    twice = b.mul(fed(b, [3, 1, 1]), b.feed("other", np.ones((2, 1, 1, 1), np.float32), ["B", 1, 1, 1]))
    result = same(b.model(times(b, twice)), b.feeds)
    assert result.counts in ({}, FUSED)


def cosine(b: Attention, mask=lambda b, scores: scores) -> str:
    """Cosine attention of projections of one input: directions compared, times exp(min(t, log 100)) by head."""
    q, k, v = b.qkv(key_perm=(0, 2, 1, 3))

    def direction(x: str) -> str:
        return b.div(x, b.max(b.sqrt(b.sum(b.mul(x, x))), 1e-12))

    factor = b.node("Exp", b.min(np.array([0.5, 1.0, 7.0], np.float32).reshape(3, 1, 1), float(np.log(100))))
    scores = b.mul(b.matmul(direction(q), b.transpose(direction(k), perm=[0, 1, 3, 2])), factor)
    return b.merged(b.matmul(b.softmax(mask(b, scores), axis=-1), v))


def test_cosine_attention_gets_its_queries_multiplied_before_they_are_rearranged():
    b = Attention()
    result = same(b.model(cosine(b)), b.feeds)
    assert result.counts == FUSED
    assert operators(result.model)["Mul"] == 3
    assert not operators(result.model)["Softmax"]


def test_windows_whose_masks_are_by_window():
    """(B W, H, S, T) scores with a mask (W, S, T): the batch is read off what is four times as large."""
    b = Attention(Sizes(B=8))
    b.inputs.clear()
    b.feeds = {"windows": b.feeds["x"].reshape(2, 4, 5, 11)}
    b.node("Reshape", b.input("windows", ["N", 4, 5, 11]), np.array([-1, 5, 11]), output="x")

    def masked(b: Attention, scores: str) -> str:
        windows = b.reshape(scores, [-1, 4, 3, 5, 5])
        mask = np.where(np.arange(100).reshape(1, 4, 1, 5, 5) % 7 == 0, np.float32(-100), np.float32(0))
        return b.reshape(b.add(windows, mask), [-1, 3, 5, 5])

    assert same(b.model(cosine(b, masked)), b.feeds).counts == FUSED


def test_a_factor_inside_a_cap():
    b = Attention(CROSS, 23)
    result = same(b.model(times(b, fed(b, [3, 1, 1]), cap)), b.feeds, target="onnx")
    assert result.counts == CAPPED
    assert "softcap" in attributes(result.model)


def test_a_factor_of_a_masked_score_scales_the_mask():
    b = Attention(CROSS)
    q, k, v = by_head(b, CROSS)
    scores = b.add(b.matmul(q, b.transpose(k, perm=[0, 1, 3, 2])), added(b, 0.0))
    attended = b.matmul(b.softmax(b.mul(scores, fed(b, [3, 1, 1])), axis=-1), v)
    assert same(b.model(attended), b.feeds, patterns=["multi_head_attention"]).counts == {}


@pytest.mark.parametrize("axes", [(3,), (1,)])
def test_only_the_maximum_along_the_keys_may_be_subtracted(axes):
    """The maximum over heads, (B, S, T), put where that of the row would be: it may be -inf where that is not."""
    b = Attention(Sizes(B=2, S=3, T=3, H=3), dynamic=False)
    q, k, v = b.qkv()
    scores = b.mul(b.matmul(q, k), 0.5)
    mask = np.where(np.eye(3, dtype=bool), np.float32(-np.inf), np.float32(0))
    scores = b.add(scores, mask)
    maximum = b.unsqueeze(b.max_over(scores, axes, 0), [3])
    model = b.model(b.merged(b.matmul(b.softmax(b.sub(scores, maximum), axis=-1), v)))
    assert same(model, b.feeds, patterns=["multi_head_attention"]).counts == (FUSED if axes == (3,) else {})
