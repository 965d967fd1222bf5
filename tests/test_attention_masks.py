"""Masks and biases beside the scores of attention: every fill, polarity and shape; rows that are masked everywhere."""

from __future__ import annotations

import numpy as np
import pytest
from building import BOOL, FLOAT, numbers, run
from test_attention import (
    ANY,
    FUSED,
    SMALLEST,
    SQUARE,
    Attention,
    Sizes,
    keep_mask,
    same,
)

# Masks ------------------------------------------------------------------------------------------------------------

MASKS = {"B11T": ("B", 1, 1, "S"), "B1ST": ("B", 1, "S", "S"), "ST": ("S", "S"), "1HST": (1, 3, "S", "S"), "T": ("S",)}


def concrete(dims, sizes: Sizes) -> list[int]:
    return [{"B": sizes.B, "S": sizes.S}.get(dim, dim) for dim in dims]


@pytest.mark.parametrize("form", MASKS)
def test_an_additive_mask_of_any_shape(form):
    b = Attention()
    shape = MASKS[form]
    mask = b.feed("mask", numbers(*concrete(shape, b.sizes), seed=3), list(shape))
    result = same(b.model(b.whole(*b.qkv(), mask=lambda b, s: b.add(s, mask))), b.feeds)
    assert result.counts == FUSED


@pytest.mark.parametrize("whole_row", [False, True])
@pytest.mark.parametrize("fill", [-1e4, -1e9, SMALLEST, -np.inf])
def test_a_mask_made_additive(fill, whole_row):
    """(1 - keep) fill, as exporters write it; -inf comes from a Where."""
    b = Attention()
    keep = keep_mask(b, whole_row)
    if np.isinf(fill):
        bias = b.where(keep, 0.0, fill)
    else:
        bias = b.mul(b.sub(1.0, b.cast(keep, to=FLOAT)), fill)
    result = same(b.model(b.whole(*b.qkv(), mask=lambda b, s: b.add(s, bias))), b.feeds)
    if np.isinf(fill) and whole_row:
        assert result.counts in ANY
    else:
        assert result.counts == FUSED


@pytest.mark.parametrize("whole_row", [False, True])
@pytest.mark.parametrize("fill", [-1e4, -1e9, SMALLEST, -np.inf])
@pytest.mark.parametrize("inverted", [False, True])
def test_scores_replaced_where_masked(fill, whole_row, inverted):
    b = Attention()
    keep = keep_mask(b, whole_row)

    def mask(b, scores):
        return b.where(b.node("Not", keep), fill, scores) if inverted else b.where(keep, scores, fill)

    result = same(b.model(b.whole(*b.qkv(), mask=mask)), b.feeds)
    assert result.counts == FUSED or np.isinf(fill)


@pytest.mark.parametrize("whole_row", [False, True])
@pytest.mark.parametrize("fill", [-1e4, 0.7 * SMALLEST])
def test_scores_selected_by_arithmetic(fill, whole_row):
    """scores [keep] + fill [not keep] is a Where."""
    b = Attention()
    keep = keep_mask(b, whole_row)

    def mask(b, scores):
        hidden = b.cast(b.node("Not", keep), to=FLOAT)
        return b.add(b.mul(scores, b.cast(keep, to=FLOAT)), b.mul(fill, hidden))

    assert same(b.model(b.whole(*b.qkv(), mask=mask)), b.feeds).counts == FUSED


def test_a_mask_that_two_attentions_are_multiplied_by():
    """What is made of the mask alone may have other readers; it stays for them."""
    b = Attention()
    keep = keep_mask(b, whole_row=False)
    kept = b.cast(keep, to=FLOAT)
    hidden = b.mul(b.sub(1.0, kept), SMALLEST)
    first, second = (b.whole(*b.qkv(), mask=lambda b, s: b.add(b.mul(kept, s), hidden)) for _ in range(2))
    assert same(b.model(first, second, kept, hidden), b.feeds).counts == {"self_attention": 2}


NO_SELECTION = {
    "added where kept": lambda b, s, m, other: b.add(b.mul(s, m), b.mul(b.sub(2.0, m), SMALLEST)),
    "another mask": lambda b, s, m, other: b.add(b.mul(s, m), b.mul(b.sub(1.0, other), SMALLEST)),
    "the same side": lambda b, s, m, other: b.add(b.mul(s, m), b.mul(m, SMALLEST)),
    "of no booleans": lambda b, s, m, other: b.add(
        b.mul(s, b.abs(b.sub(m, 0.25))), b.mul(b.sub(1.0, b.abs(b.sub(m, 0.25))), SMALLEST)
    ),
}


