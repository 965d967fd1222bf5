"""Products: MatMul, Gemm, Einsum, Attention and their shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusion.dims import Dim, broadcast, divide
from fusion.facts.common import Dims, attribute_int, input_shape
from fusion.models.graph import Node

if TYPE_CHECKING:
    from fusion.facts import Facts


def matmul(a: Dims | None, b: Dims | None) -> Dims | None:
    """numpy.matmul: batch axes broadcast, a vector counts as a matrix whose extra axis is dropped again."""
    if a is None or b is None or not a or not b:
        return None
    left: list[Dim | None] = [1, *a] if len(a) == 1 else list(a)
    right: list[Dim | None] = [*b, 1] if len(b) == 1 else list(b)
    batch = broadcast_batch(left[:-2], right[:-2])
    return [*batch, *([] if len(a) == 1 else left[-2:-1]), *([] if len(b) == 1 else right[-1:])]


def broadcast_batch(a: Dims, b: Dims) -> list[Dim | None]:
    """Broadcast where all that is unknown stays unknown."""
    rank = max(len(a), len(b))
    left, right = [1] * (rank - len(a)) + list(a), [1] * (rank - len(b)) + list(b)
    return [None if x is None or y is None else broadcast(x, y) for x, y in zip(left, right, strict=True)]


def _matmul(facts: Facts, node: Node, slot: int) -> Dims | None:
    return matmul(input_shape(facts, node, 0), input_shape(facts, node, 1))


def _matmul_quantized(facts: Facts, node: Node, slot: int) -> Dims | None:
    return matmul(input_shape(facts, node, 0), input_shape(facts, node, 3))


def _gemm(facts: Facts, node: Node, slot: int) -> Dims | None:
    a, b = input_shape(facts, node, 0), input_shape(facts, node, 1)
    rows = None if a is None or len(a) != 2 else a[1 if attribute_int(node, "transA") else 0]
    columns = None if b is None or len(b) != 2 else b[0 if attribute_int(node, "transB") else 1]
    return [rows, columns]


def einsum(equation: str, operands: list[Dims | None]) -> Dims | None:
    """The shape of an Einsum; None where an ellipsis hides a rank that is unknown."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(operands):
        return None
    sizes: dict[str, Dim | None] = {}
    hidden: list[Dim | None] = []
    for term, dims in zip(terms, operands, strict=True):
        head, dots, tail = term.partition("...")
        if dims is None:
            if dots:
                return None
            dims = [None] * len(head)
        if len(dims) < len(head) + len(tail) or (not dots and len(dims) != len(head)):
            return None
        middle = dims[len(head) : len(dims) - len(tail)] if dots else []
        hidden = broadcast_batch(hidden, middle)
        named = [*zip(head, dims, strict=False), *zip(tail, dims[len(dims) - len(tail) :], strict=True)]
        for letter, dim in named:
            known = sizes.get(letter, 1)
            sizes[letter] = None if dim is None or known is None else broadcast(known, dim)
    if not arrow:
        letters = left.replace(",", "").replace(".", "")
        right = ("..." if "..." in left else "") + "".join(c for c in sorted(set(letters)) if letters.count(c) == 1)
    head, dots, tail = right.partition("...")
    if any(letter not in sizes for letter in head + tail):
        return None
    return [*(sizes[c] for c in head), *(hidden if dots else []), *(sizes[c] for c in tail)]


def _attention(facts: Facts, node: Node, slot: int) -> Dims | None:
    """Attention (opset 23): Y, present_key, present_value, the scores."""
    q, k, v = (input_shape(facts, node, i) for i in range(3))
    past_k, past_v = input_shape(facts, node, 4), input_shape(facts, node, 5)
    if q is None:
        return None
    heads, kv_heads = attribute_int(node, "q_num_heads"), attribute_int(node, "kv_num_heads")
    flat = len(q) == 3
    if len(q) not in (3, 4):
        return None
    if slot == 0 and flat:
        width = None if v is None or len(v) != 3 or not kv_heads else divided(v[2], kv_heads)
        return [q[0], q[1], None if width is None or not heads else width * heads]
    if slot == 0:
        return [q[0], q[1], q[2], v[3] if v is not None and len(v) == 4 else None]
    if slot in (1, 2):
        new, past = (k, past_k) if slot == 1 else (v, past_v)
        return _present(new, past, kv_heads)
    total = _present(k, past_k, kv_heads)[2]
    return [q[0], heads if flat else q[1], q[1] if flat else q[2], total]


def _present(new: Dims | None, past: Dims | None, heads: int | None) -> Dims:
    """(B, heads, past + new, width) of a cache after the step."""
    if new is None or len(new) not in (3, 4):
        return [None] * 4
    if len(new) == 3:
        new = [new[0], heads, new[1], divided(new[2], heads) if heads else None]
    if past is None:
        return new
    length = None if len(past) != 4 else past[2]
    return [new[0], new[1], None if length is None or new[2] is None else length + new[2], new[3]]


def divided(dim: Dim | None, by: int) -> Dim | None:
    """A dimension that has to be a multiple of `by`, divided by it."""
    return None if dim is None or by == 0 else divide(dim, by)


RULES = {
    "Attention": _attention,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "QLinearMatMul": _matmul_quantized,
}
