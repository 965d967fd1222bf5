"""Plans: a traced pattern in normal form, one plan for each way of reading its calls and alternatives.

A call of another pattern is read twice: opened, as that pattern's own formula, and as the fused node it may already be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, TypeGuard

from fusion.errors import PatternError
from fusion.language import Capture, Dims, Expr, Pattern, walk
from fusion.terms import Atom, Group, Item, Prod, Sum, add, leaf, multiply, number, power


class Piece(NamedTuple):
    """Number `at` of `size` pieces along a letter."""

    letter: str
    at: int
    size: int


class Var(NamedTuple):
    """A capture, read along the letters of `dims`; of a `piece`, these are the axes of the whole."""

    name: str
    dims: Dims | None = None
    piece: Piece | None = None


class Op(NamedTuple):
    """An elementwise operator without parameters, such as Erf."""

    name: str
    child: Prod


class Reduction(NamedTuple):
    """The mean, max or total over letters."""

    kind: str
    child: Prod
    letters: tuple[str, ...]


class Softmax(NamedTuple):
    """A softmax over a letter; with `beside`, one number more takes its share and is left out."""

    child: Prod
    letters: tuple[str, ...]
    beside: Prod | None = None


class MatMul(NamedTuple):
    """A contraction over letters."""

    left: Prod
    right: Prod
    letters: tuple[str, ...]


class Join(NamedTuple):
    """Pieces side by side along a letter, which `dims` merges with another one."""

    parts: tuple[Prod, ...]
    letter: str
    dims: Dims


class Concat(NamedTuple):
    """Parts one after the other along the last axis of `dims`; `letters` are those of the parts there, if single."""

    parts: tuple[Prod, ...]
    letters: tuple[str, ...]
    dims: Dims


class Fused(NamedTuple):
    """A node of one of the operators that `pattern` reads."""

    pattern: Pattern
    arguments: tuple[tuple[str, Prod | None], ...]
    letters: tuple[tuple[str, tuple[str, ...]], ...]

    def __hash__(self) -> int:
        return id(self.pattern)


class Operator(NamedTuple):
    """A node of one of these operators, of which nothing is said but its first operands."""

    names: frozenset[str]
    operands: tuple[Prod, ...]


class Kept(NamedTuple):
    """An interior value that is an output too."""

    slot: int
    child: Prod


SPELLINGS: Mapping[str, frozenset[str]] = {
    "mean": frozenset(
        {"ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2", "GlobalAveragePool", "InstanceNormalization"}
    ),
    "max": frozenset({"ReduceMax"}),
    "total": frozenset({"ReduceSum"}),
    "softmax": frozenset({"Softmax", "Exp"}),
    "matmul": frozenset({"MatMul", "Gemm", "com.microsoft::FusedMatMul", "Einsum"}),
    "root": frozenset({"Sqrt", "Pow", "ReduceL2", "InstanceNormalization", "BatchNormalization"}),
    "sum": frozenset({"Add", "Sub", "Sum", "Gemm"}),
    "concat": frozenset({"Concat"}),
    "part": frozenset({"Slice", "Split"}),
    "Clamp": frozenset({"Clip", "HardSigmoid"}),
}
"""Operators that may spell a part of a formula."""

UNARY = frozenset(
    {"Abs", "Acos", "Asin", "Atan", "Ceil", "Clip", "Cos", "Cosh", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid"}
    | {"HardSwish", "LeakyRelu", "Log", "Mish", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus"}
    | {"Softsign", "Tan", "Tanh"}
)
"""Functions of one value, element by element, that no law knows."""

ALIKE = (
    (UNARY | {"Sqrt"}, UNARY),
    (
        SPELLINGS["mean"],
        frozenset({"ReduceL1", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMin", "ReduceProd"}),
    ),
    (SPELLINGS["softmax"], frozenset({"LogSoftmax", "Hardmax"})),
)
"""For operators of a formula those that stand where they should, where it is another formula."""


def alike(operators: frozenset[str]) -> frozenset[str]:
    """The operators, and those that may stand in their place where a formula nearly holds."""
    return operators.union(*(others for own, others in ALIKE if own & operators))


@dataclass(eq=False, frozen=True, slots=True)
class Plan:
    """A pattern ready to match.

    Attributes:
        root: the normal form of its result.
        dims: axes of the result.
        inner: the letters of the product that a result with merged axes, such as `B S (H E)`, rearranges; else empty.
        anchors: for each mandatory part, the operators that may spell it; the rarest in a graph is the anchor.
        operators: every operator that may spell a part.
        height: how many of these may stand between an anchor and the root.
        weight: how many operators and captures the formula has.
        reads: operators that it is made of by their names: fused ones, and those of which no formula is said.
        refines: the pattern that the result is a call of, opened: it matches wherever this plan does.
    """

    pattern: Pattern
    root: Prod
    dims: Dims
    inner: tuple[str, ...]
    captures: Mapping[str, Capture]
    kept: tuple[str, ...]
    anchors: tuple[frozenset[str], ...]
    operators: frozenset[str]
    height: int
    weight: int
    refines: Pattern | None
    reads: frozenset[str]

    @property
    def core(self) -> Atom | None:
        """The one atom that is left, beside numbers, where all is absent that may be; None where more are left."""
        items = self.root.single.items if isinstance(self.root.single, Sum) else (Item(1.0, self.root.factors),)
        needed = [item for item in items if not self._is_kind(item.factors[0][0], "optional")]
        atoms = [atom for item in needed for atom, _ in item.factors if not self._is_kind(atom, "scalar")]
        return atoms[0] if len(atoms) == 1 else None

    def _is_kind(self, atom: Atom, kind: str) -> bool:
        return isinstance(atom, Var) and self.captures[atom.name].kind == kind


@cache
def plans_of(pattern: Pattern) -> tuple[Plan, ...]:
    """The plans of a pattern, the opened reading first."""
    plans: list[Plan] = []
    decisions: list[int] = []
    while True:
        builder = _Builder(pattern, decisions)
        root = builder.result()
        anchors = tuple(dict.fromkeys(_anchors(root)))
        plans.append(
            Plan(
                pattern,
                root,
                pattern.dims,
                _inner(pattern.result) if isinstance(root.single, MatMul) else (),
                pattern.captures,
                builder.kept_names,
                anchors,
                frozenset().union(*anchors),
                max(0, _height(root) - 1),
                weight(root),
                builder.refines,
                frozenset(builder.reads),
            )
        )
        decisions = [choice for choice, _ in builder.taken]
        while decisions and decisions[-1] + 1 >= builder.taken[len(decisions) - 1][1]:
            decisions.pop()
        if not decisions:
            return tuple(plans)
        decisions[-1] += 1


def _inner(result: Expr) -> tuple[str, ...]:
    """The letters of the product that a result with merged axes rearranges."""
    if all(isinstance(token, str) for token in result.tokens or ()):
        return ()
    if result.call is not None:
        bound = result.call.letters
        inner = _inner(result.call.pattern.result)
        return tuple(outer for letter in inner for outer in bound.get(letter, (letter,)))
    return tuple(result.args[0].dims or ())


class _Builder:
    """Build one plan, taking the given decisions at calls and alternatives, and the first choice after them."""

    def __init__(self, pattern: Pattern, decisions: list[int]) -> None:
        self.pattern = pattern
        self.decisions = decisions
        self.taken: list[tuple[int, int]] = []
        self.memo: dict[tuple[int, _Frame], Prod] = {}
        self.refines: Pattern | None = None
        self.reads: set[str] = set()
        self.kept = {id(expr.args[0]): index for index, expr in enumerate(pattern.kept)}
        self.kept_names = tuple(expr.args[0].name or f"kept{index}" for index, expr in enumerate(pattern.kept))

    def result(self) -> Prod:
        return self.term(self.pattern.result, _Frame(self.pattern, {}, {}))

    def decide(self, choices: int) -> int:
        index = len(self.taken)
        choice = self.decisions[index] if index < len(self.decisions) else 0
        self.taken.append((choice, choices))
        return choice

    def factor(self, expr: Expr, frame: _Frame) -> Prod:
        """The term of an operand: kept together where the formula uses it more than once."""
        term = self.term(expr, frame)
        if frame.pattern is self.pattern and id(expr) in self.kept:
            return leaf(Kept(self.kept[id(expr)], term))
        if frame.uses[id(expr)] > 1 and expr.kind not in ("const", "var", "call") and term.factors:
            return leaf(Group(term)) if term.single is None or isinstance(term.single, Sum) else term
        return term

    def term(self, expr: Expr, frame: _Frame) -> Prod:
        key = (id(expr), frame)  # the frame itself: an id may be given again once its owner is gone
        known = self.memo.get(key)
        if known is None:
            known = self.memo[key] = self._term(expr, frame)
        return known

    def _term(self, expr: Expr, frame: _Frame) -> Prod:
        args = expr.args
        letters = tuple(letter for own in expr.letters for letter in frame.letters.get(own, (own,)))
        if expr.kind == "const":
            return number(expr.value)
        if expr.kind == "var":
            return frame.arguments[expr.name] if expr.name in frame.arguments else leaf(Var(expr.name, expr.tokens))
        if expr.kind == "mul":
            return multiply(self.factor(args[0], frame), self.factor(args[1], frame))
        if expr.kind == "pow":
            raised = power(self.factor(args[0], frame), expr.value)
            assert raised is not None, "a pattern's exponents are in domain"
            return raised
        if expr.kind == "add":
            terms = [self.factor(arg, frame) for arg in args]
            return add(0.0, [Item(term.coef, term.factors) for term in terms])
        if expr.kind == "op":
            return leaf(Op(expr.name, self.factor(args[0], frame)))
        if expr.kind == "reduce":
            return leaf(Reduction(expr.name, self.factor(args[0], frame), letters))
        if expr.kind == "softmax":
            terms = [self.factor(arg, frame) for arg in args]
            return leaf(Softmax(terms[0], letters, *terms[1:]))
        if expr.kind == "matmul":
            return leaf(MatMul(self.factor(args[0], frame), self.factor(args[1], frame), letters))
        if expr.kind in ("axes", "keep"):
            return self.factor(args[0], frame)
        if expr.kind == "piece":
            return leaf(self.piece(expr, letters[0], frame))
        if expr.kind == "join":
            parts = tuple(self.factor(arg, frame) for arg in args)
            return leaf(Join(parts, letters[0], frame.renamed(expr.tokens or ())))
        if expr.kind == "concat":
            parts = tuple(self.factor(arg, frame) for arg in args)
            ends = tuple(frame.letters.get(end, (end,))[0] for end in expr.letters)
            return leaf(Concat(parts, ends, frame.renamed(expr.tokens or ())))
        if expr.kind == "operator":
            names = expr.name.split()
            self.reads.update(names)
            return leaf(Operator(frozenset(names), tuple(self.factor(arg, frame) for arg in args)))
        if expr.kind == "either":
            return self.factor(args[self.decide(len(args))], frame)
        return self._call(expr, frame)

    def piece(self, expr: Expr, letter: str, frame: _Frame) -> Var:
        """A piece of a capture: of the pattern's own, however deep the call is that cuts it."""
        whole = self.term(expr.args[0], frame).single
        if not isinstance(whole, Var) or whole.piece is not None:
            raise PatternError(f"{frame.pattern.name} takes pieces of {expr.args[0].name!r}, which is no whole capture")
        return whole._replace(piece=Piece(letter, *expr.piece))

    def _call(self, expr: Expr, frame: _Frame) -> Prod:
        call = expr.call
        assert call is not None
        letters = {
            own: tuple(outer for letter in bound for outer in frame.letters.get(letter, (letter,)))
            for own, bound in call.letters.items()
        }
        callee = call.pattern
        fused = bool(callee.readers) and self.decide(2) == 1
        if expr is self.pattern.result and not fused:
            self.refines = callee
        arguments: dict[str, Prod | None] = {
            name: None if argument is None else self.factor(argument, frame)
            for name, argument in call.arguments.items()
        }
        if fused:
            self.reads.update(callee.readers)
            return leaf(Fused(callee, tuple(arguments.items()), tuple(letters.items())))
        given = {name: number(_neutral(callee, name)) if term is None else term for name, term in arguments.items()}
        inner = _Frame(callee, given, letters)
        for name, term in given.items():
            if inner.used[name] > 1 and term.factors and not isinstance(term.single, Var | Group | Kept):
                given[name] = leaf(Group(term))
        return self.term(callee.result, inner)


