"""Contraction: MatMul, Gemm and FusedMatMul are one sum over one axis, whatever the rank and the transposes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusion.dims import Dim, equal
from fusion.schema import attribute
from fusion.terms import Contract, Item, Prod, Ref, add, leaf
from fusion.verdict import Verdict

if TYPE_CHECKING:
    from fusion.graph import Node, Value
    from fusion.view import View

OPERATORS = frozenset({"MatMul", "Gemm", "com.microsoft::FusedMatMul"})


def normalise(node: Node, ref: Ref, view: View) -> Prod | None:
    """Return Σ left * right over a coordinate axis appended to those of `ref`; a Gemm adds its third input.

    None where a shape is unknown, an operand has rank 1, or batch axes cannot be aligned.
    """
    left, right, output = node.input(0), node.input(1), node.outputs[0]
    if left is None or right is None or output is None:
        return None
    swap_left = bool(attribute(node, "transA"))
    swap_right = bool(attribute(node, "transB"))
    if node.op == "FusedMatMul" and (attribute(node, "transBatchA") or attribute(node, "transBatchB")):
        return None
    shapes = [view.facts.shape(value) for value in (left, right, output)]
    if any(shape is None or len(shape) < 2 for shape in shapes):
        return None
    a, b, out = (shape for shape in shapes if shape is not None)
    left_axes, right_axes = _align(a, out), _align(b, out)
    if left_axes is None or right_axes is None:
        return None
    rows, inner = (len(a) - 1, len(a) - 2) if swap_left else (len(a) - 2, len(a) - 1)
    depth, columns = (len(b) - 1, len(b) - 2) if swap_right else (len(b) - 2, len(b) - 1)
    contraction = Contract(
        view.peel(Ref(left, ref.layout.remap(a, [*left_axes, rows, None], extra=[inner]))).ref,
        view.peel(Ref(right, ref.layout.remap(b, [*right_axes, None, columns], extra=[depth]))).ref,
    )
    if node.op == "MatMul":
        return leaf(contraction)
    alpha = attribute(node, "alpha")
    items = [Item(float(alpha) if isinstance(alpha, float) else 1.0, ((contraction, 1.0),))]
    if node.op == "Gemm" and node.input(2) is not None:
        addend = view.operand(ref, node, 2)
        beta = attribute(node, "beta")
        if addend is None:
            return None
        term = view.factor(addend)
        share = float(beta) if isinstance(beta, float) else 1.0
        items.append(Item(share * term.coef, term.factors, addend, share))
    return add(0.0, items)


def _align(shape: tuple[Dim, ...], out: tuple[Dim, ...]) -> list[int | None] | None:
    """For each batch axis of the result, the operand's axis, or None where the operand is broadcast over it."""
    aligned: list[int | None] = []
    for axis, dim in enumerate(out[:-2]):
        own = axis - (len(out) - len(shape))
        if own < 0 or shape[own] == 1:
            aligned.append(None)
        elif equal(shape[own], dim) is Verdict.YES:
            aligned.append(own)
        else:
            return None
    return aligned
