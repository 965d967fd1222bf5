"""New nodes: `op.Gelu(x)` asks for one, with constants and shape tensors beside it; nothing is edited yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from fusion.captures import parse
from fusion.dims import Dim, product
from fusion.models.graph import Value
from fusion.targets import Target
from fusion.verdict import Verdict
from fusion.writing.found import Captured, Found, Narrow, New, NewNode, Operand, Unmet
from fusion.writing.sizes import filled, int64, item_of, sizes

MICROSOFT = "com.microsoft"


class Nodes:
    """Collects the new nodes of one match, and the values that they read.

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
    def microsoft(self) -> Self:
        """The same builder for the operators of com.microsoft."""
        return self.of(MICROSOFT)

    def of(self, domain: str) -> Self:
        """The same builder for the operators of another domain."""
        other = type(self)(self._found, self._target, domain)
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

    def narrow(self, value: Value) -> Narrow:
        """The error for a value that the graph never has in a type as narrow as the root's."""
        name = TensorProto.DataType.Name(self._found.root_dtype)
        return Narrow(f"{value.name} is cast to {name} nowhere", self._found.facts.dtype(value), value.name)

    def unmet(self, text: str, value: Value) -> Unmet:
        """The error for a value that cannot be brought into the axes wanted."""
        return Unmet(text, kind="dimension", verdict=Verdict.UNKNOWN, place=value.name)
