"""Samples: sizes, numbers and arrays for the captures of a pattern, with the traps that have caught other tools.

Square sizes and all distinct ones, axes of size 1, parameters of shape (1, 1, D), tiny and large epsilons, scales that
are not 1 / sqrt(d), masks of every fill, rows that are masked everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from fusion import plan as p
from fusion.instances.spell import atoms, axes_of
from fusion.language import ELLIPSIS, Capture, Dims, letters_of
from fusion.laws.draw import Draw
from fusion.plan import Plan

Array = np.ndarray[Any, np.dtype[Any]]

PRIMES = (3, 2, 5, 7, 11, 13, 17)
"""Sizes that cannot be taken for one another, nor for products of others."""


@dataclass(slots=True)
class Sizes:
    """The axes of one instance.

    Attributes:
        letters: for each letter the labels of its axes.
        labels: the size of every label.
        dynamic: label → symbol of an axis whose size is not declared.
        traps: what is special, for messages.
    """

    letters: dict[str, tuple[str, ...]]
    labels: dict[str, int]
    dynamic: dict[str, str]
    traps: list[str]

    def groups(self, dims: Dims) -> tuple[tuple[str, ...], ...]:
        """The axes of a capture, in labels."""
        return axes_of(dims, self.letters)

    def shape(self, dims: Dims) -> tuple[int, ...]:
        """The shape of a capture."""
        return tuple(int(np.prod([self.labels[label] for label in group])) for group in self.groups(dims))

    def merged(self, dims: Dims) -> tuple[int, ...]:
        """The shape in which the reference reads it: a letter is one axis, though it may stand for several."""
        shape: list[int] = []
        for token in dims:
            letters = (token,) if isinstance(token, str) else token
            sizes = [self.labels[label] for letter in letters for label in self.letters.get(letter, (letter,))]
            shape.extend(sizes if token == ELLIPSIS else [int(np.prod(sizes))])
        return tuple(shape)

    def reference(self) -> dict[str, int]:
        """Sizes by letter, for `Pattern.reference`."""
        return {
            letter: int(np.prod([self.labels[label] for label in labels]))
            for letter, labels in self.letters.items()
            if letter != ELLIPSIS
        }


def draw_sizes(plan: Plan, draw: Draw) -> Sizes:
    """Sizes for the letters of a plan."""
    variables = [atom for atom in atoms(plan.root) if isinstance(atom, p.Var) and atom.dims is not None]
    specs = [dims for capture in plan.captures.values() if (dims := capture.dims)] + [plan.dims]
    names = list(dict.fromkeys(letter for dims in specs for letter in letters_of(dims)))
    same = _same_letters(variables, plan.captures)
    names += [letter for letter in same if letter not in names]
    traps: list[str] = []
    letters: dict[str, tuple[str, ...]] = {name: (name,) for name in names}
    for name in names:
        if name == ELLIPSIS:
            count = draw.choose(2, 1, 0, 3)
            letters[name] = tuple(f"N{index}" for index in range(count))
            if count not in (1, 2):
                traps.append(f"{count} leading axes")
        elif name in _several(plan, specs) and draw.chance(6):
            letters[name] = (f"{name}0", f"{name}1")
            traps.append(f"{name} is two axes")
    sums = _sums(plan)
    own = [label for name in names if name not in same and name not in sums for label in letters[name]]
    kind = draw.choose("square", "distinct", "one")
    side = draw.choose(8, 4) if kind == "square" else 0  # some kernels want multiples of 8
    labels = {label: side or PRIMES[index % len(PRIMES)] for index, label in enumerate(own)}
    # A parameter of one element is a number: what it is multiplied or added to has no such capture.
    numbers = {
        letters_of(capture.dims or ())[0]
        for capture in plan.captures.values()
        if is_parameter(capture, plan.dims) and len(letters_of(capture.dims or ())) == 1
    }
    candidates = [label for name in names if name not in numbers for label in letters[name] if label in own]
    if kind == "one" and candidates:
        single = candidates[draw.index(len(candidates))]
        labels[single] = 1
        traps.append(f"{single} is 1")
    elif kind == "square":
        traps.append("all sizes equal")
    dynamic: dict[str, str] = {}
    if draw.choose(False, True):
        fixed = _fixed(plan, specs)
        free = [label for name in names if name not in fixed for label in letters[name]]
        dynamic = {label: label.lower() for label in free if label in own}
    for name, parts in sums.items():
        labels[name] = sum(int(np.prod([labels[letter] for letter in part])) for part in parts)
    for name, other in same.items():
        for label, twin in zip(letters[name], letters[other], strict=True):
            labels[label] = labels[twin]
            if twin in dynamic:
                dynamic[label] = dynamic[twin]
    return Sizes(letters, labels, dynamic, traps)


def _same_letters(variables: Sequence[p.Var], captures: Mapping[str, Capture]) -> dict[str, str]:
    """Letters that read an axis of a capture which has another letter there."""
    same: dict[str, str] = {}
    for variable in variables:
        declared = captures[variable.name].dims or ()
        for letter, own in zip(letters_of(variable.dims or ()), letters_of(declared), strict=True):
            if letter != own:
                same[letter] = own
    return same


def _sums(plan: Plan) -> dict[str, list[tuple[str, ...]]]:
    """Letters whose size others give: that of the pieces which are joined, and of parts one after the other."""
    sums: dict[str, list[tuple[str, ...]]] = {}
    for atom in atoms(plan.root):
        if isinstance(atom, p.Join):
            sums[atom.letter] = [()] * len(atom.parts)
        elif isinstance(atom, p.Concat):
            joined = [part.single for part in atom.parts]
            merged = [letters_of(single.dims[-1:]) if isinstance(single, p.Join) else () for single in joined]
            ends = zip(atom.letters, merged, strict=True)
            sums[letters_of(atom.dims)[-1]] = [(end,) if end else group for end, group in ends]
    return dict(sorted(sums.items(), key=lambda entry: () not in entry[1]))


def _several(plan: Plan, specs: Sequence[Dims]) -> set[str]:
    """Letters that may stand for several axes: those a mean runs over, and nothing splits or contracts."""
    over = {letter for atom in atoms(plan.root) if isinstance(atom, p.Reduction) for letter in atom.letters}
    whole = {letter for atom in atoms(plan.root) if isinstance(atom, p.MatMul | p.Softmax) for letter in atom.letters}
    grouped = {letter for dims in specs for token in dims if not isinstance(token, str) for letter in token}
    return over - whole - grouped


def _fixed(plan: Plan, specs: Sequence[Dims]) -> set[str]:
    """Letters whose size exporters write down: features, not batches and positions."""
    fixed = {letter for dims in specs for token in dims if not isinstance(token, str) for letter in token}
    known = (atom for atom in atoms(plan.root) if isinstance(atom, p.Reduction | p.Concat))
    fixed |= {letter for atom in known for letter in atom.letters}
    for capture in plan.captures.values():
        if is_parameter(capture, plan.dims):
            fixed.update(letters_of(capture.dims or ()))
    return fixed


def is_parameter(capture: Capture, dims: Dims) -> bool:
    """Whether a capture is learned, and not computed from the input: it lacks the first axis of the result."""
    return capture.kind in ("tensor", "optional") and bool(capture.dims) and (capture.dims or dims)[0] != dims[0]


def draw_number(capture: Capture, draw: Draw, dtype: int) -> float:
    """A number within a scalar capture's bounds, as the element type rounds it."""
    usual = (1e-5, 1e-12, 1e-1, 1e-6) if capture.low >= 0 else (0.5, 1.702, 0.37, 1.0, 5.0)
    # A fused node keeps it as an attribute, which is single precision at most.
    kind = helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT if dtype == TensorProto.DOUBLE else dtype)
    rounded = [float(np.array(value, kind)) for value in usual]
    fitting = [value for value in rounded if value != 0.0 and capture.low <= value <= capture.high]
    if not fitting:
        raise ValueError(f"no usual number lies between {capture.low:g} and {capture.high:g}")
    return draw.choose(*fitting)


