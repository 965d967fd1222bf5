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

import difflib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fusion.captures import ELLIPSIS, Capture, Dims, letters_of, operand, optional, rest, scalar, tensor
from fusion.errors import PatternError
from fusion.expressions import (
    Call,
    Expr,
    along,
    as_expr,
    axes,
    chain,
    clamp,
    concat,
    either,
    erf,
    exp,
    join,
    keep,
    log,
    maximum,
    mean,
    misuse,
    operator,
    pieces,
    relu,
    sigmoid,
    sizes_given,
    softmax,
    spell_axes,
    sqrt,
    tanh,
    total,
    tracing,
    walk,
)

__all__ = [
    "ELLIPSIS", "Capture", "Dims", "Emit", "Expr", "Pattern", "along", "axes", "chain", "clamp", "concat", "either",
    "erf", "exp", "join", "keep", "letters_of", "log", "maximum", "mean", "operand", "operator", "optional", "pattern",
    "pieces", "relu", "rest", "scalar", "sigmoid", "softmax", "sqrt", "tanh", "tensor", "total", "walk",
]  # fmt: skip


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
    """One way to write a match: for which targets, and the function that builds the nodes.

    `last`: only where no other pattern can be written any more.
    """

    targets: tuple[str, ...]
    build: Emission
    last: bool = False


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
        token = tracing.set((self.path, self.line))
        try:
            self._check_captures()
            self._trace()
        finally:
            tracing.reset(token)

    @property
    def doc(self) -> str:
        """The docstring: formula and origin."""
        return inspect.getdoc(self.function) or ""

    @property
    def is_formula(self) -> bool:
        """Whether it says all that is computed, so that it is a reference and a generator, too."""
        return all(expr.kind != "operator" for expr in walk(self.result))

    @property
    def targets(self) -> tuple[str, ...]:
        """The targets it has an emission for."""
        return tuple(dict.fromkeys(target for emission in self.emissions for target in emission.targets))

    @property
    def is_last(self) -> bool:
        """Whether all its emissions wait until no other pattern can be written any more."""
        return bool(self.emissions) and all(emission.last for emission in self.emissions)

    @property
    def dims(self) -> Dims:
        """Axes of the result."""
        return self.result.tokens or tuple(self.result.dims or ())

    def _check_captures(self) -> None:
        parameters = list(inspect.signature(self.function).parameters)
        for name in self.captures:
            if name not in parameters:
                raise misuse(f"capture {name!r} is no parameter of {self.name}{_suggest(name, parameters)}")
        for name in parameters:
            if name not in self.captures:
                raise misuse(f"parameter {name!r} of {self.name} has no capture{_suggest(name, self.captures)}")

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
            raise misuse(f"tracing {self.name} failed: {type(error).__name__}: {error}") from error
        outputs = returned if isinstance(returned, tuple) else (returned,)
        if not all(isinstance(output, Expr) for output in outputs):
            raise misuse(f"{self.name} must return what it computes from its captures, not {returned!r}")
        self.result, self.kept = outputs[0], tuple(outputs[1:])
        if any(expr.kind != "keep" for expr in self.kept):
            raise misuse(f"further outputs of {self.name} are marked with keep(...)")
        used = {expr.name for output in outputs for expr in walk(output) if expr.kind == "var"}
        for name in self.captures:
            if name not in used:
                raise misuse(f"capture {name!r} of {self.name} is never used{_suggest(name, used)}")
        for output in outputs:
            for expr in walk(output):
                self._check_groups(expr)

    def _check_groups(self, expr: Expr) -> None:
        """A group of a capture must be split before its letters mean anything; an operand has no letters."""
        for arg in expr.args:
            if arg.kind == "var" and self.captures[arg.name].dims is None and expr.kind != "operator":
                raise misuse(f"capture {arg.name!r} of {self.name} is an operand: only operator(...) takes it")
        if expr.kind in ("axes", "call", "keep", "piece"):
            return
        for arg in expr.args:
            for token in arg.tokens or () if arg.kind == "var" else ():
                if not isinstance(token, str):
                    group = f"({' '.join(token)})"
                    raise misuse(
                        f"dimension {token[0]!r} of capture {arg.name!r} never binds in {self.name}: "
                        f"split {group} with axes(...) before computing with it"
                    )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Inside a pattern: match this pattern here. With arrays: compute the reference (absent optionals are None)."""
        bound = inspect.signature(self.function).bind_partial(*args, **kwargs).arguments
        for name in self.captures:
            bound.setdefault(name, None)
        if tracing.get() is None and not any(isinstance(argument, Expr) for argument in bound.values()):
            arguments = {name: _Absent() if value is None else value for name, value in bound.items()}
            return self.function(**arguments)
        return self._call({name: None if v is None else as_expr(v) for name, v in bound.items()})

    def _call(self, arguments: dict[str, Expr | None]) -> Expr:
        letters: dict[str, tuple[str, ...]] = {}
        for name, argument in arguments.items():
            capture = self.captures[name]
            if argument is None or capture.kind == "scalar":
                if argument is None and capture.kind != "optional":
                    raise misuse(f"{self.name} needs its capture {name!r}")
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

    def emit(self, *targets: str, last: bool = False) -> Callable[[Emission], Emission]:
        """Register a way to write a match for these targets; earlier registrations are preferred.

        With `last` it waits until no other pattern can be written any more: it takes parts that others are made of.
        """

        def register(build: Emission) -> Emission:
            self.emissions.append(Emit(targets, build, last))
            return build

        return register

    def reads(self, *operators: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register how a fused node of these operators reads: node → {capture: value or number}, or None."""

        def register(read: Callable[..., Any]) -> Callable[..., Any]:
            self.readers |= dict.fromkeys(operators, read)
            return read

        return register

    @contextmanager
    def reference(self, **sizes: int) -> Iterator[Pattern]:
        """Give the sizes of letters that groups hide while the pattern computes on arrays."""
        token = sizes_given.set(sizes)
        try:
            yield self
        finally:
            sizes_given.reset(token)


