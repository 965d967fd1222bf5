"""Convolutions and pooling with the padding before them, and with what is done to each channel after them."""

import numpy as np

from fusion.language import either, operand, operator, pattern
from fusion.schema import attribute, axes, extra_attributes

CONVOLUTIONS = "Conv ConvTranspose"


@pattern(x=operand())
def folded_batch_norm(x):
    """Batch normalization with fixed statistics (Ioffe & Szegedy 2015, algorithm 2), in the layer before it."""
    layer = operator(f"{CONVOLUTIONS} Gemm", x, dims="N C ...")
    return operator("BatchNormalization", layer, dims="N C ...")


@pattern(x=operand(), factor="C", divisor="C")
def folded_scale(x, factor, divisor):
    """A factor for each channel, in the weights of the convolution before it (Jacob et al. 2018, section 3.2)."""
    layer = operator(CONVOLUTIONS, x, dims="N C ...")
    return either(layer * factor, layer / divisor)


@pattern(x=operand(), shift="C", less="C")
def folded_shift(x, shift, less):
    """A number added to each channel, or subtracted, in the bias of the convolution before it."""
    layer = operator(CONVOLUTIONS, x, dims="N C ...")
    return either(layer + shift, layer - less)


@pattern(x=operand(), w=operand(), b=operand(absent=True))
def padded_convolution(x, w, b):
    """A convolution of an image with zeros around it (Dumoulin & Visin 2016, section 2.2)."""
    return operator("Conv", operator("Pad", x, dims="..."), w, b, dims="...")


@pattern(x=operand())
def padded_pooling(x):
    """Mean pooling of an image with zeros around it, or maximum pooling with -inf."""
    return operator("AveragePool MaxPool", operator("Pad", x, dims="..."), dims="...")


@folded_batch_norm.emit("onnx", "ort-cpu", "ort-cuda")
def _(found, op):
    norm = found.computed_by("BatchNormalization")
    fixed = norm.version >= 7 and len(norm.outputs) == 1 and not extra_attributes(norm, ("epsilon", "momentum"))
    found.require(fixed, f"{norm.label} has no fixed statistics by channel")
    scale, bias, mean, variance = (op.vector(norm.input(slot)) for slot in range(1, 5))
    spread = variance + attribute(norm, "epsilon")
    found.require(bool((spread > 0).all()), f"{norm.label} has a variance of 0 or below")
    factor = scale / np.sqrt(spread)
    layer = found.computed_by(*CONVOLUTIONS.split(), "Gemm")
    return op.folded(layer, factor=factor, shift=bias - mean * factor)


@folded_scale.emit("onnx", "ort-cpu", "ort-cuda")
def _(found, op):
    factor = op.vector(found.factor) if found.factor else 1 / op.vector(found.divisor)
    return op.folded(found.computed_by(*CONVOLUTIONS.split()), factor=factor, shift=np.zeros(len(factor)))


@folded_shift.emit("onnx", "ort-cpu", "ort-cuda")
def _(found, op):
    shift = op.vector(found.shift) if found.shift else -op.vector(found.less)
    return op.folded(found.computed_by(*CONVOLUTIONS.split()), factor=None, shift=shift)


def _integers(node, name):
    found = attribute(node, name)
    return found if isinstance(found, list) else []


def _padded(found, layer, fill):
    """The attribute `pads` of a layer that pads by itself what is padded before it."""
    pad = found.computed_by("Pad")
    if pad.version < 11:
        pads, value = tuple(_integers(pad, "pads")), attribute(pad, "value")
    else:
        known = found.facts.integers(pad.input(1))
        pads = (known.numbers if known else None) or ()
        value = found.facts.number(pad.input(2)) if pad.input(2) else 0.0
    along, rank = axes(pad, found.facts), found.rank
    found.require(attribute(pad, "mode") == b"constant" and value == fill, f"{pad.label} does not pad with {fill:g}")
    found.require(along is not None and bool(pads), f"how far {pad.label} pads is not known")
    around = [0] * (2 * rank)
    for place, axis in enumerate(along or ()):
        around[axis], around[rank + axis] = pads[place], pads[len(pads) // 2 + place]
    found.require(min(around) >= 0, f"{pad.label} crops")
    found.require(not any(around[:2] + around[rank : rank + 2]), f"{pad.label} pads other axes than those of space")
    mode = attribute(layer, "auto_pad")
    found.require(mode in {b"NOTSET", b"VALID"}, f"how far {layer.label} pads depends on the size of its input")
    wider = around[2:rank] + around[rank + 2 :]
    own = _integers(layer, "pads") if mode == b"NOTSET" else []
    return [more + have for more, have in zip(wider, own or [0] * len(wider), strict=True)]


@padded_convolution.emit("onnx", "ort-cpu", "ort-cuda")
def _(found, op):
    layer = found.computed_by("Conv")
    return op.again(layer, found.x, found.w, found.b, auto_pad=None, pads=_padded(found, layer, 0.0))


@padded_pooling.emit("onnx", "ort-cpu", "ort-cuda")
def _(found, op):
    layer = found.computed_by("AveragePool", "MaxPool")
    found.require(layer.version >= 7 and not attribute(layer, "ceil_mode"), "a window may end outside of the image")
    is_mean = layer.op == "AveragePool"
    pads, size = _padded(found, layer, 0.0 if is_mean else -np.inf), _integers(layer, "kernel_shape")
    found.require(all(pad < own for pad, own in zip(pads, [*size, *size], strict=True)), "a window of padding")
    if not is_mean:
        return op.again(layer, found.x, auto_pad=None, pads=pads)
    counted = attribute(layer, "count_include_pad") or not any(_integers(layer, "pads"))
    found.require(bool(counted), f"{layer.label} counts what is padded before it, and not what it pads")
    return op.again(layer, found.x, auto_pad=None, pads=pads, count_include_pad=1)
