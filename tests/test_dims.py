"""Dimensions against plain integers: an expression gives, under every binding of its symbols, the same number."""

from __future__ import annotations

import copy
import pickle

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from fusion.dims import (
    Dim,
    Poly,
    broadcast,
    divide,
    equal,
    evaluate,
    floordiv,
    lower,
    maximum,
    minimum,
    product,
    substitute,
    symbol,
    symbols,
    upper,
)
from fusion.verdict import Verdict

B, S, P, H, D = (symbol(name) for name in "BSPHD")

# A random expression is a pair: the Dim, and a plain Python function of the bound symbols.
OPERATIONS = {
    "add": (lambda a, b: a + b, lambda a, b: a + b),
    "subtract": (lambda a, b: a - b, lambda a, b: a - b),
    "multiply": (lambda a, b: a * b, lambda a, b: a * b),
    "minimum": (minimum, min),
    "maximum": (maximum, max),
}
LEAVES = st.one_of(
    st.integers(-3, 9).map(lambda n: (n, lambda env: n)),
    st.sampled_from("BSP").map(lambda name: (symbol(name), lambda env: env[name])),
)


@st.composite
def expressions(draw, depth=4):
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        return draw(LEAVES)
    left, left_value = draw(expressions(depth=depth - 1))
    if draw(st.integers(0, 3)) == 0:
        by = draw(st.integers(1, 6))
        return floordiv(left, by), lambda env: left_value(env) // by
    right, right_value = draw(expressions(depth=depth - 1))
    build, run = OPERATIONS[draw(st.sampled_from(sorted(OPERATIONS)))]
    return build(left, right), lambda env: run(left_value(env), right_value(env))


ENVIRONMENTS = st.fixed_dictionaries({name: st.integers(0, 12) for name in "BSP"})


def bind(env):
    return {symbol(name): value for name, value in env.items()}


@settings(max_examples=400, deadline=None)
@given(expressions(), ENVIRONMENTS)
def test_an_expression_evaluates_like_python_integers(pair, env):
    dim, value = pair
    assert evaluate(dim, bind(env)) == value(env)
    assert lower(dim) <= value(env) <= upper(dim)


@settings(max_examples=200, deadline=None)
@given(expressions(depth=3), expressions(depth=3), ENVIRONMENTS)
def test_equal_and_divide_never_contradict_a_binding(left, right, env):
    (a, a_value), (b, b_value) = left, right
    verdict = equal(a, b)
    if a_value(env) == b_value(env):
        assert verdict is not Verdict.NO
    else:
        assert verdict is not Verdict.YES
    quotient = divide(a, b)
    if quotient is not None and b_value(env):
        assert evaluate(quotient, bind(env)) * b_value(env) == a_value(env)
    assert divide(a * b, b) == a or b == 0


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from([1, 2, 7, B, S, B + 1, S * 2, minimum(B, 3), minimum(S, 7), minimum(B, S), S + B]),
        min_size=1,
        max_size=5,
    ),
    ENVIRONMENTS,
    st.randoms(),
)
def test_broadcast_is_what_numpy_gives_whenever_numpy_agrees(dims, env, random):
    values = [evaluate(dim, bind(env)) for dim in dims]
    if len({value for value in values if value != 1}) > 1:
        return  # such a run fails
    expected = next((value for value in values if value != 1), 1)
    results = []
    for _ in range(3):
        result: Dim = 1
        for dim in dims:
            result = broadcast(result, dim)
        results.append(result)
        assert evaluate(result, bind(env)) == expected
        random.shuffle(dims)


def test_equal_polynomials_are_the_same_object():
    assert (B + S) * (B - S) is B * B - S * S
    assert (B + 1) * 2 is 2 + 2 * B
    assert B - B == 0
    assert B + S - S is B
    assert symbol("B", own=True) != B
    assert pickle.loads(pickle.dumps(B * S + 1)) is B * S + 1
    assert copy.deepcopy(minimum(S, 512)) is minimum(S, 512)


def test_sums_cancel_across_minimum_and_maximum():
    assert S - maximum(0, S - 4) is minimum(S, 4)
    assert minimum(S, 1) + maximum(0, S - minimum(S, 1)) is S
    assert minimum(S + 3, S) is S
    assert minimum(2 * S, 2 * B) is 2 * minimum(S, B)
    assert P + S - P is S


def test_floor_division_is_normalised():
    assert (S + 6) // 3 is S // 3 + 2
    assert (S // 2) // 3 is S // 6
    assert (2 * S + 1) // 4 is S // 2
    assert (32 * B * S) // (8 * B) is 4 * S
    assert (B * S + B) // B is S + 1
    assert ((S - 3) // 2 + 1 - 3) // 2 is (S - 3 - 4) // 4
    assert floordiv(7, 2) == 3
    assert floordiv(-7, 2) == -4


def test_exact_division():
    assert divide(B * S * 12, S * 4) is 3 * B
    assert divide((P + S) * B, P + S) is B
    assert divide((P + S) * (B + H), B + H) is P + S
    assert divide(B * S, H) is None
    assert divide(S, 2) is None
    assert divide(7, 0) is None
    assert divide(0, S) == 0


def test_a_dimension_is_never_negative():
    assert equal(S, -1) is Verdict.NO
    assert equal(S + 1, 0) is Verdict.NO
    assert equal(S, 0) is Verdict.UNKNOWN
    assert equal(2 * S + 1, 2 * B) is Verdict.NO
    assert lower(S - minimum(S, 5)) == 0
    assert lower(S - S // 2) == 0
    assert upper(minimum(S, 5)) == 5


def test_broadcast_sets():
    assert broadcast(S, 1) is S
    assert broadcast(S, 4) == 4
    assert broadcast(S + 2, B) is S + 2
    assert broadcast(B, S) is broadcast(S, B)
    assert broadcast(broadcast(B, S), B) is broadcast(B, S)
    assert broadcast(broadcast(B, S), H) is broadcast(B, broadcast(H, S))
    assert broadcast(minimum(S, 66), S) is S
    assert broadcast(minimum(S, B), S) is not S  # B may be 0 where S is 1


def test_substitution_reaches_into_atoms():
    dim = broadcast(B, S) * 2 + minimum(S, 8) + S // 3
    assert evaluate(dim, {B: 1, S: 10}) == 20 + 8 + 3
    assert substitute(dim, {S: B}) is 2 * B + minimum(B, 8) + B // 3
    assert substitute(dim, {broadcast(B, S): S}) is 2 * S + minimum(S, 8) + S // 3
    assert symbols(dim) == [B, S] or set(symbols(dim)) == {B, S}
    assert evaluate(B // S, {B: 3, S: 0}) is None


def test_huge_nesting_stays_small():
    dim: Dim = S
    for _ in range(60):
        dim = broadcast(dim * dim, dim // 3 + 1) if isinstance(dim, Poly) and dim.weight < 100 else dim // 3 + 1
    assert isinstance(dim, Poly)


@pytest.mark.parametrize(
    ("dim", "text"),
    [
        (B * S + 2, "B*S + 2"),
        (S - 1, "S - 1"),
        (1 - S, "1 - S"),
        (minimum(S, 512), "min(S, 512)"),
        (maximum(S - 4, 0), "max(0, S - 4)"),
        (S // 2 * 3, "3*(S // 2)"),
        (broadcast(B, S), "(B ^ S)"),
        (symbol("conv.2", own=True) + P, "?conv.2 + P"),
        (product([B, B, 3]), "3*B*B"),
    ],
)
def test_text(dim, text):
    assert str(dim) == text