def _unify(dims: Dims, argument: Expr, letters: dict[str, tuple[str, ...]], place: str) -> None:
    """Bind the callee's letters to the caller's, right-aligned; `...` takes what is left."""
    own = letters_of(dims)
    tokens: Dims = argument.tokens or argument.dims or ()
    if any(not isinstance(token, str) for token in dims) and len(tokens) == len(dims):  # group for group
        tokens = letters_of(tokens)
    given = [letters_of((token,)) for token in tokens]
    front = own.index(ELLIPSIS) if ELLIPSIS in own else len(own)
    back = own[front + 1 :]
    if len(given) < len(own) - (ELLIPSIS in own) or (ELLIPSIS not in own and len(given) != len(own)):
        raise misuse(f"{place} wants axes {spell_axes(own)}, and gets {spell_axes(argument.dims or ())}")
    pairs: list[tuple[str, tuple[str, ...]]] = [(letter, given[i]) for i, letter in enumerate(own[:front])]
    pairs += [(letter, given[len(given) - len(back) + i]) for i, letter in enumerate(back)]
    if ELLIPSIS in own:
        between = given[front : len(given) - len(back)]
        pairs.append((ELLIPSIS, tuple(letter for token in between for letter in token)))
    for letter, bound in pairs:
        if letters.setdefault(letter, bound) != bound:
            raise misuse(f"{place}: {letter!r} is {spell_axes(letters[letter])} and {spell_axes(bound)}")


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
        token = tracing.set((code.co_filename, code.co_firstlineno))
        try:
            parsed = {name: tensor(spec) if isinstance(spec, str) else spec for name, spec in captures.items()}
        except PatternError as error:
            raise misuse(str(error)) from None
        finally:
            tracing.reset(token)
        return Pattern(function, parsed)

    return build
