"""Inputs that a model plausibly gets: drawn from its declared inputs alone, the same ones in every run.

Every named dimension gets several sizes. How dimensions depend on each other (a mask over past and new positions), and
which integers an input takes (a vocabulary, two token types, zeros and ones), is found by trying the model.
"""

from __future__ import annotations

import ast
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, count, permutations
from math import prod
from types import CodeType
from typing import Any

import numpy as np
from onnx import ModelProto, ValueInfoProto, helper

from fusion.errors import ModelError
from fusion.verifying.compare import is_float
from fusion.verifying.runtime import Refused

BATCHES, LENGTHS = (2, 3, 5, 1), ((7, 11, 13, 17, 19, 23), (13, 5, 17, 7, 23, 11), (3, 2, 7, 5, 13, 11))
EQUAL_SIZES = {1: 1, 3: 4}  # turn of four → the size of every dimension; in the others they are distinct
STRETCHES = (1, 8, 64)  # convolutions at the front of audio and image models need longer inputs
MASKS = ("full", "right padding", "left padding", "holes", "empty row")
EMPTY_ROW_SLACK = 16.0
MAGNITUDES = (1.0, 0.1, 3.0)
INTEGER_RANGES = (2, 8, 64, 512, 4096)
MOST_ELEMENTS = 2**24  # of an input that is tried: a guess at sizes must not exhaust the memory

Values = dict[str, Any]
Sizes = Mapping[str, int]


class NothingRan(ModelError):
    """No inputs were found that the model takes."""


