"""Keys and values of earlier tokens: the fused node appends to them, and what it gives is what Concat gave."""

from __future__ import annotations

import numpy as np
import pytest
from building import FLOAT, numbers, operators, run
from test_attention import PRIMES, SMALLEST, Attention, Sizes, same, softmax

P = 4
"""Tokens of the past."""


class Cached(Attention):
    """An attention over what its past_k and past_v (B, G, P, D) and new tokens x (B, S, C) give."""

    def __init__(
        self, sizes: Sizes = PRIMES, *, groups: int | None = None, opset: int = 17, past: int = P, dynamic: bool = True
    ) -> None:
        super().__init__(sizes, opset=opset, dynamic=dynamic)
        self.groups = groups or sizes.H
        shape = [sizes.B, self.groups, past]
        self.pasts = [
            self.feed(name, numbers(*shape, size, seed=seed), [self.batch, self.groups, "P", size])
            for name, size, seed in (("past_k", sizes.D, 21), ("past_v", sizes.E, 22))
        ]
        self.q = self.heads(self.projection("x", sizes.hidden), sizes.D)
        self.caches = [
            self.concat(past, self.new(size), axis=2, output=name)
            for past, size, name in zip(self.pasts, (sizes.D, sizes.E), ("all_k", "all_v"), strict=True)
        ]

    def new(self, size: int) -> str:
        made = self.projection("x", self.groups * size)
        return self.transpose(self.reshape(made, [0, -1, self.groups, size]), perm=[0, 2, 1, 3])

    def repeated(self, cache: str, size: int) -> str:
        if self.groups == self.sizes.H:
            return cache
        often = self.sizes.H // self.groups
        wide = self.expand(self.unsqueeze(cache, [2]), np.array([1, 1, often, 1, 1]))
        return self.reshape(wide, [0, self.sizes.H, -1, size])

    def attended(self, mask=lambda b, scores: scores) -> str:
        k, v = (self.repeated(c, d) for c, d in zip(self.caches, (self.sizes.D, self.sizes.E), strict=True))
        return self.whole(self.q, self.transpose(k, perm=[0, 1, 3, 2]), v, mask=mask, scale=0.4)


def node(model, op: str = "MultiHeadAttention"):
    (found,) = [node for node in model.graph.node if node.op_type == op]
    return found


def attributes(model, op: str) -> dict[str, int]:
    return {attribute.name: attribute.i for attribute in node(model, op).attribute}


@pytest.mark.parametrize("past", [0, 1, P])
@pytest.mark.parametrize(("tokens", "dynamic"), [(1, True), (5, True), (1, False)])
def test_the_fused_node_appends_by_itself(past, tokens, dynamic):
    b = Cached(Sizes(S=tokens), past=past, dynamic=dynamic)
    model = b.model(b.attended(), *b.caches)
    result = same(model, b.feeds)
    assert result.counts == {"multi_head_attention": 1}
    found = operators(result.model)
    assert "Concat" not in found
    assert "Transpose" not in found
    assert list(node(result.model).output)[1:] == ["all_k", "all_v"]
    assert list(node(result.model).input)[6:] == ["past_k", "past_v"]

    s = b.sizes
    weights = [numbers(s.C, s.hidden, seed=11 + 2 * i, scale=0.5) for i in range(3)]
    biases = [numbers(s.hidden, seed=12 + 2 * i, scale=0.5) for i in range(3)]
    x = b.feeds["x"].astype(np.float64)
    q, k, v = ((x @ w + c).reshape(s.B, tokens, s.H, -1).swapaxes(1, 2) for w, c in zip(weights, biases, strict=True))
    keys, values = (np.concatenate(pair, 2) for pair in ((b.feeds["past_k"], k), (b.feeds["past_v"], v)))
    expected = softmax(q @ keys.swapaxes(-1, -2) * 0.4) @ values
    got, *caches = run(result.model, b.feeds).values()
    np.testing.assert_allclose(got, expected.swapaxes(1, 2).reshape(s.B, tokens, -1), rtol=1e-3, atol=1e-4)
    for cache, whole in zip(caches, (keys, values), strict=True):
        np.testing.assert_allclose(cache, whole, rtol=1e-4, atol=1e-5)


def later_keys_hidden(b: Cached, scores: str) -> str:
    """j <= i + past, of past + S keys."""
    past, tokens = (b.node("Gather", b.shape(x), np.array(axis), axis=0) for x, axis in (("past_k", 2), ("x", 1)))
    total = b.add(past, tokens)
    columns = b.node("Range", np.array(0), total, np.array(1))
    rows = b.add(b.node("Range", np.array(0), tokens, np.array(1)), past)
    return b.where(b.node("LessOrEqual", columns, b.unsqueeze(rows, [1])), scores, SMALLEST)


