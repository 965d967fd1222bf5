"""Activations written out, also where exp overflows, and piecewise ones."""

from __future__ import annotations

import numpy as np
import pytest
from building import DOUBLE, HALF, Build, numbers, operators, run, same

import fusion

EDGES = np.array([[-np.inf, -1e30, -104.0, -89.0, -17.0, 0.0, 17.0, 89.0, 1e30, np.inf, np.nan]], np.float32)


@pytest.mark.parametrize("opset", [11, 17, 21])
@pytest.mark.parametrize("product", [False, True])
def test_a_logistic_function_written_out(product, opset):
    b = Build(opset)
    x = b.input("x", ["B", 11])
    y = b.div(x if product else 1.0, b.add(1.0, b.node("Exp", b.neg(x))))
    result = same(b.model(y), [{"x": numbers(3, 11)}, {"x": EDGES}])
    assert operators(result.model) == {"QuickGelu" if product else "Sigmoid": 1}
    (got,) = run(result.model, {"x": numbers(3, 11)}).values()
    x64 = numbers(3, 11).astype(np.float64)
    np.testing.assert_allclose(got, (x64 if product else 1.0) / (1 + np.exp(-x64)), rtol=1e-5)


@pytest.mark.parametrize("tanh", [False, True])
def test_a_gelu_whose_branches_are_transposed_each(tanh):
    """Transposed before the product, not before the function: the fused node reads one transposition."""
    b = Build(20)
    x = b.input("x", ["B", 3, 4])
    inner = b.add(x, b.mul(0.044715, b.pow(x, 3.0))) if tanh else x
    scaled = b.transpose(b.mul(inner, float(np.sqrt(2 / np.pi)) if tanh else float(np.sqrt(0.5))), perm=[0, 2, 1])
    half = b.transpose(b.mul(0.5, x), perm=[0, 2, 1])
    y = b.mul(half, b.add(1.0, b.tanh(scaled) if tanh else b.erf(scaled)))
    result = same(b.model(y), {"x": numbers(2, 3, 4)})
    assert operators(result.model) == {"Transpose": 1, "Gelu": 1}


@pytest.mark.parametrize("wrong", ["two", "no minus", "other x"])
def test_what_is_no_logistic_function(wrong):
    b = Build()
    x = b.input("x", ["B", 11])
    power = b.node("Exp", x if wrong == "no minus" else b.neg(b.relu(x) if wrong == "other x" else x))
    y = b.div(x, b.add(2.0 if wrong == "two" else 1.0, power))
    result = same(b.model(y), {"x": numbers(3, 11)})
    assert "QuickGelu" not in operators(result.model) or wrong == "no minus"


def test_half_precision_stays_equal():
    b = Build(dtype=HALF)
    x = b.input("x", ["B", 11])
    same(b.model(b.div(1.0, b.add(1.0, b.node("Exp", b.neg(x))))), {"x": numbers(3, 11, dtype=HALF)})


def softplus(b, x, *, stable=True):
    if not stable:
        return b.node("Log", b.add(1.0, b.node("Exp", x)))
    return b.add(b.relu(x), b.node("Log", b.add(1.0, b.node("Exp", b.neg(b.node("Abs", x))))))


def test_a_softplus_that_cannot_overflow():
    b = Build()
    result = same(b.model(softplus(b, b.input("x", ["B", 11]))), [{"x": numbers(3, 11)}, {"x": EDGES}])
    assert operators(result.model) == {"Softplus": 1}


def test_a_softplus_that_overflows_is_left():
    b = Build()
    result = same(b.model(softplus(b, b.input("x", ["B", 11]), stable=False)), {"x": EDGES})
    assert "Softplus" not in operators(result.model)


@pytest.mark.parametrize("form", ["Softplus", "stable", "overflowing"])
def test_mish(form):
    """Where exp(x) overflows, tanh(inf) is 1, and Mish is x too."""
    b = Build(18)
    x = b.input("x", ["B", 11])
    inner = b.node("Softplus", x) if form == "Softplus" else softplus(b, x, stable=form == "stable")
    y = b.mul(x, b.node("Tanh", inner))
    result = same(b.model(y), [{"x": numbers(3, 11)}, {"x": EDGES}], target="onnx")
    assert operators(result.model) == {"Mish": 1}
    assert "Mish" not in operators(same(b.model(y), {"x": EDGES}).model)  # it is expanded there
    (got,) = run(result.model, {"x": numbers(3, 11)}).values()
    x64 = numbers(3, 11).astype(np.float64)
    np.testing.assert_allclose(got, x64 * np.tanh(np.log1p(np.exp(x64))), rtol=1e-5, atol=1e-6)


def hard_swish(b, x, form, *, low=0.0, high=6.0, shift=3.0):
    """x relu6(x + 3) / 6, as exporters write it."""
    if form == "HardSigmoid":
        return b.mul(x, b.node("HardSigmoid", x, alpha=1 / 6, beta=0.5))
    moved = b.add(x, shift)
    clipped = b.node("Clip", moved, min=low, max=high) if b.opset < 11 else b.node("Clip", moved, low, high)
    return b.mul(b.div(x, 6.0), clipped) if form == "x / 6" else b.div(b.mul(x, clipped), 6.0)


