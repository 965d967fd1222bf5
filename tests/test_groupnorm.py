"""Group and instance normalization: as exporters write them, against numpy; what has no exact kernel is left alone."""

from __future__ import annotations

import numpy as np
import pytest
from building import DOUBLE, FLOATS, HALF, Build, numbers, operators, run, same

OPSETS = (11, 13, 17, 18, 21)
SHAPES = {"audio": (2, 6, 9), "image": (2, 6, 4, 5), "volume": (2, 6, 3, 2, 4), "square": (6, 6, 6, 6)}


def reference(x, groups, scale=1.0, bias=0.0, eps=1e-5):
    """Group normalization (Wu & He 2018, eq. 1 and 7), in doubles; scale and bias by channel."""
    grouped = x.astype(np.float64).reshape(len(x), groups, -1)
    centred = grouped - grouped.mean(-1, keepdims=True)
    normed = (centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)).reshape(x.shape)
    channels = (-1, *([1] * (x.ndim - 2)))
    return normed * np.reshape(scale, channels) + np.reshape(bias, channels)


def group_norm(b: Build, x: str, shape, groups: int, scale, bias, *, eps=1e-5, ones=None, zeros=None, dynamic=False):
    """What the exporter writes for a torch.nn.GroupNorm below opset 21."""
    ones = np.ones(groups, FLOATS[b.dtype]) if ones is None else ones
    zeros = np.zeros(groups, FLOATS[b.dtype]) if zeros is None else zeros
    grouped = b.node("Reshape", x, np.array([0, groups, -1]))
    normed = b.node("InstanceNormalization", grouped, ones, zeros, epsilon=eps)
    back = b.node("Reshape", normed, b.shape(x) if dynamic else np.array(shape))
    channels = (-1, *([1] * (len(shape) - 2)))
    scaled = b.mul(back, scale.reshape(channels)) if scale is not None else back
    return b.add(scaled, bias.reshape(channels)) if bias is not None else scaled


