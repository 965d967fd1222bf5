"""Layer and RMS normalization: every trap of the field, each equal to what it was or left alone, never wrong."""

from __future__ import annotations

import numpy as np
import pytest
from building import DOUBLE, FLOAT, FLOATS, HALF, Build, layer_norm, misses, numbers, operators, run, same

NORMED = {"layer_norm": 1}


def rms_norm(b: Build, x: str, scale=None, eps: float = 1e-5, axes=(-1,)) -> str:
    """x / sqrt(mean(x²) + eps), scaled."""
    result = b.div(x, b.sqrt(b.add(b.mean(b.pow(x, 2.0), axes), eps)))
    return result if scale is None else b.mul(result, scale)


def reference(x, scale=1.0, bias=0.0, eps=1e-5, axes=(-1,)):
    """Layer normalization in numpy, in doubles."""
    x = x.astype(np.float64)
    centred = x - x.mean(axes, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axes, keepdims=True) + eps) * scale + bias


# Spellings --------------------------------------------------------------------------------------------------------

CENTRED = {
    "pow": lambda b, d: b.pow(d, 2.0),
    "product": lambda b, d: b.mul(d, d),
}
ROOTS = {
    "div sqrt": lambda b, d, v: b.div(d, b.sqrt(v)),
    "mul reciprocal sqrt": lambda b, d, v: b.mul(b.reciprocal(b.sqrt(v)), d),
    "one over sqrt": lambda b, d, v: b.mul(d, b.div(1.0, b.sqrt(v))),
    "pow half": lambda b, d, v: b.div(d, b.pow(v, 0.5)),
    "pow minus half": lambda b, d, v: b.mul(d, b.pow(v, -0.5)),
    "sqrt reciprocal": lambda b, d, v: b.mul(d, b.sqrt(b.reciprocal(v))),
}


@pytest.mark.parametrize("square", CENTRED)
@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("swapped", [False, True])
def test_a_layer_norm_in_every_spelling_computes_the_formula(square, root, swapped):
    b = Build()
    x = b.input("x", ["B", "S", 5])
    gamma, beta = numbers(5, seed=1), numbers(5, seed=2)
    d = b.sub(x, b.mean(x))
    variance = b.mean(CENTRED[square](b, d))
    shifted = b.add(1e-3, variance) if swapped else b.add(variance, 1e-3)
    normed = ROOTS[root](b, d, shifted)
    scaled = b.mul(gamma, normed) if swapped else b.mul(normed, gamma)
    y = b.add(beta, scaled) if swapped else b.add(scaled, beta)
    feed = {"x": numbers(2, 3, 5)}
    result = same(b.model(y), feed)
    assert result.counts == NORMED
    assert operators(result.model) == {"LayerNormalization": 1}
    (got,) = run(result.model, feed).values()
    np.testing.assert_allclose(got, reference(feed["x"], gamma, beta, 1e-3), rtol=1e-4, atol=1e-5)


SPREAD = {
    "x a + (beta - mean a)": lambda b, x, u, a, beta: b.add(b.mul(x, a), b.sub(beta, b.mul(u, a))),
    "x a + (-mean a + beta)": lambda b, x, u, a, beta: b.add(b.mul(x, a), b.add(b.mul(b.neg(u), a), beta)),
    "(x a + beta) - mean a": lambda b, x, u, a, beta: b.sub(b.add(b.mul(x, a), beta), b.mul(u, a)),
    "x a - mean a": lambda b, x, u, a, beta: b.sub(b.mul(x, a), b.mul(u, a)),
}


