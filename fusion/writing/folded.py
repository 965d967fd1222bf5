"""Folded weights: a layer whose result is multiplied and shifted channel by channel, as the layer with other weights.

The weights are multiplied when the model is written; of what is read before, nothing is longer than the channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import TensorProto

from fusion.errors import ModelError
from fusion.facts import constants
from fusion.models.graph import Node, Value
from fusion.models.payload import byte_size
from fusion.schema import attribute
from fusion.writing.found import Captured, Found, New, Operand, Unmet

if TYPE_CHECKING:
    from fusion.writing.emit import Builder

Array = np.ndarray[Any, Any]

_ONCE: dict[str, dict[str, Any]] = {"Gemm": {"beta": None}}
"""Attributes that the new bias has in it."""

LARGEST = 1e18
"""Numbers below this times a weight are finite in float."""

SHARED = 1 << 16
"""Bytes up to which a weight that others read, too, is there a second time."""


def vector(found: Found, source: Captured | Value | None) -> Array:
    """See `Builder.vector`."""
    value = source.value if isinstance(source, Captured) else source
    stored = constants.stored(value) if value is not None else None
    whole = not isinstance(source, Captured) or source.ref.layout.whole(0) is not None
    if value is None or stored is None or not whole or sum(dim != 1 for dim in constants.shape(stored)) > 1:
        name = found.root.name if value is None else value.name
        raise Unmet(f"{name} is no stored vector", place=name)
    try:
        array = constants.payload(found.facts.graph, value)
    except ModelError as error:
        raise Unmet(str(error), place=value.name) from None
    assert array is not None, "what is stored has a payload"
    return array.reshape(-1).astype(np.float64)


def folded(op: Builder, found: Found, layer: Node, factor: Array | None, shift: Array) -> New:
    """See `Builder.folded`."""
    x, weight, bias = (layer.input(slot) for slot in range(3))
    stored = constants.stored(weight) if weight is not None else None
    group = attribute(layer, "group") if layer.op == "ConvTranspose" else 1
    if weight is None or not isinstance(stored, TensorProto) or not isinstance(group, int):
        raise Unmet(f"the weights of {layer.label} are not stored", place=layer.label)
    shape, along = tuple(stored.dims), _channels(layer)
    channels = shape[along] * group
    for given in (factor, shift):
        fits = given is None or (given.shape == (channels,) and bool((np.abs(given) < LARGEST).all()))
        found.require(fits, f"{layer.label} has {channels} channels, and what follows is no number for each of them")
    found.require(x is not None and found.facts.dtype(x) == found.dtype, f"{layer.label} computes in another dtype")
    shift = shift + (0.0 if bias is None else _bias(found, layer, bias) * (1.0 if factor is None else factor))
    operand: Operand = weight
    if factor is not None:
        wide = stored.data_type in (TensorProto.FLOAT, TensorProto.DOUBLE)
        found.require(wide, f"the product with {weight.name} may leave the numbers of its element type")
        alone = len(weight.uses) == 1 and not weight.is_output
        small = byte_size(stored.data_type, shape) <= SHARED
        found.require(alone or small, f"{weight.name} has other readers: it would be there twice")
        spread = factor.reshape(group, -1)
        if len(spread) > 1:
            spread = np.repeat(spread, shape[0] // group, axis=0)
        broad = [1] * len(shape)
        broad[along] = shape[along]
        broad[0] = max(broad[0], len(spread))
        operand = New(stored.data_type, shape, parts=((stored, None),), factor=spread.reshape(broad))
    return op.again(layer, x, operand, op.constant(shift.astype(op.numpy), "bias"), **_ONCE.get(layer.op, {}))


def _channels(layer: Node) -> int:
    """The axis of the weights that has the channels of the result; of a transposed convolution those of a group."""
    if layer.op == "Gemm":
        return 0 if attribute(layer, "transB") else 1
    return 1 if layer.op == "ConvTranspose" else 0


def _bias(found: Found, layer: Node, bias: Value) -> Array:
    """What the layer adds, by channel."""
    if layer.op != "Gemm":
        return vector(found, bias)
    shape = found.facts.shape(bias)
    along = shape is not None and all(dim == 1 for dim in shape[:-1])
    found.require(found.opset >= 7 and along, f"{bias.name} is no row")
    return vector(found, bias) * float(str(attribute(layer, "beta")))