def _neutral(pattern: Pattern, name: str) -> float:
    """What an optional capture that is left out stands for: 0 where it is added, 1 where it is multiplied."""
    parents = [expr for expr in walk(pattern.result) for arg in expr.args if arg.kind == "var" and arg.name == name]
    return 0.0 if all(parent.kind == "add" for parent in parents) else 1.0


class _Frame:
    """One formula being built: whose, with what for its captures and letters."""

    def __init__(self, pattern: Pattern, arguments: Mapping[str, Prod], letters: Mapping[str, tuple[str, ...]]) -> None:
        self.pattern = pattern
        self.arguments = arguments
        self.letters = letters
        self.uses: Counter[int] = Counter()
        self.used: Counter[str] = Counter()
        for expr in walk(pattern.result):
            for arg in expr.args:
                self.uses[id(arg)] += 1
                if arg.kind == "var":
                    self.used[arg.name] += 1

    def renamed(self, dims: Dims) -> Dims:
        """Axes of this formula in the letters of the pattern that is built."""
        renamed: list[str | tuple[str, ...]] = []
        for token in dims:
            if isinstance(token, str):
                renamed.extend(self.letters.get(token, (token,)))
            else:
                renamed.append(tuple(outer for own in token for outer in self.letters.get(own, (own,))))
        return tuple(renamed)


