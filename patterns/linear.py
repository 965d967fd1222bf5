"""Projections and products: with a bias, scaled, and of operands that are stored transposed."""

from onnx import TensorProto

from fusion.language import optional, pattern, scalar

FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)


@pattern(x="... C", w="C N", b=optional("N"))
def linear(x, w, b):
    """A projection, MatMul with Add or Gemm. It has no operator of its own; other patterns call it."""
    return x @ w + b


@pattern(a="M C", b="C N", c=optional("M|1 N|1"), alpha=scalar())
def gemm(a, b, c, alpha):
    """α a b + c of matrices (BLAS level 3: Dongarra et al. 1990)."""
    return alpha * (a @ b) + c


@pattern(a="... M C", b="... C N", alpha=scalar())
def scaled_matmul(a, b, alpha):
    """α a b of any rank, either operand stored transposed."""
    return alpha * (a @ b)


def _plain(rank):
    return range(rank)


def _swapped(rank):
    return (*range(rank - 2), rank - 1, rank - 2)


def _rows_first(rank):
    return (rank - 2, *range(rank - 2), rank - 1) if rank > 2 else ()


def _columns_first(rank):
    return (rank - 1, *range(rank - 2), rank - 2) if rank > 2 else ()


def _require_factor(found):
    found.require(found.alpha != 0, "0 times infinity is not 0, and kernels leave such a product out")


@gemm.emit("onnx", "ort-cpu", "ort-cuda", last=True)
def _(found, op):
    found.require(found.rank == 2, "Gemm multiplies matrices")
    found.require(found.dtype in FLOATS, "runtimes have no Gemm of integers")
    found.require(found.opset >= 7, "below opset 7 Gemm does not broadcast")
    _require_factor(found)
    (a, swap_a), (b, swap_b) = (op.stored(own, _plain, _swapped, keep=2) for own in (found.a, found.b))
    c = [op.stored(found.c, _plain)[0]] if found.c else []
    given = {"transA": swap_a, "transB": swap_b, "alpha": found.alpha if found.alpha != 1.0 else 0}
    given = {name: value for name, value in given.items() if value}
    found.require(bool(c or given), "a plain product", kind="gain")
    made = op.Gemm(a, b, *c, **given)
    found.require_fewer(op.nodes)
    return made


@scaled_matmul.emit("ort-cpu", "ort-cuda", last=True)
def _(found, op):
    _require_factor(found)
    stored = [op.stored(own, _plain, _swapped, _rows_first, _columns_first, keep=2) for own in (found.a, found.b)]
    ranks = [len(op.shape(operand)) for operand, _ in stored]
    found.require(max(ranks) == found.rank, "the product has fewer axes than the result")
    given = {"alpha": found.alpha if found.alpha != 1.0 else 0}
    for side, (_, order) in zip("AB", stored, strict=True):
        given |= {f"trans{side}": order % 2, f"transBatch{side}": order // 2}
        found.require(order < 2 or ranks[0] == ranks[1], "batch axes that are transposed are not broadcast")
    given = {name: value for name, value in given.items() if value}
    found.require(bool(given), "a plain product", kind="gain")
    made = op.microsoft.FusedMatMul(*(operand for operand, _ in stored), **given)
    found.require_fewer(op.nodes)
    return made
