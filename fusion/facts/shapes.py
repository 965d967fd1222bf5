"""Shapes: the dimensions of every output, operator by operator.

A rule gets the facts, the node and the output slot, and returns the dimensions (None for one it cannot tell), or None
where it cannot tell the rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from onnx import TensorProto

from fusion.dims import Dim, broadcast, divide, floordiv, lower, product
from fusion.facts import contrib, pieces, products, windows
from fusion.facts.common import Dims, attribute_int, attribute_ints, input_shape, listed_dims
from fusion.models.graph import Node, Value
from fusion.schema import attribute, axes

if TYPE_CHECKING:
    from fusion.facts import Facts

Rule: TypeAlias = Callable[["Facts", Node, int], Dims | None]


def shape(facts: Facts, node: Node, slot: int) -> Dims | None:
    """The shape of output `slot`, as far as the operator says it."""
    rule = RULES.get(node.key)
    return None if rule is None else rule(facts, node, slot)


def like(value: Value, known: Mapping[Value, tuple[Dim, ...] | None]) -> Value | None:
    """The input that has the shape of `value`, as far as what is known by now says it."""
    node = value.producer
    if node is None:
        return None
    rule = RULES.get(node.key)
    if rule is same and node.inputs:
        return node.inputs[0]
    if rule is elementwise and len(node.inputs) == 2:
        first, second = node.inputs
        if second is not None and known.get(second) == ():
            return first
        if first is not None and known.get(first) == ():
            return second
    return None


def same(facts: Facts, node: Node, slot: int) -> Dims | None:
    """The shape of input 0."""
    return input_shape(facts, node, 0)


def elementwise(facts: Facts, node: Node, slot: int) -> Dims | None:
    """numpy broadcasting of all inputs."""
    return broadcast_shapes([facts.shape(value) for value in node.inputs if value is not None])


def broadcast_shapes(found: Sequence[Dims | None]) -> Dims | None:
    """numpy broadcasting; None where a rank is unknown."""
    known = [dims for dims in found if dims is not None]
    if len(known) != len(found) or not known:
        return None
    first = known[0]
    if all(dims is first or dims == first for dims in known[1:]):
        return first
    result: list[Dim | None] = [1] * max(len(dims) for dims in known)
    for dims in known:
        for axis in range(1, len(dims) + 1):
            dim, other = dims[-axis], result[-axis]
            if dim is None or other is None:
                sure = other if dim is None else dim
                # A number above 1 wins over whatever the other one is.
                result[-axis] = sure if sure is not None and lower(sure) >= 2 else None
            else:
                result[-axis] = broadcast(other, dim)
    return result


def _reduce(facts: Facts, node: Node, slot: int) -> Dims | None:
    dims = input_shape(facts, node, 0)
    reduced = axes(node, facts)
    keep = attribute_int(node, "keepdims") != 0
    if dims is None:
        return None
    if reduced is None:
        return [None] * len(dims) if keep else None
    if keep:
        return [1 if axis in reduced else dim for axis, dim in enumerate(dims)]
    return [dim for axis, dim in enumerate(dims) if axis not in reduced]


def _reshape(facts: Facts, node: Node, slot: int) -> Dims | None:
    dims = input_shape(facts, node, 0)
    target = listed_dims(facts, node, 1)
    if target is None:
        return None
    keeps_zero = attribute_int(node, "allowzero") == 1
    result: list[Dim | None] = []
    for axis, item in enumerate(target):
        if item == 0 and not keeps_zero:
            item = dims[axis] if dims is not None and axis < len(dims) else None
        elif item is not None and facts.lower(item) < 0:  # -1, or a dimension that may come out as -1
            item = None
        result.append(item)
    if result.count(None) == 1 and dims is not None:
        result[result.index(None)] = _rest(dims, result)
    return result


def _rest(dims: Dims, target: Sequence[Dim | None]) -> Dim | None:
    """The dimension that is not in `target`: reshaping keeps the number of elements."""
    known = [dim for dim in dims if dim is not None]
    if len(known) < len(dims):
        return None
    given = product(dim for dim in target if dim is not None)
    total = product(known)
    exact = divide(total, given)
    if exact is not None:
        return exact
    return None if given == 0 else floordiv(total, given)


def _flatten(facts: Facts, node: Node, slot: int) -> Dims | None:
    dims = input_shape(facts, node, 0)
    axis = attribute_int(node, "axis")
    if dims is None or axis is None:
        return [None, None]
    axis = axis + len(dims) if axis < 0 else axis
    return [_product(dims[:axis]), _product(dims[axis:])]


def _product(dims: Dims) -> Dim | None:
    known = [dim for dim in dims if dim is not None]
    return product(known) if len(known) == len(dims) else None


def _transpose(facts: Facts, node: Node, slot: int) -> Dims | None:
    dims = input_shape(facts, node, 0)
    perm = attribute_ints(node, "perm")
    if dims is None:
        return None if perm is None else [None] * len(perm)
    order = perm if perm is not None else range(len(dims))[::-1]
    return [dims[axis] for axis in order] if sorted(order) == list(range(len(dims))) else None


def _unsqueeze(facts: Facts, node: Node, slot: int) -> Dims | None:
    dims = input_shape(facts, node, 0)
    if dims is None:
        return None
    inserted = axes(node, facts)
    if inserted is None:
        listed = listed_dims(facts, node, 1)
        return None if listed is None else [None] * (len(dims) + len(listed))
    result = list(dims)
    for axis in inserted:
        result.insert(axis, 1)
    return result


def squeezed_axes(facts: Facts, node: Node) -> tuple[int, ...] | None:
    """The axes a Squeeze drops; None where that depends on a dimension nobody knows."""
    given = axes(node, facts)
    if given is not None:
        return given
    dims = input_shape(facts, node, 0)
    implicit = len(node.inputs) < 2 or node.inputs[1] is None
    if dims is None or not implicit or any(item.name == "axes" for item in node.proto.attribute):
        return None
    if any(dim is None or (not isinstance(dim, int) and lower(dim) < 2) for dim in dims):
        return None
    return tuple(axis for axis, dim in enumerate(dims) if dim == 1)


def _squeeze(facts: Facts, node: Node, slot: int) -> Dims | None:
    dims = input_shape(facts, node, 0)
    dropped = squeezed_axes(facts, node)
    if dims is None or dropped is None:
        return None
    return [dim for axis, dim in enumerate(dims) if axis not in dropped]


def _expand(facts: Facts, node: Node, slot: int) -> Dims | None:
    return broadcast_shapes([input_shape(facts, node, 0), listed_dims(facts, node, 1)])


def _tile(facts: Facts, node: Node, slot: int) -> Dims | None:
    dims = input_shape(facts, node, 0)
    repeats = listed_dims(facts, node, 1)
    if dims is None or repeats is None or len(repeats) != len(dims):
        return None if dims is None else [None] * len(dims)
    return [None if n is None or dim is None else dim * n for dim, n in zip(dims, repeats, strict=True)]


def _where(facts: Facts, node: Node, slot: int) -> Dims | None:
    return elementwise(facts, node, slot)


def _shape(facts: Facts, node: Node, slot: int) -> Dims | None:
    dims = input_shape(facts, node, 0)
    if dims is None:
        return [None]
    return [len(range(len(dims))[shape_range(node)])]


def shape_range(node: Node) -> slice:
    """Which dimensions a Shape node gives (opset 15 has start and end)."""
    end = attribute_int(node, "end")
    return slice(attribute_int(node, "start") or 0, end)


def _constant_of_shape(facts: Facts, node: Node, slot: int) -> Dims | None:
    return listed_dims(facts, node, 0)


def _range(facts: Facts, node: Node, slot: int) -> Dims | None:
    start, limit, delta = (None if value is None else _bound(facts, value) for value in node.inputs)
    if start is None or limit is None or not isinstance(delta, int) or delta == 0:
        return [None]
    return [pieces.count(facts, start, limit, delta)]


def _bound(facts: Facts, value: Value) -> Dim | None:
    """A bound of a range, where it is an integer, also in single or double precision.

    A size that was cast is taken to be below 2**24: beyond, a range in single precision repeats its numbers.
    """
    node = value.producer
    if node is not None and node.key == "Cast" and facts.dtype(value) in (TensorProto.FLOAT, TensorProto.DOUBLE):
        value = node.inputs[0] or value
    number = facts.number(value)
    if number is not None:
        return int(number) if number.is_integer() else None
    found = facts.integers(value)
    item = found.items[0] if found is not None and len(found.items) == 1 else None
    return None if isinstance(item, bool) else item


def _arg(facts: Facts, node: Node, slot: int) -> Dims | None:
    return _reduce(facts, node, slot)


def _normalisation(facts: Facts, node: Node, slot: int) -> Dims | None:
    """LayerNormalization and its kin: outputs 1 and 2 are statistics over the axes from `axis` on."""
    dims = input_shape(facts, node, 0)
    if slot == 0 or dims is None:
        return dims
    along = axes(node, facts)
    return None if along is None else [1 if axis in along else dim for axis, dim in enumerate(dims)]


def _batch_normalisation(facts: Facts, node: Node, slot: int) -> Dims | None:
    return input_shape(facts, node, 0 if slot == 0 else 1)


def _einsum(facts: Facts, node: Node, slot: int) -> Dims | None:
    equation = attribute(node, "equation")
    if not isinstance(equation, bytes):
        return None
    operands = [input_shape(facts, node, i) for i in range(len(node.inputs))]
    return products.einsum(equation.decode(), operands)


def _if(facts: Facts, node: Node, slot: int) -> Dims | None:
    """What both branches agree on."""
    found = [facts.shape(body.outputs[slot]) for body in node.bodies if slot < len(body.outputs)]
    first = found[0] if found else None
    if first is None or any(dims is None or len(dims) != len(first) for dims in found):
        return None
    return [first[axis] if len({dims[axis] for dims in found if dims}) == 1 else None for axis in range(len(first))]


def _nonzero(facts: Facts, node: Node, slot: int) -> Dims | None:
    dims = input_shape(facts, node, 0)
    return [None if dims is None else max(len(dims), 1), None]


def _top_k(facts: Facts, node: Node, slot: int) -> Dims | None:
    dims = input_shape(facts, node, 0)
    axis = axes(node, facts)
    if dims is None:
        return None
    if axis is None:
        return [None] * len(dims)
    count = listed_dims(facts, node, 1)
    k = count[0] if count else None
    return [k if i in axis else dim for i, dim in enumerate(dims)]


def _one_hot(facts: Facts, node: Node, slot: int) -> Dims | None:
    dims = input_shape(facts, node, 0)
    axis = axes(node, facts)
    depth = None if node.input(1) is None else facts.integers(node.inputs[1])  # type: ignore[arg-type]
    if dims is None or axis is None:
        return None if dims is None else [None] * (len(dims) + 1)
    count = depth.dims[0] if depth is not None and len(depth.items) == 1 else None
    result = list(dims)
    result.insert(axis[0], count)
    return result


def _random(facts: Facts, node: Node, slot: int) -> Dims | None:
    return attribute_ints(node, "shape")


_SAME = """Abs Acos Acosh Asin Asinh Atan Atanh Bernoulli BitwiseNot Cast CastLike Ceil Celu Clip Cos Cosh CumSum
    DequantizeLinear Dropout Elu Erf Exp EyeLike Floor Gelu GroupNormalization HardSigmoid HardSwish Hardmax
    Identity InstanceNormalization IsInf IsNaN LeakyRelu Log LogSoftmax LpNormalization
    MeanVarianceNormalization Mish Neg Not QuantizeLinear RandomNormalLike RandomUniformLike Reciprocal Relu
    ReverseSequence RotaryEmbedding Round ScatterElements Scatter ScatterND Selu Shrink Sigmoid Sign Sin Sinh
    Softmax Softplus Softsign Sqrt Swish Tan Tanh TensorScatter ThresholdedRelu Trilu LRN""".split()  # noqa: SIM905
_ELEMENTWISE = """Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max
    Mean Min Mod Mul Or Pow Sub Sum Where Xor""".split()  # noqa: SIM905
_REDUCE = """ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
    ReduceSumSquare ArgMax ArgMin""".split()  # noqa: SIM905

RULES: dict[str, Rule] = {
    **dict.fromkeys(_SAME, same),
    **dict.fromkeys(_ELEMENTWISE, elementwise),
    **dict.fromkeys(_REDUCE, _reduce),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"), _normalisation),
    "PRelu": same,
    "BatchNormalization": _batch_normalisation,
    "ConstantOfShape": _constant_of_shape,
    "Einsum": _einsum,
    "Expand": _expand,
    "Flatten": _flatten,
    "If": _if,
    "NonZero": _nonzero,
    "OneHot": _one_hot,
    "RandomNormal": _random,
    "RandomUniform": _random,
    "Range": _range,
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": lambda facts, node, slot: (),
    "Squeeze": _squeeze,
    "Tile": _tile,
    "TopK": _top_k,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    **pieces.RULES,
    **products.RULES,
    **windows.RULES,
    **contrib.RULES,
}
