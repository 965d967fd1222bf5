"""Contraction: MatMul, Gemm, FusedMatMul and Einsum are one sum over one axis, whatever the rank and the transposes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fusion.dims import Dim, equal
from fusion.laws.arrange import arrange
from fusion.schema import attribute
from fusion.terms import Contract, Item, Prod, Ref, add, leaf
from fusion.verdict import Verdict

if TYPE_CHECKING:
    from fusion.instances.spell import Speller
    from fusion.laws.writer import Axes, Group, Written
    from fusion.models.graph import Node
    from fusion.plan import MatMul
    from fusion.terms import Sum
    from fusion.view import View

OPERATORS = frozenset({"MatMul", "Gemm", "com.microsoft::FusedMatMul", "Einsum"})


def normalise(node: Node, ref: Ref, view: View) -> Prod | None:
    """Return Σ left * right over a coordinate axis appended to those of `ref`; a Gemm adds its third input.

    None where a shape is unknown, an operand has rank 1, or batch axes cannot be aligned.
    """
    left, right, output = node.input(0), node.input(1), node.outputs[0]
    if left is None or right is None or output is None or any(item.ref_attr_name for item in node.proto.attribute):
        return None
    if node.op == "Einsum":
        return _einsum(node, ref, view)
    swap_left = bool(attribute(node, "transA"))
    swap_right = bool(attribute(node, "transB"))
    shapes = [view.facts.shape(value) for value in (left, right, output)]
    if any(shape is None or len(shape) < 2 for shape in shapes):
        return None
    a, b, out = (shape for shape in shapes if shape is not None)
    *batch_a, rows, inner = _stored(len(a), swap_left, bool(attribute(node, "transBatchA")))
    *batch_b, depth, columns = _stored(len(b), swap_right, bool(attribute(node, "transBatchB")))
    left_axes, right_axes = _align(a, batch_a, out), _align(b, batch_b, out)
    if left_axes is None or right_axes is None:
        return None
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


def order(node: Node | None) -> list[int] | None:
    """The axes of an Einsum of two operands as MatMul has them: those of both, then rows, then columns; else None.

    Of several axes that one operand alone has, its last one is the row or the column.
    """
    named, result = _equation(node) if node is not None and node.key == "Einsum" else ([], "")
    if len(named) != 2:
        return None
    own = [
        [result.index(letter) for letter in term if letter in result and letter not in other]
        for term, other in (named, named[::-1])
    ]
    both = [axis for axis in range(len(result)) if not any(axis in axes for axes in own)]
    return both + [axis for axes in own for axis in axes[:-1]] + [axis for axes in own for axis in axes[-1:]]


def _equation(node: Node) -> tuple[list[str], str]:
    """The letters of the operands and of the result of an Einsum; none of the result where it is not written."""
    equation = attribute(node, "equation")
    text = equation.decode().replace(" ", "") if isinstance(equation, bytes) else ""
    terms, _, result = text.partition("->")
    return ([], "") if "." in text else (terms.split(","), result)


def _einsum(node: Node, ref: Ref, view: View) -> Prod | None:
    """The product of two operands, summed over all letters that the result lacks, as one axis.

    None where a letter is repeated in an operand, summed in one alone, or not provably of one size; where nothing is
    summed; and where the equation has an ellipsis, or no result.
    """
    named, result = _equation(node)
    shapes = [view.facts.shape(value) if value is not None else None for value in node.inputs]
    if len(named) != 2 or len(shapes) != 2 or not result:
        return None
    sizes: dict[str, Dim] = {}
    for term, shape in zip(named, shapes, strict=True):
        if shape is None or len(set(term)) != len(term) or len(term) != len(shape):
            return None
        pairs = zip(term, shape, strict=True)
        if any(equal(sizes.setdefault(letter, dim), dim) is not Verdict.YES for letter, dim in pairs):
            return None
    summed = [letter for letter in named[0] if letter not in result]
    if not summed or set(summed) != set(sizes) - set(result) or not set(summed) <= set(named[1]):
        return None
    operands: list[Ref] = []
    for term, shape, value in zip(named, shapes, node.inputs, strict=True):
        assert shape is not None
        assert value is not None
        places = [term.index(letter) if letter in term else None for letter in result]
        layout = ref.layout.remap(shape, places, extra=[term.index(letter) for letter in summed])
        first = len(ref.layout.axes)
        operands.append(view.peel(Ref(value, layout.merge(first, first + len(summed)))).ref)
    return leaf(Contract(*operands))


def _stored(rank: int, swap: bool, swap_batch: bool) -> tuple[int, ...]:
    """The axes of an operand as the product reads them: batch axes, then the two of the matrix."""
    axes = range(rank)
    if swap_batch:
        return (*axes[1:-1], rank - 1, 0) if swap else (*axes[1:-1], 0, rank - 1)
    return (*axes[:-2], rank - 1, rank - 2) if swap else tuple(axes)


def _align(shape: tuple[Dim, ...], batch: Sequence[int], out: tuple[Dim, ...]) -> list[int | None] | None:
    """For each batch axis of the result, the operand's axis, or None where the operand is broadcast over it."""
    aligned: list[int | None] = []
    missing = len(out) - 2 - len(batch)
    for axis, dim in enumerate(out[:-2]):
        own = batch[axis - missing] if axis >= missing else None
        if own is None or shape[own] == 1:
            aligned.append(None)
        elif equal(shape[own], dim) is Verdict.YES:
            aligned.append(own)
        else:
            return None
    return aligned


# -- spelling ---------------------------------------------------------------------------------------------------------


