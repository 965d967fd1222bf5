"""The pattern language: a Python function over captures is traced once; called with numpy arrays it is the reference.

    @pattern(x="... D", scale=optional("D"), bias=optional("D"), eps=scalar(0))
    def layer_norm(x, scale, bias, eps):
        d = x - mean(x)
        return d / sqrt(mean(d**2) + eps) * scale + bias

Captures are the parameters. A dimension spec names the axes of a capture: letters, `...` for any number of axes,
`(H D)` for two axes merged into one, `B|1` for an axis that may be broadcast. A letter stands for the same axis
wherever it is used; the letter a mean runs over may stand for several trailing axes.
"""

from __future__ import annotations

import contextvars
import difflib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from fusion.errors import PatternError

Token = str | tuple[str, ...]
Dims = tuple[Token, ...]
ELLIPSIS = "..."


@dataclass(frozen=True, slots=True)
class Capture:
    """What a parameter of a pattern may bind.

    Attributes:
        kind: tensor, optional (may be absent: the neutral element), scalar (a number of the graph) or rest (everything
            else that is added to or masked out of a sum).
        dims: its axes; None where it has the axes of the pattern's result.
        loose: letters over which it may be broadcast.
        low, high: bounds of a scalar.
    """

    kind: str
    dims: Dims | None = None
    loose: frozenset[str] = frozenset()
    low: float = -math.inf
    high: float = math.inf


def tensor(spec: str) -> Capture:
    """A tensor with the axes of `spec`; a plain string means the same."""
    return Capture("tensor", *_parse(spec))


def optional(spec: str) -> Capture:
    """A tensor that may be absent; then it is 0 where it is added, and 1 where it is multiplied."""
    return Capture("optional", *_parse(spec))


def rest(spec: str) -> Capture:
    """Everything else that is added to, or masked out of, a sum: an ordered list, possibly empty.

    Each part may be broadcast over any of the axes.
    """
    return Capture("rest", *_parse(spec))


def scalar(low: float = -math.inf, high: float = math.inf) -> Capture:
    """A number written in the graph, low <= number <= high."""
    return Capture("scalar", (), low=low, high=high)


def _parse(spec: str) -> tuple[Dims, frozenset[str]]:
    tokens: list[Token] = []
    loose: set[str] = set()
    text = spec.replace("(", " ( ").replace(")", " ) ").split()
    group: list[str] | None = None
    for word in text:
        if word == "(":
            group = []
        elif word == ")":
            tokens.append(tuple(group or ()))
            group = None
        else:
            letter, _, one = word.partition("|")
            if one not in ("", "1") or not (letter == ELLIPSIS or letter.isidentifier()):
                raise PatternError(f"{word!r} is no dimension: write a letter, `...`, `(H D)` or `B|1`")
            if one:
                loose.add(letter)
            (tokens if group is None else group).append(letter)
    if group is not None:
        raise PatternError(f"{spec!r} opens a bracket that it does not close")
    return tuple(tokens), frozenset(loose)


def letters_of(dims: Dims) -> tuple[str, ...]:
    """The letters of a spec, groups opened."""
    return tuple(letter for token in dims for letter in ((token,) if isinstance(token, str) else token))


