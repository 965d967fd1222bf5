"""Instances: models in which a pattern's own formula is spelled once, with arrays for its captures and the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, printer

from fusion import plan as p
from fusion.errors import PatternError
from fusion.instances.sample import Array, Mask, Sizes, draw_array, draw_number, draw_rest, draw_sizes, is_parameter
from fusion.instances.spell import Beside, Captures, Given, Speller, atoms, fill_in
from fusion.language import ELLIPSIS, Capture, Dims, Pattern
from fusion.laws import noise
from fusion.laws.arrange import transpose
from fusion.laws.draw import Draw
from fusion.laws.writer import Axes, Writer, Written
from fusion.plan import Plan, plans_of

FLOAT, HALF, BOOL, INT64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BOOL, TensorProto.INT64


@dataclass(frozen=True, slots=True)
class Instance:
    """A model in which a pattern is spelled once.

    Attributes:
        pattern: which.
        model: the model.
        feeds: its inputs.
        expected: its outputs, computed by the pattern itself in double.
        opset, dtype: what it was drawn for.
        interior: values inside the formula, between the captures and the results.
        results: values of the pattern's outputs in the graph, the result first.
        numbers: the scalar captures.
        absent: captures that are left out.
        traps: what is special about it. A kernel may refuse some of these; none may make the result wrong.
    """

    pattern: Pattern
    model: ModelProto
    feeds: dict[str, Array]
    expected: dict[str, Array]
    opset: int
    dtype: int
    interior: tuple[str, ...]
    results: tuple[str, ...]
    numbers: dict[str, float]
    absent: tuple[str, ...]
    traps: tuple[str, ...]

    def __str__(self) -> str:
        kind = TensorProto.DataType.Name(self.dtype).lower()
        parts = [f"{self.pattern.name}, opset {self.opset}, {kind}"]
        parts += [f"{name} = {value:g}" for name, value in self.numbers.items()]
        parts += [f"no {name}" for name in self.absent]
        return "\n".join(["; ".join([*parts, *self.traps]), text_of(self.model)])


def text_of(model: ModelProto) -> str:
    """A small model as a person can read it, without the numbers of weights."""
    return re.sub(r"\{[^{}\n]{60,}\}", "{…}", printer.to_text(model))


def draw_instance(pattern: Pattern, draw: Draw, *, opset: int = 17, dtype: int = FLOAT) -> Instance:
    """Return one instance.

    Args:
        pattern: what to spell.
        draw: makes all choices.
        opset: of the standard operators.
        dtype: element type (TensorProto.DataType).
    """
    if not pattern.is_formula:
        raise PatternError(f"{pattern.name} has operators without a formula: instances of it cannot be drawn")
    plans = [plan for plan in plans_of(pattern) if not any(isinstance(a, p.Fused) for a in atoms(plan.root))]
    return _Drawing(draw.choose(*plans), draw, opset, dtype).instance()


@dataclass
class _Drawing:
    """One instance in the making."""

    plan: Plan
    draw: Draw
    opset: int
    dtype: int
    feeds: dict[str, Array] = field(default_factory=dict)
    arrays: dict[str, Any] = field(default_factory=dict)
    """By capture, as the reference takes them: in double, or None."""
    numbers: dict[str, float] = field(default_factory=dict)
    tensors: dict[str, Given] = field(default_factory=dict)
    rests: dict[str, list[Beside]] = field(default_factory=dict)
    traps: list[str] = field(default_factory=list)

    def instance(self) -> Instance:
        draw, plan = self.draw, self.plan
        self.sizes: Sizes = draw_sizes(plan, draw)
        self.traps.extend(self.sizes.traps)
        # Exporters of half models compute norms and activations in float, with casts around.
        self.computed = FLOAT if self.dtype == HALF and draw.chance(3) else self.dtype
        self.writer = Writer(
            draw, opset=self.opset, dtype=self.computed, sizes=self.sizes.labels, dynamic=self.sizes.dynamic
        )
        for name, capture in plan.captures.items():
            self._capture(name, capture)
        absent = tuple(name for name, array in self.arrays.items() if array is None)
        order = [label for labels in self.sizes.letters.values() for label in labels]
        speller = Speller(self.writer, Captures(self.tensors, self.rests, self.sizes.letters), order)
        first = len(self.writer.nodes)
        result = speller.spell(fill_in(plan.root, self.numbers, absent), self.sizes.groups(plan.dims))
        inside = [
            name
            for node in self.writer.nodes[first:]
            for name in node.output
            if self.writer.types.get(name) in noise.FLOATS
        ]
        values = [result, *(speller.kept[index] for index in sorted(speller.kept))]
        names = tuple(value.name for value in values)
        outputs = self._outputs(values, self._reference(values, guarded=speller.guarded))
        infos = [self.writer.info(value.name, value.axes, value.dtype) for value, _ in outputs]
        return Instance(
            plan.pattern, self.writer.model(infos), self.feeds, {value.name: array for value, array in outputs},
            self.opset, self.dtype, tuple(name for name in inside if name not in names), names,
            self.numbers, absent, tuple(self.traps),
        )  # fmt: skip

    @property
    def appended(self) -> set[str]:
        """The captures that a Concat takes as they are: it broadcasts nothing."""
        concats = [atom for atom in atoms(self.plan.root) if isinstance(atom, p.Concat)]
        return {part.single.name for atom in concats for part in atom.parts if isinstance(part.single, p.Var)}

    # -- captures -----------------------------------------------------------------------------------------------------

    def _capture(self, name: str, capture: Capture) -> None:
        if capture.kind == "scalar":
            self.numbers[name] = self.arrays[name] = draw_number(capture, self.draw, self.computed)
        elif capture.kind == "rest":
            self._rest(name, capture)
        elif capture.kind == "optional" and self.draw.choose(False, True):
            self.arrays[name] = None
        elif is_parameter(capture, self.plan.dims):
            self._parameter(name, capture.dims or ())
        else:
            self._activation(name, capture.dims or (ELLIPSIS,))

    def _activation(self, name: str, dims: Dims) -> None:
        """What is computed from the model's input: read directly, after another node, or in other axes."""
        draw, sizes = self.draw, self.sizes
        missing = 0
        if (
            dims[0] == ELLIPSIS
            and sizes.letters[ELLIPSIS]
            and self.tensors
            and name not in self.appended
            and draw.chance(6)
        ):
            missing = draw.index(len(sizes.letters[ELLIPSIS])) + 1
            self.traps.append(f"{name} is broadcast")
        axes = sizes.groups(dims)[missing:]
        array = draw_array(name, sizes.shape(dims)[missing:], draw, self.dtype)
        forms = ["input", "computed", "transposed", "permuted"]
        if any(len(labels) > 1 for letter, labels in sizes.letters.items() if letter != ELLIPSIS):
            forms.pop()  # a mean over several axes runs over them as they lie
        form = draw.choose(*forms) if len(axes) > 1 else "input"
        order = draw.shuffled(range(len(axes)))[::-1] if form in ("transposed", "permuted") else list(range(len(axes)))
        stored = tuple(axes[axis] for axis in order)
        value = self.writer.input(name, stored, self.dtype)
        self.feeds[name] = array.transpose(order) if order else array
        if form == "computed":
            value, array = self.writer.node("Sin", [value], axes), np.sin(array.astype(np.float64))
        if form == "transposed":
            value = transpose(self.writer, value, [order.index(axis) for axis in range(len(order))])
            order = sorted(order)
        if form == "permuted" and order != sorted(order):
            self.traps.append(f"{name} lies in other axes")
        value = self._cast(value)
        self.tensors[name] = Given(value.name, value.dtype, tuple(missing + axis for axis in order))
        self.arrays[name] = array.astype(np.float64).reshape(sizes.merged(dims)[missing:])

    def _cast(self, value: Written) -> Written:
        if value.dtype == self.computed:
            return value
        return self.writer.node("Cast", [value], value.axes, dtype=self.computed, to=self.computed)

    def _parameter(self, name: str, dims: Dims) -> None:
        """What is learned: stored, now and then an input, with leading axes of size 1, or transposed."""
        draw, sizes = self.draw, self.sizes
        axes = sizes.groups(dims)
        dtype = draw.choose(self.computed, self.dtype)
        array = draw_array(name, sizes.shape(dims), draw, dtype)
        order: list[int | None] = list(range(len(axes)))
        if len(axes) > 1 and draw.chance(4):
            order = order[::-1]
        elif len(axes) == 1 and draw.chance(6):
            ones = draw.index(len(sizes.groups(self.plan.dims)) - 1) + 1 if len(sizes.groups(self.plan.dims)) > 1 else 0
            order = [*([None] * ones), *order]
            self.traps.extend([f"{name} has {ones} leading axes of size 1"] if ones else [])
        stored: Axes = tuple(() if axis is None else axes[axis] for axis in order)
        laid = array.transpose([axis for axis in order if axis is not None]).reshape(self.writer.shape(stored))
        if draw.chance(8):
            value = self.writer.input(name, stored, dtype)
            self.feeds[name] = laid
            self.traps.append(f"{name} is an input")
        else:
            value = self.writer.stored(name, stored, laid)
        value = self._cast(value)
        self.tensors[name] = Given(value.name, value.dtype, tuple(order))
        self.arrays[name] = array.astype(np.float64).reshape(sizes.merged(dims))

    def _rest(self, name: str, capture: Capture) -> None:
        masks, traps = draw_rest(capture, self.sizes, self.draw, self.computed)
        self.traps.extend(traps)
        labels = [label for group in self.sizes.groups(capture.dims or ()) for label in group]
        with np.errstate(all="ignore"):
            self.arrays[name] = sum((mask.added() for mask in masks), np.zeros((1,) * len(labels)))
        self.rests[name] = []
        for index, mask in enumerate(masks):
            axes: Axes = tuple((label,) if label in mask.labels else () for label in labels)
            self.rests[name].append(self._beside(f"{name}{index}", mask, axes))

    def _beside(self, name: str, mask: Mask, axes: Axes) -> Beside:
        """One mask as an input, with the nodes that exporters write to make it fit."""
        draw, writer = self.draw, self.writer
        missing = next(index for index, group in enumerate(axes) if group) if draw.chance(3) else 0
        axes, array = axes[missing:], mask.array.reshape(mask.array.shape[missing:])
        if mask.kind == "bias":
            self.feeds[name] = array.astype(helper.tensor_dtype_to_np_dtype(self.computed))
            return Beside(writer.input(name, axes))
        if mask.kind == "where":
            keep = draw.choose(True, False)
            self.feeds[name] = array if keep else ~array
            return Beside(writer.input(name, axes, BOOL), mask.fill, keep)
        kind = helper.tensor_dtype_to_np_dtype(self.computed)
        form = draw.choose("numbers", "where", "product") if np.isfinite(mask.fill) else draw.choose("numbers", "where")
        if form == "numbers":
            self.feeds[name] = np.where(array, 0.0, mask.fill).astype(kind)
            return Beside(writer.input(name, axes))
        if form == "where":
            self.feeds[name] = array
            choices = [writer.number(0.0, len(axes)), writer.number(mask.fill, len(axes))]
            condition = writer.input(name, axes, BOOL)
            return Beside(writer.node("Where", [condition, *choices], axes, dtype=self.computed))
        self.feeds[name] = array.astype(np.int64)
        seen = writer.node("Cast", [writer.input(name, axes, INT64)], axes, dtype=self.computed, to=self.computed)
        hidden = writer.node("Sub", [writer.number(1.0, len(axes)), seen], axes, dtype=self.computed)
        return Beside(writer.node("Mul", [hidden, writer.number(mask.fill, len(axes))], axes))

    # -- results ------------------------------------------------------------------------------------------------------

    def _reference(self, values: Sequence[Written], *, guarded: bool) -> list[Array]:
        """What the pattern computes on the arrays, laid out as the values are."""
        pattern = self.plan.pattern
        with pattern.reference(**self.sizes.reference()), np.errstate(all="ignore"):
            returned = pattern(**self.arrays)
        results = list(returned) if isinstance(returned, tuple) else [returned]
        specs = [self.plan.dims, *(tuple(kept.dims or ()) for kept in pattern.kept)]
        arrays = []
        for array, dims, value in zip(results, specs, values, strict=True):
            labels = [label for group in self.sizes.groups(dims) for label in group]
            split = np.asarray(array).reshape([self.sizes.labels[label] for label in labels])
            laid = split.transpose([labels.index(label) for label in value.labels])
            arrays.append(laid.reshape(self.writer.shape(value.axes)))
        return [np.nan_to_num(array, nan=0.0) for array in arrays] if guarded else arrays

    def _outputs(self, values: Sequence[Written], arrays: Sequence[Array]) -> list[tuple[Written, Array]]:
        """The outputs of the model: the results themselves, or what is computed from them."""
        outputs = []
        for index, (value, array) in enumerate(zip(values, arrays, strict=True)):
            if index and self.draw.chance(4):
                continue
            if value.dtype != self.dtype:
                value = self.writer.node("Cast", [value], value.axes, dtype=self.dtype, to=self.dtype)
            if self.draw.choose(False, True):
                value, array = self.writer.node("Sin", [value], value.axes), np.sin(array)
            outputs.append((value, array.astype(helper.tensor_dtype_to_np_dtype(self.dtype))))
        return outputs
