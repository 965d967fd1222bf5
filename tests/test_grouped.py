"""Heads of keys and values that several of queries read: GroupQueryAttention takes them as they are."""

from __future__ import annotations

import numpy as np
import pytest
from building import misses, numbers, operators, run
from onnx import helper, numpy_helper
from test_attention import SMALLEST, Attention, Sizes, same, softmax
from test_cache import Cached, P, later_keys_hidden
from test_masks import not_after
from test_scores import cap

import fusion

SIZES = Sizes(H=6, D=8, E=8)
GROUPED = "GroupQueryAttention"


def attributes(model) -> dict[str, object]:
    (node,) = [node for node in model.graph.node if node.op_type == GROUPED]
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def grouped(sizes: Sizes = SIZES, groups: int = 2, mask=lambda b, scores: scores, **options) -> tuple[Attention, str]:
    """Attention of x (B, S, C) whose `groups` heads of keys and values are repeated for the heads of queries."""
    b = Attention(sizes, **options)
    q = b.heads(b.projection("x", sizes.hidden), sizes.D)

    def shared(width: int) -> str:
        made = b.transpose(b.reshape(b.projection("x", groups * width), [0, -1, groups, width]), perm=[0, 2, 1, 3])
        wide = b.expand(b.unsqueeze(made, [2]), np.array([1, 1, sizes.H // groups, 1, 1]))
        return b.reshape(wide, [0, sizes.H, -1, width])

    k, v = shared(sizes.D), shared(sizes.E)
    return b, b.whole(q, b.transpose(k, perm=[0, 1, 3, 2]), v, mask=mask, scale=0.4)


def added(b: Attention, scores: str) -> str:
    """A mask of holes; one row hides every key."""
    mask = np.where(np.arange(b.sizes.S) % 3 == 1, SMALLEST, 0.0) * np.ones((2, 1, b.sizes.S, 1))
    mask[1, 0, 2] = SMALLEST
    return b.add(scores, b.feed("mask", mask.astype(np.float32), ["B", 1, "S", "S"]))


def causal(b: Attention, scores: str) -> str:
    return b.where(not_after(b), scores, SMALLEST)


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_nothing_is_repeated(groups, dynamic):
    b, attended = grouped(groups=groups, dynamic=dynamic)
    model = b.model(attended)
    result = same(model, b.feeds)
    assert {"num_heads": 6, "kv_num_heads": groups, "causal": 0}.items() <= attributes(result.model).items()
    assert attributes(result.model)["scale"] == pytest.approx(0.4)
    assert not {"Expand", "Transpose", "Reshape"} & set(operators(result.model)) or dynamic

    s = b.sizes
    widths = (s.hidden, groups * s.D, groups * s.E)
    weights = [
        (numbers(s.C, w, seed=11 + 2 * i, scale=0.5), numbers(w, seed=12 + 2 * i, scale=0.5))
        for i, w in enumerate(widths)
    ]
    x = b.feeds["x"].astype(np.float64)
    q, k, v = ((x @ w + c).reshape(s.B, s.S, -1, s.D).swapaxes(1, 2) for w, c in weights)
    k, v = (np.repeat(array, s.H // groups, axis=1) for array in (k, v))
    expected = softmax(q @ k.swapaxes(-1, -2) * 0.4) @ v
    (got,) = run(result.model, b.feeds).values()
    np.testing.assert_allclose(got, expected.swapaxes(1, 2).reshape(s.B, s.S, -1), rtol=1e-3, atol=1e-4)


def test_rows_masked_everywhere_are_the_mean_of_the_values():
    b, attended = grouped(mask=added)
    result = same(b.model(attended), b.feeds)
    assert attributes(result.model)["causal"] == 0
    (found,) = [node for node in result.model.graph.node if node.op_type == GROUPED]
    assert found.input[10] == "mask"


def test_a_causal_mask_is_what_the_kernel_does_by_itself():
    b, attended = grouped(mask=causal)
    result = same(b.model(attended), b.feeds)
    assert "causal" not in attributes(result.model)
    (found,) = [node for node in result.model.graph.node if node.op_type == GROUPED]
    assert len(found.input) == 7


def test_layers_ask_for_the_lengths_once():
    b, first = grouped()
    q = b.heads(b.projection("x", SIZES.hidden), SIZES.D)
    made = b.transpose(b.reshape(b.projection("x", 16), [0, -1, 2, 8]), perm=[0, 2, 1, 3])
    k = v = b.reshape(b.expand(b.unsqueeze(made, [2]), np.array([1, 1, 3, 1, 1])), [0, 6, -1, 8])
    second = b.whole(q, b.transpose(k, perm=[0, 1, 3, 2]), v)
    result = same(b.model(first, second), b.feeds)
    counts = operators(result.model)
    assert (counts[GROUPED], counts["Shape"], counts["Cast"]) == (2, 1, 2)


@pytest.mark.parametrize(
    ("sizes", "reason"), [(Sizes(H=6, D=7, E=7), "multiples of 8"), (Sizes(H=6, D=8, E=16), "one size")]
)
def test_sizes_that_the_kernel_refuses_are_for_another_operator(sizes, reason):
    b, attended = grouped(sizes)
    result = same(b.model(attended), b.feeds)
    assert GROUPED not in operators(result.model)
    assert operators(result.model)["MultiHeadAttention"] == 1

    b, attended = grouped(sizes, mask=lambda b, s: added(b, cap(b, s)))
    assert any(reason in text for _, text in misses(same(b.model(attended), b.feeds), "capped_attention"))


def test_every_head_with_keys_of_its_own_is_no_group():
    b, attended = grouped(groups=6)
    assert GROUPED not in operators(same(b.model(attended), b.feeds).model)


def test_keys_of_another_sequence_are_no_group():
    b = Attention(Sizes(H=6, D=8, E=8, T=13))
    q = b.heads(b.projection("x", 48), 8)
    pasts = [b.feed(name, numbers(2, 2, 13, 8, seed=seed), ["B", 2, "T", 8]) for name, seed in (("k", 5), ("v", 6))]
    k, v = (b.reshape(b.expand(b.unsqueeze(p, [2]), np.array([1, 1, 3, 1, 1])), [0, 6, -1, 8]) for p in pasts)
    result = same(b.model(b.whole(q, b.transpose(k, perm=[0, 1, 3, 2]), v)), b.feeds)
    assert operators(result.model)["MultiHeadAttention"] == 1


@pytest.mark.parametrize("past", [0, 1, P])
@pytest.mark.parametrize("tokens", [1, 5])
def test_it_appends_to_a_cache_of_the_heads_there_are(tokens, past):
    """Several new tokens in a batch of several: the kernel is told how many of them are new."""
    b = Cached(Sizes(S=tokens, H=6, D=8, E=8), groups=2, past=past)
    result = same(b.model(b.attended(later_keys_hidden), *b.caches), b.feeds)
    assert attributes(result.model)["kv_num_heads"] == 2
    (found,) = [node for node in result.model.graph.node if node.op_type == GROUPED]
    assert list(found.input)[3:5] == ["past_k", "past_v"]
    assert found.input[16]
    assert list(found.output)[1:] == ["all_k", "all_v"]
    assert "Concat" not in operators(result.model)


def masked(b: Cached, scores: str) -> str:
    """What MultiHeadAttention adds: some keys hidden, all of them in one row, and a number for each other one."""
    rows, keys = b.sizes.S, b.sizes.S + b.feeds["past_k"].shape[2]
    mask = np.where(np.arange(keys) % 3 == 1, SMALLEST, numbers(2, 1, rows, keys, seed=8))
    mask[1, 0, rows - 1] = SMALLEST
    return b.add(scores, b.feed("mask", mask.astype(np.float32), ["B", 1, "S", "all"]))


@pytest.mark.parametrize("mask", [None, masked], ids=["none", "added"])
@pytest.mark.parametrize("past", [0, P])
@pytest.mark.parametrize(("tokens", "groups"), [(1, 2), (5, 2), (5, 1), (5, 3)])
def test_queries_that_share_keys_are_rows_beside_each_other(tokens, groups, past, mask):
    """Behind a cache GroupQueryAttention is causal; MultiHeadAttention takes any mask, over the heads of keys."""
    b = Cached(Sizes(S=tokens, H=6), groups=groups, past=past)
    result = same(b.model(b.attended(mask or (lambda b, scores: scores)), *b.caches), b.feeds)
    (found,) = [node for node in result.model.graph.node if node.op_type == "MultiHeadAttention"]
    heads = {attribute.name: attribute.i for attribute in found.attribute}["num_heads"]
    assert heads == groups
    assert list(found.input)[6:] == ["past_k", "past_v"]
    assert list(found.output)[1:] == ["all_k", "all_v"]
    assert bool(found.input[5]) == (mask is not None)


def test_a_bias_of_each_head_keeps_the_heads_apart():
    b = Cached(Sizes(H=6), groups=2)
    mask = b.feed("mask", numbers(1, 6, 5, P + 5, seed=8), [1, 6, "S", "all"])
    result = same(b.model(b.attended(lambda b, scores: b.add(scores, mask)), *b.caches), b.feeds)
    (found,) = [node for node in result.model.graph.node if node.op_type == "MultiHeadAttention"]
    assert {attribute.name: attribute.i for attribute in found.attribute}["num_heads"] == 6


@pytest.mark.parametrize("mask", [None, added, causal], ids=["none", "added", "causal"])
@pytest.mark.parametrize("groups", [2, 6])
def test_caps_are_applied_before_masks(groups, mask):
    b, attended = grouped(groups=groups, mask=lambda b, s: (mask or (lambda _, scores: scores))(b, cap(b, s)))
    result = same(b.model(attended), b.feeds)
    assert result.counts == {"capped_attention": 1}
    assert attributes(result.model)["softcap"] == 2.0


# A score beside those of the keys ----------------------------------------------------------------------------------

SINKS = np.linspace(-1.0, 3.0, 6, dtype=np.float32)


def sunk(groups: int = 2, mask=lambda b, scores: scores, case: str = "", **options) -> tuple[Attention, str]:
    """Attention with one more column of scores, a number for each head, which is cut off after the softmax."""
    b = Attention(SIZES, **options)
    s = b.sizes
    q = b.heads(b.projection("x", s.hidden), s.D)
    made = [b.reshape(b.projection("x", groups * s.D), [0, -1, groups, s.D]) for _ in "kv"]
    wide = [b.unsqueeze(b.transpose(one, perm=[0, 2, 1, 3]), [2]) for one in made]
    k, v = (b.reshape(b.expand(one, np.array([1, 1, s.H // groups, 1, 1])), [0, s.H, -1, s.D]) for one in wide)
    scores = mask(b, b.mul(b.matmul(q, b.transpose(k, perm=[0, 1, 3, 2])), 0.4))
    batch, length = (b.node("Gather", b.shape("x"), np.array([axis]), axis=0) for axis in (0, 1))
    columns = 2 if case == "two columns" else 1
    shape = b.concat(batch, np.array([s.H]), length, np.array([columns]), axis=0)
    column = b.expand(b.reshape(SINKS, [1, -1, 1, 1]), shape)
    joined = b.concat(*((column, scores) if case == "before" else (scores, column)), axis=-1)
    most = b.max_over(scores if case == "the maximum of scores" else joined)
    weights = b.softmax(b.sub(joined, most), axis=2 if case == "another axis" else -1)
    start, end = {"before": (1, 2**31), "another cut": (1, 2**31)}.get(case, (0, -columns))
    cut = b.slice(weights, np.array([start]), np.array([end]), np.array([3]))
    return b, b.merged(b.matmul(cut, v))


@pytest.mark.parametrize("case", ["behind", "before"])
@pytest.mark.parametrize("mask", [None, added, causal], ids=["none", "added", "causal"])
@pytest.mark.parametrize("groups", [2, 6])
def test_a_sink_takes_its_share_of_the_softmax(groups, mask, case):
    b, attended = sunk(groups, mask or (lambda _, scores: scores), case)
    result = same(b.model(attended), b.feeds)
    assert result.counts == {"sink_attention": 1}
    (found,) = [node for node in result.model.graph.node if node.op_type == GROUPED]
    (sinks,) = [tensor for tensor in result.model.graph.initializer if tensor.name == found.input[11]]
    np.testing.assert_array_equal(numpy_helper.to_array(sinks), SINKS)


@pytest.mark.parametrize("case", ["two columns", "another axis", "another cut", "the maximum of scores"])
def test_what_is_no_sink(case):
    """Less the maximum of the scores alone it would be equal, but may overflow."""
    b, attended = sunk(case=case)
    assert same(b.model(attended), b.feeds).counts == {}


def test_a_runtime_whose_operator_is_always_causal_is_given_causal_ones_only(monkeypatch):
    from fusion.registry import Schema

    takes = Schema.takes
    monkeypatch.setattr(Schema, "takes", lambda self, name: name != "causal" and takes(self, name))
    for mask, operator in ((causal, GROUPED), (added, "MultiHeadAttention")):
        b, attended = grouped(mask=mask)
        result = fusion.optimize(b.model(attended))
        assert operators(result.model)[operator] == 1