@dataclass(frozen=True, slots=True)
class Input:
    """A declared input: its name, element type, and per axis a size or the name of one (None: rank not declared)."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str, ...] | None

    @property
    def is_mask(self) -> bool:
        """Whether the declaration says that the input chooses among positions."""
        return self.dtype.kind == "b" or ("mask" in self.name.lower() and not is_float(self.dtype))

    @property
    def is_counted(self) -> bool:
        """Whether the input holds integers that may number something."""
        return self.dtype.kind in "iu" and not self.is_mask

    @staticmethod
    def declared(info: ValueInfoProto) -> Input:
        """Read a declaration; ModelError where it is not that of a tensor of some element type."""
        tensor = info.type.tensor_type
        if not tensor.elem_type:
            kind = (info.type.WhichOneof("value") or "tensor_type").removesuffix("_type")
            what = "has no element type" if kind == "tensor" else f"is a {kind}"
            hint = "give the inputs, as an .npz or a dict"
            raise ModelError(f"input {info.name!r} {what}, so it cannot be drawn: {hint}")
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        # A dimension without size and name is its own: nothing says that two of them are equal.
        dims = tuple(
            d.dim_value if d.HasField("dim_value") else d.dim_param or f"{info.name}.{axis}"
            for axis, d in enumerate(tensor.shape.dim)
        )
        return Input(info.name, dtype, dims if tensor.HasField("shape") else None)


@dataclass(frozen=True, slots=True)
class Feed:
    """One set of inputs.

    Attributes:
        label: how it came about, in words.
        values: by name.
        slack: factor on the allowed error. Where a row masks every key, the scores sit on top of the mask's fill and
            inherit its rounding (1e-3 for -10000 in single precision), which equal computations spell differently.
    """

    label: str
    values: Values
    slack: float = 1.0


@dataclass(slots=True)
class Habits:
    """What trying a model has taught about its inputs.

    Attributes:
        stretch: factor on the lengths that the model needs.
        relation: dependent dimension → the dimensions whose sizes it adds up.
        single: a dimension that must be 1, though it has a name: decoders are traced with one new token.
        start: value of integer inputs in the first run that worked.
        limits: integer input → exclusive upper bound of its values.
        masks: inputs that only take zeros and ones, beside those whose name says so.
    """

    stretch: int = 1
    relation: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    single: str | None = None
    start: int = 0
    limits: dict[str, int] = field(default_factory=dict)
    masks: set[str] = field(default_factory=set)


def declared_inputs(model: ModelProto) -> list[Input]:
    """Return the inputs that a caller has to feed.

    Raises:
        ModelError: an input is not a tensor; such inputs have to be given.
    """
    weights = {t.name for t in model.graph.initializer} | {t.values.name for t in model.graph.sparse_initializer}
    return [Input.declared(info) for info in model.graph.input if info.name not in weights]


class Feeder:
    """Draws feeds for one model, after trying what it takes."""

    def __init__(
        self, inputs: Sequence[Input], run: Callable[[Values], Mapping[str, Any]], sizes: Sizes | None = None
    ) -> None:
        """Learn the habits of a model.

        Args:
            inputs: its declared inputs.
            run: runs the model; raises `Refused` where it does not take the values.
            sizes: sizes that the caller wants for named dimensions.

        Raises:
            ModelError: a size for a dimension the model does not have, or no inputs that the model takes were found.
        """
        self.inputs = list(inputs)
        self._run = run
        self._wanted = dict(sizes or {})
        self.symbols = list(dict.fromkeys(d for i in inputs for d in i.shape or () if isinstance(d, str)))
        self._formulas = {s: code for s in self.symbols if (code := _formula(s, self.symbols)) is not None}
        self._free = [s for s in self.symbols if s not in self._wanted and s not in self._formulas]
        self._leading = {i.shape[0] for i in inputs if i.shape}
        # Dimensions that may count samples or pixels; tokens never need many, and attention over many is dear.
        shared = {d for i in inputs if not is_float(i.dtype) for d in i.shape or ()}
        self._signals = set(self._free) - self._leading - shared
        if unknown := sorted(self._wanted.keys() - set(self.symbols)):
            raise ModelError(
                f"no dimension {unknown[0]!r}: the model's named dimensions are {', '.join(self.symbols) or 'none'}"
            )
        self._learn()

    def __iter__(self) -> Iterator[Feed]:
        """Yield feeds without end."""
        return map(self.feed, count())

    def feed(self, turn: int) -> Feed:
        """Return a feed; sizes, masks and magnitudes take turns, and their turns do not coincide. Turn 0 is plain."""
        sizes = self._sizes(turn)
        mask = MASKS[turn % len(MASKS)]
        words = [f"{name}={size}" for name, size in sizes.items()]
        masked = any(self._is_mask(i) for i in self.inputs)
        if masked:
            words.append(f"mask: {mask}")
        words.append(f"draw {turn}")
        slack = EMPTY_ROW_SLACK if masked and mask == "empty row" else 1.0
        return Feed(", ".join(words), {i.name: self._values(i, sizes, turn) for i in self.inputs}, slack)

    def _is_mask(self, given: Input) -> bool:
        return given.is_mask or given.name in self.habits.masks

    # What the model takes ----------------------------------------------------------------------------------

    def _learn(self) -> None:
        first: Refused | None = None
        for habits in self._candidates():
            self.habits = habits
            if not self._is_bearable():
                continue
            try:
                plain = self._run(self.feed(0).values)
            except Refused as refusal:
                first = first or refusal
            else:
                self._widen(_odd(plain))
                return
        hint = "give some, as an .npz or a dict" + (", or sizes of its named dimensions" if self._free else "")
        raise NothingRan(f"found no inputs that the model takes ({first}): {hint}")

    def _is_bearable(self) -> bool:
        """Whether no input is larger than a guess may be; sizes that are declared or wanted are none."""
        sizes = self._sizes(0)
        return all(
            prod(sizes[dim] for dim in given.shape or () if dim in self._free) <= MOST_ELEMENTS for given in self.inputs
        )

    def _candidates(self) -> Iterator[Habits]:
        """Yield guesses, the plain ones first: independent sizes; one adds up others; some are equal; one is 1."""
        free = self._free
        relations: list[dict[str, tuple[str, ...]]] = [{}]
        if alike := self._alike():
            own = [s for s in free if s not in alike]
            relations += [alike]
            for s in free:  # it comes first: others may be equal to it
                pairs = combinations([other for other in own if other != s], 2)
                relations += [{s: pair} | {t: other for t, other in alike.items() if t != s} for pair in pairs]
        relations += [{s: pair} for s in free for pair in combinations([f for f in free if f != s], 2)]
        relations += [{s: (other,)} for s, other in permutations(free, 2)]
        relations += [dict.fromkeys(free[1:], (free[0],))] if len(free) > 2 else []
        starts = (0, 1, 2) if any(i.is_counted for i in self.inputs) else (0,)
        for stretch in STRETCHES if self._signals else (1,):
            for relation in relations:
                for start in starts if not relation else (0,):
                    yield Habits(stretch, relation, start=start)
        yield from (Habits(1, relation, s) for s in free for relation in relations if s not in relation)

    def _alike(self) -> dict[str, tuple[str, ...]]:
        """Dimensions of inputs that are alike but for names, such as the caches of all layers: each as its first."""
        equal: dict[str, tuple[str, ...]] = {}
        first: dict[tuple[object, ...], tuple[int | str, ...]] = {}
        for given in self.inputs:
            if given.shape is not None:
                sizes = tuple(isinstance(dim, str) or dim for dim in given.shape)
                for other, dim in zip(first.setdefault((given.dtype, sizes), given.shape), given.shape, strict=True):
                    if dim in self._free and dim != other and (dim,) not in equal.values():
                        equal[str(dim)] = equal.get(str(other), (str(other),))
        return equal

    def _widen(self, odd: int) -> None:
        """Give every integer input the largest range in which the model runs and no new NaN or infinity comes out."""
        limits = self.habits.limits
        for given in self.inputs:
            if not given.is_counted:
                continue
            name, known = given.name, 0
            for limit in (r for r in INTEGER_RANGES if r - 1 <= np.iinfo(given.dtype).max):
                limits[name] = limit
                try:
                    odder = _odd(self._run(self.feed(0).values)) > odd
                except Refused:
                    limits[name] = known
                    break
                if odder:
                    limits[name] = known
                    self.habits.masks.add(name)
                    break
                known = limit

    # Sizes and values --------------------------------------------------------------------------------------

    def _sizes(self, turn: int) -> dict[str, int]:
        """Return a size per dimension: distinct primes, then all one, other primes, all equal, and again."""
        kind, row = turn % 4, turn // 4 + turn % 4 // 2
        batches = iter((BATCHES[row % len(BATCHES)], *LENGTHS[2]))
        lengths = iter(LENGTHS[row % len(LENGTHS)])
        sizes = dict(self._wanted)
        for name in self._free:
            size = EQUAL_SIZES.get(kind) or next(batches if name in self._leading else lengths, 29)
            sizes[name] = size * self.habits.stretch if name in self._signals and size > 1 else size
        if self.habits.single is not None:
            sizes[self.habits.single] = 1
        for name, parts in self.habits.relation.items():
            sizes[name] = sum(sizes[part] for part in parts)
        for name, formula in self._formulas.items():
            if name not in sizes:
                try:
                    sizes[name] = max(0, eval(formula, {"__builtins__": {}}, sizes))  # `_formula` lets only sums pass
                except ZeroDivisionError:
                    sizes[name] = 0
        return {name: sizes[name] for name in self.symbols}

    def _values(self, given: Input, sizes: Sizes, turn: int) -> np.ndarray[Any, Any]:
        # An undeclared rank: a scalar says least about the others.
        shape = tuple(sizes[d] if isinstance(d, str) else d for d in given.shape or ())
        rng = np.random.default_rng([turn, zlib.crc32(given.name.encode())])
        drawn: Any
        if self._is_mask(given):
            drawn = mask(shape, MASKS[turn % len(MASKS)], rng)
        elif given.dtype.kind == "O":
            drawn = rng.choice(np.array(["a", "to", "the", "word"], dtype=object), size=shape)
        elif is_float(given.dtype):
            drawn = rng.standard_normal(shape) * MAGNITUDES[turn % len(MAGNITUDES)]
            if given.dtype.kind == "c":
                drawn = drawn + 1j * rng.standard_normal(shape)
        else:
            limit = self.habits.limits.get(given.name)
            drawn = rng.integers(0, limit, shape) if limit else np.full(shape, self.habits.start)
        return np.asarray(drawn).astype(given.dtype)


def mask(shape: Sequence[int], kind: str, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Return ones and zeros, of a kind of `MASKS`, over the last axis; the leading axes are rows."""
    keep = np.ones(shape, np.int64)
    if not keep.size or kind == "full":
        return keep
    rows = keep.reshape(-1, shape[-1] if shape else 1)
    count, length = rows.shape
    if kind == "holes":
        rows[:] = rng.integers(0, 2, rows.shape)
        rows[np.arange(count), rng.integers(0, length, count)] = 1
    elif kind == "empty row":
        rows[0] = 0
    else:
        kept = rng.integers(1, length + 1, (count, 1))
        place = np.arange(length)
        rows[:] = place < kept if kind == "right padding" else place >= length - kept
    return keep


def _odd(results: Mapping[str, Any]) -> int:
    """Return how many NaN and infinities came out."""
    arrays = [r for r in results.values() if isinstance(r, np.ndarray) and is_float(r.dtype)]
    return sum(int((~np.isfinite(array)).sum()) for array in arrays)


def _formula(name: str, symbols: Collection[str]) -> CodeType | None:
    """Return a dimension's name as an expression over other dimensions ("past + sequence"); None where it is a name."""
    try:
        tree = ast.parse(re.sub("/+", "//", name), mode="eval")
    except (SyntaxError, ValueError):
        return None
    allowed = (ast.Expression, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Load)
    for part in ast.walk(tree):
        known = part.id in symbols if isinstance(part, ast.Name) else isinstance(part, allowed)
        if not known and not (isinstance(part, ast.Constant) and type(part.value) is int):
            return None
    return compile(tree, name, "eval") if isinstance(tree.body, ast.BinOp) else None
