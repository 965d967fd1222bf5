"""Attention: hand-built graphs of every form and trap, run before and after; what is fused computes the same."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import building
import numpy as np
import pytest
from building import BOOL, DOUBLE, FLOAT, FLOATS, HALF, INT64, Build, misses, numbers, operators, run

from fusion.api import library

# What takes in a scale or a transposition where no attention could be written is another matter.
same = partial(building.same, patterns=[pattern for pattern in library().values() if not pattern.is_last])
FUSED = {"self_attention": 1}
ANY = ({"self_attention": 1}, {"multi_head_attention": 1}, {"sdpa": 1}, {})
SMALLEST = float(np.finfo(np.float32).min)


@dataclass(frozen=True)
class Sizes:
    """Batch, queries, keys, heads, head size of q and k, head size of v, width of the input."""

    B: int = 2
    S: int = 5
    T: int = 5
    H: int = 3
    D: int = 7
    E: int = 7
    C: int = 11

    @property
    def hidden(self) -> int:
        return self.H * self.D


PRIMES = Sizes()
SQUARE = Sizes(4, 4, 4, 4, 4, 4, 16)
CROSS = Sizes(T=13)


class Attention(Build):
    """A graph with inputs x (B, S, C) and y (B, T, C), and its attention, step by step."""

    def __init__(self, sizes: Sizes = PRIMES, opset: int = 17, dtype: int = FLOAT, dynamic: bool = True) -> None:
        super().__init__(opset, dtype)
        self.sizes = sizes
        self.batch, self.length = ("B", "S") if dynamic else (sizes.B, sizes.S)
        self.input("x", [self.batch, self.length, sizes.C])
        self.feeds = {"x": numbers(sizes.B, sizes.S, sizes.C, seed=1, dtype=dtype)}
        self.seed = 10

    def feed(self, name: str, array, shape, dtype: int | None = None) -> str:
        self.feeds[name] = array
        return self.input(name, shape, dtype)

    def weight(self, *shape: int) -> np.ndarray:
        self.seed += 1
        return numbers(*shape, seed=self.seed, dtype=self.dtype, scale=0.5)

    def projection(self, x: str, width: int, bias: bool = True) -> str:
        made = self.matmul(x, self.weight(self.sizes.C, width))
        return self.add(made, self.weight(width)) if bias else made

    def heads(self, x: str, size: int, perm=(0, 2, 1, 3)) -> str:
        """(B, S, H D) as (B, H, S, D)."""
        return self.transpose(self.reshape(x, [0, -1, self.sizes.H, size]), perm=list(perm))

    def qkv(self, biases: str = "qkv", key_perm=(0, 2, 3, 1)):
        """q, kᵀ and v by head, of one input."""
        hidden, wide = self.sizes.hidden, self.sizes.H * self.sizes.E
        q = self.heads(self.projection("x", hidden, "q" in biases), self.sizes.D)
        k = self.heads(self.projection("x", hidden, "k" in biases), self.sizes.D, key_perm)
        v = self.heads(self.projection("x", wide, "v" in biases), self.sizes.E)
        return q, k, v

    def merged(self, attended: str) -> str:
        """(B, H, S, E) as (B, S, H E)."""
        return self.reshape(self.transpose(attended, perm=[0, 2, 1, 3]), [0, -1, self.sizes.H * self.sizes.E])

    def whole(self, q: str, k: str, v: str, mask=lambda b, scores: scores, scale=None) -> str:
        scores = self.mul(self.matmul(q, k), self.sizes.D**-0.5 if scale is None else scale)
        return self.merged(self.matmul(self.softmax(mask(self, scores), axis=-1), v))


def softmax(scores: np.ndarray) -> np.ndarray:
    shifted = np.exp(scores - scores.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def keep_mask(b: Attention, whole_row: bool) -> str:
    """A boolean (B, 1, S, S): holes, left padding, and, if asked, a row that is masked everywhere."""
    s = b.sizes
    keep = np.random.default_rng(5).random((s.B, 1, s.S, s.S)) > 0.4
    keep[..., 0] |= ~keep.any(-1)
    keep[0, 0, :, :2], keep[0, 0, :, 2] = False, True
    if whole_row:
        keep[0, 0, 1] = False
    return b.feed("keep", keep, ["B", 1, "S", "S"], BOOL)


# The plain form ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [PRIMES, SQUARE], ids=["primes", "square"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_self_attention_is_one_node_that_computes_the_formula(sizes, dynamic):
    b = Attention(sizes, dynamic=dynamic)
    model = b.model(b.whole(*b.qkv()))
    result = same(model, b.feeds)
    assert result.counts == FUSED
    assert operators(result.model) == {"Attention": 1}
    (node,) = result.model.graph.node
    attributes = {attribute.name: attribute for attribute in node.attribute}
    assert attributes["num_heads"].i == sizes.H
    assert attributes["scale"].f == pytest.approx(sizes.D**-0.5)

    wq, bq, wk, bk, wv, bv = (numbers(*shape, seed=11 + i, scale=0.5) for i, shape in enumerate(shapes(sizes)))
    x = b.feeds["x"].astype(np.float64)
    split = (sizes.B, sizes.S, sizes.H, sizes.D)
    q, k, v = ((x @ w + c).reshape(split).swapaxes(1, 2) for w, c in ((wq, bq), (wk, bk), (wv, bv)))
    expected = softmax(q @ k.swapaxes(-1, -2) * sizes.D**-0.5) @ v
    expected = expected.swapaxes(1, 2).reshape(sizes.B, sizes.S, sizes.hidden)
    (got,) = run(result.model, b.feeds).values()
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


def shapes(sizes: Sizes):
    return [(sizes.C, sizes.hidden), (sizes.hidden,)] * 3


@pytest.mark.parametrize("biases", ["", "q", "qv", "kv", "qkv"])
def test_projections_with_and_without_bias(biases):
    b = Attention()
    result = same(b.model(b.whole(*b.qkv(biases))), b.feeds)
    assert result.counts == FUSED
    assert operators(result.model) == {"Attention": 1}


def test_values_of_another_head_size():
    b = Attention(Sizes(E=2))
    result = same(b.model(b.whole(*b.qkv())), b.feeds)
    assert result.counts == FUSED
    (node,) = result.model.graph.node
    (sizes,) = [list(attribute.ints) for attribute in node.attribute if attribute.name == "qkv_hidden_sizes"]
    assert sizes == [21, 21, 6]


@pytest.mark.parametrize("trans", [0, 1])
def test_projections_by_gemm(trans):
    b = Attention(dynamic=False)
    s = b.sizes
    flat = b.reshape("x", [-1, s.C])

    def projected():
        shape = (s.hidden, s.C) if trans else (s.C, s.hidden)
        made = b.gemm(flat, b.weight(*shape), b.weight(s.hidden), transB=trans)
        return b.reshape(made, [s.B, s.S, s.H, s.D])

    q, k, v = (b.transpose(projected(), perm=perm) for perm in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]))
    result = same(b.model(b.whole(q, k, v)), b.feeds)
    assert result.counts in (FUSED, {"multi_head_attention": 1})


def test_keys_transposed_in_two_steps():
    b = Attention()
    q, k, v = b.qkv(key_perm=(0, 2, 1, 3))
    result = same(b.model(b.whole(q, b.transpose(k, perm=[0, 1, 3, 2]), v)), b.feeds)
    assert result.counts == FUSED


def test_batch_and_heads_in_one_axis():
    b = Attention(dynamic=False)
    s = b.sizes

    def flat(perm, dims):
        made = b.transpose(b.reshape(b.projection("x", s.hidden), [s.B, s.S, s.H, s.D]), perm=perm)
        return b.reshape(made, dims)

    q, v = (flat([0, 2, 1, 3], [s.B * s.H, s.S, s.D]) for _ in range(2))
    k = flat([0, 2, 3, 1], [s.B * s.H, s.D, s.S])
    attended = b.matmul(b.softmax(b.mul(b.matmul(q, k), s.D**-0.5), axis=-1), v)
    result = same(b.model(b.merged(b.reshape(attended, [s.B, s.H, s.S, s.D]))), b.feeds)
    assert result.counts == FUSED


@pytest.mark.parametrize("sizes", [CROSS, Sizes(4, 4, 4, 4, 4, 4, 16)], ids=["primes", "square"])
def test_cross_attention_is_no_self_attention(sizes):
    b = Attention(sizes)
    s = b.sizes
    b.feed("y", numbers(s.B, s.T, s.C, seed=2), ["B", "T", s.C])
    q = b.heads(b.projection("x", s.hidden), s.D)
    k = b.heads(b.projection("y", s.hidden), s.D, (0, 2, 3, 1))
    v = b.heads(b.projection("y", s.hidden), s.D)
    result = same(b.model(b.whole(q, k, v)), b.feeds)
    assert result.counts == {"multi_head_attention": 1}


def test_keys_of_one_input_and_values_of_another_are_no_self_attention():
    b = Attention(SQUARE)
    s = b.sizes
    b.feed("y", numbers(s.B, s.T, s.C, seed=2), ["B", "S", s.C])
    q, k = b.heads(b.projection("x", s.hidden), s.D), b.heads(b.projection("x", s.hidden), s.D, (0, 2, 3, 1))
    v = b.heads(b.projection("y", s.hidden), s.D)
    assert "self_attention" not in same(b.model(b.whole(q, k, v)), b.feeds).counts


# Rearrangements that look right -----------------------------------------------------------------------------------


@pytest.mark.parametrize("perm", [(0, 3, 2, 1), (0, 2, 1, 3), (2, 1, 3, 0), (1, 2, 3, 0), (0, 1, 3, 2), (0, 3, 1, 2)])
def test_keys_that_reach_the_product_in_other_axes(perm):
    """All sizes are 4, so that every permutation runs."""
    b = Attention(SQUARE, dynamic=False)
    q, k, v = b.qkv(key_perm=perm)
    assert "self_attention" not in same(b.model(b.whole(q, k, v)), b.feeds).counts


@pytest.mark.parametrize("perm", [(0, 1, 2, 3), (0, 2, 3, 1), (0, 3, 2, 1), (2, 0, 1, 3), (1, 2, 0, 3)])
@pytest.mark.parametrize("which", ["q", "v", "out"])
def test_queries_values_or_the_result_in_other_axes(perm, which):
    b = Attention(SQUARE, dynamic=False)
    s = b.sizes
    perms = {"q": (0, 2, 1, 3), "v": (0, 2, 1, 3), "out": (0, 2, 1, 3), which: perm}
    q = b.heads(b.projection("x", s.hidden), s.D, perms["q"])
    k = b.heads(b.projection("x", s.hidden), s.D, (0, 2, 3, 1))
    v = b.heads(b.projection("x", s.hidden), s.D, perms["v"])
    attended = b.matmul(b.softmax(b.mul(b.matmul(q, k), 0.5), axis=-1), v)
    merged = b.reshape(b.transpose(attended, perm=list(perms["out"])), [4, 4, 16])
    counts = same(b.model(merged), b.feeds).counts
    if which == "out":  # the result of the fused node is rearranged
        assert counts == FUSED
    else:
        assert "self_attention" not in counts


@pytest.mark.parametrize("split", ["(D H)", "(H D)"])
def test_heads_that_lie_inside_out(split):
    b = Attention(SQUARE, dynamic=False)
    s = b.sizes

    def heads(perm):
        made = b.reshape(b.projection("x", s.hidden), [4, 4, 4, 4])
        turned = b.transpose(made, perm=[0, 1, 3, 2]) if split == "(D H)" else made
        return b.transpose(turned, perm=perm)

    q, k, v = heads([0, 2, 1, 3]), heads([0, 2, 3, 1]), heads([0, 2, 1, 3])
    counts = same(b.model(b.whole(q, k, v)), b.feeds).counts
    assert (counts == FUSED) == (split == "(H D)")


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -2])
def test_a_softmax_over_another_axis_is_no_attention(axis):
    b = Attention(SQUARE, dynamic=False)
    q, k, v = b.qkv()
    probabilities = b.softmax(b.mul(b.matmul(q, k), 0.5), axis=axis)
    counts = same(b.model(b.merged(b.matmul(probabilities, v))), b.feeds).counts
    assert (counts == FUSED) == (axis in (3, -1))


@pytest.mark.parametrize("axis", [1, 2, 3, None])
def test_below_opset_13_a_softmax_flattens_from_its_axis_on(axis):
    b = Attention(SQUARE, opset=11, dynamic=False)
    q, k, v = b.qkv()
    given = {} if axis is None else {"axis": axis}
    probabilities = b.softmax(b.mul(b.matmul(q, k), 0.5), **given)
    counts = same(b.model(b.merged(b.matmul(probabilities, v))), b.feeds).counts
    assert (counts == FUSED) == (axis == 3)


@pytest.mark.parametrize("opset", [11, 17])
def test_scores_of_keys_by_queries(opset):
    """The softmax runs over an axis in the middle, which is that axis alone from opset 13 on."""
    b = Attention(opset=opset)
    s = b.sizes
    q = b.heads(b.projection("x", s.hidden), s.D, (0, 2, 3, 1))
    k, v = (b.heads(b.projection("x", s.hidden), s.D) for _ in range(2))
    probabilities = b.softmax(b.mul(b.matmul(k, q), 0.4), axis=2)
    attended = b.matmul(b.transpose(probabilities, perm=[0, 1, 3, 2]), v)
    assert same(b.model(b.merged(attended)), b.feeds).counts == (FUSED if opset == 17 else {})


def test_probabilities_times_values_the_wrong_way_round():
    b = Attention(SQUARE, dynamic=False)
    q, k, v = b.qkv()
    probabilities = b.softmax(b.mul(b.matmul(q, k), 0.5), axis=-1)
    assert same(b.model(b.merged(b.matmul(v, probabilities))), b.feeds).counts in ANY[1:]


# Scale ------------------------------------------------------------------------------------------------------------

SCALES = {
    "before, on q": lambda b, q, k: b.matmul(b.mul(q, 0.3), k),
    "before, on k": lambda b, q, k: b.matmul(q, b.div(k, 4.0)),
    "square root on both": lambda b, q, k: b.matmul(b.mul(q, 0.25**0.5), b.mul(k, 0.25**0.5)),
    "before and after": lambda b, q, k: b.div(b.matmul(b.mul(q, 0.5), k), 2.0),
    "divided by a computed root": lambda b, q, k: b.div(b.matmul(q, k), b.sqrt(7.0)),
    "number first": lambda b, q, k: b.mul(0.2, b.matmul(q, k)),
    "no scale": lambda b, q, k: b.matmul(q, k),
    "negative": lambda b, q, k: b.mul(b.matmul(q, k), -0.3),
    "zero": lambda b, q, k: b.mul(b.matmul(q, k), 0.0),
}


@pytest.mark.parametrize("case", SCALES)
def test_the_scale_may_stand_anywhere(case):
    b = Attention()
    q, k, v = b.qkv()
    result = same(b.model(b.merged(b.matmul(b.softmax(SCALES[case](b, q, k), axis=-1), v))), b.feeds)
    if case == "zero":
        assert result.counts == {}  # the kernels read 0 as "no scale given"
    elif case != "negative":
        assert result.counts == FUSED


@pytest.mark.parametrize("shape", [(7,), (5, 7), (3, 1, 1), (2, 1, 1, 1)])
def test_a_scale_along_an_axis_is_no_number(shape):
    b = Attention(dynamic=False)
    q, k, v = b.qkv()
    scaled = b.mul(q, np.linspace(0.1, 1.0, int(np.prod(shape)), dtype=np.float32).reshape(shape))
    assert "self_attention" not in same(b.model(b.whole(scaled, k, v)), b.feeds).counts


# What else reads inside -------------------------------------------------------------------------------------------


def test_probabilities_that_are_an_output_are_kept_and_said():
    b = Attention()
    q, k, v = b.qkv()
    probabilities = b.softmax(b.mul(b.matmul(q, k), 0.4), axis=-1)
    result = same(b.model(b.merged(b.matmul(probabilities, v)), probabilities), b.feeds)
    assert result.counts == {}
    reasons = misses(result, "self_attention") + misses(result, "multi_head_attention")
    assert ("privacy", f"{probabilities} inside the region is a graph output") in reasons


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_a_projection_that_is_read_elsewhere_too(which):
    b = Attention()
    q, k, v = b.qkv()
    side = b.relu({"q": q, "k": k, "v": v}[which])
    assert same(b.model(b.whole(q, k, v), side), b.feeds).counts in ({"multi_head_attention": 1}, FUSED, {})


@pytest.mark.parametrize("opset", [12, 17])
@pytest.mark.parametrize("heads", ["by head", "in the batch"])
def test_a_bias_made_of_the_sizes_of_the_scores_reads_them_off_the_input(opset, heads):
    b = Attention(opset=opset)
    s = b.sizes
    q, k, v = b.qkv(biases="")
    if heads == "in the batch":
        q, v, k = b.reshape(q, [-1, s.S, 7]), b.reshape(v, [-1, s.S, 7]), b.reshape(k, [-1, 7, s.S])

    def nearer(b, scores):
        sizes = b.shape(scores)
        total = b.gather(sizes, np.array(-1), axis=0)
        columns = b.node("Range", np.array(0), total, np.array(1))
        return b.add(scores, b.expand(b.mul(b.cast(columns, to=FLOAT), 0.25), sizes))

    attended = b.matmul(b.softmax(nearer(b, b.mul(b.matmul(q, k), 0.4)), axis=-1), v)
    attended = attended if heads == "by head" else b.reshape(attended, [-1, s.H, s.S, 7])
    result = same(b.model(b.merged(attended)), b.feeds)
    assert sum(result.counts.values()) == 1
    assert "Softmax" not in operators(result.model)

    x = b.feeds["x"].astype(np.float64)
    split = (s.B, s.S, s.H, s.D)
    projected = (x @ numbers(s.C, s.hidden, seed=11 + i, scale=0.5) for i in range(3))
    q, k, v = (made.reshape(split).swapaxes(1, 2) for made in projected)
    expected = softmax(q @ k.swapaxes(-1, -2) * 0.4 + 0.25 * np.arange(s.S)) @ v
    (got,) = run(result.model, b.feeds).values()
    np.testing.assert_allclose(got, expected.swapaxes(1, 2).reshape(s.B, s.S, -1), rtol=1e-3, atol=1e-4)


def test_a_bias_made_of_the_scores_themselves_keeps_them():
    b = Attention()
    result = same(b.model(b.whole(*b.qkv(), mask=lambda b, scores: b.add(scores, b.max_over(scores)))), b.feeds)
    assert result.counts == {}


def test_two_attentions_of_one_input_do_not_mix():
    b = Attention()
    first, second = b.qkv(), b.qkv()
    outputs = b.whole(*first), b.whole(first[0], second[1], second[2])
    same(b.model(*outputs), b.feeds)


def test_an_attention_that_reads_the_heads_of_another_one():
    """The first rewrite removes the value that the second match has bound."""
    b = Attention(Sizes(C=21))
    first = b.whole(*b.qkv())
    second = b.whole(b.heads(first, 7), b.heads(first, 7, (0, 2, 3, 1)), b.heads(first, 7))
    result = same(b.model(second), b.feeds)
    assert result.counts == {"self_attention": 1, "multi_head_attention": 1}
    assert operators(result.model) == {"Attention": 1, "MultiHeadAttention": 1}


def test_a_mask_shared_by_two_layers_is_prepared_once():
    b = Attention(Sizes(C=21))
    keep = keep_mask(b, False)

    def mask(b, scores):
        return b.where(keep, scores, SMALLEST)

    first = b.whole(*b.qkv(), mask=mask)
    hidden = {}
    for name in ("q", "k", "v"):
        perm = (0, 2, 3, 1) if name == "k" else (0, 2, 1, 3)
        hidden[name] = b.heads(b.add(b.matmul(first, b.weight(21, 21)), b.weight(21)), 7, perm)
    result = same(b.model(b.whole(hidden["q"], hidden["k"], hidden["v"], mask=mask)), b.feeds)
    assert result.counts == {"self_attention": 2}
    assert operators(result.model)["Where"] == 1


# Grouped and single keys ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2])
def test_keys_shared_by_several_heads(groups):
    b = Attention(Sizes(B=2, S=5, T=5, H=4, D=3, E=3), dynamic=False)
    s = b.sizes
    q = b.heads(b.projection("x", 12), 3)

    def repeated(perm):
        made = b.reshape(b.projection("x", groups * 3), [2, 5, groups, 1, 3])
        wide = b.expand(made, np.array([2, 5, groups, s.H // groups, 3]))
        return b.transpose(b.reshape(wide, [2, 5, 4, 3]), perm=perm)

    assert same(b.model(b.whole(q, repeated([0, 2, 3, 1]), repeated([0, 2, 1, 3]))), b.feeds).counts in ANY


# Element types and opsets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [11, 13, 17, 18, 20, 23])
def test_every_opset(opset):
    b = Attention(opset=opset)
    assert same(b.model(b.whole(*b.qkv())), b.feeds).counts == FUSED


def test_doubles_have_no_kernel_and_that_is_said():
    b = Attention(dtype=DOUBLE)
    result = same(b.model(b.whole(*b.qkv())), b.feeds)
    assert result.counts == {}
    reasons = misses(result, "self_attention") + misses(result, "multi_head_attention")
    assert any(kind == "kernel" and "double" in text for kind, text in reasons)


def test_halves_are_fused_where_they_run_and_left_alone_elsewhere():
    b = Attention(dtype=HALF)
    b.feeds = {name: array.astype(FLOATS[HALF]) for name, array in b.feeds.items()}
    same(b.model(b.whole(*b.qkv())), b.feeds, tolerance=2e-2)


def test_shapes_that_are_computed():
    """The target of the split as an exporter with dynamic axes writes it."""
    b = Attention()
    s = b.sizes
    shape = b.shape("x")
    parts = [b.unsqueeze(b.gather(shape, np.array(axis), axis=0), [0]) for axis in (0, 1)]
    split = b.concat(*parts, np.array([s.H]), np.array([s.D]), axis=0)
    merge = b.concat(*parts, np.array([s.hidden]), axis=0)

    def heads(perm):
        return b.transpose(b.node("Reshape", b.projection("x", s.hidden), split), perm=perm)

    q, k, v = heads([0, 2, 1, 3]), heads([0, 2, 3, 1]), heads([0, 2, 1, 3])
    attended = b.matmul(b.softmax(b.mul(b.matmul(q, k), 0.4), axis=-1), v)
    merged = b.node("Reshape", b.transpose(attended, perm=[0, 2, 1, 3]), merge)
    result = same(b.model(merged, (shape, INT64, [3])), b.feeds)
    assert result.counts == FUSED
    assert operators(result.model) == {"Shape": 1, "Attention": 1}


@pytest.mark.parametrize("source", ["softmax", "root"])
def test_what_reads_a_guarded_value_reads_the_guard(source):
    """A NaN guard belongs to the softmax before it; what computes with its result must not see NaN again."""
    b = Attention(dynamic=False)
    q, k, _ = b.qkv()
    scores = b.add(b.mul(b.matmul(q, k), 0.4), b.where(keep_mask(b, True), 0.0, -np.inf))
    value = b.softmax(scores, axis=-1) if source == "softmax" else b.sqrt(scores)
    guarded = b.where(b.isnan(value), 0.0, value)
    normed = b.div(guarded, b.sqrt(b.add(b.mean(b.mul(guarded, guarded)), 1e-5)))
    model = b.model(b.mul(normed, numbers(5, seed=3)))
    (expected,) = run(model, b.feeds).values()
    assert not np.isnan(expected).any()
    assert same(model, b.feeds).counts == {"rms_norm": 1}
