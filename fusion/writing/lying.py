"""How a result lies: in the axes of the pattern's result, which may have another order or grouping in the root."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusion.captures import letters_of
from fusion.layout import Layout, merge_neighbours
from fusion.writing.found import Captured, Found, New, Operand
from fusion.writing.place import rearranged

if TYPE_CHECKING:
    from fusion.writing.emit import Builder


def unmoved(op: Builder, found: Found, captured: Captured, letter: str) -> tuple[Operand, int]:
    """See `Builder.unmoved`."""
    letters = found.state.letters
    order = [axis for own in letters_of(found.plan.captures[captured.name].dims or ()) for axis in letters.get(own, ())]
    found.require(len(letters[letter]) == 1, f"{letter} is more than one axis")
    return op.arranged(captured.axes(*map(order.index, range(len(order))))), letters[letter][0]


def in_root_axes(op: Builder, found: Found, result: New) -> New:
    """See `Builder.in_root_axes`."""
    if result.lies:
        return result
    if found.plan.inner:
        return _in_root_layout(op, found, result)
    order = [axis for letter in letters_of(found.plan.dims) for axis in found.state.letters.get(letter, ())]
    if order == sorted(order):
        return result
    back = sorted(range(len(order)), key=lambda index: order[index])
    return op.shared("Transpose", [result], None, perm=back)


def _in_root_layout(op: Builder, found: Found, result: New) -> New:
    axes = found.ref.layout.axes
    own = []
    for token in found.plan.dims:
        letters = (token,) if isinstance(token, str) else token
        own.append(tuple(f for letter in letters for axis in found.state.letters[letter] for f in axes[axis]))
    have = Layout(tuple(map(merge_neighbours, own)), found.ref.layout.offsets, found.ref.layout.source)
    root = found.view.root(found.root)
    wanted = found.view.peel(root).ref.layout if root is not None else have
    if wanted == have:
        return result
    made = rearranged(op, result, have, wanted)
    if made is None:
        raise op.unmet(f"{found.root.name} does not lie in axes that the fused node's result has", found.root)
    return made
