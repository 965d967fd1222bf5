"""Inputs that a model plausibly gets: drawn from its declared inputs alone, the same ones in every run.

Every named dimension gets several sizes. How dimensions depend on each other (a mask over past and new positions), and
which integers an input takes (a vocabulary, two token types, zeros and ones), is found by trying the model.
"""

from __future__ import annotations

import ast
import operator
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, count, permutations
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from fusion.compare import is_float
from fusion.errors import ModelError
from fusion.runtime import Refused

BATCHES, LENGTHS = (2, 3, 5, 1), ((7, 11, 13, 17, 19, 23), (13, 5, 17, 7, 23, 11), (3, 2, 7, 5, 13, 11))
STRETCHES = (1, 8, 64)  # convolutions at the front of audio and image models need longer inputs
MASKS = ("full", "right padding", "left padding", "holes", "empty row")
EMPTY_ROW_SLACK = 16.0
MAGNITUDES = (1.0, 0.1, 3.0)
INTEGER_RANGES = (2, 8, 64, 512, 4096)

Values = dict[str, Any]
Sizes = Mapping[str, int]


class NothingRan(ModelError):
    """No inputs were found that the model takes."""


@dataclass(frozen=True, slots=True)
class Input:
    """A declared input: its name, element type, and per axis a size or the name of one (None: rank not declared)."""

    name: str
    code: int
    shape: tuple[int | str, ...] | None

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type as numpy's."""
        return helper.tensor_dtype_to_np_dtype(self.code)

    @property
    def is_mask(self) -> bool:
        """Whether the declaration says that the input chooses among positions."""
        return self.code == TensorProto.BOOL or ("mask" in self.name.lower() and not is_float(self.dtype))

    @staticmethod
    def declared(info: ValueInfoProto) -> Input:
        """Read a declaration; ModelError where it is not that of a tensor."""
        if not info.type.HasField("tensor_type"):
            kind = (info.type.WhichOneof("value") or "untyped").removesuffix("_type")
            raise ModelError(
                f"input {info.name!r} is a {kind}, which cannot be drawn: give the inputs, as an .npz or a dict"
            )
        tensor = info.type.tensor_type
        if not tensor.HasField("shape"):
            return Input(info.name, tensor.elem_type, None)
        # A dimension without size and name is its own: nothing says that two of them are equal.
        dims = tuple(
            d.dim_value if d.HasField("dim_value") else d.dim_param or f"{info.name}.{axis}"
            for axis, d in enumerate(tensor.shape.dim)
        )
        return Input(info.name, tensor.elem_type, dims)

    @property
    def is_integer(self) -> bool:
        """Whether the input holds integers of any width."""
        return self.dtype.kind in "iu"


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
        limits: integer input → exclusive upper bound of its values.
        masks: inputs that only take zeros and ones, beside those whose name says so.
        start: value of integer inputs in the first run that worked.
    """

    stretch: int = 1
    relation: dict[str, tuple[str, ...]] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)
    masks: set[str] = field(default_factory=set)
    start: int = 0


def declared_inputs(model: ModelProto) -> list[Input]:
    """Return the inputs that a caller has to feed.

    Raises:
        ModelError: an input is not a tensor; such inputs have to be given.
    """
    weights = {t.name for t in model.graph.initializer} | {t.values.name for t in model.graph.sparse_initializer}
    return [Input.declared(info) for info in model.graph.input if info.name not in weights]


class Feeder:
    """Draws feeds for one model, after trying what it takes."""

    def __init__(self, inputs: Sequence[Input], run: Callable[[Values], Mapping[str, Any]], sizes: Sizes | None = None):
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
        self._free = [s for s in self.symbols if s not in self._wanted and _parse(s, self.symbols) is None]
        self._leading = {i.shape[0] for i in inputs if i.shape}
        if unknown := sorted(self._wanted.keys() - set(self.symbols)):
            raise ModelError(
                f"no dimension {unknown[0]!r}: the model's named dimensions are {', '.join(self.symbols) or 'none'}"
            )
        self.habits = self._learn()

    def __iter__(self) -> Iterator[Feed]:
        """Yield feeds without end; sizes, masks and magnitudes take turns, and their turns do not coincide."""
        for turn in count():
            sizes = self._sizes(turn, self.habits)
            mask, magnitude = MASKS[turn % len(MASKS)], MAGNITUDES[turn % len(MAGNITUDES)]
            words = [f"{name}={size}" for name, size in sizes.items()]
            masked = any(self._is_mask(i) for i in self.inputs)
            if masked:
                words.append(f"mask: {mask}")
            words.append(f"draw {turn}")
            slack = EMPTY_ROW_SLACK if masked and mask == "empty row" else 1.0
            yield Feed(", ".join(words), self._draw(sizes, turn, mask, magnitude, self.habits), slack)

    def _is_signal(self, name: str) -> bool:
        """Whether a dimension may count samples or pixels; tokens never need many, and attention over many is dear."""
        holders = [i for i in self.inputs if i.shape and name in i.shape]
        return name not in self._leading and not any(i.is_integer or i.is_mask for i in holders)

    def _is_mask(self, given: Input) -> bool:
        return given.is_mask or given.name in self.habits.masks

    # What the model takes ----------------------------------------------------------------------------------

    def _learn(self) -> Habits:
        first: Refused | None = None
        for habits in self._candidates():
            try:
                plain = self._run(self._draw(self._sizes(0, habits), 0, "full", 1.0, habits))
            except Refused as refusal:
                first = first or refusal
                continue
            self._widen(habits, _odd(plain))
            return habits
        raise NothingRan(f"found no inputs that the model takes ({first}): give some, as an .npz or a dict")

    def _candidates(self) -> Iterator[Habits]:
        """Yield guesses, the plain ones first: independent sizes; one is the sum of two others; some are equal."""
        free = self._free
        relations: list[dict[str, tuple[str, ...]]] = [{}]
        relations += [{s: pair} for s in free for pair in combinations([f for f in free if f != s], 2)]
        relations += [{s: (other,)} for s, other in permutations(free, 2)]
        relations += [dict.fromkeys(free[1:], (free[0],))] if len(free) > 2 else []
        starts = (0, 1, 2) if any(i.is_integer and not i.is_mask for i in self.inputs) else (0,)
        stretches = STRETCHES if any(self._is_signal(s) for s in free) else (1,)
        for stretch in stretches:
            for relation in relations:
                for start in starts if not relation else (0,):
                    yield Habits(stretch, relation, {}, set(), start)

    def _widen(self, habits: Habits, odd: int) -> None:
        """Give every integer input the largest range in which the model runs and no new NaN or infinity comes out."""
        self.habits = habits
        for given in self.inputs:
            if not given.is_integer or given.is_mask:
                continue
            for limit in INTEGER_RANGES:
                if limit - 1 > np.iinfo(given.dtype).max:
                    break
                habits.limits[given.name] = limit
                try:
                    results = self._run(self._draw(self._sizes(0, habits), 0, "full", 1.0, habits))
                except Refused:
                    accepted = False
                else:
                    accepted = _odd(results) <= odd
                    if not accepted:
                        habits.masks.add(given.name)
                if not accepted:
                    habits.limits[given.name] = max((r for r in INTEGER_RANGES if r < limit), default=0)
                    break

    # Sizes and values --------------------------------------------------------------------------------------

    def _sizes(self, turn: int, habits: Habits) -> dict[str, int]:
        """Return a size per dimension: distinct primes, then all one, other primes, all equal, and again."""
        kind = turn % 4
        round_ = turn // 4
        batches = iter([BATCHES[(kind // 2 + round_) % len(BATCHES)], *LENGTHS[2]])
        lengths = iter(LENGTHS[(kind // 2 + round_) % len(LENGTHS)])
        sizes: dict[str, int] = {}
        for name in self._free:
            leads = name in self._leading
            if kind == 1:
                size = 1
            elif kind == 3:
                size = 4
            else:
                size = next(batches if leads else lengths, 29)
            sizes[name] = size * habits.stretch if self._is_signal(name) and kind != 1 else size
        sizes.update(self._wanted)
        for name, parts in habits.relation.items():
            sizes[name] = sum(sizes[part] for part in parts)
        for name in self.symbols:
            if name not in sizes:
                sizes[name] = max(0, _evaluate(name, sizes))
        return {name: sizes[name] for name in self.symbols}

    def _draw(self, sizes: Sizes, turn: int, mask: str, magnitude: float, habits: Habits) -> Values:
        return {i.name: self._values(i, sizes, turn, mask, magnitude, habits) for i in self.inputs}

    def _values(
        self, given: Input, sizes: Sizes, turn: int, mask: str, magnitude: float, habits: Habits
    ) -> np.ndarray[Any, Any]:
        # An undeclared rank: a scalar says least about the others.
        shape = tuple(sizes[d] if isinstance(d, str) else d for d in given.shape or ())
        rng = np.random.default_rng([turn, zlib.crc32(given.name.encode())])
        if given.is_mask or given.name in habits.masks:
            return _mask(shape, mask, rng).astype(given.dtype)
        if given.dtype.kind == "O":
            return rng.choice(np.array(["a", "to", "the", "word"], dtype=object), size=shape)
        if given.is_integer or not is_float(given.dtype):
            limit = habits.limits.get(given.name, 0)
            drawn = rng.integers(0, limit, shape) if limit else np.full(shape, habits.start)
            return drawn.astype(given.dtype)
        drawn = rng.standard_normal(shape) * magnitude
        if given.dtype.kind == "c":
            drawn = drawn + 1j * rng.standard_normal(shape)
        return np.asarray(drawn).astype(given.dtype)


def _mask(shape: tuple[int, ...], kind: str, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Return ones and zeros over the last axis; its leading axes are rows."""
    keep = np.ones(shape, np.int64)
    if not shape or not keep.size or kind == "full":
        return keep
    length = shape[-1]
    rows = keep.reshape(-1, length)
    if kind == "holes":
        rows[:] = rng.integers(0, 2, rows.shape)
        rows[np.arange(len(rows)), rng.integers(0, length, len(rows))] = 1
    elif kind == "empty row":
        rows[0] = 0
    else:
        kept = rng.integers(1, length + 1, len(rows))[:, None]
        place = np.arange(length)[None, :]
        rows[:] = place < kept if kind == "right padding" else place >= length - kept
    return keep


