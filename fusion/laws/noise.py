"""Noise: nodes that change no number worth speaking of: Identity, Dropout at inference, Casts between floats.

A Cast from an integer or a boolean is not noise. Every crossing is recorded, so that an emission knows the dtypes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx import TensorProto

if TYPE_CHECKING:
    from fusion.facts import Facts
    from fusion.graph import Node, Value

FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16})


def crossed(node: Node, value: Value, facts: Facts) -> Value | None:
    """The input that `value`, the first output of `node`, repeats; None where the node is not noise."""
    if node.domain or value.slot != 0 or not node.inputs:
        return None
    source = node.inputs[0]
    if node.op == "Identity":
        return source
    if node.op == "Dropout":
        training = node.input(2)
        if training is None or facts.number(training) == 0.0:
            return source
        return None
    if node.op in ("Cast", "CastLike") and source is not None:
        if facts.dtype(source) in FLOATS and facts.dtype(value) in FLOATS:
            return source
    return None
