"""Emission: what a pattern's emission function sees of a match, and the nodes it asks for.

An emission runs before anything is edited. It builds a list of new nodes over existing values; what does not hold is
raised as `Unmet` and becomes a miss. Captures are passed to operators as they are: the value that lies in the graph
with the axes of the capture is looked up, and only `op.arranged(...)` and its like may insert nodes that rearrange.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import helper

from fusion.captures import Dims, letters_of, parse
from fusion.dims import Dim
from fusion.layout import Layout, merge_neighbours
from fusion.matching.state import Entry
from fusion.models.graph import Node, Value
from fusion.schema import extra_attributes
from fusion.terms import Ref
from fusion.writing.beside import additive, guarded, is_causal
from fusion.writing.cache import split_cache
from fusion.writing.folded import folded, vector
from fusion.writing.found import Captured, New, NewNode, Operand, Unmet
from fusion.writing.lying import in_root_axes, unmoved
from fusion.writing.nodes import Nodes
from fusion.writing.packed import packed
from fusion.writing.place import nearest, place, standing
from fusion.writing.place import rearranged as lay_out


class Builder(Nodes):
    """Builds the new nodes of one match from its captures: `op.Gelu(found.x)`, `op.microsoft.Gelu(found.x)`."""

    def packed(self, *captures: Captured | None, axis: int, absent: tuple[Captured, ...] = ()) -> Operand:
        """Weights put together along an axis: the value of which they are the pieces, else a new one, the bytes of
        which are joined only when the model is written.

        Args:
            captures: constant matrices (C, N) or vectors (N,); None where absent.
            absent: where given, the matrices whose columns say how many zeros stand for an absent vector.

        Raises:
            Unmet: a capture is no stored constant, or of another dtype.
        """
        return packed(self, self._found, captures, axis, absent)

    def vector(self, source: Captured | Value | None) -> np.ndarray[Any, Any]:
        """The numbers of a stored vector, in double.

        Raises:
            Unmet: it is computed, or no vector.
        """
        return vector(self._found, source)

    def again(self, node: Node, *inputs: Captured | Operand, **attributes: object) -> New:
        """A node of the region once more, of other inputs; its attributes but for those given, and without those None.

        Raises:
            Unmet: an attribute of it is a parameter of the function it stands in.
        """
        own = {item.name: helper.get_attribute_value(item) for item in node.proto.attribute}
        self._found.require(not extra_attributes(node, own), f"attributes of {node.label} are not known")
        kept = {name: value for name, value in (own | attributes).items() if value is not None}
        made: New = getattr(self, node.op)(*inputs, **kept)
        return made

    def folded(self, layer: Node, *, factor: np.ndarray[Any, Any] | None, shift: np.ndarray[Any, Any]) -> New:
        """A Conv, ConvTranspose or Gemm that computes what `layer` does, times a factor, plus a shift, by channel.

        Raises:
            Unmet: its weights are computed, are in half precision, or others read them too.
        """
        return folded(self, self._found, layer, factor, shift)

    def stored(self, captured: Captured, *orders: Callable[[int], Sequence[int]], keep: int = 0) -> tuple[Operand, int]:
        """A capture as it is stored, its axes in one of several orders: the operand, and which of the orders it has.

        What lies nearest to the capture's source is taken; where nothing lies so, new nodes bring it into the first
        order. Axes over which it is broadcast have size 1, or, leading ones, may be missing.

        Args:
            captured: what to look up.
            orders: each gives, for a number of axes, the order in which the axes of the capture are stored.
            keep: how many trailing axes must be there.

        Raises:
            Unmet: it cannot be brought there.
        """
        layout, found = captured.ref.layout, self._found
        axes = tuple(axis if layout.depends(index) else () for index, axis in enumerate(layout.axes))
        missing = next((index for index, axis in enumerate(axes[: len(axes) - keep]) if axis), len(axes) - keep)
        wanted: list[tuple[int, Layout]] = []
        for lead in range(missing + 1):
            narrow = Layout(axes[lead:], layout.offsets, layout.source)
            for index, order in enumerate(orders):
                permuted = list(order(len(axes) - lead))
                if sorted(permuted) == list(range(len(axes) - lead)):
                    wanted.append((index, narrow.permute(permuted)))
        chosen = nearest(found.view, captured.value, [own for _, own in wanted], found.node)
        index, narrow = wanted[chosen or 0]
        return self.placed(Ref(captured.value, narrow), found.dtype), index

    def broadcast(self, captured: Captured) -> Operand:
        """A capture of three axes that may lack the first one, or have it as 1, where it is broadcast over it."""
        layout = captured.ref.layout
        if len(layout.axes) != 3 or layout.depends(0) or layout.shape[0] == 1:
            return self._operand(captured)
        single = Layout(((), *layout.axes[1:]), layout.offsets, layout.source)
        missing = Layout(layout.axes[1:], layout.offsets, layout.source)
        for variant in (single, missing):
            value = standing(self._found.view, Ref(captured.value, variant), self._found.dtype, self._found.node)
            if value is not None:
                return self._operand(value)
        return self._operand(captured)

    def guarded(self, result: New) -> New:
        """The result with 0 for rows that are masked everywhere, where the region says so around its softmax.

        Result (B, S, N), masks (B, H, S, T): `Where(IsNaN(p), 0, p)` becomes the same around the result, and
        `Where(mask, p, 0)` becomes 0 for the rows in which the mask keeps no key.

        Raises:
            Unmet: a mask that is put on the probabilities was not put on the scores before them, or differs by head.
        """
        return guarded(self, self._found, result)

    def additive(self, entries: tuple[Entry, ...]) -> Operand:
        """The entries of a `rest` capture as one tensor to add, its last two axes written out; None where they do
        nothing.

        `Where(keep, score, fill)` equals `score + Where(keep, 0, fill)` only where fill absorbs every score: a number
        near the smallest of the dtype, or -inf. Where nothing else is beside the scores, a number that does is
        written for one that hides. In half precision only -inf does, as kernels compute in float there, or any that
        hides where every row keeps a key, or is 0 in the end.

        Raises:
            Unmet: a mask has another fill.
        """
        return additive(self, self._found, entries)

    def is_causal(self, entries: tuple[Entry, ...], past: Dim = 0) -> bool:
        """Whether all that the entries of a `rest` capture do is to hide the keys j > past + i from query i.

        There are as many keys as past ones and queries. All is proved from what computes the entries, or from what is
        stored; False where nobody knows.
        """
        return is_causal(self._found, entries, past)

    def split_cache(self, letter: str, *, shared: str = "", **forms: str) -> list[Captured]:
        """Read captures that append to a cache as what is new in them; what they append to is returned.

        The emission returns the whole caches, in this order, behind its result: they are outputs of the fused node.

        Args:
            letter: of the axis that grows.
            shared: a letter along which keys may be repeated behind the cache.
            forms: for each capture, the axes in which the kernel reads the past and writes the whole.

        Raises:
            Unmet: a capture is not one value appended to another, or does not lie so, or nobody reads the whole.
        """
        return split_cache(self._found, forms, letter, shared)

    def arranged(self, captured: Captured | None) -> Operand:
        """A capture in its own axes: standing in the graph, or rearranged by new nodes. An absent one stays absent."""
        if captured is None:
            return None
        return self._vector(captured) or self.placed(captured.ref, self._found.dtype)

    def scaled(self, captured: Captured, factor: Captured, form: str) -> Operand:
        """A capture times a factor of these axes but for the last one, multiplied there, and brought into its own axes.

        Raises:
            Unmet: one of them cannot be brought there.
        """
        wide, narrow = captured.along(form), factor.along(form.rpartition(" ")[0])
        column = Layout((*narrow.layout.axes, ()), narrow.layout.offsets, narrow.layout.source)
        lies, _ = self.stored(Captured(self._found, factor.name, Ref(factor.value, column)), range)
        made = self.Mul(self.placed(wide, self._found.dtype), lies)
        arranged = lay_out(self, made, wide.layout, captured.ref.layout)
        if arranged is None:
            raise self.unmet(f"{captured.value.name} cannot be rearranged after its factor", captured.value)
        return arranged

    def before(self, captured: Captured, count: int) -> Operand:
        """A capture with as many axes of size 1 behind its own."""
        layout = captured.ref.layout
        wide = Layout((*layout.axes, *((),) * count), layout.offsets, layout.source)
        return self.placed(Ref(captured.value, wide), self._found.dtype)

    def unmoved(self, captured: Captured, letter: str) -> tuple[Operand, int]:
        """A capture of all axes of the result, in the order in which the result lies, and the axis that a letter is.

        What is computed of it in this order is returned as `lying`.

        Raises:
            Unmet: the letter stands for several axes, or the capture cannot be brought there.
        """
        return unmoved(self, self._found, captured, letter)

    @staticmethod
    def lying(result: New) -> New:
        """A result that lies as the root does, whatever the order of its letters."""
        result.lies = True
        return result

    def _vector(self, captured: Captured) -> New | None:
        """A stored vector such as (1, 1, D), wanted as (D), written so; None for anything else."""
        tensor, layout = captured.value.tensor, captured.ref.layout
        if tensor is None or tensor.data_type != self._found.dtype or list(layout.shape) == list(tensor.dims):
            return None
        longer = [(axis, dim) for axis, dim in enumerate(tensor.dims) if dim != 1]
        if len(longer) != 1 or len(layout.axes) != 1 or layout.whole(0) != longer[0][0]:
            return None
        found = self._found
        if standing(found.view, captured.ref, found.dtype, found.node) is not None:
            return None
        return New(found.dtype, (longer[0][1],), parts=((tensor, None),))

    def fewest(self, *forms: Sequence[tuple[Captured, str]]) -> list[Operand]:
        """Captures in the axes of one of these forms: the first of those that need the fewest new nodes."""
        before = len(self.nodes), len(self.inputs)
        best: tuple[int, list[NewNode], list[Value], list[Operand]] | None = None
        refused: Unmet | None = None
        for form in forms:
            try:
                made = [self.placed(captured.along(spec), self._found.dtype) for captured, spec in form]
                count = len(self.nodes) - before[0]
                if best is None or count < best[0]:
                    best = count, self.nodes[before[0] :], self.inputs[before[1] :], made
            except Unmet as unmet:
                refused = refused or unmet
            del self.nodes[before[0] :], self.inputs[before[1] :]
        if best is None:
            assert refused is not None, "a form is given"
            raise refused
        self.nodes += best[1]
        self.inputs += best[2]
        return best[3]

    def unrepeated(self, letter: str, *forms: tuple[Captured, str]) -> tuple[int, list[Operand]]:
        """Captures in other axes, with what is repeated along a letter there once, and how often it is there then.

        Keys of 8 heads which two query heads each read, as `(k, "B T (H D)")`, are 4 heads (B, T, 4 D).
        """
        once = [self._found.unrepeated(captured, letter) for captured, _ in forms]
        often = once[0][0] if len({times for times, _ in once}) == 1 else 1
        laid = [
            captured.laid(axes if often > 1 else captured.by_letter(), spec)
            for (captured, spec), (_, axes) in zip(forms, once, strict=True)
        ]
        return self._found.size(letter) // often, [self.placed(ref, self._found.dtype) for ref in laid]

    def placed(self, ref: Ref, dtype: int | None) -> Operand:
        """A value in the axes of `ref`."""
        made = place(self._found.view, ref, dtype, self._found.node, self)
        if isinstance(made, Value):
            self.inputs.append(made)
        return made

    def rearranged(self, operand: Operand, spec: str, **sizes: Dim) -> New:
        """An operand in other axes, written as for `axes`; along a letter that only the right side has it is repeated.

        Args:
            sizes: of the letters that the operand's shape does not tell.

        Raises:
            Unmet: a size is unknown.
        """
        before, after = (parse(side)[0] for side in spec.split("->"))
        letters = letters_of(before)
        if not sizes.keys() >= set(letters):
            told = zip(before, self.shape(operand), strict=True)
            sizes |= {token: dim for token, dim in told if isinstance(token, str)}

        def laid(tokens: Dims) -> Layout:
            groups = ((token,) if isinstance(token, str) else token for token in tokens)
            axes = [
                [(letters.index(own), 1, sizes[own]) if own in letters else (None, 0, sizes[own]) for own in group]
                for group in groups
            ]
            return Layout(tuple(map(merge_neighbours, axes)), (0,) * len(letters), tuple(sizes[own] for own in letters))

        made = lay_out(self, operand, laid(before), laid(after))
        if made is None:
            raise self.unmet(f"{spec} cannot be written", self._found.root)
        return made

    def in_root_axes(self, result: New) -> New:
        """The result with its axes as the root has them, where the pattern's result has them in another order."""
        return in_root_axes(self, self._found, result)