@pytest.mark.parametrize("form", ["Clip", "x / 6", "HardSigmoid"])
def test_hard_swish(form):
    b = Build(14)
    model = b.model(hard_swish(b, b.input("x", ["B", 11]), form))
    feeds = [{"x": numbers(3, 11)}, {"x": EDGES}]
    for target in ("onnx", "ort-cuda"):
        assert operators(same(model, feeds, target=target).model) == {"HardSwish": 1}
    assert "HardSwish" not in operators(same(model, feeds).model)
    (got,) = run(fusion.optimize(model, target="onnx").model, feeds[0]).values()
    x = feeds[0]["x"].astype(np.float64)
    np.testing.assert_allclose(got, x * np.clip(x + 3, 0, 6) / 6, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("opset", [7, 11, 22])
def test_a_hard_sigmoid_written_with_clip(opset):
    b = Build(opset)
    x = b.input("x", ["B", 11])
    clip = {"min": 0.0, "max": 6.0}
    moved = b.add(x, 3.0)
    y = b.div(b.node("Clip", moved, **clip) if opset < 11 else b.node("Clip", moved, 0.0, 6.0), 6.0)
    result = same(b.model(y), [{"x": numbers(3, 11)}, {"x": EDGES}])
    assert operators(result.model) == {"HardSigmoid": 1}


@pytest.mark.parametrize("wrong", [{"high": 9.0}, {"low": -1.0}, {"shift": 2.0}, {"high": np.inf}, {"low": -np.inf}])
def test_what_is_no_hard_swish(wrong):
    b = Build(14)
    result = same(b.model(hard_swish(b, b.input("x", ["B", 11]), "Clip", **wrong)), {"x": EDGES}, target="onnx")
    assert "HardSwish" not in operators(result.model)


def test_a_clip_that_does_not_start_at_0_is_named():
    b = Build()
    y = b.node("Clip", b.add(b.mul(b.input("x", ["B", 11]), 0.25), 0.5), 0.125, 1.0)
    (place,) = fusion.why(b.model(y), "hard_sigmoid").places
    assert [miss.text for miss in place.misses] == ["expected a clamp from 0, found from 0.125 times the upper bound"]


def quotient(b, x, axis=-1, *, form="Div", shift=True, over=None):
    """exp(x - max(x)) / sum(exp(x - max(x))), as it is written where there is no Softmax."""
    power = b.node("Exp", b.sub(x, b.max_over(x, (axis,))) if shift else x)
    total = b.sum(power, (axis if over is None else over,))
    return b.div(power, total) if form == "Div" else b.mul(b.node("Reciprocal", total), power)


@pytest.mark.parametrize("form", ["Div", "Reciprocal"])
@pytest.mark.parametrize("dims", [["N", "S", 5], [2, 3, 5], ["N", "S", "T"]])
def test_a_softmax_written_out(dims, form):
    b = Build()
    feeds = [{"x": numbers(2, 3, 5, seed=seed) * scale} for seed, scale in ((1, 1.0), (2, 200.0))]
    model = b.model(quotient(b, b.input("x", dims), form=form))
    result = same(model, feeds)
    assert operators(result.model) == {"Softmax": 1}
    x = feeds[1]["x"].astype(np.float64)
    e = np.exp(x - x.max(-1, keepdims=True))
    (got,) = run(result.model, feeds[1]).values()
    np.testing.assert_allclose(got, e / e.sum(-1, keepdims=True), rtol=1e-5, atol=1e-7)


def test_infinities_and_nan_in_a_softmax_stay_what_they_are():
    b = Build()
    x = np.array([[0, -np.inf, 1], [-np.inf, -np.inf, -np.inf], [0, np.inf, 1], [0, np.nan, 1]], np.float32)
    assert operators(same(b.model(quotient(b, b.input("x", ["N", 3]))), {"x": x}).model) == {"Softmax": 1}


def test_a_maximum_before_a_softmax_is_not_needed():
    b = Build()
    x = b.input("x", ["N", "S", 5])
    y = b.softmax(b.sub(x, b.max_over(x, (-1,))), axis=-1)
    assert operators(same(b.model(y), {"x": numbers(2, 3, 5)}).model) == {"Softmax": 1}


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_softmax_over_another_axis_than_the_last(axis, op):
    """From opset 13 on there is one along any axis; below, the operator flattens."""
    for opset in (11, 17):
        b = Build(opset)
        x = b.input("x", ["N", 3, 5])
        y = quotient(b, x, axis=axis) if op == "Softmax" else log_softmax(b, x, axis=axis)
        result = same(b.model(y), {"x": numbers(2, 3, 5)})
        assert operators(result.model)[op] == (opset > 11)
        assert opset > 11 or "flattens" in str(result.near_misses) or op == "Softmax"


def log_softmax(b, x, axis=-1, *, form="shared", over=None):
    """x - max(x) - log(sum(exp(x - max(x))))."""
    shifted = b.sub(x, b.max_over(x, (axis,)))
    log = b.node("Log", b.sum(b.node("Exp", shifted), (axis,)))
    if form == "shared":
        return b.sub(shifted, log)
    top = b.max_over(x, (axis if over is None else over,))
    return b.sub(x, b.add(log, top)) if form == "together" else b.sub(b.sub(x, top), log)


@pytest.mark.parametrize("form", ["shared", "together", "apart"])
@pytest.mark.parametrize("dims", [["N", "S", 5], [2, 3, 5], ["N", "S", "T"]])
@pytest.mark.parametrize("opset", [11, 13, 18, 20])
def test_a_log_softmax_written_out(opset, dims, form):
    """Finite at probabilities that are 0, and what it is where a number is infinite."""
    b = Build(opset)
    feeds = [{"x": numbers(2, 3, 5, seed=seed) * scale} for seed, scale in ((1, 1.0), (2, 300.0))]
    odd = numbers(2, 3, 5, seed=3)
    odd[0, 0, :], odd[0, 1, 2], odd[0, 2, 1], odd[1, 0, 0] = -np.inf, np.inf, np.nan, -np.inf
    result = same(b.model(log_softmax(b, b.input("x", dims), form=form)), [*feeds, {"x": odd}])
    assert operators(result.model) == {"LogSoftmax": 1}
    x = feeds[1]["x"].astype(np.float64)
    d = x - x.max(-1, keepdims=True)
    (got,) = run(result.model, feeds[1]).values()
    np.testing.assert_allclose(got, d - np.log(np.exp(d).sum(-1, keepdims=True)), rtol=1e-5, atol=1e-4)
    assert got.min() < -600


def test_what_is_no_log_softmax():
    """The logarithm of a softmax is -inf where that is 0; other maxima overflow elsewhere, or shift the result."""
    for form in ("log", "over", "sum"):
        b = Build()
        x = b.input("x", [4, 4])
        if form == "log":
            y = b.node("Log", b.softmax(x, axis=-1))
        elif form == "over":
            y = log_softmax(b, x, form="apart", over=0)
        else:
            d = b.sub(x, b.max_over(x))
            y = b.sub(d, b.node("Log", b.sum(b.node("Exp", d), (0,))))
        result = same(b.model(y), {"x": numbers(4, 4) * 100})
        assert "LogSoftmax" not in operators(result.model)


def test_a_nan_guard_behind_it_stays():
    b = Build()
    p = quotient(b, b.input("x", ["N", 3]))
    y = b.node("Where", b.node("IsNaN", p), 0.0, p)
    result = same(b.model(y), {"x": np.array([[-np.inf] * 3, [1, 2, 3]], np.float32)})
    assert operators(result.model) == {"Softmax": 1, "IsNaN": 1, "Where": 1}


@pytest.mark.parametrize("wrong", [{"shift": False}, {"over": 0}, {"over": 1, "axis": 0}])
def test_what_is_no_softmax(wrong):
    b = Build()
    model = b.model(quotient(b, b.input("x", [4, 4]), **wrong))
    assert "Softmax" not in operators(same(model, {"x": numbers(4, 4)}).model)
    misses = [miss.text for place in fusion.why(model, "stable_softmax").places for miss in place.misses]
    assert misses[0] == "expected exp(x - max(x)), found exp(x), which overflows"


@pytest.mark.parametrize("alpha", [1.0, 1.702])
@pytest.mark.parametrize("dims", [["B", 11], ["B", 1]])
def test_a_gate_of_the_same_shape_is_a_swiglu(dims, alpha):
    """The standard operator broadcasts nothing."""
    b = Build(28)
    gate, up = b.input("gate", ["B", 11]), b.input("up", dims)
    y = b.mul(up, b.mul(gate, b.node("Sigmoid", b.mul(gate, alpha))))
    feeds = {"gate": numbers(3, 11), "up": numbers(3, dims[1], seed=1)}
    found = operators(same(b.model(y), feeds, target="onnx").model)
    assert found == ({"SwiGLU": 1} if dims[1] == 11 else {"Swish": 1, "Mul": 1})
    (got,) = run(fusion.optimize(b.model(y), target="onnx").model, feeds).values()
    wide = feeds["gate"].astype(np.float64)
    np.testing.assert_allclose(got, wide / (1 + np.exp(-alpha * wide)) * feeds["up"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_the_tanh_gelu_of_doubles_is_left_to_doubles(bias):
    """The kernel of FastGelu holds its numbers in single precision."""
    b = Build(dtype=DOUBLE)
    x = b.input("x", [3, 4])
    h = b.add(x, numbers(4, dtype=DOUBLE)) if bias else x
    t = b.tanh(b.mul(b.add(h, b.mul(b.pow(h, 3.0), 0.044715)), (2 / np.pi) ** 0.5))
    model = b.model(b.mul(b.mul(h, 0.5), b.add(t, 1.0)))
    for target in ("ort-cpu", "ort-cuda"):
        assert not same(model, {"x": numbers(3, 4, dtype=DOUBLE)}, target=target).matches