# -- expressions ----------------------------------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class Expr:
    """A node of a traced pattern. `dims` are its axes in letters, groups opened; `tokens` the same with groups."""

    kind: str
    args: tuple[Expr, ...] = ()
    dims: tuple[str, ...] | None = None
    name: str = ""
    value: float = 0.0
    letters: tuple[str, ...] = ()
    capture: Capture | None = None
    call: Call | None = None
    tokens: Dims | None = None

    def __add__(self, other: Operand) -> Expr:
        return _elementwise("add", self, other)

    def __radd__(self, other: Operand) -> Expr:
        return _elementwise("add", other, self)

    def __sub__(self, other: Operand) -> Expr:
        return self + (-_expr(other))

    def __rsub__(self, other: Operand) -> Expr:
        return _expr(other) + (-self)

    def __neg__(self) -> Expr:
        return _elementwise("mul", -1.0, self)

    def __mul__(self, other: Operand) -> Expr:
        return _elementwise("mul", self, other)

    def __rmul__(self, other: Operand) -> Expr:
        return _elementwise("mul", other, self)

    def __truediv__(self, other: Operand) -> Expr:
        return self * _expr(other) ** -1.0

    def __rtruediv__(self, other: Operand) -> Expr:
        return _expr(other) * self**-1.0

    def __pow__(self, exponent: float) -> Expr:
        if not isinstance(exponent, int | float):
            raise _misuse("an exponent is a number, not a capture")
        return Expr("pow", (self,), self.dims, value=float(exponent))

    def __matmul__(self, other: Expr) -> Expr:
        left, right = self.dims or (), other.dims or ()
        if len(left) < 2 or len(right) < 2 or left[-1] != right[-2]:
            raise _misuse(
                f"@ contracts the last axis of {_spell(left)} with the last but one of {_spell(right)}; "
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


def _spell(dims: Sequence[str]) -> str:
    return repr(" ".join(dims))


def _expr(value: Operand) -> Expr:
    return value if isinstance(value, Expr) else Expr("const", value=float(value), dims=())


def _merge_dims(left: tuple[str, ...], right: tuple[str, ...]) -> tuple[str, ...]:
    """The axes of an elementwise result: the longer list, of which the shorter one must be a part, in order."""
    longer, shorter = (left, right) if len(left) >= len(right) else (right, left)
    position = 0
    for letter in shorter:
        if letter not in longer[position:]:
            raise _misuse(
                f"{_spell(left)} and {_spell(right)} cannot be broadcast: {letter!r} is not in both, in order"
            )
        position = longer.index(letter, position) + 1
    return longer


def _elementwise(kind: str, left: Operand, right: Operand) -> Expr:
    a, b = _expr(left), _expr(right)
    return Expr(kind, (a, b), _merge_dims(a.dims or (), b.dims or ()))


_NO_SIZES: Mapping[str, int] = MappingProxyType({})
_tracing: contextvars.ContextVar[tuple[str, int] | None] = contextvars.ContextVar("tracing", default=None)
_sizes: contextvars.ContextVar[Mapping[str, int]] = contextvars.ContextVar("sizes", default=_NO_SIZES)


def _misuse(message: str) -> PatternError:
    path, line = _tracing.get() or ("", 0)
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
sigmoid = _unary("Sigmoid", lambda x: 1 / (1 + np.exp(-x)))


def sqrt(x: Any) -> Any:
    """Square root: x ** 0.5."""
    if isinstance(x, Expr):
        return x**0.5
    return math.sqrt(x) if isinstance(x, int | float) else np.sqrt(x)


def mean(x: Any, over: str | None = None) -> Any:
    """Mean over one letter (the last one), kept as an axis of size 1. In a pattern the letter may be several axes."""
    if isinstance(x, Expr):
        dims = x.dims or ()
        letter = over or (dims[-1] if dims else "")
        if letter not in dims or letter == ELLIPSIS:
            raise _misuse(f"mean over {letter!r}, which is no letter of {_spell(dims)}")
        return Expr("reduce", (x,), dims, name="mean", letters=(letter,))
    return np.mean(x, axis=-1, keepdims=True)


def softmax(x: Any, over: str | None = None) -> Any:
    """exp(x) / sum(exp(x)) over one letter (the last one)."""
    if isinstance(x, Expr):
        dims = x.dims or ()
        letter = over or (dims[-1] if dims else "")
        if letter not in dims or letter == ELLIPSIS:
            raise _misuse(f"softmax over {letter!r}, which is no letter of {_spell(dims)}")
        return Expr("softmax", (x,), dims, letters=(letter,))
    e = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return e / np.sum(e, axis=-1, keepdims=True)


def axes(x: Any, spec: str) -> Any:
    """Rearrange axes: `"B S (H D) -> B H S D"` splits, merges and permutes them by name.

    On arrays the size of a letter that a group hides is taken from `Pattern.reference(sizes=...)`.
    """
    before, arrow, after = spec.partition("->")
    if not arrow:
        raise _misuse(f"axes wants `before -> after`, not {spec!r}")
    (source, _), (target, _) = _parse(before), _parse(after)
    if sorted(letters_of(source)) != sorted(letters_of(target)):
        raise _misuse(f"axes {spec!r} must have the same letters on both sides")
    if isinstance(x, Expr):
        if letters_of(source) != (x.dims or ()):
            raise _misuse(f"axes {spec!r} is applied to {_spell(x.dims or ())}")
        return Expr("axes", (x,), letters_of(target), tokens=target)
    return _rearrange(np.asarray(x), source, target)


def along(x: Any, spec: str) -> Any:
    """The same capture read along other letters: keys of self-attention are `along(x, "B T C")` of x of `"B S C"`."""
    if not isinstance(x, Expr):
        return x
    tokens, _ = _parse(spec)
    if x.kind != "var" or len(tokens) != len(x.tokens or ()):
        raise _misuse(f"along({spec!r}) reads a capture along as many other letters")
    return Expr("var", (), letters_of(tokens), name=x.name, capture=x.capture, tokens=tokens)


def _rearrange(array: Any, source: Dims, target: Dims) -> Any:
    sizes: dict[str, int] = dict(_sizes.get())
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


def keep(x: Any) -> Any:
    """Mark an interior value as an output of the pattern: it may have other consumers."""
    return Expr("keep", (x,), x.dims) if isinstance(x, Expr) else x


def either(*choices: Any) -> Any:
    """One of several formulas of the same value; on arrays the first one computes."""
    if any(isinstance(choice, Expr) for choice in choices):
        options = tuple(_expr(choice) for choice in choices)
        return Expr("either", options, options[0].dims)
    return choices[0]


def chain(x: Any, *steps: Callable[[Any], Any]) -> Any:
    """Apply functions one after the other: chain(x, sigmoid, tanh) is tanh(sigmoid(x))."""
    for step in steps:
        x = step(x)
    return x


class _Absent:
    """An optional capture left out: neutral in sums and products of the reference."""

    __array_ufunc__ = None

    def __add__(self, other: Any) -> Any:
        return other

    __radd__ = __mul__ = __rmul__ = __rsub__ = __rtruediv__ = __add__


# -- patterns -------------------------------------------------------------------------------------------------------

Emission = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Emit:
    """One way to write a match: for which targets, and the function that builds the nodes."""

    targets: tuple[str, ...]
    build: Emission


@dataclass(eq=False)
class Pattern:
    """A fusion: what is computed, which captures it has, how it is emitted, how a fused node of it reads.

    Attributes:
        name: the function's name.
        captures: by parameter name.
        result: the traced formula; `kept` are its further outputs.
        dims: axes of the result.
        emissions: in order of preference.
        readers: fused operator → function from the node to its captures.
    """

    function: Callable[..., Any]
    captures: dict[str, Capture]
    name: str = field(init=False)
    result: Expr = field(init=False)
    kept: tuple[Expr, ...] = field(init=False)
    emissions: list[Emit] = field(init=False, default_factory=list)
    readers: dict[str, Callable[..., Any]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.name = self.function.__name__
        code = self.function.__code__
        self.path, self.line = code.co_filename, code.co_firstlineno
        token = _tracing.set((self.path, self.line))
        try:
            self._check_captures()
            self._trace()
        finally:
            _tracing.reset(token)

    @property
    def doc(self) -> str:
        """The docstring: formula and origin."""
        return inspect.getdoc(self.function) or ""

    @property
    def targets(self) -> tuple[str, ...]:
        """The targets it has an emission for."""
        return tuple(dict.fromkeys(target for emission in self.emissions for target in emission.targets))

    @property
    def dims(self) -> Dims:
        """Axes of the result."""
        return self.result.tokens or tuple(self.result.dims or ())

    def _check_captures(self) -> None:
        parameters = list(inspect.signature(self.function).parameters)
        for name in self.captures:
            if name not in parameters:
                raise _misuse(f"capture {name!r} is no parameter of {self.name}{_suggest(name, parameters)}")
        for name in parameters:
            if name not in self.captures:
                raise _misuse(f"parameter {name!r} of {self.name} has no capture{_suggest(name, self.captures)}")

    def _trace(self) -> None:
        arguments = {
            name: Expr("var", (), letters_of(capture.dims or ()), name=name, capture=capture, tokens=capture.dims)
            for name, capture in self.captures.items()
        }
        try:
            returned = self.function(**arguments)
        except PatternError:
            raise
        except Exception as error:
            raise _misuse(f"tracing {self.name} failed: {type(error).__name__}: {error}") from error
        outputs = returned if isinstance(returned, tuple) else (returned,)
        if not all(isinstance(output, Expr) for output in outputs):
            raise _misuse(f"{self.name} must return what it computes from its captures, not {returned!r}")
        self.result, self.kept = outputs[0], tuple(outputs[1:])
        if any(expr.kind != "keep" for expr in self.kept):
            raise _misuse(f"further outputs of {self.name} are marked with keep(...)")
        used = {expr.name for output in outputs for expr in walk(output) if expr.kind == "var"}
        for name in self.captures:
            if name not in used:
                raise _misuse(f"capture {name!r} of {self.name} is never used{_suggest(name, used)}")
        known = set(self.result.dims or ())
        for output in outputs:
            for expr in walk(output):
                known.update(expr.letters)
                if expr.call is not None:
                    known.update(letter for bound in expr.call.letters.values() for letter in bound)
        for name, capture in self.captures.items():
            for letter in letters_of(capture.dims or ()):
                if letter not in known:
                    raise _misuse(
                        f"dimension {letter!r} of capture {name!r} never binds in {self.name}{_suggest(letter, known)}"
                    )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Inside a pattern: match this pattern here. With arrays: compute the reference (absent optionals are None)."""
        bound = inspect.signature(self.function).bind_partial(*args, **kwargs).arguments
        for name in self.captures:
            bound.setdefault(name, None)
        if _tracing.get() is None and not any(isinstance(argument, Expr) for argument in bound.values()):
            arguments = {name: _Absent() if value is None else value for name, value in bound.items()}
            return self.function(**arguments)
        return self._call({name: None if v is None else _expr(v) for name, v in bound.items()})

    def _call(self, arguments: dict[str, Expr | None]) -> Expr:
        letters: dict[str, tuple[str, ...]] = {}
        for name, argument in arguments.items():
            capture = self.captures[name]
            if argument is None or capture.kind == "scalar":
                if argument is None and capture.kind != "optional":
                    raise _misuse(f"{self.name} needs its capture {name!r}")
                continue
            _unify(capture.dims or (ELLIPSIS,), argument, letters, f"{self.name}({name})")
        dims = tuple(letter for own in letters_of(self.dims) for letter in letters.get(own, (own,)))
        tokens: Dims = tuple(
            token if isinstance(token, str) else tuple(letter for own in token for letter in letters.get(own, (own,)))
            for own_token in self.dims
            for token in ((own_token,) if not isinstance(own_token, str) else letters.get(own_token, (own_token,)))
        )
        given = tuple(argument for argument in arguments.values() if argument is not None)
        return Expr("call", given, dims, call=Call(self, arguments, letters), tokens=tokens)

    def emit(self, *targets: str) -> Callable[[Emission], Emission]:
        """Register a way to write a match for these targets; earlier registrations are preferred."""

        def register(build: Emission) -> Emission:
            self.emissions.append(Emit(targets, build))
            return build

        return register

    def reads(self, *operators: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register how a fused node of these operators reads: node → {capture: value or number}, or None."""

        def register(read: Callable[..., Any]) -> Callable[..., Any]:
            for operator in operators:
                self.readers[operator] = read
            return read

        return register

    @contextmanager
    def reference(self, **sizes: int) -> Iterator[Pattern]:
        """Give the sizes of letters that groups hide while the pattern computes on arrays."""
        token = _sizes.set(sizes)
        try:
            yield self
        finally:
            _sizes.reset(token)


def _unify(dims: Dims, argument: Expr, letters: dict[str, tuple[str, ...]], place: str) -> None:
    """Bind the callee's letters to the caller's, right-aligned; `...` takes what is left."""
    own = letters_of(dims)
    given = [letters_of((token,)) for token in argument.tokens or argument.dims or ()]
    front = own.index(ELLIPSIS) if ELLIPSIS in own else len(own)
    back = own[front + 1 :]
    if len(given) < len(own) - (ELLIPSIS in own) or (ELLIPSIS not in own and len(given) != len(own)):
        raise _misuse(f"{place} wants axes {_spell(own)}, and gets {_spell(argument.dims or ())}")
    pairs: list[tuple[str, tuple[str, ...]]] = [(letter, given[i]) for i, letter in enumerate(own[:front])]
    pairs += [(letter, given[len(given) - len(back) + i]) for i, letter in enumerate(back)]
    if ELLIPSIS in own:
        between = given[front : len(given) - len(back)]
        pairs.append((ELLIPSIS, tuple(letter for token in between for letter in token)))
    for letter, bound in pairs:
        if letters.setdefault(letter, bound) != bound:
            raise _misuse(f"{place}: {letter!r} is {_spell(letters[letter])} and {_spell(bound)}")


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


def _suggest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, [str(k) for k in known], n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def pattern(**captures: str | Capture) -> Callable[[Callable[..., Any]], Pattern]:
    """Declare a pattern.

    Args:
        captures: for each parameter a spec such as `"... D"`, or optional(...), scalar(...), rest(...).

    Raises:
        PatternError: misuse, with the pattern's file and line and a suggestion.
    """

    def build(function: Callable[..., Any]) -> Pattern:
        code = function.__code__
        token = _tracing.set((code.co_filename, code.co_firstlineno))
        try:
            parsed = {name: tensor(spec) if isinstance(spec, str) else spec for name, spec in captures.items()}
        except PatternError as error:
            raise _misuse(str(error)) from None
        finally:
            _tracing.reset(token)
        return Pattern(function, parsed)

    return build