@pytest.mark.parametrize("past", [0, P])
def test_a_causal_mask_begins_behind_the_past(past):
    b = Cached(past=past)
    result = same(b.model(b.attended(later_keys_hidden), *b.caches), b.feeds)
    assert attributes(result.model, "MultiHeadAttention")["unidirectional"] == 1
    assert not node(result.model).input[5]
    assert node(result.model).input[6]


@pytest.mark.parametrize("target", ["ort-cpu", "onnx"])
def test_the_standard_operator_takes_a_cache_and_a_causal_mask(target):
    b = Cached(opset=23)
    result = same(b.model(b.attended(later_keys_hidden), *b.caches), b.feeds, target=target)
    assert attributes(result.model, "Attention")["is_causal"] == 1
    assert list(node(result.model, "Attention").input)[3:] == ["", "past_k", "past_v"]


def test_a_mask_of_all_keys_is_added():
    b = Cached()
    mask = b.feed("mask", numbers(2, 1, 5, P + 5, seed=8), ["B", 1, "S", "all"])
    result = same(b.model(b.attended(lambda b, scores: b.add(scores, mask)), *b.caches), b.feeds)
    assert list(node(result.model).input)[6:] == ["past_k", "past_v"]


@pytest.mark.parametrize(("groups", "E"), [(3, 4), (1, 7), (1, 4)])
def test_shared_or_unequal_heads_are_for_the_standard_operator(groups, E):
    """MultiHeadAttention refuses a cache of unequal heads; then Concat stays. Shared ones are its heads."""
    b = Cached(Sizes(E=E), groups=groups, opset=23)
    result = same(b.model(b.attended(), *b.caches), b.feeds, target="onnx")
    assert attributes(result.model, "Attention")["kv_num_heads"] == groups
    assert "Concat" not in operators(result.model)

    b = Cached(Sizes(E=E), groups=groups)
    result = same(b.model(b.attended(), *b.caches), b.feeds)
    assert [name for name in b.caches if name in node(result.model).output] == (b.caches if E == 7 else [])


@pytest.mark.parametrize(
    "case", ["a cache that nobody reads", "one of two", "keys alone", "three parts", "another past", "one for both"]
)
def test_what_stays(case):
    b = Cached()
    outputs = b.caches
    if case == "a cache that nobody reads":
        outputs = []
    elif case == "one of two":
        outputs = b.caches[:1]
    elif case == "keys alone":
        b.caches[1] = b.feed("v", numbers(2, 3, P + 5, 7, seed=9), ["B", 3, "T", 7])
        outputs = b.caches[:1]
    elif case == "three parts":
        outputs = b.caches = [b.concat(past, past, b.new(7), axis=2) for past in b.pasts]
    elif case == "another past":  # of as many values in all: one new key more, and one new value less
        more = b.feed("more", numbers(2, 3, P + 1, 7, seed=9), ["B", 3, "P_v", 7])
        b.caches[1] = b.concat(more, b.slice(b.new(7), np.array([1]), np.array([99]), np.array([2])), axis=2)
        outputs = b.caches
    else:
        b.caches[1] = b.caches[0]
        outputs = b.caches[:1]
    result = same(b.model(b.attended(), *outputs), b.feeds)
    assert operators(result.model)["MultiHeadAttention"] == 1
    assert len(node(result.model).input) <= 6


def test_a_cache_in_other_axes_stays():
    """(B, P, H, D), as exporters of other frameworks keep it."""
    b = Cached()
    s = b.sizes
    caches = []
    for name, seed in (("other_k", 31), ("other_v", 32)):
        past = b.feed(name, numbers(2, P, s.H, s.D, seed=seed), ["B", "P", s.H, s.D])
        caches.append(b.concat(past, b.reshape(b.projection("x", s.hidden), [0, -1, s.H, s.D]), axis=1))
    b.caches = [b.transpose(cache, perm=[0, 2, 1, 3]) for cache in caches]
    result = same(b.model(b.attended(), *caches), b.feeds)
    assert operators(result.model)["MultiHeadAttention"] == 1
    assert len(node(result.model).input) <= 6


