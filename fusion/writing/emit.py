"""Emission: what a pattern's emission function sees of a match, and the nodes it asks for.

An emission runs before anything is edited. It builds a list of new nodes over existing values; what does not hold is
raised as `Unmet` and becomes a miss. Captures are passed to operators as they are: the value that lies in the graph
with the axes of the capture is looked up, and only `op.arranged(...)` and its like may insert nodes that rearrange.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from fusion.captures import Dims, letters_of, parse
from fusion.dims import Dim, product
from fusion.layout import Layout, merge_neighbours
from fusion.matching.state import Entry
from fusion.models.graph import Node, Value
from fusion.schema import extra_attributes
from fusion.targets import Target
from fusion.terms import Ref
from fusion.verdict import Verdict
from fusion.writing.beside import additive, guarded, is_causal
from fusion.writing.cache import split_cache
from fusion.writing.folded import folded, vector
from fusion.writing.found import Captured, Found, Narrow, New, NewNode, Operand, Unmet
from fusion.writing.lying import in_root_axes, unmoved
from fusion.writing.packed import packed
from fusion.writing.place import nearest, place, standing
from fusion.writing.place import rearranged as lay_out
from fusion.writing.sizes import filled, int64, item_of, sizes

MICROSOFT = "com.microsoft"


class Builder:
    """Builds the new nodes of one match: `op.Gelu(found.x)`, `op.microsoft.Gelu(found.x)`.

    A node for which the target has no kernel, for its dtypes and the model's opset, is raised as `Unmet`.
    """

    def __init__(self, found: Found, target: Target, domain: str = "") -> None:
        self._found = found
        self._target = target
        self._domain = domain
        self.nodes: list[NewNode] = []
        self.inputs: list[Value] = []

    @property
    def provider(self) -> str | None:
        """Whose kernels will run; None where that is open."""
        return self._target.provider

    @property
    def microsoft(self) -> Builder:
        """The same builder for the operators of com.microsoft."""
        return self.of(MICROSOFT)

    def of(self, domain: str) -> Builder:
        """The same builder for the operators of another domain."""
        other = Builder(self._found, self._target, domain)
        other.nodes, other.inputs = self.nodes, self.inputs
        return other

    def __getattr__(self, op: str) -> Callable[..., Any]:
        if op.startswith("_"):
            raise AttributeError(op)

        def build(*inputs: Any, outputs: int = 1, dtype: int | None = None, **attributes: object) -> Any:
            made = [New(None) for _ in range(outputs)]
            operands = [self._operand(value) for value in inputs]
            made[0].dtype = dtype or next((d for o in operands if (d := self._dtype(o)) is not None), None)
            self._add(NewNode(op, self._domain, operands, made, attributes))
            return made[0] if outputs == 1 else tuple(made)

        return build

    def _add(self, node: NewNode) -> None:
        version = 1 if node.domain else self._found.opset
        dtypes = [self._dtype(operand) for operand in node.inputs]
        asked = (node.op, node.domain, version, dtypes, node.outputs[0].dtype)
        reason = self._target.refuses(*asked, attributes=node.attributes)
        if reason is None and TensorProto.DOUBLE in dtypes and self._target.route(*asked) == "expanded":
            reason = f"{node.op} has no kernel for double: it would be computed in float"
        if reason is None and TensorProto.DOUBLE in dtypes:
            reason = node.rounding()
        if reason is not None:
            raise Unmet(reason, kind="kernel", place=self._found.root.name)
        node.least = self._target.results(node.op, node.domain, version)
        self.nodes.append(node)

    def _dtype(self, operand: Operand) -> int | None:
        if isinstance(operand, New):
            return operand.dtype
        return None if operand is None else self._found.facts.dtype(operand)

    def _operand(self, value: Any) -> Operand:
        if isinstance(value, Captured):
            value = value.standing(self._found.dtype)
        if isinstance(value, Value):
            self.inputs.append(value)
        if value is None or isinstance(value, Value | New):
            return value
        raise TypeError(f"an operand is a capture, a value or a new output, not {value!r}")

    def constant(self, array: np.ndarray[Any, Any], hint: str = "constant") -> New:
        """A new constant."""
        tensor = numpy_helper.from_array(array, hint)
        return New(tensor.data_type, tuple(array.shape), tensor)

    def ones(self, spec: str) -> New:
        """Ones over the axes of a letter, or of several merged, in the dtype of the root."""
        sizes: list[Dim] = []
        for token in parse(spec)[0]:
            own = [size for letter in token for size in self._found.dims(letter)]
            sizes.extend(own if isinstance(token, str) else [product(own)])
        if not all(isinstance(size, int) for size in sizes):
            raise self.unmet(f"the size of {spec} is not a known number", self._found.root)
        return self.constant(np.ones([int(str(s)) for s in sizes], self.numpy), "ones")

    def zeros(self, spec: str) -> New:
        """Zeros over the same."""
        ones = self.ones(spec)
        return self.constant(np.zeros([int(str(size)) for size in ones.shape or ()], self.numpy), "zeros")

    @property
    def numpy(self) -> np.dtype[Any]:
        """The dtype of the root, for constants."""
        return helper.tensor_dtype_to_np_dtype(self._found.dtype)

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

    def shape(self, operand: Operand) -> tuple[Dim, ...]:
        """The shape of an operand.

        Raises:
            Unmet: it is not known.
        """
        known = operand.shape if isinstance(operand, New) else None
        shape = self._found.facts.shape(operand) if isinstance(operand, Value) else known
        if shape is None:
            raise self.unmet("the shape of an operand is not known", self._found.root)
        return shape

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

    def scalar(self, value: float) -> New:
        """A new constant of one element, in the dtype of the root."""
        return self.constant(np.array(value, self.numpy), "scalar")

    def shared(
        self,
        op: str,
        inputs: list[Operand],
        shape: tuple[Dim, ...] | None,
        dtype: int | None = None,
        **attributes: object,
    ) -> New:
        """A node that later matches may use too: made early, and found again instead of made twice."""
        known = dtype if dtype is not None else next((d for o in inputs if (d := self._dtype(o)) is not None), None)
        made = New(known, shape)
        for operand in inputs:
            if isinstance(operand, Value):
                self.inputs.append(operand)
        self._add(NewNode(op, "", inputs, [made], attributes, shared=True))
        return made

    def unsqueezed(self, operand: Operand, axes: list[int], shape: tuple[Dim, ...]) -> New:
        """Unsqueeze, its axes an input from opset 13 on."""
        if self._found.opset >= 13:
            return self.shared("Unsqueeze", [operand, self.constant(int64(axes), "axes")], shape)
        return self.shared("Unsqueeze", [operand], shape, axes=axes)

    def sliced(self, operand: Operand, axis: int, places: range, shape: tuple[Dim, ...]) -> New:
        """Slice along one axis, its bounds inputs from opset 10 on; below there are no steps."""
        bounds = ([places.start], [places.stop], [axis], [places.step])
        if self._found.opset >= 10:
            return self.shared("Slice", [operand, *(self.constant(int64(bound), "slice") for bound in bounds)], shape)
        self._found.require(places.step == 1, "Slice has no steps before opset 10")
        return self.shared("Slice", [operand], shape, starts=bounds[0], ends=bounds[1], axes=bounds[2])

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

    def reshaped(self, operand: Operand, have: tuple[Dim, ...], wanted: tuple[Dim, ...]) -> Operand:
        """An operand of one shape in another one."""
        if have == wanted:
            return operand
        return self.Reshape(operand, self.sizes(wanted, have, copy=True))  # type: ignore[no-any-return]

    def flattened(self, operand: Operand, width: Dim) -> New:
        """An operand as a matrix of this many columns."""
        if not isinstance(width, int):
            raise self.unmet(f"the size {width} is not a known number", self._found.root)
        return self.shared("Reshape", [operand, self.constant(int64([-1, width]), "shape")], None)

    def numbered(self, operand: Operand, rank: int) -> New:
        """0, 1, 2, … in the first `rank` axes of an operand, as int64."""
        shape = self.shared("Shape", [operand], None, dtype=TensorProto.INT64)
        axes = self.constant(int64(list(range(rank))), "axes")
        sizes = self.shared("Gather", [shape, axes], (rank,), axis=0)
        count = self.shared("ReduceProd", [sizes], (), keepdims=0)
        zero, one = (self.constant(np.array(number), "number") for number in (0, 1))
        numbers = self.shared("Range", [zero, count, one], None)
        return self.shared("Reshape", [numbers, sizes], None)

    def sizes(self, dims: tuple[Dim, ...], have: tuple[Dim, ...], *, copy: bool) -> New:
        """A shape tensor; sizes that are no numbers are read off the captures."""
        return sizes(self, self._found, dims, have, copy)

    def filled(self, number: Dim, count: Dim) -> New:
        """A size again and again, (count,), as int32: lengths of sequences, as kernels take them."""
        return filled(self, self._found, number, count)

    def tell_sizes(self) -> None:
        """Let who asks for the sizes of a value that goes, or that is computed later now, read them off captures.

        Raises:
            Unmet: a size cannot be read off any value that is computed before the one asked.
        """
        for asking in self._found.region.asking:
            output, asked, count = asking.outputs[0], asking.inputs[0], len(self.nodes)
            known = None if output is None else self._found.facts.integers(output)
            if asking not in self._found.node.scope.nodes or known is None or asked is None or asked.producer is None:
                continue  # another rewrite has told it, or needs it no more
            at = asked.producer
            parts: list[Operand] = [item_of(self, self._found, item, at) for item in known.dims if item is not None]
            self._add(NewNode("Concat", "", parts, [New(TensorProto.INT64)], {"axis": 0}))
            for new in self.nodes[count:]:
                new.asking = asking

    def in_root_axes(self, result: New) -> New:
        """The result with its axes as the root has them, where the pattern's result has them in another order."""
        return in_root_axes(self, self._found, result)

    def narrow(self, value: Value) -> Narrow:
        """The error for a value that the graph never has in a type as narrow as the root's."""
        name = TensorProto.DataType.Name(self._found.root_dtype)
        return Narrow(f"{value.name} is cast to {name} nowhere", self._found.facts.dtype(value), value.name)

    def unmet(self, text: str, value: Value) -> Unmet:
        """The error for a value that cannot be brought into the axes wanted."""
        return Unmet(text, kind="dimension", verdict=Verdict.UNKNOWN, place=value.name)
