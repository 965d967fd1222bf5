"""Attention in the axes exporters leave it in: raw products, other orders of the result, shared heads, masks on p."""

from __future__ import annotations

import numpy as np
import pytest
from building import BOOL, FLOAT, Build, misses, numbers, operators
from test_attention import CROSS, PRIMES, SMALLEST, Attention, Sizes, same

import fusion
from fusion.verdict import Verdict

MULTI = {"multi_head_attention": 1}


def by_head(b: Attention, s: Sizes) -> tuple[str, str, str]:
    """q (B, H, S, D), k (B, H, T, D) and v (B, H, T, E) as inputs."""
    q = b.feed("q", numbers(s.B, s.H, s.S, s.D, seed=3), ["B", s.H, "S", s.D])
    k = b.feed("k", numbers(s.B, s.H, s.T, s.D, seed=4), ["B", s.H, "T", s.D])
    v = b.feed("v", numbers(s.B, s.H, s.T, s.E, seed=5), ["B", s.H, "T", s.E])
    return q, k, v


def attend(b: Attention, q: str, k: str, v: str, perm=(0, 1, 3, 2)) -> str:
    scores = b.mul(b.matmul(q, b.transpose(k, perm=list(perm))), 0.3)
    return b.matmul(b.softmax(scores, axis=-1), v)


@pytest.mark.parametrize("sizes", [PRIMES, CROSS, Sizes(1, 1, 6, 3, 4, 4, 5)], ids=["self", "cross", "one query"])
def test_products_of_heads_without_any_rearrangement(sizes):
    b = Attention(sizes)
    result = same(b.model(attend(b, *by_head(b, sizes))), b.feeds)
    assert result.counts == MULTI
    assert operators(result.model)["MultiHeadAttention"] == 1


def test_keys_and_values_by_head_are_read_as_they_lie():
    b = Attention(CROSS)
    s = CROSS
    k = b.feed("k", numbers(s.B, s.H, s.T, s.D, seed=4), ["B", s.H, "T", s.D])
    v = b.feed("v", numbers(s.B, s.H, s.T, s.D, seed=5), ["B", s.H, "T", s.D])
    q = b.heads(b.projection("x", s.hidden), s.D)
    result = same(b.model(b.merged(attend(b, q, k, v))), b.feeds)
    assert operators(result.model) == {"MatMul": 1, "Add": 1, "MultiHeadAttention": 1}


def test_heads_of_one_batch_axis():
    """(B H) as one axis, and nothing that says which part of it is heads: one head then."""
    b = Attention(PRIMES)
    s = PRIMES
    q = b.feed("q", numbers(6, s.S, s.D, seed=3), ["N", "S", s.D])
    k = b.feed("k", numbers(6, s.T, s.D, seed=4), ["N", "T", s.D])
    v = b.feed("v", numbers(6, s.T, s.E, seed=5), ["N", "T", s.E])
    result = same(b.model(attend(b, q, k, v, (0, 2, 1))), b.feeds)
    assert result.counts == MULTI
    (node,) = [node for node in result.model.graph.node if node.op_type == "MultiHeadAttention"]
    assert {a.name: a.i for a in node.attribute}["num_heads"] == 1


@pytest.mark.parametrize("dynamic", [False, True])
def test_sequence_first(dynamic):
    """(S, B, (H D)), as torch.nn.MultiheadAttention lays it: heads are found in the merged axis of batch and heads."""
    b = Attention(PRIMES, dynamic=dynamic)
    s = PRIMES
    turned = b.transpose("x", perm=[1, 0, 2])

    def heads(x: str, size: int) -> str:
        return b.transpose(b.reshape(x, [s.S if not dynamic else -1, s.B * s.H, size]), perm=[1, 0, 2])

    q, k, v = (heads(b.projection(turned, s.hidden), s.D) for _ in range(3))
    attended = attend(b, q, k, v, (0, 2, 1))
    merged = b.reshape(b.transpose(attended, perm=[1, 0, 2]), [-1, s.B, s.hidden])
    result = same(b.model(merged), b.feeds)
    assert sum(result.counts.values()) == 1
    (node,) = [node for node in result.model.graph.node if "Attention" in node.op_type]
    assert {a.name: a.i for a in node.attribute}["num_heads"] == s.H


