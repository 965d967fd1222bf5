"""Convolutions: what is done to each channel is done by their weights, and they pad for themselves."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from building import DOUBLE, FLOAT, FLOATS, HALF, Build, misses, numbers, operators, run, same
from onnx import TensorProto, numpy_helper

import fusion

IMAGE = {"x": numbers(2, 4, 7, 6, seed=1)}
GIVEN = ("N", 4, "H", "W")


def batch_norm(b, y, channels, seed=5, dtype=None, **attributes):
    draw = np.random.default_rng(seed)
    drawn = [draw.uniform(low, high, channels) for low, high in ((0.5, 2), (-1, 1), (-1, 1), (0.1, 3))]
    return b.node("BatchNormalization", y, *(own.astype(dtype or FLOATS[b.dtype]) for own in drawn), **attributes)


def attributes(model, op):
    (node,) = [node for node in model.graph.node if node.op_type == op]
    return {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}


def texts(result, pattern):
    return " ".join(text for _, text in misses(result, pattern))


def conv(b, x, w=(6, 4, 3, 3), bias=False, **options):
    return b.node("Conv", x, numbers(*w, seed=2), *([numbers(w[0], seed=3)] if bias else []), **options)


# Weights ----------------------------------------------------------------------------------------------------------


def test_the_folded_weights_are_what_the_formula_says():
    """One channel doubled and shifted by hand: (3 x + 1 - 5) / 2 * 4 + 7 = 6 x - 1, with variance + epsilon = 4."""
    b = Build()
    y = b.node("Conv", b.input("x", [1, 1, 2, 2]), np.float32([[[[3.0]]], [[[3.0]]]]), np.float32([1.0, 1.0]))
    parameters = (np.float32([own, own]) for own in (4.0, 7.0, 5.0, 3.5))
    result = same(b.model(b.node("BatchNormalization", y, *parameters, epsilon=0.5)), {"x": numbers(1, 1, 2, 2)})
    (node,) = result.model.graph.node
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in result.model.graph.initializer}
    assert [stored[name].ravel().tolist() for name in node.input[1:]] == [[6.0, 6.0], [-1.0, -1.0]]
    assert len(stored) == 2


@pytest.mark.parametrize("opset", [7, 8, 9, 11, 14, 15, 17, 20])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_batch_normalization_goes_into_the_convolution_before(op, group, bias, opset):
    """Of a transposed convolution the output channels are the second axis of the weights, group by group."""
    b = Build(opset)
    shape = (8, 4 // group, 3, 3) if op == "Conv" else (4, 8 // group, 3, 3)
    x = b.input("x", GIVEN)
    y = b.node(op, x, numbers(*shape, seed=2), *([numbers(8, seed=3)] if bias else []), group=group, strides=[2, 1])
    result = same(b.model(b.relu(batch_norm(b, y, 8, epsilon=1e-3, momentum=0.5))), IMAGE)
    assert operators(result.model) == {op: 1, "Relu": 1}
    assert result.counts == {"folded_batch_norm": 1}


@pytest.mark.parametrize("target", ["onnx", "ort-cpu"])
@pytest.mark.parametrize("rank", [3, 5])
def test_any_number_of_axes_of_space(rank, target):
    b = Build()
    space = (5, 6, 4)[: rank - 2]
    y = conv(b, b.input("x", ["N", 4, *"HWD"[: rank - 2]]), (6, 4, *(3,) * (rank - 2)))
    result = same(b.model(batch_norm(b, y, 6)), {"x": numbers(2, 4, *space)}, target=target)
    assert operators(result.model) == {"Conv": 1}


@pytest.mark.parametrize("swapped", [0, 1])
@pytest.mark.parametrize("row", [(6,), (1, 6), ()])
def test_batch_normalization_goes_into_gemm(row, swapped):
    b = Build()
    w = numbers(*((6, 4) if swapped else (4, 6)), seed=2)
    y = b.node("Gemm", b.input("x", ["N", 4]), w, numbers(*row, seed=3), alpha=0.5, beta=2.0, transB=swapped)
    result = same(b.model(batch_norm(b, y, 6)), {"x": numbers(3, 4)})
    assert operators(result.model) == {"Gemm": 1}


def test_a_column_added_by_gemm_is_no_bias():
    """Square, so that its length says nothing."""
    b = Build()
    y = b.node("Gemm", b.input("x", [6, 4]), numbers(4, 6, seed=2), numbers(6, 1, seed=3))
    result = same(b.model(batch_norm(b, y, 6)), {"x": numbers(6, 4)})
    assert operators(result.model) == {"Gemm": 1, "BatchNormalization": 1}


@pytest.mark.parametrize("shape", [(6, 1, 1), (1, 6, 1, 1)])
def test_factors_divisors_and_shifts_by_channel_are_folded_one_after_the_other(shape):
    b = Build()
    own = [numbers(*shape, seed=seed) + 3 for seed in range(6, 10)]
    y = b.add(own[0], b.mul(conv(b, b.input("x", GIVEN), bias=True), own[1]))
    y = b.div(b.sub(y, own[2]), own[3])
    result = same(b.model(batch_norm(b, y, 6)), IMAGE)
    assert operators(result.model) == {"Conv": 1}
    assert result.counts == {"folded_scale": 2, "folded_shift": 2, "folded_batch_norm": 1}


@pytest.mark.parametrize("shape", [(1, 4, 5, 4), (4, 5, 4), (4,), (1, 1, 5, 1), (2, 4, 1, 1), (1, 1, 4, 1, 1)], ids=str)
@pytest.mark.parametrize("op", ["Add", "Mul"])
def test_what_is_no_number_for_each_channel_stays(op, shape):
    """Channels, rows and columns of one size, so that only the place of an axis tells them apart."""
    b = Build()
    y = conv(b, b.input("x", [2, 4, 7, 6]), (4, 4, 3, 3))
    assert same(b.model(b.node(op, y, numbers(*shape, seed=6))), IMAGE).counts == {}


@pytest.mark.parametrize("number", [np.inf, np.nan, 1e30])
def test_factors_that_weights_cannot_take_stay(number):
    b = Build()
    factor = numbers(6, 1, 1, seed=6)
    factor[2] = number
    result = fusion.optimize(b.model(b.mul(conv(b, b.input("x", GIVEN)), factor)))
    assert operators(result.model) == {"Conv": 1, "Mul": 1}


def test_a_constant_read_backwards_is_not_taken_as_it_is_stored():
    b = Build()
    ends = (np.array([own]) for own in (-1, -(2**62), 0, -1))
    factor = b.node("Slice", numbers(6, 1, 1, seed=6), *ends)
    result = same(b.model(b.mul(conv(b, b.input("x", GIVEN)), factor)), IMAGE, patterns=["folded_scale"])
    assert operators(result.model) == {"Conv": 1, "Slice": 1, "Mul": 1}


def test_weights_in_constant_nodes_and_in_double():
    b = Build(dtype=DOUBLE)
    w = b.node("Constant", value=numpy_helper.from_array(numbers(6, 4, 3, 3, dtype=DOUBLE)))
    y = b.node("Conv", b.input("x", GIVEN), w)
    result = fusion.optimize(b.model(batch_norm(b, y, 6)), target="onnx")
    assert operators(result.model) == {"Conv": 1}
    before, after = (
        onnx.reference.ReferenceEvaluator(own).run(None, {"x": IMAGE["x"].astype(np.float64)})[0]
        for own in (b.model(*[node.output[0] for node in b.nodes[-1:]]), result.model)
    )
    np.testing.assert_allclose(after, before, rtol=1e-12, atol=1e-12)


def test_weights_in_half_precision_are_not_multiplied_and_their_bias_is_added():
    b = Build(dtype=HALF)
    y = b.add(b.node("Conv", b.input("x", GIVEN), numbers(6, 4, 3, 3, dtype=HALF)), numbers(6, 1, 1, dtype=HALF))
    result = fusion.optimize(b.model(batch_norm(b, y, 6)), target="onnx")
    assert operators(result.model) == {"Conv": 1, "BatchNormalization": 1}
    assert "may leave the numbers of its element type" in texts(result, "folded_batch_norm")


def test_a_norm_in_another_type_than_the_convolution_stays():
    b = Build(dtype=HALF)
    y = b.node("Conv", b.input("x", GIVEN), numbers(6, 4, 3, 3, dtype=HALF))
    y = batch_norm(b, b.node("Cast", y, to=FLOAT), 6, dtype=np.float32)
    result = fusion.optimize(b.model((y, FLOAT, None)), target="onnx")
    assert operators(result.model) == {"Conv": 1, "Cast": 1, "BatchNormalization": 1}


# Who else reads, and names ----------------------------------------------------------------------------------------


def test_a_convolution_that_others_read_keeps_its_weights():
    for outside in (True, False):
        b = Build()
        y = conv(b, b.input("x", GIVEN))
        normed = batch_norm(b, y, 6)
        model = b.model(normed, y) if outside else b.model(b.add(normed, b.relu(y)))
        result = same(model, IMAGE)
        assert operators(result.model)["BatchNormalization"] == 1
        assert y in texts(result, "folded_batch_norm")


def test_the_result_may_be_an_output_that_others_read():
    b = Build()
    y = b.mul(conv(b, b.input("x", GIVEN)), numbers(6, 1, 1, seed=4))
    result = same(b.model(b.relu(y), y), IMAGE)
    assert operators(result.model) == {"Conv": 1, "Relu": 1}


@pytest.mark.parametrize("names", ["unique", "none"])
def test_two_convolutions_that_share_weights_get_their_own(names):
    """The second one still reads the old weights when the first has new ones."""
    b = Build(names=names)
    x = b.input("x", GIVEN)
    w, bias = b.constant(numbers(6, 4, 3, 3, seed=2), "conv.weight"), b.constant(numbers(6, seed=3), "conv.bias")
    first, second, third = (b.node("Conv", own, w, bias) for own in (x, b.relu(x), b.tanh(x)))
    result = same(b.model(batch_norm(b, first, 6), batch_norm(b, second, 6, seed=8), third), IMAGE)
    assert operators(result.model)["Conv"] == 3
    assert result.counts == {"folded_batch_norm": 2}
    assert {"conv.weight", "conv.bias"} < {tensor.name for tensor in result.model.graph.initializer}


def test_large_weights_that_others_read_are_not_stored_twice():
    b = Build()
    x = b.input("x", ["N", 64, "H", "W"])
    w = b.constant(numbers(64, 64, 3, 3, seed=2, scale=0.1), "w")
    model = b.model(batch_norm(b, b.node("Conv", x, w), 64), b.node("Conv", b.relu(x), w))
    result = same(model, {"x": numbers(1, 64, 4, 4)})
    assert result.counts == {}
    assert "would be there twice" in texts(result, "folded_batch_norm")


def test_weights_stay_in_their_file_until_they_are_written(tmp_path, monkeypatch):
    """Nothing longer than the channels is read while the model is fused."""
    b = Build()
    y = conv(b, b.input("x", ["N", 16, "H", "W"]), (32, 16, 3, 3))
    model = b.model(batch_norm(b, y, 32))
    feeds = {"x": numbers(1, 16, 5, 5)}
    (before,) = run(model, feeds).values()
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    read = []
    array = fusion.models.model.Model.array
    monkeypatch.setattr(fusion.models.model.Model, "array", lambda self, own: read.append(own) or array(self, own))
    result = fusion.optimize(tmp_path / "model.onnx", tmp_path / "folded.onnx")
    assert [own.dims for own in read if len(own.dims) > 1] == [[32, 16, 3, 3]], "once, to be written"
    assert result.counts == {"folded_batch_norm": 1}
    (after,) = run(onnx.load(tmp_path / "folded.onnx"), feeds).values()
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)


def test_folded_weights_are_checked_as_others():
    b = Build()
    result = same(b.model(batch_norm(b, conv(b, b.input("x", GIVEN)), 6)), IMAGE, check=True)
    assert [made.checked for made in result.matches] == [True]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"training_mode": 1}, "no fixed statistics"),
        ({"variance": 0.0}, "a variance of 0"),
        ({"computed": True}, "which no capture binds"),
    ],
    ids=str,
)
def test_statistics_must_be_fixed_and_sound(given, reason):
    b = Build()
    y = conv(b, b.input("x", GIVEN))
    ones = np.ones(6, np.float32)
    if "computed" in given:
        variance = b.input("v", [6])
    else:
        variance = ones * given.get("variance", 1.0)
    flags = {name: value for name, value in given.items() if name == "training_mode"}
    y = b.node("BatchNormalization", y, ones, ones, ones, variance, epsilon=0.0, **flags)
    result = fusion.optimize(b.model(y))
    assert result.counts == {}
    assert reason in texts(result, "folded_batch_norm")


def test_weights_that_a_caller_may_replace_are_not_folded():
    b = Build()
    w = b.constant(numbers(6, 4, 3, 3), "w")
    b.input("w", [6, 4, 3, 3])
    result = same(b.model(batch_norm(b, b.node("Conv", b.input("x", GIVEN), w), 6)), IMAGE)
    assert result.counts == {}


# Padding ----------------------------------------------------------------------------------------------------------


def pad(b, x, pads, value=None, **options):
    """Pad around rows and columns: attributes below opset 11, inputs from there on, axes from 18 on."""
    if b.opset < 11:
        return b.node("Pad", x, pads=pads, **({} if value is None else {"value": value}), **options)
    given = [] if value is None else [np.array(value, FLOATS[b.dtype])]
    if b.opset >= 18 and pads[:2] + pads[4:6] == [0] * 4:
        return b.node("Pad", x, np.array(pads[2:4] + pads[6:]), *(given or [""]), np.array([-2, 3]), **options)
    return b.node("Pad", x, np.array(pads), *given, **options)


@pytest.mark.parametrize("opset", [8, 10, 11, 13, 17, 18, 20])
@pytest.mark.parametrize("options", [{}, {"value": 0.0}, {"mode": "constant"}], ids=str)
@pytest.mark.parametrize("own", [{}, {"pads": [1, 0, 0, 2]}, {"auto_pad": "VALID"}, {"auto_pad": "NOTSET"}], ids=str)
def test_zeros_around_an_image_are_the_convolution_s(own, options, opset):
    """Rows 1 and 2 more, columns 3 and 0 more, besides what the convolution pads itself."""
    b = Build(opset)
    y = conv(b, pad(b, b.input("x", GIVEN), [0, 0, 1, 3, 0, 0, 2, 0], **options), bias=True, **own)
    result = same(b.model(y), IMAGE)
    assert operators(result.model) == {"Conv": 1}
    before = own.get("pads", [0, 0, 0, 0])
    wanted = [more + have for more, have in zip([1, 3, 2, 0], before, strict=True)]
    assert attributes(result.model, "Conv")["pads"] == wanted
    assert "auto_pad" not in attributes(result.model, "Conv") or own == {"auto_pad": "NOTSET"}


@pytest.mark.parametrize(
    ("pads", "options", "own", "reason"),
    [
        ([0, 0, -1, 0, 0, 0, 1, 1], {}, {}, "crops"),
        ([0, 1, 0, 0, 0, 1, 0, 0], {}, {}, "other axes than those of space"),
        ([1, 0, 0, 0, 0, 0, 0, 0], {}, {}, "other axes than those of space"),
        ([0, 0, 1, 1, 0, 0, 1, 1], {"value": 1.0}, {}, "does not pad with 0"),
        ([0, 0, 1, 1, 0, 0, 1, 1], {"mode": "reflect"}, {}, "does not pad with 0"),
        ([0, 0, 1, 1, 0, 0, 1, 1], {"mode": "edge"}, {}, "does not pad with 0"),
        ([0, 0, 1, 1, 0, 0, 1, 1], {}, {"auto_pad": "SAME_UPPER"}, "depends on the size"),
    ],
    ids=str,
)
@pytest.mark.parametrize("opset", [10, 17, 19])
def test_other_padding_stays(opset, pads, options, own, reason):
    b = Build(opset)
    channels = 4 + pads[1] + pads[5]
    y = conv(b, pad(b, b.input("x", GIVEN), pads, **options), (6, channels, 3, 3), **own)
    result = same(b.model(y), IMAGE)
    assert operators(result.model) == {"Pad": 1, "Conv": 1}
    assert reason in texts(result, "padded_convolution")


def test_padding_that_is_computed_at_run_time_stays():
    b = Build()
    x, pads = b.input("x", GIVEN), b.input("pads", [8], TensorProto.INT64)
    result = same(b.model(conv(b, b.node("Pad", x, pads))), IMAGE | {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1])})
    assert result.counts == {}


def test_each_reader_takes_the_padding_with_it():
    """Two convolutions of other sizes, weights that are inputs, and one more that pads by size: it keeps the Pad."""
    for third in (False, True):
        b = Build()
        padded = pad(b, b.input("x", GIVEN), [0, 0, 2, 2, 0, 0, 2, 2])
        w = b.input("w", [6, 4, 3, 3])
        outputs = [b.node("Conv", padded, w), conv(b, padded, (6, 4, 5, 5), pads=[1, 1, 1, 1])]
        outputs += [conv(b, padded, auto_pad="SAME_LOWER")] if third else []
        result = same(b.model(*outputs), IMAGE | {"w": numbers(6, 4, 3, 3)})
        assert result.counts == {"padded_convolution": 2}
        assert operators(result.model)["Pad"] == third


@pytest.mark.parametrize("outside", [True, False])
def test_what_is_padded_for_others_too_stays(outside):
    b = Build()
    padded = pad(b, b.input("x", GIVEN), [0, 0, 1, 1, 0, 0, 1, 1])
    outputs = [conv(b, padded), padded if outside else b.relu(padded)]
    result = same(b.model(*outputs), IMAGE)
    assert result.counts == {}
    assert "1 new nodes would replace 1" in texts(result, "padded_convolution")


def test_padding_and_normalization_around_one_convolution():
    b = Build()
    padded = pad(b, b.input("x", GIVEN), [0, 0, 1, 1, 0, 0, 1, 1])
    result = same(b.model(batch_norm(b, conv(b, padded, bias=True), 6)), IMAGE)
    assert operators(result.model) == {"Conv": 1}


@pytest.mark.parametrize(
    ("op", "value", "options", "fused"),
    [
        ("AveragePool", 0.0, {}, True),
        ("AveragePool", 0.0, {"count_include_pad": 1, "pads": [1, 0, 1, 0]}, True),
        ("AveragePool", 0.0, {"pads": [1, 0, 1, 0]}, False),
        ("AveragePool", 1.0, {}, False),
        ("AveragePool", 0.0, {"ceil_mode": 1, "strides": [2, 2]}, False),
        ("MaxPool", -np.inf, {"strides": [2, 1]}, True),
        ("MaxPool", 0.0, {}, False),
        ("MaxPool", None, {}, False),
    ],
    ids=str,
)
def test_padding_before_pooling(op, value, options, fused):
    """A mean counts the zeros, if it is told to; a maximum is not that of zeros. All numbers are below 0."""
    b = Build()
    padded = pad(b, b.input("x", GIVEN), [0, 0, 1, 2, 0, 0, 1, 1], value)
    result = same(b.model(b.node(op, padded, kernel_shape=[3, 3], **options)), {"x": -np.abs(IMAGE["x"]) - 1})
    assert operators(result.model) == ({op: 1} if fused else {op: 1, "Pad": 1})


def test_a_window_of_nothing_but_padding_is_left():
    """onnxruntime refuses such padding of a pool."""
    b = Build()
    padded = pad(b, b.input("x", GIVEN), [0, 0, 3, 0, 0, 0, 0, 0])
    result = same(b.model(b.node("AveragePool", padded, kernel_shape=[3, 3])), IMAGE)
    assert operators(result.model) == {"AveragePool": 1, "Pad": 1}
    assert "a window of padding" in texts(result, "padded_pooling")