def spread(b: Build, form: str, *, pooled: bool = False) -> tuple[str, str]:
    """A norm of which scale over root, a = gamma / sqrt(variance + eps), is multiplied by x and by its mean."""
    x = b.input("x", ["B", 3, 5])
    mean = (lambda own: b.node("GlobalAveragePool", own)) if pooled else b.mean
    u = mean(x)
    d = b.sub(x, u)
    a = b.mul(b.reciprocal(b.sqrt(b.add(mean(b.mul(d, d)), 1e-3))), numbers(5, seed=1))
    return SPREAD[form](b, x, u, a, numbers(5, seed=2)), a


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("form", SPREAD)
def test_scale_over_root_may_be_multiplied_by_x_and_by_its_mean(form, pooled):
    """How TensorFlow normalizes a batch, and writes every LayerNormalization; there the mean is a pool."""
    b = Build()
    feed = {"x": numbers(2, 3, 5)}
    y, _ = spread(b, form, pooled=pooled)
    result = same(b.model(y), feed)
    assert result.counts == NORMED
    assert operators(result.model)["LayerNormalization"] == 1
    (got,) = run(result.model, feed).values()
    bias = 0.0 if form == "x a - mean a" else numbers(5, seed=2)
    np.testing.assert_allclose(got, reference(feed["x"], numbers(5, seed=1), bias, 1e-3), rtol=1e-4, atol=1e-5)


def batch_norm(b: Build, x: str, mean, variance, **attributes) -> str:
    """A BatchNormalization of (1, N, 5, 1) by a mean and a variance of N, without scale and bias."""
    count = b.unsqueeze(b.node("Gather", b.shape(x), np.array(1), axis=0), [0])
    ones, zeros = b.expand(b.number(1.0, (1,)), count), b.expand(b.number(0.0, (1,)), count)
    return b.node("BatchNormalization", x, ones, zeros, mean, variance, **attributes)


def keras_norm(b: Build, x: str, **attributes) -> str:
    """How Keras normalizes a layer by normalizing a batch: every vector is a channel of its own."""
    column = b.reshape(x, [1, -1, 5, 1])
    mean = b.mean(column, (0, 2, 3))
    d = b.sub(column, mean)
    squares = b.node("ReduceSumSquare", d, axes=[0, 2, 3], keepdims=0)
    flat = b.node("Squeeze", mean, np.array([0, 2, 3]))
    normed = batch_norm(b, column, flat, b.div(squares, 5.0), **attributes)
    return b.node("Reshape", normed, b.shape(x))