def norms(model):
    return {op: count for op, count in operators(model).items() if op != "Shape"}


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_group_of_one_channel_is_an_instance_norm(shape, dynamic, opset):
    b, dims = Build(opset), SHAPES[shape]
    declared = ["N", dims[1], *(f"d{axis}" for axis in range(2, len(dims)))] if dynamic else list(dims)
    scale, bias = numbers(6, seed=1), numbers(6, seed=2)
    y = group_norm(b, b.input("x", declared), dims, 6, scale, bias, eps=1e-3, dynamic=dynamic)
    feeds = {"x": numbers(*dims, seed=3)}
    result = same(b.model(y), feeds)
    one = {"InstanceNormalization": 1}
    assert norms(result.model) == (one | {"Mul": 1, "Add": 1} if dynamic else one)
    (got,) = run(result.model, feeds).values()
    np.testing.assert_allclose(got, reference(feeds["x"], 6, scale, bias, 1e-3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axes", [(2, 3), (-1, -2)])
def test_an_instance_norm_written_out(axes):
    b = Build()
    scale, bias = numbers(6, seed=1), numbers(6, seed=2)
    x = b.input("x", ["N", 6, 4, 5])
    d = b.sub(x, b.mean(x, axes))
    normed = b.div(d, b.sqrt(b.add(b.mean(b.mul(d, d), axes), 1e-5)))
    y = b.add(b.mul(normed, scale.reshape(6, 1, 1)), bias.reshape(6, 1, 1))
    feeds = {"x": numbers(2, 6, 4, 5, seed=3)}
    result = same(b.model(y), feeds)
    assert operators(result.model) == {"InstanceNormalization": 1}
    (got,) = run(result.model, feeds).values()
    np.testing.assert_allclose(got, reference(feeds["x"], 6, scale, bias), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_groups_of_several_channels_stay_as_they_are(shape, groups):
    """No CPU kernel: onnxruntime writes GroupNormalization out with a variance that cancels."""
    b, dims = Build(21), SHAPES[shape]
    scale, bias = numbers(6, seed=1), numbers(6, seed=2)
    y = group_norm(b, b.input("x", list(dims)), dims, groups, scale, bias)
    result = same(b.model(y), {"x": numbers(*dims)})
    assert operators(result.model) == {"Reshape": 2, "InstanceNormalization": 1, "Mul": 1, "Add": 1}


@pytest.mark.parametrize("wrong", ["scale", "bias", "spatial", "last axis", "epsilon", "regrouped"])
def test_what_is_no_instance_norm(wrong):
    """One thing differs; equal to what it was, whatever is made of it."""
    dims = (6, 6, 6, 6)
    b = Build()
    x = b.input("x", list(dims))
    scale, bias = numbers(6, seed=1), numbers(6, seed=2)
    given = {"scale": {"ones": numbers(6, seed=4)}, "bias": {"zeros": numbers(6, seed=4)}, "epsilon": {"eps": 1e-9}}
    if wrong in ("spatial", "last axis"):
        weight = numbers(6, 1, seed=1) if wrong == "spatial" else numbers(6, seed=1)
        y = b.mul(group_norm(b, x, dims, 6, None, None), weight)
    else:
        y = group_norm(b, x, (36, 1, 6, 6) if wrong == "regrouped" else dims, 6, scale, bias, **given.get(wrong, {}))
    same(b.model(y), {"x": numbers(*dims)})


@pytest.mark.parametrize("dtype", [HALF, DOUBLE])
def test_other_element_types_stay_equal(dtype):
    b, dims = Build(dtype=dtype), SHAPES["image"]
    scale, bias = (numbers(6, seed=seed, dtype=dtype) for seed in (1, 2))
    same(b.model(group_norm(b, b.input("x", list(dims)), dims, 6, scale, bias)), {"x": numbers(*dims, dtype=dtype)})


def test_a_mean_that_lies_far_from_zero_is_still_exact():
    b, dims = Build(), SHAPES["image"]
    y = group_norm(b, b.input("x", list(dims)), dims, 6, numbers(6, seed=1), numbers(6, seed=2))
    feeds = {"x": numbers(*dims) + 1000}
    (got,) = run(same(b.model(y), feeds, tolerance=1e-3).model, feeds).values()
    np.testing.assert_allclose(got, reference(feeds["x"], 6, numbers(6, seed=1), numbers(6, seed=2)), atol=2e-3)


def test_a_weight_of_one_plus_w_is_bound_whole():
    b = Build()
    x = b.input("x", ["B", "S", 5])
    y = b.mul(b.div(x, b.sqrt(b.add(b.mean(b.mul(x, x)), 1e-6))), b.add(1.0, b.constant(numbers(5, seed=1))))
    feeds = {"x": numbers(2, 3, 5)}
    result = same(b.model(y), feeds)
    assert operators(result.model) == {"Add": 1, "SimplifiedLayerNormalization": 1}


# -- several channels a group, for the standard -----------------------------------------------------------------------


def written_out(b: Build, x: str, shape, groups: int, scale, bias, *, eps=1e-5, over=None):
    """Group normalization without an operator for it: means of (N, G, C / G, …) over all axes but two."""
    grouped = b.reshape(x, np.array([0, groups, shape[1] // groups, *shape[2:]]))
    axes = tuple(range(2, len(shape) + 1)) if over is None else over
    d = b.sub(grouped, b.mean(grouped, axes))
    normed = b.div(d, b.sqrt(b.add(b.mean(b.mul(d, d), axes), eps)))
    channels = (-1, *([1] * (len(shape) - 2)))
    scaled = b.mul(b.reshape(normed, np.array([0, *shape[1:]])), scale.reshape(channels))
    return scaled if bias is None else b.add(scaled, bias.reshape(channels))


@pytest.mark.parametrize("form", ["exported", "dynamic", "written out", "no bias"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_groups_of_several_channels_become_the_standard_operator(shape, groups, form):
    b, dims = Build(21), SHAPES[shape]
    scale, bias = numbers(6, seed=1), None if form == "no bias" else numbers(6, seed=2)
    x = b.input("x", ["N", 6, *(f"d{axis}" for axis in range(2, len(dims)))] if form == "dynamic" else list(dims))
    if form == "written out":
        y = written_out(b, x, dims, groups, scale, bias, eps=1e-3)
    else:
        y = group_norm(b, x, dims, groups, scale, bias, eps=1e-3, dynamic=form == "dynamic")
    feeds = {"x": numbers(*dims, seed=3)}
    result = same(b.model(y), feeds, target="onnx", tolerance=1e-4)
    assert norms(result.model) == {"GroupNormalization": 1}
    (got,) = run(result.model, feeds).values()
    expected = reference(feeds["x"], groups, scale, 0.0 if bias is None else bias, 1e-3)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("opset", [17, 18, 20])
def test_below_opset_21_it_has_scale_and_bias_of_groups(opset):
    b, dims = Build(opset), SHAPES["image"]
    y = group_norm(b, b.input("x", list(dims)), dims, 2, numbers(6, seed=1), numbers(6, seed=2))
    assert "GroupNormalization" not in operators(same(b.model(y), {"x": numbers(*dims)}, target="onnx").model)


@pytest.mark.parametrize("wrong", ["scale", "bias", "spatial", "last axis", "regrouped", "one axis", "two norms"])
def test_what_is_no_group_norm(wrong):
    b, dims = Build(21), (6, 6, 6, 6)
    x, scale, bias = b.input("x", list(dims)), numbers(6, seed=1), numbers(6, seed=2)
    given = {"scale": {"ones": numbers(3, seed=4)}, "bias": {"zeros": numbers(3, seed=4)}}
    if wrong in ("spatial", "last axis"):
        y = b.mul(group_norm(b, x, dims, 3, None, None), numbers(6, 1, seed=1) if wrong == "spatial" else scale)
    elif wrong == "one axis":
        y = written_out(b, x, dims, 3, scale, bias, over=(2, 3))
    elif wrong == "two norms":  # the scale is that of groups, the bias of another grouping
        y = b.add(group_norm(b, x, dims, 3, scale, None), group_norm(b, x, dims, 2, scale, None))
    else:
        y = group_norm(b, x, (1, 6, 36, 6) if wrong == "regrouped" else dims, 3, scale, bias, **given.get(wrong, {}))
    result = same(b.model(y), {"x": numbers(*dims)}, target="onnx", tolerance=1e-4)
    assert operators(result.model).get("GroupNormalization", 0) == (2 if wrong == "two norms" else 0)
