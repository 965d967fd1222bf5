"""Pieces: what is read of a Concat within one operand is read of that operand.

So concat(a, b) c + concat(d, e) f and concat(a c₁ + d f₁, b c₂ + e f₂) are one formula, read piece by piece.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fusion import plan as p
from fusion.dims import Dim
from fusion.laws.arrange import arrange
from fusion.layout import Layout
from fusion.schema import axes
from fusion.terms import Factors, Prod, Sum

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fusion.facts import Facts
    from fusion.instances.spell import Speller
    from fusion.laws.writer import Group, Written
    from fusion.models.graph import Node, Value

_FAR = 2**63 - 1


def part(node: Node, layout: Layout, facts: Facts) -> tuple[Value, Layout] | None:
    """The operand of a Concat in which everything lies that `layout` reads, and the layout over it."""
    along = axes(node, facts) if node.key == "Concat" else None
    if along is None:
        return None
    axis = along[0]
    read = [(stride, size) for factors in layout.axes for source, stride, size in factors if source == axis]
    if (1, layout.source[axis]) in read:
        return None
    least = most = layout.offsets[axis]
    for stride, size in read:
        if facts.lower(stride) >= 0:
            most = most + stride * (size - 1)
        else:
            least = least + stride * (size - 1)
    start: Dim = 0
    for operand in node.inputs:
        shape = facts.shape(operand) if operand is not None else None
        if operand is None or shape is None:
            return None
        end = start + shape[axis]
        if facts.lower(least - start) >= 0 and facts.lower(end - 1 - most) >= 0:
            offsets = (*layout.offsets[:axis], layout.offsets[axis] - start, *layout.offsets[axis + 1 :])
            return operand, Layout(layout.axes, offsets, shape)
        start = end
    return None


# -- spelling ---------------------------------------------------------------------------------------------------------


def spell_piece(whole: Written, piece: p.Piece, speller: Speller) -> Written:
    """Cut one piece out of a value: by Slice, or by Gather of an axis that is split off."""
    draw, writer = speller.draw, speller.writer
    (label,) = speller.labels((piece.letter,))
    axis = next(index for index, group in enumerate(whole.axes) if label in group)
    group = whole.axes[axis]
    left = tuple(own for own in group if own != label)
    if draw.chance(3):
        split = arrange(writer, whole, (*whole.axes[:axis], *((own,) for own in group), *whole.axes[axis + 1 :]))
        at = split.axes.index((label,))
        index = writer.constant(np.array(piece.at, np.int64))
        rest = tuple(own for own in split.axes if own != (label,))
        return writer.node("Gather", [split, index], rest, axis=at)
    size = writer.shape((left,))[0]
    start, end, step = piece.at * size, (piece.at + 1) * size, 1
    if group[0] != label:
        start, end, step = piece.at, piece.size * size, piece.size
    if piece.at == piece.size - 1 and draw.choose(True, False):
        end = _FAR
    bounds = [writer.integers(bound) for bound in ([start], [end], writer.signed([axis], len(whole.axes)), [step])]
    return writer.node("Slice", [whole, *bounds], (*whole.axes[:axis], left, *whole.axes[axis + 1 :]))


def spell_join(atom: p.Join, speller: Speller) -> Written:
    """Write pieces side by side; now and then each summand by itself, its pieces side by side."""
    (label,) = speller.labels((atom.letter,))
    group = next(speller.labels(token) for token in atom.dims if not isinstance(token, str))
    rows = [_summands(part) for part in atom.parts]
    if not speller.draw.choose(True, False) or any(row is None or row.keys() != (rows[0] or {}).keys() for row in rows):
        return _joined([speller.value(part) for part in atom.parts], label, group, speller)
    written: list[Written] = []
    for others in speller.draw.shuffled(list(rows[0] or {})):
        found = [row[others] for row in rows if row is not None]
        beside = speller.value(Prod(1.0, others))
        wide = _joined([beside] * len(rows), label, group, speller)
        if all(
            coef == 1.0 and variable.piece == (atom.letter, at, len(rows)) for at, (coef, variable) in enumerate(found)
        ):
            joined = speller.atom(found[0][1]._replace(piece=None))[0]
        else:
            pieces = [speller.value(Prod(coef, ((variable, 1.0),))) for coef, variable in found]
            joined = _joined(pieces, label, group, speller)
        written.append(speller.elementwise("Mul", *speller.draw.shuffled([joined, wide])))
    total = written[0]
    for other in written[1:]:
        total = speller.elementwise("Add", *speller.draw.shuffled([total, other]))
    return total


def _summands(part: Prod) -> dict[Factors, tuple[float, p.Var]] | None:
    """Of a sum of pieces of captures, each times other factors: by these factors, the number and the piece."""
    single = part.single
    found: dict[Factors, tuple[float, p.Var]] = {}
    for item in single.items if isinstance(single, Sum) and single.const == 0.0 else ():
        pieces = [atom for atom, exponent in item.factors if isinstance(atom, p.Var) and atom.piece and exponent == 1.0]
        others = tuple(factor for factor in item.factors if factor[0] not in pieces)
        if len(pieces) != 1 or not others or others in found:
            return None
        found[others] = item.coef, pieces[0]
    return found or None


def _joined(parts: Sequence[Written], label: str, group: Group, speller: Speller) -> Written:
    """Parts side by side along a label: as a Concat of them, or stacked along an axis of their own and merged."""
    writer = speller.writer
    left = tuple(own for own in group if own != label)
    axes_ = parts[0].axes
    if left not in axes_:
        axes_ = tuple((own,) for own in parts[0].labels)
    parts = [arrange(writer, part, axes_) for part in parts]
    axis = axes_.index(left)
    merged = (*axes_[:axis], group, *axes_[axis + 1 :])
    if group[0] == label and speller.draw.choose(True, False):
        return writer.node("Concat", parts, merged, axis=writer.signed([axis], len(axes_))[0])
    at = axis if group[0] == label else axis + 1
    opened = (*axes_[:at], (), *axes_[at:])
    stacked = [writer.along("Unsqueeze", part, [at], opened) for part in parts]
    made = writer.node("Concat", stacked, (*axes_[:at], (label,), *axes_[at:]), axis=at)
    return arrange(writer, made, merged)


def spell_concat(atom: p.Concat, speller: Speller) -> Written:
    """Write parts of any length one after the other along the last axis."""
    writer = speller.writer
    *front, last = atom.dims
    lead = speller.labels([str(token) for token in front])
    parts = []
    for part in atom.parts:
        value = speller.value(part)
        end = tuple(label for label in value.labels if label not in lead)
        parts.append(arrange(writer, value, (*((label,) for label in lead), end)))
    axes_ = tuple((label,) for label in (*lead, *speller.labels((str(last),))))
    return writer.node("Concat", parts, axes_, axis=writer.signed([len(lead)], len(axes_))[0])
