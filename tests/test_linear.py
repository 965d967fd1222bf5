"""Products: scaled, of transposed operands, with a bias; each equal to numpy, and never at the cost of an attention."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from building import DOUBLE, FLOATS, HALF, INT64, Build, numbers, operators, run, same

import fusion

FUSED = "FusedMatMul"
OPSETS = (11, 13, 17, 21)


def attributes(model, op):
    (node,) = [node for node in model.graph.node if node.op_type == op]
    return {item.name: item.f or item.i for item in node.attribute}


def optimized(b: Build, y: str, feeds, expected):
    """The fused model, which computes what numpy says."""
    result = same(b.model(y), feeds)
    (got,) = run(result.model, feeds).values()
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    return result.model


# FusedMatMul ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("scaled", ["before left", "before right", "after", "after, divided"])
def test_a_number_goes_into_the_product(scaled, opset):
    b = Build(opset)
    a, w = b.input("a", ["B", 3, 4]), b.input("w", ["B", 4, 5])
    left = b.mul(a, 0.25) if scaled == "before left" else a
    right = b.mul(0.25, w) if scaled == "before right" else w
    y = b.matmul(left, right)
    y = b.mul(y, 0.25) if scaled == "after" else b.div(y, 4.0) if scaled == "after, divided" else y
    feeds = {"a": numbers(2, 3, 4, seed=1), "w": numbers(2, 4, 5, seed=2)}
    model = optimized(b, y, feeds, 0.25 * feeds["a"] @ feeds["w"])
    assert operators(model) == {FUSED: 1}
    assert attributes(model, "FusedMatMul") == {"alpha": 0.25}


@pytest.mark.parametrize("side", ["a", "w"])
@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_an_operand_in_any_order_is_read_where_the_kernel_can(side, order):
    """The flags are checked against numpy for every order of four axes; four orders have flags."""
    b = Build()
    shapes = {"a": (2, 6, 3, 4), "w": (2, 6, 4, 5)}
    feeds = {name: numbers(*shape, seed=3) for name, shape in shapes.items()}
    expected = feeds["a"] @ feeds["w"]
    feeds[side] = np.ascontiguousarray(feeds[side].transpose(order))
    operands = {name: b.input(name, list(array.shape)) for name, array in feeds.items()}
    operands[side] = b.transpose(operands[side], perm=list(np.argsort(order)))
    model = optimized(b, b.matmul(operands["a"], operands["w"]), feeds, expected)
    read = {(0, 1, 3, 2), (2, 0, 1, 3), (3, 0, 1, 2)}
    assert operators(model) == ({FUSED: 1} if order in read else operators(model))
    assert ("Transpose" in operators(model)) == (order not in read)


def test_a_fused_product_is_read_as_a_contraction_whatever_its_flags():
    """The four ways of storing each operand, as FusedMatMul nodes, with a factor that joins their alpha."""
    orders = {(0, 0): (0, 1, 2), (1, 0): (0, 2, 1), (0, 1): (1, 0, 2), (1, 1): (2, 0, 1)}
    for (swap_a, batch_a), (swap_b, batch_b) in itertools.product(orders, repeat=2):
        b = Build()
        a, w = numbers(2, 3, 4, seed=1), numbers(2, 4, 5, seed=2)
        stored = {"a": a.transpose(orders[swap_a, batch_a]), "w": w.transpose(orders[swap_b, batch_b])}
        flags = {"transA": swap_a, "transBatchA": batch_a, "transB": swap_b, "transBatchB": batch_b}
        feeds = {name: np.ascontiguousarray(array) for name, array in stored.items()}
        inputs = [b.input(name, list(array.shape)) for name, array in feeds.items()]
        y = b.mul(b.node("FusedMatMul", *inputs, domain="com.microsoft", alpha=2.0, **flags), 1.5)
        model = optimized(b, y, feeds, 3 * a @ w)
        assert operators(model) == {FUSED: 1}


@pytest.mark.parametrize("opset", OPSETS)
def test_a_transposed_product_is_the_product_of_the_transposed(opset):
    b = Build(opset)
    a, w = b.input("a", ["B", 3, 4]), b.input("w", ["B", 4, 5])
    feeds = {"a": numbers(2, 3, 4, seed=1), "w": numbers(2, 4, 5, seed=2)}
    y = b.transpose(b.matmul(a, w), perm=[0, 2, 1])
    model = optimized(b, y, feeds, (feeds["a"] @ feeds["w"]).transpose(0, 2, 1))
    assert operators(model) == {FUSED: 1}


def test_a_transposition_that_several_products_read_goes_once_all_have_taken_it_in():
    b = Build()
    a, w = b.input("a", ["B", 4, 3]), b.input("w", ["B", 4, 5])
    turned = b.transpose(a, perm=[0, 2, 1])
    y = b.add(b.matmul(turned, w), b.matmul(turned, b.relu(w)))
    feeds = {"a": numbers(2, 4, 3, seed=1), "w": numbers(2, 4, 5, seed=2)}
    left = feeds["a"].transpose(0, 2, 1)
    model = optimized(b, y, feeds, left @ feeds["w"] + left @ np.maximum(feeds["w"], 0))
    assert operators(model) == {FUSED: 2, "Relu": 1, "Add": 1}


def test_a_transposition_that_others_need_stays_and_so_does_the_product():
    b = Build()
    a, w = b.input("a", ["B", 4, 3]), b.input("w", ["B", 4, 5])
    turned = b.transpose(a, perm=[0, 2, 1])
    model = same(b.model(b.matmul(turned, w), b.relu(turned)), {"a": numbers(2, 4, 3), "w": numbers(2, 4, 5)}).model
    assert operators(model) == {"Transpose": 1, "MatMul": 1, "Relu": 1}


def test_a_number_with_more_axes_than_the_product_adds_axes():
    b = Build()
    a, w = b.input("a", [3, 4]), b.input("w", [4, 5])
    model = same(
        b.model(b.mul(b.matmul(a, w), b.number(2.0, (1, 1, 1)))), {"a": numbers(3, 4), "w": numbers(4, 5)}
    ).model
    assert operators(model) == {"MatMul": 1, "Mul": 1}


@pytest.mark.parametrize("what", ["a tensor", "the numerator", "an input"])
def test_only_a_number_that_multiplies_goes_in(what):
    b = Build()
    a, w = b.input("a", ["B", 3, 4]), b.input("w", ["B", 4, 5])
    feeds = {"a": numbers(2, 3, 4, seed=1) + 3, "w": numbers(2, 4, 5, seed=2)}
    if what == "an input":
        feeds["s"] = np.array(2.0, np.float32)
        scaled = b.mul(a, b.input("s", []))
    else:
        scaled = b.mul(a, b.constant(numbers(4))) if what == "a tensor" else b.div(2.0, a)
    assert FUSED not in operators(same(b.model(b.matmul(scaled, w)), feeds).model)


@pytest.mark.parametrize("dtype", [HALF, DOUBLE])
def test_other_element_types_stay_equal(dtype):
    b = Build(dtype=dtype)
    a, w = b.input("a", [2, 4, 3]), b.input("w", [2, 4, 5])
    feeds = {"a": numbers(2, 4, 3).astype(FLOATS[dtype]), "w": numbers(2, 4, 5).astype(FLOATS[dtype])}
    same(b.model(b.mul(b.matmul(b.transpose(a, perm=[0, 2, 1]), w), 0.5)), feeds)


# Gemm -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["onnx", "ort-cpu"])
@pytest.mark.parametrize("opset", [7, 9, *OPSETS])
@pytest.mark.parametrize("shape", [(5,), (1, 5), (3, 1), (3, 5)])
def test_a_product_and_its_bias_are_one_gemm(shape, opset, target):
    b = Build(opset)
    a, w = b.input("a", [3, 4]), b.constant(numbers(4, 5, seed=2))
    y = b.add(b.matmul(a, w), b.constant(numbers(*shape, seed=3)))
    feeds = {"a": numbers(3, 4, seed=1)}
    result = fusion.optimize(b.model(y), target=target).model
    assert operators(result) == {"Gemm": 1}
    (got,) = run(result, feeds).values()
    np.testing.assert_allclose(got, feeds["a"] @ numbers(4, 5, seed=2) + numbers(*shape, seed=3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("left", "right"), list(itertools.product([False, True], repeat=2)))
def test_transposed_matrices_and_a_scale_go_into_gemm(left, right):
    b = Build()
    feeds = {"a": numbers(*((4, 3) if left else (3, 4)), seed=1), "w": numbers(*((5, 4) if right else (4, 5)), seed=2)}
    a, w = (b.input(name, list(array.shape)) for name, array in feeds.items())
    y = b.matmul(b.transpose(a, perm=[1, 0]) if left else a, b.transpose(w) if right else w)
    y = b.add(b.mul(y, 0.5), b.constant(numbers(5, seed=3)))
    x, k = feeds["a"].T if left else feeds["a"], feeds["w"].T if right else feeds["w"]
    model = optimized(b, y, feeds, 0.5 * x @ k + numbers(5, seed=3))
    assert operators(model) == {"Gemm": 1}
    wanted = {"alpha": 0.5, "transA": int(left), "transB": int(right)}
    assert attributes(model, "Gemm") == {name: value for name, value in wanted.items() if value}


@pytest.mark.parametrize("shape", [(1, 3, 5), (2, 3, 5), (7, 5)])
def test_what_makes_the_result_larger_is_no_bias_of_a_gemm(shape):
    b = Build()
    rows = 1 if shape == (7, 5) else 3
    a, w = b.input("a", [rows, 4]), b.constant(numbers(4, 5))
    model = same(b.model(b.add(b.matmul(a, w), b.constant(numbers(*shape)))), {"a": numbers(rows, 4)}).model
    assert "Gemm" not in operators(model)


def test_products_of_more_axes_are_no_gemm():
    b = Build()
    a, w = b.input("a", [1, 3, 4]), b.constant(numbers(4, 5))
    model = same(b.model(b.add(b.matmul(a, w), b.constant(numbers(5)))), {"a": numbers(1, 3, 4)}).model
    assert operators(model) == {"MatMul": 1, "Add": 1}


def test_an_attention_is_not_cut_into_products():
    b = Build()
    q, k, v = (b.input(name, ["B", "S", 2, 4]) for name in "qkv")
    scores = b.matmul(b.transpose(q, perm=[0, 2, 1, 3]), b.transpose(k, perm=[0, 2, 3, 1]))
    mixed = b.matmul(b.softmax(b.mul(scores, 0.5), axis=-1), b.transpose(v, perm=[0, 2, 1, 3]))
    y = b.reshape(b.transpose(mixed, perm=[0, 2, 1, 3]), np.array([0, 0, 8]))
    result = same(b.model(y), {name: numbers(2, 3, 2, 4, seed=i) for i, name in enumerate("qkv")})
    assert result.counts == {"multi_head_attention": 1}


@pytest.mark.parametrize(("alpha", "written"), [(0.25, True), (0.3, False)])
@pytest.mark.parametrize("rank", [2, 3])
def test_a_factor_in_double_goes_into_an_attribute_only_where_single_precision_holds_it(alpha, written, rank):
    b = Build(dtype=DOUBLE)
    shape = [2, 3, 4][-rank:]
    y = b.mul(b.matmul(b.input("a", shape), b.input("w", [4, 5])), alpha)
    feeds = {"a": numbers(*shape, dtype=DOUBLE), "w": numbers(4, 5, dtype=DOUBLE)}
    result = same(b.model(y), feeds, tolerance=1e-14)
    assert bool(result.matches) == written


def test_integers_are_not_multiplied_by_gemm():
    """The standard allows it, and runtimes have no kernel."""
    b = Build()
    y = b.add(b.matmul(b.transpose(b.input("a", [4, 3], INT64)), b.input("w", [4, 5], INT64)), b.input("c", [5], INT64))
    feeds = {
        name: np.arange(size).reshape(shape)
        for name, size, shape in (("a", 12, (4, 3)), ("w", 20, (4, 5)), ("c", 5, (5,)))
    }
    assert not same(b.model((y, INT64, None)), feeds, target="onnx").matches


@pytest.mark.parametrize("rank", [2, 3])
def test_a_factor_of_zero_is_no_factor_that_is_absent(rank):
    b = Build()
    shape = [2, 3, 4][-rank:]
    y = b.matmul(b.mul(b.input("a", shape), 0.0), b.input("w", [4, 5]))
    a, w = numbers(*shape), numbers(4, 5)
    a.flat[0] = np.inf
    same(b.model(y), [{"a": numbers(*shape), "w": w}, {"a": a, "w": w}])