def test_channels_before_positions():
    """A result (B, (H E), S), as convolutional models want it."""
    b = Attention(PRIMES)
    s = PRIMES
    attended = attend(b, *by_head(b, Sizes(T=s.S)))
    merged = b.reshape(b.transpose(attended, perm=[0, 1, 3, 2]), [0, s.H * s.E, -1])
    assert same(b.model(merged), b.feeds).counts == MULTI


def test_windows_are_batch():
    """Five axes: (B, W, H, S, D)."""
    b = Attention(PRIMES)
    s = PRIMES
    q, k, v = (b.feed(n, numbers(2, 4, s.H, s.S, s.D, seed=i), ["B", 4, s.H, s.S, s.D]) for i, n in enumerate("qkv"))
    attended = attend(b, q, k, v, (0, 1, 2, 4, 3))
    merged = b.reshape(b.transpose(attended, perm=[0, 1, 3, 2, 4]), [-1, s.S, s.hidden])
    result = same(b.model(merged), b.feeds)
    assert result.counts == MULTI
    (node,) = [node for node in result.model.graph.node if node.op_type == "MultiHeadAttention"]
    assert {a.name: a.i for a in node.attribute}["num_heads"] == s.H


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("how", ["expand", "broadcast"])
def test_heads_that_share_keys_and_values(groups, how):
    """H = 6 query heads over 1, 2 or 6 heads of keys."""
    b = Attention(Sizes(H=6))
    s = b.sizes
    q = b.heads(b.projection("x", s.hidden), s.D)

    def shared(width: int) -> str:
        made = b.transpose(b.reshape(b.projection("x", groups * width), [0, -1, groups, width]), perm=[0, 2, 1, 3])
        if how == "broadcast" and groups == 1:
            return made
        wide = b.expand(b.unsqueeze(made, np.array([2])), np.array([1, 1, 6 // groups, 1, 1]))
        return b.reshape(wide, np.array([0, 6, -1, width]))

    result = same(b.model(b.merged(attend(b, q, shared(s.D), shared(s.E)))), b.feeds)
    assert sum(result.counts.values()) == 1


@pytest.mark.parametrize("whole_row", [False, True])
@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("fill", [SMALLEST, -1e9, -np.inf])
def test_a_mask_on_the_probabilities_too(fill, inverted, whole_row):
    """Rows that are masked everywhere give 0, with a number or -inf as fill: then no row sees what a number hides."""
    b = Attention(PRIMES)
    s = PRIMES
    mask = np.random.default_rng(0).random((s.B, 1, s.S, s.S)) < 0.6
    mask[:, :, :, 0] = True
    mask[0, 0, 1] = mask[0, 0, 1] & (not whole_row)
    m = b.feed("m", mask != inverted, ["B", 1, "S", "S"], BOOL)
    q, k, v = b.qkv()

    def where(x: str, other: float) -> str:
        return b.where(m, other, x) if inverted else b.where(m, x, other)

    p = where(b.softmax(where(b.mul(b.matmul(q, k), 0.4), fill), axis=-1), 0.0)
    result = same(b.model(b.merged(b.matmul(p, v))), b.feeds)
    assert sum(result.counts.values()) == 1


@pytest.mark.parametrize("whole_row", [False, True])
def test_a_mask_multiplied_into_scores_and_probabilities(whole_row):
    """How Keras masks a softmax, with tf.where as it is exported."""
    b = Attention(PRIMES)
    s = PRIMES
    mask = np.random.default_rng(0).random((s.B, 1, s.S, s.S)) < 0.6
    mask[:, :, :, 0] = True
    mask[0, 0, 1] = mask[0, 0, 1] & (not whole_row)
    m = b.feed("m", mask, ["B", 1, "S", "S"], BOOL)
    kept, hidden = b.cast(m, to=FLOAT), b.cast(b.node("Not", m), to=FLOAT)
    q, k, v = b.qkv()
    p = b.softmax(b.add(b.mul(kept, b.mul(b.matmul(q, k), 0.4)), b.mul(-1e9, hidden)), axis=-1)
    model = b.model(b.merged(b.matmul(b.add(b.mul(kept, p), b.mul(0.0, hidden)), v)))
    assert sum(same(model, b.feeds).counts.values()) == 1


def test_another_mask_on_the_probabilities_is_no_mask_of_the_scores():
    b = Attention(PRIMES)
    s = PRIMES
    masks = [b.feed(n, np.random.default_rng(i).random((s.B, 1, s.S, s.S)) < 0.7, ["B", 1, "S", "S"], BOOL)
             for i, n in enumerate("mn")]  # fmt: skip
    q, k, v = b.qkv()
    scores = b.where(masks[0], b.mul(b.matmul(q, k), 0.4), SMALLEST)
    model = b.model(b.merged(b.matmul(b.where(masks[1], b.softmax(scores, axis=-1), 0.0), v)))
    result = same(model, b.feeds)
    assert not result.counts
    assert any("masks no score" in text for _, text in misses(result, "multi_head_attention"))


def test_sizes_that_only_a_run_knows_are_declared():
    """onnxruntime infers no shape through a Reshape to computed sizes, and of such values an Attention of width 0."""
    b = Build(23)
    x = b.input("x", ["B", "S", 8])
    size = b.node("Shape", x, start=0, end=2)
    rows = b.reshape(x, [-1, 8])

    def projected(seed: int) -> str:
        made = b.matmul(rows, numbers(8, 8, seed=seed))
        split = b.node("Reshape", made, b.concat(size, np.array([2, 4]), axis=0))
        return b.transpose(split, perm=[0, 2, 1, 3])

    q, k, v = (projected(seed) for seed in (1, 2, 3))
    scores = b.mul(b.matmul(q, b.transpose(k, perm=[0, 1, 3, 2])), 0.4)
    attended = b.transpose(b.matmul(b.softmax(scores, axis=-1), v), perm=[0, 2, 1, 3])
    y = b.matmul(b.node("Reshape", attended, b.concat(size, np.array([8]), axis=0)), numbers(8, 8, seed=4))
    result = same(b.model(y), {"x": numbers(2, 3, 8)}, target="onnx")
    assert result.counts == MULTI


# Masks with a number that is not the smallest -----------------------------------------------------------------------


def triangle(size: int, diagonal: int = 0) -> np.ndarray:
    return np.tril(np.ones((1, 1, size, size), bool), diagonal)


def masked(b: Attention, mask: np.ndarray, fill: float, after=None) -> object:
    q, k, v = b.qkv()
    scores = b.where(b.constant(mask), b.mul(b.matmul(q, k), 0.4), fill)
    if after is not None:
        scores = b.add(scores, after)
    return b.model(b.merged(b.matmul(b.softmax(scores, axis=-1), v)))


def test_a_causal_mask_hides_whatever_its_number():
    b = Attention(PRIMES, dynamic=False)
    assert sum(same(masked(b, triangle(5), -1e4), b.feeds).counts.values()) == 1


@pytest.mark.parametrize("fill", [-9e3, -1e4, -1e9, -1e20])
def test_where_no_key_is_kept_all_scores_are_the_number(fill):
    """Their mean comes out; scores that a number is added to would still differ."""
    b = Attention(PRIMES, dynamic=False)
    assert sum(same(masked(b, triangle(5, -1), fill), b.feeds).counts.values()) == 1


def test_a_number_that_is_scaled_with_the_scores():
    b = Attention(PRIMES, dynamic=False)
    q, k, v = b.qkv()
    scores = b.div(b.where(b.constant(triangle(5, -1)), b.matmul(q, k), -1e20), 2.5)
    model = b.model(b.merged(b.matmul(b.softmax(scores, axis=-1), v)))
    assert sum(same(model, b.feeds).counts.values()) == 1


def padded_before_it(b: Attention) -> object:
    """The first key is padding, so that all keys that the triangle leaves to the first query are hidden before it."""
    q, k, v = b.qkv()
    padding = b.constant(np.arange(5)[None, None, None] > 0)
    scores = b.where(padding, b.mul(b.matmul(q, k), 0.4), SMALLEST)
    scores = b.where(b.constant(triangle(5)), scores, -1e4)
    return b.model(b.merged(b.matmul(b.softmax(scores, axis=-1), v)))


@pytest.mark.parametrize("case", ["a small number", "a bias after it", "a mask before it"])
def test_a_number_that_does_not_hide_is_refused(case):
    b = Attention(PRIMES, dynamic=False)
    after = numbers(1, 1, 5, 5, seed=9, scale=-1e4) if case == "a bias after it" else None
    fill = -50.0 if case == "a small number" else -1e4
    model = padded_before_it(b) if case == "a mask before it" else masked(b, triangle(5), fill, after)
    result = same(model, b.feeds)
    assert not result.counts
    assert any("does not absorb" in text for _, text in misses(result, "multi_head_attention"))


def test_a_scaled_query_that_others_read_stays():
    b = Attention(PRIMES)
    q, k, v = b.qkv()
    scaled = b.mul(q, 0.4)
    attended = b.merged(b.matmul(b.softmax(b.matmul(scaled, k), axis=-1), v))
    result = same(b.model(attended, b.relu(scaled)), b.feeds)
    assert result.counts == MULTI


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_the_standard_operator_reads_shared_heads_once(groups):
    """Without masks it is the standard operator from opset 23 on, and nothing is repeated any more."""
    b = Attention(Sizes(H=6), opset=23)
    s = b.sizes
    q = b.heads(b.projection("x", s.hidden), s.D)

    def shared(width: int) -> str:
        made = b.transpose(b.reshape(b.projection("x", groups * width), [0, -1, groups, width]), perm=[0, 2, 1, 3])
        wide = b.expand(b.unsqueeze(made, np.array([2])), np.array([1, 1, 6 // groups, 1, 1]))
        return b.reshape(wide, np.array([0, 6, -1, width]))

    result = same(b.model(b.merged(attend(b, q, shared(s.D), shared(s.E)))), b.feeds, patterns=["multi_head_attention"])
    (node,) = [node for node in result.model.graph.node if node.op_type == "Attention"]
    attributes = {a.name: a.i for a in node.attribute}
    assert (attributes["q_num_heads"], attributes["kv_num_heads"]) == (6, groups)
    assert not {"Expand", "Reshape", "Transpose"} & operators(result.model).keys()


@pytest.mark.parametrize("opset", [11, 17, 18])
@pytest.mark.parametrize("case", ["shifted", "not shifted", "another axis"])
def test_a_softmax_written_out(case, opset):
    """exp(x - max) / sum(exp(x - max)) is a softmax; without the maximum it overflows, and is another function."""
    b = Attention(Sizes(4, 4, 4, 4, 4, 4, 16), opset=opset, dynamic=False)
    q, k, v = b.qkv()
    scores = b.mul(b.matmul(q, k), 0.4)
    axis = -2 if case == "another axis" else -1
    if case != "not shifted":
        scores = b.sub(scores, b.max_over(scores, (axis,)))
    power = b.node("Exp", scores)
    along = {"axes": [-1]} if opset < 13 else {}
    total = b.node("ReduceSum", power, *([] if along else [np.array([-1])]), keepdims=1, **along)
    counts = same(b.model(b.merged(b.matmul(b.div(power, total), v))), b.feeds).counts
    assert bool(counts.get("self_attention")) == (case == "shifted")


def test_caches_whose_lengths_have_names_of_their_own_are_explained_by_their_shapes():
    """Nothing says that a mask is as wide as the scores where neither is known to be as long as the values."""
    b = Attention()
    q, _, _ = b.qkv()
    past = {name: b.input(name, ["B", 3, length, 7]) for name, length in (("k", "P"), ("v", "R"))}
    mask = b.input("mask", ["B", 1, "S", "T"])
    own = [b.transpose(b.reshape(b.projection("x", 21), [0, -1, 3, 7]), perm=[0, 2, 1, 3]) for _ in "kv"]
    k, v = (b.concat(past[name], new, axis=2) for name, new in zip("kv", own, strict=True))
    scores = b.add(b.mul(b.matmul(q, b.transpose(k, perm=[0, 1, 3, 2])), 0.4), mask)
    model = b.model(b.merged(b.matmul(b.softmax(scores, axis=-1), v)))
    assert fusion.optimize(model, patterns=["multi_head_attention"]).counts == {}
    (place,) = fusion.why(model, "multi_head_attention").places
    assert [(miss.kind, miss.verdict) for miss in place.misses] == [("dimension", Verdict.UNKNOWN)]
    assert "found (B, 3, S, P + S) and (B, 1, S, T), which may be broadcast" in place.misses[0].text
