"""Causal masks: proved from what computes them, and written as the attribute that hides later keys."""

from __future__ import annotations

import numpy as np
import pytest
from building import BOOL, FLOAT, operators, run
from onnx import numpy_helper
from test_attention import PRIMES, SMALLEST, Attention, Sizes, same, softmax

LONG = 9
"""Positions of a stored triangle, of which a model cuts as many as it has."""


def attributes(model, op: str) -> dict[str, int]:
    """The integer attributes of the one node of an operator."""
    (node,) = [node for node in model.graph.node if node.op_type == op]
    return {attribute.name: attribute.i for attribute in node.attribute}


def biased(model) -> bool:
    """Whether a fused node reads anything but queries, keys and values, or an input, its weights and their bias."""
    (node,) = [node for node in model.graph.node if node.op_type in ("Attention", "MultiHeadAttention")]
    return any(node.input[3:])


def length(b: Attention) -> str:
    return b.node("Gather", b.shape("x"), np.array(1), axis=0)


def positions(b: Attention) -> str:
    return b.node("Range", np.array(0), length(b), np.array(1))


def axis(b: Attention, values: str, place: int) -> str:
    """Positions (S,) along axis `place` of (1, 1, S, S)."""
    return b.unsqueeze(values, [0, 1, 5 - place])


def rows_and_columns(b: Attention) -> tuple[str, str]:
    return axis(b, positions(b), 2), axis(b, positions(b), 3)


def cut(b: Attention, array: np.ndarray) -> str:
    """The first S rows and columns of a stored (1, 1, 9, 9)."""
    end = b.unsqueeze(length(b), [0])
    rows = b.slice(b.constant(array[None, None]), np.array([0]), end, np.array([2]))
    return b.slice(rows, np.array([0]), end, np.array([3]))


def square(b: Attention, value: float) -> str:
    """(S, S), all of one number."""
    size = b.unsqueeze(length(b), [0])
    return b.expand(b.number(value, (1, 1)), b.concat(size, size, axis=0))


def at_most(b: Attention) -> str:
    rows, columns = rows_and_columns(b)
    return b.node("LessOrEqual", columns, rows)


def not_after(b: Attention) -> str:
    rows, columns = rows_and_columns(b)
    return b.node("Not", b.node("Greater", columns, rows))


def below_the_next(b: Attention) -> str:
    numbers = positions(b)
    return b.node("Less", numbers, b.reshape(b.add(numbers, np.array(1)), [-1, 1]))


def counted(b: Attention) -> str:
    """Positions as exporters get them from ones: their sum so far, less one."""
    ones = b.expand(np.array([1]), b.unsqueeze(length(b), [0]))
    numbers = b.sub(b.node("CumSum", ones, np.array(0)), np.array(1))
    return b.node("GreaterOrEqual", axis(b, numbers, 2), axis(b, numbers, 3))


def numbered(b: Attention) -> str:
    """Rows and columns of positions that are counted through the whole square, as TensorFlow's band is exported."""
    ones = b.expand(np.array([1]), b.unsqueeze(b.node("Mul", length(b), length(b)), [0]))
    size = b.unsqueeze(length(b), [0])
    number = b.node("Reshape", b.node("CumSum", ones, np.array(0), exclusive=1), b.concat(size, size, axis=0))
    above = b.sub(b.node("Mod", number, size), b.div(number, size))
    return b.node("Not", b.node("Greater", above, np.array(0)))


def lower_ones(b: Attention) -> str:
    return b.cast(b.node("Trilu", square(b, 1.0), upper=0), to=BOOL)


def not_upper_ones(b: Attention) -> str:
    return b.equal(b.node("Trilu", square(b, 1.0), np.array(1), upper=1), 0.0)


def stored(b: Attention) -> str:
    return cut(b, np.tri(LONG, dtype=bool))


def stored_numbers(b: Attention) -> str:
    return b.cast(cut(b, np.tri(LONG, dtype=np.uint8)), to=BOOL)


def with_what_hides_nothing(b: Attention) -> str:
    rows, columns = rows_and_columns(b)
    everything = b.node("GreaterOrEqual", rows, np.array(0))
    return b.node("And", everything, b.node("LessOrEqual", columns, rows))


CAUSAL = [
    at_most, not_after, below_the_next, counted, numbered, lower_ones, not_upper_ones, stored, stored_numbers,
    with_what_hides_nothing,
]  # fmt: skip


def chosen(b: Attention, keep: str, scores: str, fill: float) -> str:
    return b.where(keep, scores, fill)


def added(b: Attention, keep: str, scores: str, fill: float) -> str:
    return b.add(scores, b.where(keep, 0.0, fill))