@pytest.mark.parametrize("form", NO_SELECTION)
def test_what_is_multiplied_and_no_selection(form):
    b = Attention()
    kept = b.cast(keep_mask(b, whole_row=False), to=FLOAT)
    s = b.sizes
    holes = np.random.default_rng(9).random((s.B, 1, s.S, s.S)) > 0.3
    other = b.cast(b.feed("holes", holes, ["B", 1, "S", "S"], BOOL), to=FLOAT)
    mask = b.whole(*b.qkv(), mask=lambda b, scores: NO_SELECTION[form](b, scores, kept, other))
    assert same(b.model(mask), b.feeds).counts == {}


@pytest.mark.parametrize("whole_row", [False, True])
@pytest.mark.parametrize("fill", [-1e4, SMALLEST])
@pytest.mark.parametrize("first", ["where", "add"])
def test_the_order_of_masks_and_biases_is_kept(first, fill, whole_row):
    b = Attention()
    keep = keep_mask(b, whole_row)
    bias = b.feed("bias", numbers(3, 5, 5, seed=4), [3, "S", "S"])

    def mask(b, scores):
        if first == "where":
            return b.add(b.where(keep, scores, fill), bias)
        return b.where(keep, b.add(scores, bias), fill)

    assert same(b.model(b.whole(*b.qkv(), mask=mask)), b.feeds).counts in ANY


@pytest.mark.parametrize("whole_row", [False, True])
def test_two_biases_are_added(whole_row):
    b = Attention()
    keep = keep_mask(b, whole_row)
    bias = b.feed("bias", numbers(1, 3, 5, 5, seed=4), [1, 3, "S", "S"])
    padding = b.where(keep, 0.0, SMALLEST)
    result = same(b.model(b.whole(*b.qkv(), mask=lambda b, s: b.add(b.add(s, bias), padding))), b.feeds)
    assert result.counts == FUSED


@pytest.mark.parametrize("factor", [2.0, -1.0, 0.5])
def test_a_scale_after_the_mask_scales_the_mask(factor):
    b = Attention()
    bias = b.feed("bias", numbers(1, 3, 5, 5, seed=4), [1, 3, "S", "S"])
    result = same(b.model(b.whole(*b.qkv(), mask=lambda b, s: b.mul(b.add(s, bias), factor))), b.feeds)
    assert result.counts in (FUSED, {})


def test_a_subtracted_bias_is_not_an_added_one():
    b = Attention()
    bias = b.feed("bias", numbers(1, 3, 5, 5, seed=4), [1, 3, "S", "S"])
    assert same(b.model(b.whole(*b.qkv(), mask=lambda b, s: b.sub(s, bias))), b.feeds).counts in ANY
    c = Attention()
    bias = c.feed("bias", numbers(1, 3, 5, 5, seed=4), [1, 3, "S", "S"])
    assert same(c.model(c.whole(*c.qkv(), mask=lambda b, s: b.sub(bias, s))), c.feeds).counts in ANY


@pytest.mark.parametrize("whole_row", [False, True])
@pytest.mark.parametrize("fill", [-np.inf, SMALLEST])
def test_a_guard_against_nan_gives_nothing_where_everything_is_masked(fill, whole_row):
    b = Attention()
    q, k, v = b.qkv()
    bias = b.where(keep_mask(b, whole_row), 0.0, fill)
    probabilities = b.softmax(b.add(b.mul(b.matmul(q, k), 0.4), bias), axis=-1)
    guarded = b.where(b.isnan(probabilities), 0.0, probabilities)
    model = b.model(b.merged(b.matmul(guarded, v)))
    (expected,) = run(model, b.feeds).values()
    assert not np.isnan(expected).any()
    assert (np.abs(expected[0, 1]).max() == 0.0) == (whole_row and np.isinf(fill))
    assert same(model, b.feeds).counts in ANY


def test_a_where_after_the_softmax_that_is_no_guard():
    b = Attention()
    q, k, v = b.qkv()
    keep = keep_mask(b, True)
    probabilities = b.softmax(b.mul(b.matmul(q, k), 0.4), axis=-1)
    masked = b.where(keep, probabilities, 0.0)
    assert same(b.model(b.merged(b.matmul(masked, v))), b.feeds).counts == {}


def test_the_maximum_subtracted_by_hand():
    b = Attention()
    result = same(b.model(b.whole(*b.qkv(), mask=lambda b, s: b.sub(s, b.max_over(s)))), b.feeds)
    assert result.counts == FUSED
    c = Attention(SQUARE, dynamic=False)
    another = same(c.model(c.whole(*c.qkv(), mask=lambda b, s: b.sub(s, b.max_over(s, (-2,))))), c.feeds)
    assert "sdpa" not in another.counts


@pytest.mark.parametrize("bound", [-1e4, SMALLEST])
def test_clamped_scores(bound):
    b = Attention()
    bias = b.where(keep_mask(b, True), 0.0, -np.inf)
    result = same(b.model(b.whole(*b.qkv(), mask=lambda b, s: b.max(b.add(s, bias), bound))), b.feeds)
    assert result.counts in ({}, FUSED)
    if bound == -1e4:
        assert result.counts == {}