@pytest.mark.parametrize("dims", [["B", 5], ["B", 3, 5], ["B", 2, 3, 5]])
def test_a_layer_normalized_as_a_batch_of_one(dims):
    b = Build()
    x = b.input("x", dims)
    gamma, beta = numbers(5, seed=1), numbers(5, seed=2)
    feed = {"x": numbers(*(4 if dim == "B" else dim for dim in dims))}
    result = same(b.model(b.add(b.mul(keras_norm(b, x, epsilon=1e-3), gamma), beta)), feed)
    assert result.counts == NORMED
    assert operators(result.model) == {"LayerNormalization": 1}
    (got,) = run(result.model, feed).values()
    np.testing.assert_allclose(got, reference(feed["x"], gamma, beta, 1e-3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrong", ["the mean of squares", "stored statistics", "another mean"])
def test_a_batch_normalized_otherwise_is_no_layer_norm(wrong):
    b = Build()
    x = b.input("x", [1, 3, 5, 1])
    mean = b.node("ReduceMean", x, axes=[0, 2, 3], keepdims=0)
    variance = b.node("ReduceMean", b.mul(x, x), axes=[0, 2, 3], keepdims=0)
    if wrong != "the mean of squares":
        d = b.sub(x, b.mean(x, (0, 2, 3)))
        variance = b.node("ReduceMean", b.mul(d, d), axes=[0, 2, 3], keepdims=0)
        mean = numbers(3, seed=3) if wrong == "stored statistics" else b.mul(mean, 2.0)
    assert same(b.model(batch_norm(b, x, mean, variance, epsilon=1e-3)), {"x": numbers(1, 3, 5, 1)}).counts == {}


def test_scale_over_root_that_is_read_elsewhere_stays():
    b = Build()
    y, a = spread(b, "x a + (beta - mean a)")
    assert same(b.model(y, a), {"x": numbers(2, 3, 5)}).counts == {}


def test_the_mean_over_another_root_is_another_function():
    b = Build()
    x = b.input("x", ["B", 5])
    u = b.mean(x)
    d = b.sub(x, u)
    root = b.sqrt(b.add(b.mean(b.mul(d, d)), 1e-3))
    y = b.add(b.div(x, root), b.sub(numbers(5, seed=2), b.div(u, b.sqrt(b.add(root, 1e-3)))))
    assert same(b.model(y), {"x": numbers(2, 5)}).counts == {}


def test_a_global_pool_is_a_mean_over_all_axes_after_the_second():
    b = Build()
    x = b.input("x", ["B", "S", 4, 5])
    d = b.sub(x, b.node("GlobalAveragePool", x))
    y = b.div(d, b.sqrt(b.add(b.node("GlobalAveragePool", b.mul(d, d)), 1e-3)))
    feed = {"x": numbers(2, 3, 4, 5)}
    result = same(b.model(y), feed)
    assert result.counts == NORMED
    (got,) = run(result.model, feed).values()
    np.testing.assert_allclose(got, reference(feed["x"], axes=(-2, -1), eps=1e-3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("eps", [1e-1, 1e-3, 1e-5, 1e-12])
@pytest.mark.parametrize("by", ["initializer", "constant node", "computed"])
def test_epsilon_is_read_and_never_defaulted(eps, by):
    """Small numbers go in, so that epsilon matters."""
    b = Build()
    x = b.input("x", ["B", 5])
    if by == "initializer":
        number = b.number(eps, (1,))
    elif by == "constant node":
        number = b.node("Constant", value_float=eps)
    else:
        number = b.mul(eps * 4, 0.25)
    d = b.sub(x, b.mean(x))
    y = b.div(d, b.sqrt(b.add(number, b.mean(b.mul(d, d)))))
    feed = {"x": numbers(4, 5, scale=float(np.sqrt(eps)))}
    result = same(b.model(y), feed)
    assert result.counts == NORMED
    (node,) = result.model.graph.node
    (attribute,) = [attribute for attribute in node.attribute if attribute.name == "epsilon"]
    assert attribute.f == pytest.approx(eps, rel=1e-6)


@pytest.mark.parametrize("eps", [-1e-3, 0.0])
def test_an_epsilon_that_is_none(eps):
    b = Build()
    same(b.model(layer_norm(b, b.input("x", ["B", 5]), eps=eps)), {"x": numbers(4, 5)})


def test_an_epsilon_along_an_axis_is_no_number():
    b = Build()
    x = b.input("x", ["B", 5])
    d = b.sub(x, b.mean(x))
    eps = np.array([[0.1], [0.2], [0.3], [0.4]], np.float32)
    result = same(b.model(b.div(d, b.sqrt(b.add(b.mean(b.mul(d, d)), eps)))), {"x": numbers(4, 5)})
    assert result.counts == {}


@pytest.mark.parametrize("eps", [1e-1, 1e-3])
def test_an_epsilon_outside_the_root_is_another_function(eps):
    b = Build()
    x = b.input("x", ["B", 5])
    d = b.sub(x, b.mean(x))
    result = same(b.model(b.div(d, b.add(b.sqrt(b.mean(b.mul(d, d))), eps))), {"x": numbers(4, 5, scale=0.1)})
    assert result.counts == {}


# Axes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [13, 18])
def test_means_that_drop_their_axis_do_not_line_up(opset):
    """Square, so that the broadcast runs: the mean of row i is taken from column i (trap N1)."""
    b = Build(opset)
    x = b.input("x", [5, 5])
    d = b.sub(x, b.mean(x, keepdims=0))
    y = b.div(d, b.sqrt(b.add(b.mean(b.mul(d, d), keepdims=0), 1e-3)))
    assert same(b.model(b.mul(y, numbers(5, seed=1))), {"x": numbers(5, 5)}).counts == {}


def test_rms_that_drops_its_axis_does_not_line_up():
    b = Build()
    x = b.input("x", [5, 5])
    y = b.div(x, b.sqrt(b.add(b.mean(b.mul(x, x), keepdims=0), 1e-3)))
    assert same(b.model(b.mul(y, numbers(5, seed=1))), {"x": numbers(5, 5)}).counts == {}


def test_a_dropped_axis_that_is_put_back_is_fine():
    b = Build()
    x = b.input("x", [5, 5])
    d = b.sub(x, b.unsqueeze(b.mean(x, keepdims=0), [1]))
    variance = b.unsqueeze(b.mean(b.mul(d, d), keepdims=0), [-1])
    result = same(b.model(b.div(d, b.sqrt(b.add(variance, 1e-3)))), {"x": numbers(5, 5)})
    assert result.counts == NORMED


@pytest.mark.parametrize("opset", [11, 17, 18])
@pytest.mark.parametrize("affine", ["", "scale", "bias", "scale bias"])
@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
def test_a_vector_alone(opset, affine, norm):
    """Rank 1: the quotient must not become its own scale (trap N2)."""
    b = Build(opset)
    y = norm(b, b.input("x", [5]), eps=1e-3)
    y = b.mul(y, numbers(5, seed=1)) if "scale" in affine else y
    y = b.add(numbers(5, seed=2), y) if "bias" in affine else y
    same(b.model(y), {"x": numbers(5)})


@pytest.mark.parametrize("axes", [(-2, -1), (-3, -2, -1), (1, 2), (-1, -2)])
def test_several_trailing_axes(axes):
    b = Build()
    shape = (3, 5, 5)[-len(axes) :] if len(axes) == 2 else (2, 3, 5, 5)[-3:]
    x = b.input("x", ["B", 5, 5] if len(axes) == 2 else ["B", 3, 5, 5])
    gamma, beta = numbers(*shape, seed=1), numbers(*shape, seed=2)
    result = same(
        b.model(layer_norm(b, x, gamma, beta, eps=1e-3, axes=axes)),
        {"x": numbers(2, *((5, 5) if len(axes) == 2 else (3, 5, 5)))},
    )
    assert result.counts == NORMED
    (node,) = result.model.graph.node
    assert [attribute.i for attribute in node.attribute if attribute.name == "axis"] == [-len(axes)]


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1), (0, 2), (0, 1, 2), (-2,)])
@pytest.mark.parametrize("affine", [False, True])
def test_other_axes_than_the_trailing_ones(axes, affine):
    b = Build()
    scale, bias = (numbers(5, seed=1), numbers(5, seed=2)) if affine else (None, None)
    same(b.model(layer_norm(b, b.input("x", [5, 5, 5]), scale, bias, eps=1e-3, axes=axes)), {"x": numbers(5, 5, 5)})


@pytest.mark.parametrize("opset", [11, 17, 18])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (5, 5, 5)])
@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
def test_a_mean_without_axes_is_one_over_everything(opset, shape, norm):
    b = Build(opset)
    same(b.model(norm(b, b.input("x", shape), numbers(5, seed=1), eps=1e-3, axes=None)), {"x": numbers(*shape)})


