"""Windows and grids: convolutions, pooling, resizing, blocks of pixels, and their shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusion.dims import Dim, divide, floordiv
from fusion.facts.common import Dims, attribute_int, attribute_ints, input_shape, listed_dims
from fusion.models.graph import Node
from fusion.schema import attribute

if TYPE_CHECKING:
    from fusion.facts import Facts


def _spatial(facts: Facts, node: Node, dims: Dims, kernel: Dims) -> list[Dim | None]:
    """The spatial dimensions a sliding window gives."""
    rank = len(dims) - 2
    strides = attribute_ints(node, "strides") or [1] * rank
    dilations = attribute_ints(node, "dilations") or [1] * rank
    around = attribute_ints(node, "pads") or [0] * (2 * rank)
    auto = attribute(node, "auto_pad")
    result: list[Dim | None] = []
    if not len(strides) == len(dilations) == len(kernel) == len(around) // 2 == rank or min(strides, default=1) < 1:
        return [None] * rank
    for axis, (dim, size, stride, dilation) in enumerate(zip(dims[2:], kernel, strides, dilations, strict=True)):
        if dim is None or size is None:
            result.append(None)
        elif auto in (b"SAME_UPPER", b"SAME_LOWER"):
            result.append(floordiv(dim + (stride - 1), stride))
        else:
            padding = 0 if auto == b"VALID" else around[axis] + around[axis + rank]
            reach = (size - 1) * dilation + 1
            free = facts.dim(dim + padding - reach)
            facts.not_negative(free, node.scope)  # the window fits at least once
            if attribute_int(node, "ceil_mode") and divide(free, stride) is None:
                result.append(None)  # whether a last window starts inside the padding differs between runtimes
            else:
                result.append(floordiv(free, stride) + 1)
    return result


def _conv(facts: Facts, node: Node, slot: int) -> Dims | None:
    dims, kernel = input_shape(facts, node, 0), input_shape(facts, node, 1)
    if dims is None or len(dims) < 3:
        return None if kernel is None else [None] * len(kernel)
    if kernel is None or len(kernel) != len(dims):
        return [dims[0], None, *[None] * (len(dims) - 2)]
    return [dims[0], kernel[0], *_spatial(facts, node, dims, kernel[2:])]


def _conv_transpose(facts: Facts, node: Node, slot: int) -> Dims | None:
    dims, kernel = input_shape(facts, node, 0), input_shape(facts, node, 1)
    if dims is None or kernel is None or len(kernel) != len(dims):
        return None if dims is None else [None] * len(dims)
    rank = len(dims) - 2
    channels = None if kernel[1] is None else kernel[1] * (attribute_int(node, "group") or 1)
    fixed = attribute_ints(node, "output_shape")
    if fixed is not None and len(fixed) == rank:
        return [dims[0], channels, *fixed]
    strides = attribute_ints(node, "strides") or [1] * rank
    dilations = attribute_ints(node, "dilations") or [1] * rank
    around = attribute_ints(node, "pads") or [0] * (2 * rank)
    extra = attribute_ints(node, "output_padding") or [0] * rank
    auto = attribute(node, "auto_pad")
    if auto in (b"SAME_UPPER", b"SAME_LOWER"):
        return [dims[0], channels, *[None] * rank]
    result: list[Dim | None] = []
    for axis, (dim, size) in enumerate(zip(dims[2:], kernel[2:], strict=True)):
        padding = 0 if auto == b"VALID" else around[axis] + around[axis + rank]
        if dim is None or size is None:
            result.append(None)
            continue
        result.append(strides[axis] * (dim - 1) + extra[axis] + (size - 1) * dilations[axis] + 1 - padding)
    return [dims[0], channels, *result]


def _pool(facts: Facts, node: Node, slot: int) -> Dims | None:
    dims = input_shape(facts, node, 0)
    kernel = attribute_ints(node, "kernel_shape")
    if dims is None or kernel is None or len(kernel) != len(dims) - 2:
        return None if dims is None else [None] * len(dims)
    return [*dims[:2], *_spatial(facts, node, dims, kernel)]


def _global_pool(facts: Facts, node: Node, slot: int) -> Dims | None:
    dims = input_shape(facts, node, 0)
    return None if dims is None else [*dims[:2], *[1] * (len(dims) - 2)]


def _resize(facts: Facts, node: Node, slot: int) -> Dims | None:
    dims = input_shape(facts, node, 0)
    if dims is None:
        return None
    if attribute_ints(node, "axes") is not None or attribute(node, "keep_aspect_ratio_policy") not in (
        None,
        b"stretch",
    ):
        return [None] * len(dims)
    sizes = listed_dims(facts, node, 3)
    if sizes is not None and len(sizes) == len(dims):
        return sizes
    return _scaled(facts, node, dims, 1 if node.version < 11 else 2)


def _upsample(facts: Facts, node: Node, slot: int) -> Dims | None:
    dims = input_shape(facts, node, 0)
    return None if dims is None else _scaled(facts, node, dims, 1)


def _scaled(facts: Facts, node: Node, dims: Dims, slot: int) -> Dims:
    """floor(dim * scale), where the scale is a stored number."""
    value = node.input(slot)
    stored = None if value is None or facts.shape(value) != (len(dims),) else facts.constant(value)
    factors = attribute(node, "scales") if stored is None else stored.tolist()
    if not isinstance(factors, list) or len(factors) != len(dims):
        return [None] * len(dims)
    return [_scale(dim, factor) for dim, factor in zip(dims, factors, strict=True)]


def _scale(dim: Dim | None, factor: object) -> Dim | None:
    if dim is None or not isinstance(factor, int | float):
        return None
    scale = float(factor)
    if scale.is_integer():
        return dim * int(scale)
    # Rounding cannot matter where the product is a multiple of a quarter.
    return int(dim * scale) if isinstance(dim, int) and (dim * scale * 4).is_integer() else None


def _blocks(facts: Facts, node: Node, slot: int) -> Dims | None:
    """DepthToSpace and SpaceToDepth of (N, C, H, W)."""
    dims = input_shape(facts, node, 0)
    size = attribute_int(node, "blocksize")
    if dims is None or len(dims) != 4 or not size:
        return [None] * 4
    n, c, h, w = dims
    if node.op == "DepthToSpace":
        return [n, _over(c, size * size), _times(h, size), _times(w, size)]
    return [n, _times(c, size * size), _over(h, size), _over(w, size)]


def _times(dim: Dim | None, by: int) -> Dim | None:
    return None if dim is None else dim * by


def _over(dim: Dim | None, by: int) -> Dim | None:
    return None if dim is None else floordiv(dim, by)


RULES = {
    "AveragePool": _pool,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "DepthToSpace": _blocks,
    "GlobalAveragePool": _global_pool,
    "GlobalLpPool": _global_pool,
    "GlobalMaxPool": _global_pool,
    "LpPool": _pool,
    "MaxPool": _pool,
    "Resize": _resize,
    "SpaceToDepth": _blocks,
    "Upsample": _upsample,
}