@pytest.mark.parametrize("past", [0, P])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_mask_made_of_the_size_of_the_cache_reads_it_off_the_past_and_the_new_tokens(transposed, past):
    b = Cached(past=past)
    keys = b.transpose("all_k", perm=[0, 1, 3, 2])

    def mask(b, scores):
        sizes, axis = (b.shape(keys), 3) if transposed else (b.shape("all_k"), 2)
        total = b.node("Gather", sizes, np.array(axis), axis=0)
        return b.add(scores, b.cast(b.node("Range", np.array(0), total, np.array(1)), to=FLOAT))

    result = same(b.model(b.whole(b.q, keys, "all_v", mask=mask, scale=0.4), *b.caches), b.feeds)
    assert list(node(result.model).input)[6:] == ["past_k", "past_v"]
    asked = {name for made in result.model.graph.node if made.op_type == "Shape" for name in made.input}
    assert asked.isdisjoint([keys, "all_k"])

    attended = b.attended(lambda b, scores: b.add(scores, np.arange(past + 5, dtype=np.float32)))
    expected = run(b.model(attended, *b.caches), b.feeds)[attended]
    np.testing.assert_allclose(run(result.model, b.feeds)[result.matches[0].root], expected, rtol=1e-4, atol=1e-5)


def test_a_mask_made_of_the_numbers_of_the_cache_needs_it_before():
    b = Cached()

    def mask(b, scores):
        return b.add(scores, b.transpose(b.sum("all_k"), perm=[0, 1, 3, 2]))

    result = same(b.model(b.attended(mask), *b.caches), b.feeds)
    assert operators(result.model)["MultiHeadAttention"] == 1
    assert len(node(result.model).input) <= 6


def test_sizes_that_only_the_region_asked_for_go_with_it():
    """Keys are flattened and transposed by their own shape, as some exporters do."""
    b = Cached()
    shape = b.shape("all_k")
    flat = b.node("Reshape", "all_k", b.concat(np.array([-1]), b.slice(shape, np.array([2]), np.array([4])), axis=0))
    turned = b.concat(*(b.slice(shape, np.array([i]), np.array([i + 1])) for i in (0, 1, 3, 2)), axis=0)
    keys = b.node("Reshape", b.transpose(flat, perm=[0, 2, 1]), turned)
    result = same(b.model(b.whole(b.q, keys, "all_v"), *b.caches), b.feeds)
    assert list(node(result.model).input)[6:] == ["past_k", "past_v"]
    assert not {"Shape", "Gather", "Concat"} & set(operators(result.model))


@pytest.mark.parametrize("early", [False, True])
def test_who_reads_a_cache_reads_it_from_the_fused_node(early):
    """Also where the reader stands before the attention."""
    b = Cached()
    reader = b.relu("all_k") if early else None
    attended = b.attended()
    reader = reader or b.relu("all_k")
    result = same(b.model(attended, reader, "all_v"), b.feeds)
    assert list(node(result.model).output)[1:] == ["all_k", "all_v"]


def test_keys_transposed_for_others_too_are_read_from_the_fused_node():
    b = Cached()
    keys = b.transpose("all_k", perm=[0, 1, 3, 2])
    result = same(b.model(b.whole(b.q, keys, "all_v"), keys, *b.caches), b.feeds)
    assert list(node(result.model).output)[1:] == ["all_k", "all_v"]
    assert operators(result.model)["Transpose"] == 1


def test_a_result_in_other_axes_leaves_the_cache_as_it_is():
    b = Cached()
    scores = b.mul(b.matmul(b.q, b.transpose("all_k", perm=[0, 1, 3, 2])), 0.4)
    product = b.matmul(b.softmax(scores, axis=-1), "all_v")
    result = same(b.model(b.transpose(product, perm=[2, 0, 1, 3]), *b.caches), b.feeds)
    assert list(node(result.model).output)[1:] == ["all_k", "all_v"]


def test_two_attentions_over_one_cache():
    """The first one writes it, the second one reads what was written."""
    b = Cached()
    first, second = b.attended(), b.attended()
    result = same(b.model(first, second, *b.caches), b.feeds)
    assert operators(result.model)["MultiHeadAttention"] == 2


def test_both_sides_run_on_the_same_past():
    b = Cached()
    result = same(b.model(b.attended(later_keys_hidden), *b.caches), b.feeds, check=True)
    assert [match.checked for match in result.matches] == [True]
    assert list(node(result.model).input)[6:] == ["past_k", "past_v"]


def test_no_cache_for_cuda():
    """Nothing was run there; Concat stays."""
    b = Cached()
    result = same(b.model(b.attended(), *b.caches), b.feeds, target="ort-cuda")
    assert len(node(result.model).input) <= 6