def children(atom: Atom) -> Iterator[Prod]:
    """The terms below an atom of a plan."""
    if isinstance(atom, Group):
        yield atom.product
    elif isinstance(atom, Sum):
        for item in atom.items:
            yield Prod(item.coef, item.factors)
    elif isinstance(atom, Op | Reduction | Kept):
        yield atom.child
    elif isinstance(atom, Softmax):
        yield from (term for term in (atom.child, atom.beside) if term is not None)
    elif isinstance(atom, MatMul):
        yield atom.left
        yield atom.right
    elif isinstance(atom, Join | Concat):
        yield from atom.parts
    elif isinstance(atom, Operator):
        yield from atom.operands
    elif isinstance(atom, Fused):
        for _, argument in atom.arguments:
            if argument is not None:
                yield argument


def is_clamp(atom: Atom) -> TypeGuard[Op]:
    """Whether an atom is a clamp to [0, 1], which is spelled by several operators."""
    return isinstance(atom, Op) and atom.name == "Clamp"


def weight(term: Prod) -> int:
    """The number of operators and captures of a term; a softmax is three, as it is written out."""
    total = 0 if term.coef == 1.0 else 1
    for atom, _ in term.factors:
        own = 0 if isinstance(atom, Group | Kept) else 3 if isinstance(atom, Softmax) else 1
        total += own + sum(weight(child) for child in children(atom))
    return total