def draw_array(name: str, shape: Sequence[int], draw: Draw, dtype: int) -> Array:
    """Normally distributed numbers, others for every name."""
    rng = np.random.default_rng([draw.index(1 << 16), *name.encode()])
    return rng.standard_normal(tuple(shape)).astype(helper.tensor_dtype_to_np_dtype(dtype))


@dataclass(slots=True)
class Mask:
    """One part of what a `rest` capture stands for.

    Attributes:
        kind: "bias" (numbers are added), "fill" (fill is added where not kept) or "where" (fill replaces the sum).
        labels: those it has; over the others of the capture it is broadcast.
        array: numbers, or booleans: true where a score is kept.
        fill: what masks.
    """

    kind: str
    labels: tuple[str, ...]
    array: Array
    fill: float = 0.0

    def added(self) -> Array:
        """What is added to scores, in double: what absorbs or replaces them in the element type does so there."""
        if self.kind == "bias":
            return self.array
        absorbs = self.kind == "where" or self.fill < -3e4
        return np.where(self.array, 0.0, -1e300 if absorbs and np.isfinite(self.fill) else self.fill)


def draw_rest(capture: Capture, sizes: Sizes, draw: Draw, dtype: int) -> tuple[list[Mask], list[str]]:
    """Masks and biases over the letters of a `rest` capture, innermost first, and what is special about them."""
    masks: list[Mask] = []
    traps: list[str] = []
    kinds = draw.choose((), ("fill",), ("where",), ("bias",), ("bias", "fill"), ("fill", "bias"), ("where", "bias"))
    smallest = float(np.finfo(helper.tensor_dtype_to_np_dtype(dtype)).min)
    for kind in kinds:
        dims = letters_of(capture.dims or ())
        labels = [label for letter in dims for label in sizes.letters[letter]]
        kept = [label for label in labels[:-1] if draw.choose(False, True)] + labels[-1:]
        shape = [sizes.labels[label] if label in kept else 1 for label in labels]
        if kind == "bias":
            masks.append(Mask(kind, tuple(kept), draw_array(kind, shape, draw, dtype)))
            continue
        rng = np.random.default_rng(draw.index(1 << 16))
        array = rng.random(shape) < 0.7
        array[..., 0] = True
        fill = draw.choose(smallest, -np.inf, -1e4)
        # To a finite number something can be added, and how many digits of it stay depends on the kernel.
        # In half, onnxruntime adds in single precision, where the smallest number of half absorbs nothing.
        keeps = fill == -1e4 or (fill == smallest and dtype == TensorProto.FLOAT16)
        if draw.chance(3) and (not keeps or kinds[-1] == "where"):
            array.reshape(-1, shape[-1])[draw.index(int(np.prod(shape[:-1])))] = False
            traps.append("a row is masked everywhere")
        traps.append(f"{kind} {fill:g}")
        masks.append(Mask(kind, tuple(kept), array, fill))
    return masks, traps
