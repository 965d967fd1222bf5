"""Expressions: what tracing a pattern makes; the operators that trace on expressions and compute on arrays."""

from __future__ import annotations

import contextvars
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from fusion.captures import ELLIPSIS, Capture, Dims, letters_of, parse
from fusion.errors import PatternError

if TYPE_CHECKING:
    from fusion.language import Pattern


@dataclass(eq=False, slots=True)
class Expr:
    """A node of a traced pattern. `dims` are its axes in letters, groups opened; `tokens` the same with groups.

    `piece` says which piece of how many this is of its argument.
    """

    kind: str
    args: tuple[Expr, ...] = ()
    dims: tuple[str, ...] | None = None
    name: str = ""
    value: float = 0.0
    letters: tuple[str, ...] = ()
    capture: Capture | None = None
    call: Call | None = None
    tokens: Dims | None = None
    piece: tuple[int, int] = (0, 1)

    def __add__(self, other: Operand) -> Expr:
        return _elementwise("add", self, other)

    def __radd__(self, other: Operand) -> Expr:
        return _elementwise("add", other, self)

    def __sub__(self, other: Operand) -> Expr:
        return self + (-as_expr(other))

    def __rsub__(self, other: Operand) -> Expr:
        return as_expr(other) + (-self)

    def __neg__(self) -> Expr:
        return _elementwise("mul", -1.0, self)

    def __abs__(self) -> Expr:
        return Expr("op", (self,), self.dims, name="Abs")

    def __mul__(self, other: Operand) -> Expr:
        return _elementwise("mul", self, other)

    def __rmul__(self, other: Operand) -> Expr:
        return _elementwise("mul", other, self)

    def __truediv__(self, other: Operand) -> Expr:
        return self * as_expr(other) ** -1.0

    def __rtruediv__(self, other: Operand) -> Expr:
        return as_expr(other) * self**-1.0

    def __pow__(self, exponent: float) -> Expr:
        if not isinstance(exponent, int | float):
            raise misuse("an exponent is a number, not a capture")
        return Expr("pow", (self,), self.dims, value=float(exponent))

    def __matmul__(self, other: Expr) -> Expr:
        left, right = self.dims or (), other.dims or ()
        if len(left) < 2 or len(right) < 2 or left[-1] != right[-2]:
            raise misuse(
                f"@ contracts the last axis of {spell_axes(left)} with the last but one of {spell_axes(right)}; "
                "they must be one letter"
            )
        batch = _merge_dims(left[:-2], right[:-2])
        return Expr("matmul", (self, other), (*batch, left[-2], right[-1]), letters=(left[-1],))


Operand = Expr | float | int


@dataclass(eq=False, slots=True)
class Call:
    """A pattern used inside another one: `layer_norm(x + skip, …)`."""

    pattern: Pattern
    arguments: dict[str, Expr | None]
    letters: dict[str, tuple[str, ...]]


def spell_axes(dims: Sequence[str]) -> str:
    return repr(" ".join(dims))


def as_expr(value: Operand) -> Expr:
    return value if isinstance(value, Expr) else Expr("const", value=float(value), dims=())


def _merge_dims(left: tuple[str, ...], right: tuple[str, ...]) -> tuple[str, ...]:
    """The axes of an elementwise result: the longer list, of which the shorter one must be a part, in order."""
    longer, shorter = (left, right) if len(left) >= len(right) else (right, left)
    position = 0
    for letter in shorter:
        if letter not in longer[position:]:
            raise misuse(
                f"{spell_axes(left)} and {spell_axes(right)} cannot be broadcast: {letter!r} is not in both, in order"
            )
        position = longer.index(letter, position) + 1
    return longer


def _elementwise(kind: str, left: Operand, right: Operand) -> Expr:
    a, b = as_expr(left), as_expr(right)
    return Expr(kind, (a, b), _merge_dims(a.dims or (), b.dims or ()))