def _odd(results: Mapping[str, Any]) -> int:
    """Return how many NaN and infinities came out."""
    arrays = [r for r in results.values() if isinstance(r, np.ndarray) and is_float(r.dtype)]
    return sum(
        int((~np.isfinite(a.astype(np.complex128 if a.dtype.kind == "c" else np.float64))).sum()) for a in arrays
    )


_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.floordiv,
}


def _parse(name: str, symbols: Iterable[str]) -> ast.expr | None:
    """Return a dimension's name as an expression over other dimensions ("past + sequence"); None where it is a name."""
    try:
        tree = ast.parse(name, mode="eval").body
    except (SyntaxError, ValueError):
        return None
    parts = list(ast.walk(tree))
    names = {p.id for p in parts if isinstance(p, ast.Name)}
    allowed = (ast.BinOp, ast.Name, ast.Constant, ast.Load, *_OPERATORS)
    known = isinstance(tree, ast.BinOp) and names <= set(symbols) and all(isinstance(p, allowed) for p in parts)
    return tree if known else None


def _evaluate(name: str, sizes: Sizes) -> int:
    def value(part: ast.expr) -> int:
        if isinstance(part, ast.BinOp):
            right = value(part.right)
            if right == 0 and isinstance(part.op, ast.FloorDiv | ast.Div):
                return 0
            return _OPERATORS[type(part.op)](value(part.left), right)
        return sizes[part.id] if isinstance(part, ast.Name) else int(getattr(part, "value", 0))

    tree = _parse(name, sizes)
    return value(tree) if tree is not None else 1