def spell(atom: MatMul, coef: float, speller: Speller) -> tuple[Written, float]:
    """Write a contraction with MatMul or Gemm; a number may go to an operand, or its square root to both.

    Returns:
        The value, and the number that is still to be multiplied.
    """
    draw = speller.draw
    (label,) = speller.labels(atom.letters)
    left, right = speller.value(atom.left), speller.value(atom.right)
    if coef != 1.0 and not speller.is_shared(atom):
        place = draw.choose("after", "left", "right", "both")
        if place == "both" and coef > 0:
            left, right, coef = speller.scaled(left, coef**0.5), speller.scaled(right, coef**0.5), 1.0
        elif place == "left":
            left, coef = speller.scaled(left, coef), 1.0
        elif place == "right":
            right, coef = speller.scaled(right, coef), 1.0
    batch = tuple(own for own in left.labels if own in right.labels and own != label)
    if draw.chance(6) and speller.writer.opset >= 12 and all(len(own) == 1 for own in (*left.axes, *right.axes)):
        return _spell_einsum(left, right, label, speller), coef
    if batch:
        return _batched(left, right, label, batch, speller), coef
    if draw.chance(4):
        written, own = _gemm(left, right, label, speller, coef=coef)
        return written, coef / own
    return _projected(left, right, label, speller), coef


def _spell_einsum(left: Written, right: Written, label: str, speller: Speller) -> Written:
    """The result with its axes in any order."""
    labels = tuple(dict.fromkeys((*left.labels, *right.labels)))
    letter = dict(zip(labels, "abcdefghijklmnop", strict=False))
    result = speller.draw.shuffled(own for own in labels if own != label)
    terms = ["".join(letter[own] for own in given) for given in (left.labels, right.labels, result)]
    axes = tuple((own,) for own in result)
    return speller.writer.node("Einsum", [left, right], axes, equation=f"{terms[0]},{terms[1]}->{terms[2]}")


def _projected(left: Written, right: Written, label: str, speller: Speller) -> Written:
    """No axis is in both: (…, label) times (label, columns)."""
    columns: Group = tuple(own for own in right.labels if own != label)
    rows = _rows(left, label)
    left = arrange(speller.writer, left, (*rows, (label,)))
    right = arrange(speller.writer, right, ((label,), columns))
    return speller.writer.node("MatMul", [left, right], (*rows, columns))


def _batched(left: Written, right: Written, label: str, batch: tuple[str, ...], speller: Speller) -> Written:
    """Axes in both are batch axes, of a product of any rank: merged into one, or side by side."""
    draw, writer = speller.draw, speller.writer
    if draw.chance(8):
        left, right = right, left
    rows = [own for own in left.labels if own not in (*batch, label)]
    columns = tuple(own for own in right.labels if own not in (*batch, label))
    extra, row = tuple((own,) for own in rows[:-1]), tuple(rows[-1:])
    groups: Axes = (batch,) if len(batch) > 1 and draw.chance(3) else tuple((own,) for own in batch)
    front = (*groups, *extra)
    left = arrange(writer, left, (*front, row, (label,)))
    right = arrange(writer, right, (*groups, *(((),) * len(extra)), (label,), columns))
    return writer.node("MatMul", [left, right], (*front, row, columns))


def spell_gemm(term: Sum, speller: Speller) -> Written | None:
    """Write a contraction plus one summand along its columns as one Gemm, now and then; None otherwise."""
    if not speller.draw.chance(3):
        return None
    for item, other in (term.items, term.items[::-1]):
        atom = speller.contraction_of(item)
        if atom is None or other.coef != 1.0:
            continue
        (label,) = speller.labels(atom.letters)
        addend = speller.variable_of(other)
        rows, columns = speller.labels_in(atom.left), speller.labels_in(atom.right) - {label}
        if addend is None or rows & columns or len(addend.axes) != 1 or set(addend.labels) != columns:
            return None
        left, right = speller.value(atom.left), speller.value(atom.right)
        return _gemm(left, right, label, speller, addend=addend, coef=item.coef)[0]
    return None


def _gemm(
    left: Written, right: Written, label: str, speller: Speller, *, addend: Written | None = None, coef: float = 1.0
) -> tuple[Written, float]:
    """A Gemm of operands brought to two axes; return it, with its axes as they were, and the number it took in."""
    draw, writer = speller.draw, speller.writer
    rows = _rows(left, label)
    flat: Group = tuple(own for group in rows for own in group)
    columns: Group = addend.axes[0] if addend is not None else tuple(own for own in right.labels if own != label)
    swap_left, swap_right = draw.chance(6), draw.choose(False, True)
    if right.axes == (columns, (label,)):
        swap_right = True
    left = arrange(writer, left, ((label,), flat) if swap_left else (flat, (label,)))
    right = arrange(writer, right, (columns, (label,)) if swap_right else ((label,), columns))
    alpha = coef if addend is not None or draw.choose(True, False) else 1.0
    operands = [left, right] if addend is None else [left, right, addend]
    swapped = {"transA": int(swap_left) or None, "transB": int(swap_right) or None}
    made = writer.node("Gemm", operands, (flat, columns), **swapped, alpha=None if alpha == 1.0 else alpha)
    return arrange(writer, made, (*rows, columns)), alpha


def _rows(left: Written, label: str) -> Axes:
    """The axes of a left operand without the label that is contracted."""
    groups = (tuple(own for own in group if own != label) for group in left.axes)
    return tuple(group for own, group in zip(left.axes, groups, strict=True) if group or not own)