_NO_SIZES: Mapping[str, int] = MappingProxyType({})
tracing: contextvars.ContextVar[tuple[str, int] | None] = contextvars.ContextVar("tracing", default=None)
sizes_given: contextvars.ContextVar[Mapping[str, int]] = contextvars.ContextVar("sizes", default=_NO_SIZES)


def misuse(message: str) -> PatternError:
    path, line = tracing.get() or ("", 0)
    return PatternError(message, path, line)


# -- operators: on expressions they trace, on arrays they compute -----------------------------------------------------


def _unary(name: str, compute: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def apply(x: Any) -> Any:
        return Expr("op", (x,), x.dims, name=name) if isinstance(x, Expr) else compute(np.asarray(x))

    apply.__name__ = name.lower()
    apply.__doc__ = f"Elementwise {name}."
    return apply


def _erf(x: Any) -> Any:
    return np.vectorize(math.erf, otypes=[x.dtype])(x)


erf = _unary("Erf", _erf)
tanh = _unary("Tanh", np.tanh)
exp = _unary("Exp", np.exp)
log = _unary("Log", np.log)
sigmoid = _unary("Sigmoid", lambda x: 1 / (1 + np.exp(-x)))
relu = _unary("Relu", lambda x: np.maximum(x, 0))
clamp = _unary("Clamp", lambda x: np.clip(x, 0, 1))


def sqrt(x: Any) -> Any:
    """Square root: x ** 0.5."""
    if isinstance(x, Expr):
        return x**0.5
    return math.sqrt(x) if isinstance(x, int | float) else np.sqrt(x)


def mean(x: Any, over: str | None = None) -> Any:
    """Mean over letters such as "C S" (the last one), kept as axes of size 1. The last one may be several axes."""
    return _reduced("mean", x, over, np.mean)


def maximum(x: Any, over: str | None = None) -> Any:
    """The largest number over letters, as `mean` has them."""
    return _reduced("max", x, over, np.max)


def total(x: Any, over: str | None = None) -> Any:
    """The sum over letters, as `mean` has them."""
    return _reduced("total", x, over, np.sum)


def _reduced(kind: str, x: Any, over: str | None, compute: Callable[..., Any]) -> Any:
    letters = tuple((over or "").split())
    if isinstance(x, Expr):
        dims = x.dims or ()
        letters = letters or dims[-1:]
        for letter in letters or ("",):
            if letter not in dims or letter == ELLIPSIS:
                raise misuse(f"{kind} over {letter!r}, which is no letter of {spell_axes(dims)}")
        return Expr("reduce", (x,), dims, name=kind, letters=letters)
    return compute(x, axis=tuple(range(-max(1, len(letters)), 0)), keepdims=True)


def softmax(x: Any, over: str | None = None, beside: Any = None) -> Any:
    """exp(x) / sum(exp(x)) over one letter (the last one).

    With `beside`, exp(x) / (exp(beside) + sum(exp(x))): one more number along that letter, whose share is left out.
    """
    if isinstance(x, Expr):
        dims = x.dims or ()
        letter = over or (dims[-1] if dims else "")
        if letter not in dims or letter == ELLIPSIS:
            raise misuse(f"softmax over {letter!r}, which is no letter of {spell_axes(dims)}")
        if beside is not None and not set(beside.dims or ()) <= set(dims) - {letter}:
            raise misuse(f"beside a softmax over {letter!r} stands {spell_axes(beside.dims or ())}")
        return Expr("softmax", (x,) if beside is None else (x, beside), dims, letters=(letter,))
    most = np.max(x, axis=-1, keepdims=True)
    most = most if beside is None else np.maximum(most, beside)
    e = np.exp(x - most)
    return e / (np.sum(e, axis=-1, keepdims=True) + (0 if beside is None else np.exp(beside - most)))


def axes(x: Any, spec: str) -> Any:
    """Rearrange axes: `"B S (H D) -> B H S D"` splits, merges and permutes them by name; `1` is an axis of size 1.

    On arrays the size of a letter that a group hides is taken from `Pattern.reference(sizes=...)`.
    """
    before, arrow, after = spec.partition("->")
    if not arrow:
        raise misuse(f"axes wants `before -> after`, not {spec!r}")
    words = after.split()
    added = [at - len(words) * (ELLIPSIS in words[:at]) for at, word in enumerate(words) if word == "1"]
    (source, _), (target, _) = parse(before), parse(" ".join(word for word in words if word != "1"))
    if sorted(letters_of(source)) != sorted(letters_of(target)):
        raise misuse(f"axes {spec!r} must have the same letters on both sides")
    if isinstance(x, Expr):
        if letters_of(source) != (x.dims or ()):
            raise misuse(f"axes {spec!r} is applied to {spell_axes(x.dims or ())}")
        return Expr("axes", (x,), letters_of(target), tokens=target)
    if not hasattr(x, "shape"):
        return x  # an optional capture left out
    return np.expand_dims(_rearrange(np.asarray(x), source, target), tuple(added))


def along(x: Any, spec: str) -> Any:
    """The same capture read along other letters: keys of self-attention are `along(x, "B T C")` of x of `"B S C"`."""
    if not isinstance(x, Expr):
        return x
    tokens, _ = parse(spec)
    if x.kind != "var" or len(tokens) != len(x.tokens or ()):
        raise misuse(f"along({spec!r}) reads a capture along as many other letters")
    return Expr("var", (), letters_of(tokens), name=x.name, capture=x.capture, tokens=tokens)


def pieces(x: Any, spec: str, count: int) -> tuple[Any, ...]:
    """The pieces of a capture along one of its letters, which `"... (K P) -> K ... P"` brings to the front.

    Halves of an axis are its pieces along K of `(K P)`, every other element those along K of `(P K)`.
    """
    letter, source, target = _along(spec)
    if not isinstance(x, Expr):
        return tuple(_rearrange(np.asarray(x), source, (letter, *target), {letter: count}))
    if x.kind != "var" or x.tokens != source:
        raise misuse(f"pieces {spec!r} are taken of a capture with these axes, not of {spell_axes(x.dims or ())}")
    return tuple(Expr("piece", (x,), target, letters=(letter,), piece=(index, count)) for index in range(count))


def join(parts: Sequence[Any], spec: str) -> Any:
    """The inverse of `pieces`: stacked along a new letter, which `"K ... P -> ... (K P)"` merges into another axis."""
    before, arrow, after = spec.partition("->")
    letter, grouped, single = _along(f"{after} {arrow} {before}")
    if not any(isinstance(part, Expr) for part in parts):
        return _rearrange(np.stack(np.broadcast_arrays(*parts)), (letter, *single), grouped, {letter: len(parts)})
    expressions = tuple(as_expr(part) for part in parts)
    for part in expressions:
        if part.dims != single:
            raise misuse(f"join {spec!r} is applied to {spell_axes(part.dims or ())}")
    groups = [token for token in grouped if not isinstance(token, str)]
    if len(groups) != 1 or len(groups[0]) != 2 or letter not in groups[0]:
        raise misuse(f"join {spec!r} must merge {letter!r} with one other letter")
    return Expr("join", expressions, letters_of(grouped), letters=(letter,), tokens=grouped)


def concat(parts: Sequence[Any], spec: str) -> Any:
    """Parts of any length one after the other along the last axis; `spec` names the axes of the result."""
    if not any(isinstance(part, Expr) for part in parts):
        return np.concatenate(parts, axis=-1)
    tokens, _ = parse(spec)
    expressions = tuple(as_expr(part) for part in parts)
    last = tuple((part.tokens or part.dims or ())[-1:] for part in expressions)
    for part in expressions:
        if tuple(part.tokens or part.dims or ())[:-1] != tokens[:-1] or not all(isinstance(t, str) for t in tokens):
            raise misuse(f"concat {spec!r} is applied to {spell_axes(part.dims or ())}")
    ends = tuple(token if isinstance(token, str) else "" for (token,) in last)
    return Expr("concat", expressions, letters_of(tokens), letters=ends, tokens=tokens)


def _along(spec: str) -> tuple[str, Dims, tuple[str, ...]]:
    """Of `"... (K P) -> K ... P"` the letter in front, the axes with it, and those without."""
    before, arrow, after = spec.partition("->")
    (source, _), (target, _) = parse(before), parse(after)
    if not arrow or sorted(letters_of(source)) != sorted(letters_of(target)) or not target or target[0] == ELLIPSIS:
        raise misuse(f"{spec!r} must have the same letters on both sides, and one of them in front")
    if not all(isinstance(token, str) for token in target):
        raise misuse(f"{spec!r} merges axes where the pieces are")
    return str(target[0]), source, letters_of(target[1:])


def _rearrange(array: Any, source: Dims, target: Dims, given: Mapping[str, int] = _NO_SIZES) -> Any:
    sizes: dict[str, int] = {**sizes_given.get(), **given}
    if ELLIPSIS in source:
        hidden = tuple(f"{ELLIPSIS}{index}" for index in range(array.ndim - len(source) + 1))
        source, target = _spread(source, hidden), _spread(target, hidden)
    split: list[int] = []
    for token, length in zip(source, array.shape, strict=True):
        if isinstance(token, str):
            sizes[token] = length
            split.append(length)
            continue
        unknown = [letter for letter in token if letter not in sizes]
        if len(unknown) > 1:
            raise PatternError(f"the sizes of {', '.join(unknown)} are needed to split {token}: give `sizes=`")
        for letter in unknown:
            sizes[letter] = length // math.prod(sizes[other] for other in token if other != letter)
        split.extend(sizes[letter] for letter in token)
    order = [letters_of(source).index(letter) for letter in letters_of(target)]
    merged = [
        math.prod(sizes[letter] for letter in ((token,) if isinstance(token, str) else token)) for token in target
    ]
    return array.reshape(split).transpose(order).reshape(merged)


def _spread(dims: Dims, letters: tuple[str, ...]) -> Dims:
    """The spec with letters of their own in the place of `...`."""
    index = dims.index(ELLIPSIS)
    return (*dims[:index], *letters, *dims[index + 1 :])


def operator(names: str, *operands: Any, dims: str) -> Any:
    """What a node of one of these operators computes, along the axes `dims`: for what no formula here says.

    Operands are captures declared as `operand()`, or what such nodes compute. Attributes are the emission's to look at,
    and so are inputs that are not listed, which are constants.
    """
    if not all(isinstance(own, Expr) for own in operands):
        raise misuse(f"{names} has no formula: it computes nothing on arrays")
    for own in operands:
        if own.kind != "operator" and not (own.kind == "var" and own.capture and own.capture.dims is None):
            raise misuse(f"an operand of {names} is a capture declared as operand(), or another operator(...)")
    return Expr("operator", operands, letters_of(parse(dims)[0]), name=names)


def keep(x: Any) -> Any:
    """Mark an interior value as an output of the pattern: it may have other consumers."""
    return Expr("keep", (x,), x.dims) if isinstance(x, Expr) else x


def either(*choices: Any) -> Any:
    """One of several formulas of the same value; on arrays the first one computes."""
    if any(isinstance(choice, Expr) for choice in choices):
        options = tuple(as_expr(choice) for choice in choices)
        return Expr("either", options, options[0].dims)
    return choices[0]


def chain(x: Any, *steps: Callable[[Any], Any]) -> Any:
    """Apply functions one after the other: chain(x, sigmoid, tanh) is tanh(sigmoid(x))."""
    for step in steps:
        x = step(x)
    return x


def walk(expr: Expr) -> Iterator[Expr]:
    """Every expression below `expr`, itself included, each once."""
    seen: set[int] = set()
    stack = [expr]
    while stack:
        current = stack.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        stack.extend(current.args)