def multiplied(b: Attention, keep: str, scores: str, fill: float) -> str:
    return b.add(b.mul(b.sub(1.0, b.cast(keep, to=FLOAT)), fill), scores)


def blended(b: Attention, keep: str, scores: str, fill: float) -> str:
    """scores keep + fill (1 - keep), as GPT-2 has it."""
    kept = b.cast(keep, to=FLOAT)
    return b.sub(b.mul(scores, kept), b.mul(b.sub(1.0, kept), -fill))


def selected(b: Attention, keep: str, scores: str, fill: float) -> str:
    """The same with the mask negated, as TensorFlow's Select is exported."""
    hidden = b.mul(fill, b.cast(b.node("Not", keep), to=FLOAT))
    return b.add(b.mul(b.cast(keep, to=FLOAT), scores), hidden)


def clamped(b: Attention, keep: str, scores: str, fill: float) -> str:
    return b.max(added(b, keep, scores, fill), SMALLEST)


def attend(keep, put=chosen, fill: float = SMALLEST, *, opset: int = 17, scale: float = 0.4) -> Attention:
    b = Attention(PRIMES, opset=opset)
    b.result = b.whole(*b.qkv(), mask=lambda b, scores: put(b, keep(b), scores, fill), scale=scale)
    return b


@pytest.mark.parametrize("keep", CAUSAL, ids=lambda keep: keep.__name__)
@pytest.mark.parametrize(
    ("put", "fill"),
    [
        *((chosen, fill) for fill in (SMALLEST, -np.inf, -1e4)),
        *((added, -np.inf), (multiplied, -1e4), (clamped, -np.inf)),
        *((blended, -1e4), (selected, 0.7 * SMALLEST)),
    ],
    ids=lambda value: getattr(value, "__name__", f"{value:g}" if isinstance(value, float) else ""),
)
def test_a_causal_mask_is_an_attribute(keep, put, fill):
    b = attend(keep, put, fill)
    result = same(b.model(b.result), b.feeds)
    assert attributes(result.model, "Attention")["unidirectional"] == 1
    assert not biased(result.model)
    assert operators(result.model) == {"Attention": 1}


@pytest.mark.parametrize("fill", [-1e4, -np.inf])
def test_a_stored_triangle_is_added(fill):
    triangle = np.where(np.tri(LONG), 0.0, fill).astype(np.float32)
    b = Attention(PRIMES)
    result = same(b.model(b.whole(*b.qkv(), mask=lambda b, s: b.add(s, cut(b, triangle)))), b.feeds)
    assert attributes(result.model, "Attention")["unidirectional"] == 1
    assert operators(result.model) == {"Attention": 1}


def shifted(by: int):
    def keep(b: Attention) -> str:
        rows, columns = rows_and_columns(b)
        return b.node("LessOrEqual", columns, b.add(rows, np.array(by)))

    return keep


def later(b: Attention) -> str:
    rows, columns = rows_and_columns(b)
    return b.node("LessOrEqual", rows, columns)


def one_more(b: Attention) -> str:
    triangle = np.tri(LONG, dtype=bool)
    triangle[1, 3] = True
    return cut(b, triangle)


def window(b: Attention) -> str:
    rows, columns = rows_and_columns(b)
    near = b.node("Greater", columns, b.sub(rows, np.array(3)))
    return b.node("And", near, b.node("LessOrEqual", columns, rows))


def both(op: str, by: int):
    """Two lines: a triangle and a larger or a smaller one."""
    return lambda b: b.node(op, at_most(b), shifted(by)(b))


def padded(b: Attention) -> str:
    """Left padding: a row before the first token keeps no key, and then its softmax sees later ones, too."""
    padding = np.ones((PRIMES.B, 1, 1, PRIMES.S), bool)
    padding[0, ..., :2] = False
    return b.node("And", at_most(b), b.feed("padding", padding, ["B", 1, 1, "S"], BOOL))


OTHER = {
    "1": shifted(1), "-1": shifted(-1), "-2": shifted(-2), "later": later, "one more": one_more, "window": window,
    "padded": padded, "and": both("And", -1), "or": both("Or", 1),
}  # fmt: skip


@pytest.mark.parametrize("keep", OTHER)
@pytest.mark.parametrize("put", [chosen, added])
@pytest.mark.parametrize("opset", [17, 23])
def test_another_mask_is_added(keep, put, opset):
    b = attend(OTHER[keep], put, opset=opset)
    result = same(b.model(b.result), b.feeds)
    assert biased(result.model)
    assert not {"unidirectional", "is_causal"} & attributes(result.model, "Attention").keys()


def test_a_small_number_hides_nothing():
    b = attend(at_most, added, -20.0)
    result = same(b.model(b.result), b.feeds)
    assert biased(result.model)