@pytest.mark.parametrize(("first", "second"), [((-1,), (-2,)), ((-2,), (-1,)), ((-1,), (-2, -1)), ((-2, -1), (-1,))])
def test_mean_and_variance_over_different_axes(first, second):
    b = Build()
    x = b.input("x", [5, 5, 5])
    d = b.sub(x, b.mean(x, first))
    y = b.div(d, b.sqrt(b.add(b.mean(b.mul(d, d), second), 1e-3)))
    assert "layer_norm" not in same(b.model(y), {"x": numbers(5, 5, 5)}).counts


@pytest.mark.parametrize("shape", [(4, 5, 5), (5, 5, 5)])
def test_channels_first(shape):
    """Normalized over the channels of NCHW, scale and bias of shape (C, 1, 1)."""
    b = Build()
    c = shape[0]
    gamma, beta = numbers(c, 1, 1, seed=1), numbers(c, 1, 1, seed=2)
    x = b.input("x", ["B", *shape])
    same(b.model(layer_norm(b, x, gamma, beta, eps=1e-3, axes=(1,))), {"x": numbers(2, *shape)})


def test_channels_last_by_transposes():
    b = Build()
    x = b.transpose(b.input("x", ["B", 4, "H", "W"]), perm=[0, 2, 3, 1])
    y = layer_norm(b, x, numbers(4, seed=1), numbers(4, seed=2), eps=1e-3)
    result = same(b.model(b.transpose(y, perm=[0, 3, 1, 2])), {"x": numbers(2, 4, 3, 5)})
    assert result.counts == NORMED


