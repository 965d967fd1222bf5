"""Constants worked out ahead: nodes whose inputs are small constants, and small integers that facts know.

Only operators with one exact answer are computed, so that the constant has the bits a runtime would have computed:
rearrangements, integers, comparisons, and float arithmetic that IEEE 754 rounds correctly. No payload above
`constants.SMALL_PAYLOAD` is read, and no result is larger than that or than the inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import helper, numpy_helper

from fusion.facts import Facts, constants, rearrange
from fusion.facts.integers import IntTensor
from fusion.facts.values import RULES as INTEGER_RULES
from fusion.layout import Layout
from fusion.models.graph import Node, Value
from fusion.schema import axes
from fusion.simplify.edits import Editor
from fusion.simplify.purity import feeds_quantisation, is_quantisation

Array = np.ndarray[Any, Any]
Compute = Callable[..., "Array | None"]

FLOATS = frozenset({np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)})


def fold(editor: Editor, rule: str, node: Node) -> bool:
    """Make the output of a node a constant, if all that it reads are small constants."""
    if not node.inputs or any(value is None or constants.stored(value) is None for value in node.inputs):
        return False
    facts, compute = editor.facts, COMPUTED.get(node.key)
    output = node.outputs[0] if len(node.outputs) == 1 else None
    if output is None or is_quantisation(node) or feeds_quantisation(output):
        return False
    arrays = [constants.small(facts.graph, value) for value in node.inputs if value is not None]
    given = [array for array in arrays if array is not None]
    if len(given) < len(arrays):
        return False
    bound = max(constants.SMALL_PAYLOAD, sum(array.nbytes for array in given))
    result = _computed(facts, node, output, compute, given, bound)
    if result is None or result.nbytes > bound:
        return False
    dtype = facts.dtype(output)
    if dtype is None or helper.tensor_dtype_to_np_dtype(dtype) != result.dtype:
        return False
    return editor.settle(rule, output, numpy_helper.from_array(np.ascontiguousarray(result).reshape(result.shape)))


def _computed(
    facts: Facts, node: Node, output: Value, compute: Compute | None, given: list[Array], bound: int
) -> Array | None:
    shape = facts.shape(output)
    if shape is None:
        return None
    sizes = tuple(dim for dim in shape if isinstance(dim, int))
    if len(sizes) < len(shape) or int(np.prod(sizes, dtype=object)) > bound:
        return None
    try:
        with np.errstate(all="ignore"):
            result = _moved(facts, node, given[0]) if node.key in rearrange.RULES else None
            if result is None and compute is not None:
                result = compute(node, facts, *given)
    except (ValueError, IndexError):  # sizes that do not fit: no runtime computes it
        return None
    return result if result is not None and result.shape == sizes else None


def _moved(facts: Facts, node: Node, array: Array) -> Array | None:
    layout = facts.layout(node)
    return None if layout is None else read(layout, array)


def read(layout: Layout, array: Array) -> Array | None:
    """The elements of a source as a layout lies over it; None where a size is no number."""
    digits: list[tuple[int | None, int, int]] = []
    for source, stride, size in (factor for axis in layout.axes for factor in axis):
        if not isinstance(stride, int) or not isinstance(size, int):
            return None
        digits.append((source, stride, size))
    if layout.source != array.shape or not all(isinstance(offset, int) for offset in layout.offsets):
        return None
    index: list[Any] = [np.full((1,) * len(digits), offset) for offset in layout.offsets]
    for place, (source, stride, size) in enumerate(digits):
        if source is not None:
            spread = [-1 if other == place else 1 for other in range(len(digits))]
            index[source] = index[source] + (np.arange(size) * stride).reshape(spread)
    taken = array[tuple(index)] if index else array.reshape((1,) * len(digits))
    shape = [dim for dim in layout.shape if isinstance(dim, int)]
    return np.broadcast_to(taken, [size for *_, size in digits]).reshape(shape)


def integers(editor: Editor, rule: str, node: Node) -> bool:
    """Make the output of a node a constant, if it is a small integer tensor of which every element is known."""
    output = node.outputs[0]
    known = None if output is None else editor.facts.integers(output)
    if output is None or known is None or feeds_quantisation(output):
        return False
    array = as_array(editor.facts.dtype(output), known)
    return array is not None and editor.settle(rule, output, numpy_helper.from_array(array))


def as_array(dtype: int | None, known: IntTensor) -> Array | None:
    """The tensor, where every element is a number or a truth value and its type is known."""
    if dtype is None or not all(isinstance(item, int) for item in known.items):
        return None
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    if (kind.kind == "b") != any(isinstance(item, bool) for item in known.items) and known.items:
        return None
    return np.array(known.items, kind).reshape(known.shape) if kind.kind in "iub" else None


# -- operators with one exact answer -----------------------------------------------------------------------------------


def _exact(operation: Callable[..., Any], kinds: str = "iuf") -> Compute:
    """Arithmetic on operands of one type; floats are rounded as IEEE 754 says."""

    def compute(node: Node, facts: Facts, *given: Array) -> Array | None:
        if any(array.dtype != given[0].dtype or array.dtype.kind not in kinds for array in given):
            return None
        if given[0].dtype.kind == "f" and given[0].dtype not in FLOATS:
            return None
        result = operation(*given)
        return None if result is None else np.asarray(result)

    return compute


def _divide(a: Array, b: Array) -> Any:
    if a.dtype.kind == "f":
        return a / b
    return a // b if (b > 0).all() and (a >= 0).all() else None  # of signs runtimes think differently


def _cast(node: Node, facts: Facts, source: Array, *like: Array) -> Array | None:
    dtype = None if node.outputs[0] is None else facts.dtype(node.outputs[0])
    if dtype is None:
        return None
    target = helper.tensor_dtype_to_np_dtype(dtype)
    plain = target.kind in "iub" or target in FLOATS
    if not plain or source.dtype.kind not in "iubf" or (source.dtype.kind == "f" and source.dtype not in FLOATS):
        return None
    if target.kind in "iu" and source.size:
        limits = np.iinfo(target)
        if source.dtype.kind == "f" and not np.isfinite(source).all():
            return None
        wide = [int(number) for number in source.flat]
        if min(wide) < limits.min or max(wide) > limits.max:
            return None
    return source.astype(target)


def _gather(node: Node, facts: Facts, data: Array, index: Array) -> Array | None:
    along = axes(node, facts)
    if along is None or index.dtype.kind not in "iu":
        return None
    size = data.shape[along[0]]
    return data.take(index, along[0]) if ((-size <= index) & (index < size)).all() else None


def _concat(node: Node, facts: Facts, *given: Array) -> Array | None:
    along = axes(node, facts)
    return None if along is None else np.concatenate(given, along[0])


def _where(node: Node, facts: Facts, condition: Array, yes: Array, no: Array) -> Array | None:
    if yes.dtype != no.dtype or any(a.dtype.kind == "f" and (np.signbit(a) & (a == 0)).any() for a in (yes, no)):
        return None  # onnxruntime's kernel makes 0.0 of -0.0
    return np.where(condition, yes, no)


def _constant_of_shape(node: Node, facts: Facts, shape: Array) -> Array | None:
    output = node.outputs[0]
    dtype = None if output is None else facts.dtype(output)
    value = next((a.t for a in node.proto.attribute if a.name == "value"), None)
    filled = np.zeros(1, np.float32) if value is None else facts.graph.model.array(value).reshape(-1)
    if dtype is None or filled.size != 1:
        return None
    return np.full(shape.tolist(), filled[0], filled.dtype)


def _range(node: Node, facts: Facts, start: Array, limit: Array, step: Array) -> Array | None:
    if start.dtype.kind not in "iu" or start.size != 1 or step.item() == 0:
        return None
    return np.arange(int(start.item()), int(limit.item()), int(step.item())).astype(start.dtype)


def _boolean(operation: Callable[..., Any]) -> Compute:
    return _exact(operation, "b")


COMPUTED: dict[str, Compute] = {
    "Abs": _exact(np.abs),
    "Add": _exact(np.add),
    "And": _boolean(np.logical_and),
    "Cast": _cast,
    "CastLike": _cast,
    "Ceil": _exact(np.ceil, "f"),
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Div": _exact(_divide),
    "Equal": _exact(np.equal, "iufb"),
    "Floor": _exact(np.floor, "f"),
    "Gather": _gather,
    "Greater": _exact(np.greater),
    "GreaterOrEqual": _exact(np.greater_equal),
    "Identity": _exact(lambda a: a, "iufb"),
    "IsNaN": _exact(np.isnan, "f"),
    "Less": _exact(np.less),
    "LessOrEqual": _exact(np.less_equal),
    "Mul": _exact(np.multiply),
    "Neg": _exact(np.negative, "if"),
    "Not": _boolean(np.logical_not),
    "Or": _boolean(np.logical_or),
    "Range": _range,
    "Reciprocal": _exact(lambda a: a.dtype.type(1) / a, "f"),
    "Sqrt": _exact(np.sqrt, "f"),
    "Sub": _exact(np.subtract),
    "Where": _where,
    "Xor": _boolean(np.logical_xor),
}

OPERATORS = frozenset(COMPUTED) | frozenset(rearrange.RULES)
"""What `fold` knows."""
INTEGERS = frozenset(INTEGER_RULES)
"""What `integers` knows."""
SOURCES = frozenset({"Shape", "Size", "ConstantOfShape"})
"""Operators whose output may be known where no element of an input is."""