def test_a_bias_beside_a_causal_mask_keeps_both_added():
    b = Attention(PRIMES)
    bias = b.feed("bias", np.random.default_rng(1).standard_normal((3, 5, 5)).astype(np.float32), [3, "S", "S"])
    result = same(b.model(b.whole(*b.qkv(), mask=lambda b, s: b.where(at_most(b), b.add(s, bias), SMALLEST))), b.feeds)
    assert biased(result.model)


@pytest.mark.parametrize(("S", "T"), [(3, 5), (5, 3)])
def test_fewer_queries_than_keys_or_more(S, T):
    """j <= i of another number of keys: MultiHeadAttention aligns its triangle elsewhere."""
    b = Attention(Sizes(S=S, T=T))
    y = b.feed("y", np.random.default_rng(2).standard_normal((2, T, 11)).astype(np.float32), ["B", "T", 11])
    q = b.heads(b.projection("x", 21), 7)
    k, v = b.heads(b.projection(y, 21), 7, (0, 2, 3, 1)), b.heads(b.projection(y, 21), 7)

    def mask(b, scores):
        columns = b.node("Range", np.array(0), b.node("Gather", b.shape(y), np.array(1), axis=0), np.array(1))
        return b.where(b.node("LessOrEqual", columns, b.unsqueeze(positions(b), [1])), scores, SMALLEST)

    result = same(b.model(b.whole(q, k, v, mask=mask)), b.feeds)
    assert attributes(result.model, "MultiHeadAttention").get("unidirectional", 0) == 0


def test_the_last_query_sees_every_key():
    """One new token and a cache: j <= past hides nothing of past + 1 keys."""
    b = Attention(Sizes(S=1, T=6), dynamic=True)
    s = b.sizes
    q = b.feed("q", np.random.default_rng(1).standard_normal((2, 3, 1, 7)).astype(np.float32), ["B", 3, 1, 7])
    new = b.feed("new", np.random.default_rng(2).standard_normal((2, 3, 1, 7)).astype(np.float32), ["B", 3, 1, 7])
    past = b.feed("past", np.random.default_rng(3).standard_normal((2, 3, 5, 7)).astype(np.float32), ["B", 3, "P", 7])
    del b.feeds["x"], b.inputs[0]
    keys = b.concat(past, new, axis=2)
    size = b.node("Gather", b.shape(past), np.array(2), axis=0)
    columns = b.node("Range", np.array(0), b.add(size, np.array(1)), np.array(1))
    seen = b.node("LessOrEqual", columns, size)
    scores = b.where(seen, b.mul(b.matmul(q, b.transpose(keys, perm=[0, 1, 3, 2])), 0.4), SMALLEST)
    result = same(b.model(b.merged(b.matmul(b.softmax(scores, axis=-1), keys))), b.feeds)
    assert result.counts == {"multi_head_attention": 1}
    assert s.T == 6
    assert not biased(result.model)


@pytest.mark.parametrize("target", ["ort-cpu", "onnx"])
def test_the_standard_operator_takes_a_causal_mask(target):
    """No row is masked everywhere, so that onnxruntime's kernel does as the standard says."""
    b = attend(at_most, opset=23)
    patterns = ["multi_head_attention"]
    result = same(b.model(b.result), b.feeds, target=target, patterns=patterns)
    (node,) = [node for node in result.model.graph.node if node.op_type == "Attention"]
    assert node.domain == ""
    assert attributes(result.model, "Attention")["is_causal"] == 1
    assert len(node.input) == 3


def test_the_formula_with_a_causal_mask():
    b = attend(stored, fill=-1e4)
    result = same(b.model(b.result), b.feeds)
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in result.model.graph.initializer}
    (node,) = result.model.graph.node
    projected = b.feeds["x"].astype(np.float64) @ weights[node.input[1]] + weights[node.input[2]]
    q, k, v = (part.reshape(2, 5, PRIMES.H, -1).swapaxes(1, 2) for part in np.split(projected, 3, -1))
    scores = np.where(np.tri(5, dtype=bool), q @ k.swapaxes(-1, -2) * 0.4, -np.inf)
    expected = (softmax(scores) @ v).swapaxes(1, 2).reshape(2, 5, -1)
    (got,) = run(result.model, b.feeds).values()
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("keep", [at_most, stored, lower_ones], ids=lambda keep: keep.__name__)
def test_both_sides_run_with_the_mask_that_was_proved(keep):
    """Other numbers in its place would not be the mask that the attribute stands for."""
    b = attend(keep)
    result = same(b.model(b.result), b.feeds, check=True)
    assert [match.checked for match in result.matches] == [True]
    assert attributes(result.model, "Attention")["unidirectional"] == 1