# Scale and bias ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("shape", [(2,), (1, 2), (3, 1, 1)])
@pytest.mark.parametrize("as_bias", [False, True])
def test_a_scale_that_enlarges_the_result_is_none(shape, first, as_bias):
    """x (1, 1): the product is larger than what is normalized (trap N3)."""
    b = Build()
    normed = layer_norm(b, b.input("x", [1, 1]), eps=1e-3)
    weight = numbers(*shape, seed=1)
    operands = (weight, normed) if first else (normed, weight)
    y = b.add(*operands) if as_bias else b.mul(*operands)
    same(b.model(y), {"x": numbers(1, 1)})


@pytest.mark.parametrize(
    "shape", [(5, 1), (5, 5), (1, 1), (1,), (), (1, 5), (1, 1, 5), (5, 5, 5), (5, 1, 1), (1, 5, 5)]
)
@pytest.mark.parametrize("role", ["scale", "bias"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_a_weight_of_any_shape(shape, role, norm):
    """Sizes are equal, so that every shape broadcasts (traps N4, N7)."""
    b = Build()
    x = b.input("x", [5, 5, 5])
    y = layer_norm(b, x, eps=1e-3) if norm == "layer" else rms_norm(b, x, eps=1e-3)
    weight = numbers(*shape, seed=1) + np.float32(2)
    y = b.mul(y, weight) if role == "scale" else b.add(y, weight)
    result = same(b.model(y), {"x": numbers(5, 5, 5)})
    assert sum(result.counts.values()) == 1


def test_two_scales_and_two_biases():
    b = Build()
    y = layer_norm(b, b.input("x", ["B", 5]), numbers(5, seed=1), numbers(5, seed=2), eps=1e-3)
    y = b.add(b.mul(y, numbers(5, seed=3)), numbers(5, seed=4))
    assert same(b.model(y), {"x": numbers(3, 5)}).counts == NORMED


@pytest.mark.parametrize("shape", [("B", "S", 5), (1, "S", 5)])
def test_a_bias_that_is_an_activation(shape):
    b = Build()
    x = b.input("x", [1, "S", 5])
    y = b.add(layer_norm(b, x, numbers(5, seed=1), eps=1e-3), b.input("z", shape))
    feed = {"x": numbers(1, 3, 5), "z": numbers(4 if shape[0] == "B" else 1, 3, 5, seed=2)}
    assert same(b.model(y), feed).counts == NORMED


# What looks like a norm -------------------------------------------------------------------------------------------


def deviation(b: Build, d: str) -> str:
    return b.sqrt(b.add(b.mean(b.mul(d, d)), 1e-3))


def centred(b: Build, x: str) -> str:
    return b.sub(x, b.mean(x))


def divided(b: Build, d: str) -> str:
    """d by its own root mean square."""
    return b.div(d, deviation(b, d))


def over(b: Build, x: str, spread) -> str:
    """x, centred, divided by what `spread` makes of it."""
    d = centred(b, x)
    return b.div(d, spread(d))


LOOKALIKES = {
    "root over x": lambda b, x: (lambda d: b.div(deviation(b, d), d))(centred(b, x)),
    "sum for the mean": lambda b, x: divided(b, b.sub(x, b.sum(x))),
    "largest for the mean": lambda b, x: divided(b, b.sub(x, b.max_over(x))),
    "added mean": lambda b, x: divided(b, b.add(x, b.mean(x))),
    "not centred below": lambda b, x: b.div(centred(b, x), deviation(b, x)),
    "not centred above": lambda b, x: b.div(x, deviation(b, centred(b, x))),
    "another x": lambda b, x: b.div(b.sub(b.abs(x), b.mean(x)), deviation(b, centred(b, x))),
    "sum of squares": lambda b, x: over(b, x, lambda d: b.sqrt(b.add(b.sum(b.mul(d, d)), 1e-3))),
    "sample variance": lambda b, x: over(b, x, lambda d: b.sqrt(b.add(b.div(b.sum(b.mul(d, d)), 4.0), 1e-3))),
    "no root": lambda b, x: over(b, x, lambda d: b.add(b.mean(b.mul(d, d)), 1e-3)),
    "fourth power": lambda b, x: over(b, x, lambda d: b.sqrt(b.add(b.mean(b.pow(d, 4.0)), 1e-3))),
    "no square": lambda b, x: over(b, x, lambda d: b.sqrt(b.add(b.mean(b.abs(d)), 1e-3))),
}


@pytest.mark.parametrize("case", LOOKALIKES)
def test_what_looks_like_a_layer_norm(case):
    b = Build()
    result = same(b.model(LOOKALIKES[case](b, b.input("x", [5, 5]))), {"x": numbers(5, 5)})
    assert "layer_norm" not in result.counts


def test_the_mean_minus_x_is_a_layer_norm_with_the_other_sign():
    b = Build()
    x = b.input("x", [5, 5])
    same(b.model(divided(b, b.sub(b.mean(x), x))), {"x": numbers(5, 5)})


def test_a_sum_divided_by_the_size_is_a_mean():
    b = Build()
    x = b.input("x", ["B", 5])
    d = b.sub(x, b.div(b.sum(x), 5.0))
    y = b.div(d, b.sqrt(b.add(b.mul(b.sum(b.mul(d, d)), 0.2), 1e-3)))
    assert same(b.model(y), {"x": numbers(3, 5)}).counts == NORMED


# Element types ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FLOAT, HALF, DOUBLE])
@pytest.mark.parametrize("opset", [11, 13, 17, 18, 23])
@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
def test_every_element_type_and_opset(dtype, opset, norm):
    b = Build(opset, dtype)
    y = norm(b, b.input("x", ["B", "S", 5]), numbers(5, seed=1, dtype=dtype), eps=1e-2)
    result = same(b.model(y), {"x": numbers(2, 3, 5, dtype=dtype)}, tolerance=2e-2 if dtype == HALF else None)
    if dtype == FLOAT:
        assert sum(result.counts.values()) == 1
    if not result.counts:
        assert {kind for name in ("layer_norm", "rms_norm") for kind, _ in misses(result, name)} <= {"kernel", "dtype"}


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
@pytest.mark.parametrize(("outer", "inner"), [(HALF, FLOAT), (FLOAT, DOUBLE), (FLOAT, HALF), (DOUBLE, FLOAT)])
@pytest.mark.parametrize("weight", ["outer", "inner"])
def test_casts_around_a_norm(norm, outer, inner, weight):
    """Computed in another type than it is given: types must not be mixed up on the way (traps N9, N10)."""
    b = Build(dtype=inner)
    x = b.cast(b.input("x", ["B", "S", 5], outer), to=inner)
    if weight == "inner":
        y = b.cast(norm(b, x, numbers(5, seed=1, dtype=inner), eps=1e-2), to=outer)
    else:
        y = b.mul(b.cast(norm(b, x, eps=1e-2), to=outer), numbers(5, seed=1, dtype=outer))
    tolerance = 2e-2 if HALF in (outer, inner) else 1e-4
    same(b.model((y, outer, None)), {"x": numbers(2, 3, 5).astype(FLOATS[outer])}, tolerance=tolerance)


def test_an_exponent_shared_by_two_norms_of_which_one_is_fused():
    """The exponent comes from a node and is read by both (trap N8)."""
    b = Build()
    x = b.input("x", ["B", "S", 5])
    two = b.cast(b.constant(np.array(2)), to=FLOAT)
    outputs = []
    for index in range(2):
        squares = b.pow(x, two)
        mean = b.mean(squares)
        y = b.div(x, b.sqrt(b.add(1e-3, mean)))
        outputs.append(b.mul(y, numbers(5, seed=index)))
    result = same(b.model(*outputs, squares), {"x": numbers(2, 3, 5)})
    assert result.counts == {"rms_norm": 1}


def test_an_integer_exponent_is_the_same_exponent():
    b = Build()
    x = b.input("x", ["B", 5])
    squares = b.pow(x, b.constant(np.array(2, np.int64)))
    y = b.div(x, b.sqrt(b.add(b.mean(squares), 1e-3)))
    assert same(b.model(y), {"x": numbers(3, 5)}).counts == {"rms_norm": 1}


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
@pytest.mark.parametrize("size", [0, 1])
def test_empty_and_single_rows(norm, size):
    b = Build()
    y = norm(b, b.input("x", ["B", "S", "D"]), eps=1e-3)
    z = norm(b, b.input("w", ["B", "S", 5]), numbers(5, seed=1), eps=1e-3)
    feed = {"x": numbers(2, 3, 1), "w": numbers(size, 3, 5, seed=2)}
    feed["x"] = numbers(size, 3, 1)
    same(b.model(y, z), feed)


@pytest.mark.parametrize(
    ("op", "opset"), [("RMSNormalization", 23), ("SimplifiedLayerNormalization", 17)], ids=["standard", "onnxruntime"]
)
def test_an_rms_norm_that_an_exporter_wrote_of_what_is_centred_is_a_layer_norm(op, opset):
    b = Build(opset)
    x = b.input("x", ["B", "S", 8])
    centred = b.sub(x, b.mean(x))
    normed = b.node(op, centred, numbers(8, seed=1), axis=-1, epsilon=1e-5)
    result = same(b.model(normed), {"x": numbers(2, 3, 8)}, target="ort-cpu")
    assert result.counts == {"layer_norm": 1}
    assert operators(result.model) == {"LayerNormalization": 1}


@pytest.mark.parametrize("opset", [11, 17, 23])
def test_an_rms_norm_may_have_no_eps(opset):
    """An exporter drops an addition of 1e-8 as one of nothing; a row of zeros is then NaN."""
    b = Build(opset)
    x = b.input("x", ["B", "S", 8])
    normed = b.div(x, b.sqrt(b.mean(b.mul(x, x))))
    array = numbers(2, 3, 8)
    array[0, 1] = 0.0
    result = same(b.model(b.mul(normed, numbers(8, seed=1))), {"x": array})
    assert result.counts == {"rms_norm": 1}


def test_a_layer_norm_without_eps_stays_a_norm_of_the_difference():
    """Of equal numbers the difference from their mean is rounding noise; it is kept, and divided by itself."""
    b = Build()
    x = b.input("x", ["B", 7])
    d = b.sub(x, b.mean(x))
    model = b.model(b.div(d, b.sqrt(b.mean(b.mul(d, d)))))
    result = same(model, {"x": np.full((2, 7), 0.1, np.float32)})
    assert result.counts == {"rms_norm": 1}
    assert operators(result.model)["ReduceMean"] == 1


# A norm that is kept above a tiny number ----------------------------------------------------------------------------


def normalised(b: Build, least: float = 1e-12, most: float | None = None) -> str:
    """x / max(|x|, least), times the root of the size: RMS normalization as many write it."""
    x = b.input("x", ["B", 5])
    norm = b.node("ReduceL2", x, axes=[-1])
    clipped = b.node("Clip", norm, least) if most is None else b.node("Clip", norm, least, most)
    return b.mul(b.mul(b.div(x, clipped), float(np.sqrt(5.0))), numbers(5, seed=1))


def test_a_norm_that_is_kept_from_zero():
    b = Build()
    x = numbers(4, 5) * np.array([[1.0], [0.0], [1e-5], [1e3]], np.float32)
    result = same(b.model(normalised(b)), {"x": x})
    assert result.counts == {"rms_norm": 1}
    (got,) = run(result.model, {"x": x}).values()
    length = np.maximum(np.linalg.norm(x.astype(np.float64), axis=-1, keepdims=True), 1e-12)
    np.testing.assert_allclose(got, x / length * np.sqrt(5) * numbers(5, seed=1), rtol=1e-5)


@pytest.mark.parametrize(("least", "most"), [(1e-3, None), (1e-12, 2.0)])
def test_a_norm_that_is_clipped_otherwise_is_another_function(least, most):
    b = Build()
    assert not same(b.model(normalised(b, least, most)), {"x": numbers(4, 5) * 1e-3}).counts


def test_what_is_no_root_may_be_clipped():
    b = Build()
    x = b.input("x", ["B", 5])
    total = b.node("ReduceSumSquare", x, axes=[-1])
    assert not same(b.model(b.div(x, b.node("Clip", total, 1e-12))), {"x": numbers(4, 5)}).counts