def _height(term: Prod) -> int:
    """The longest chain of operators that are not arithmetic."""
    tallest = 0
    for atom, _ in term.factors:
        own = 1 if isinstance(atom, Op | Reduction | Softmax | MatMul | Join | Concat | Operator | Fused) else 0
        own += 2 if isinstance(atom, Softmax) and atom.beside is not None else 0  # what puts it there, and cuts it off
        tallest = max([tallest, own, *(own + _height(child) for child in children(atom))])
    return tallest


def _anchors(term: Prod) -> Iterator[frozenset[str]]:
    """The parts of a formula that an operator of their own must spell, those next to the root first."""
    level = [term]
    while level:
        for atom, exponent in (factor for current in level for factor in current.factors):
            if exponent in (0.5, -0.5):
                yield SPELLINGS["root"]
            if isinstance(atom, Op):
                yield SPELLINGS.get(atom.name, frozenset({atom.name}))
            elif isinstance(atom, Reduction):
                yield SPELLINGS[atom.kind]
            elif isinstance(atom, Softmax):
                yield SPELLINGS["softmax"]
                if atom.beside is not None:
                    yield SPELLINGS["concat"]
                    yield SPELLINGS["part"]
            elif isinstance(atom, MatMul):
                yield SPELLINGS["matmul"]
            elif isinstance(atom, Join | Concat):
                yield SPELLINGS["concat"]
            elif isinstance(atom, Operator):
                yield atom.names
            elif isinstance(atom, Fused):
                yield frozenset(atom.pattern.readers)
        level = [child for current in level for atom, _ in current.factors for child in children(atom)]
