"""Spelling: a term written as ONNX nodes, in one of the ways an exporter might; the laws read backwards.

What is spelled is the normal form of a plan, so every pattern can be: ours, and those that people write. The laws' own
`spell` functions do the work; here are the walk over a term, what they share, and the captures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fusion import plan as p
from fusion.language import Dims
from fusion.laws import clamps, contraction, noise, pieces, reduction, ring, softmax
from fusion.laws.arrange import align, arrange
from fusion.laws.draw import Draw
from fusion.laws.writer import Axes, Writer, Written
from fusion.terms import Atom, Group, Item, Prod, Sum, add, leaf, multiply, number, power


class Done(NamedTuple):
    """A value that is written already, as an atom."""

    value: Written


class Beside(NamedTuple):
    """One part of a `rest` capture, as it is written around the rest of a sum.

    Attributes:
        value: added; or a condition, true where the sum is kept (`keep`) or where it becomes `fill` (not `keep`).
        fill: None where `value` is added.
    """

    value: Written
    fill: float | None = None
    keep: bool = True


class Given(NamedTuple):
    """A tensor capture as it lies in the graph.

    Attributes:
        name: of the value.
        dtype: its element type.
        order: for each of its axes the token of the capture's dims that it is, None for an axis of size 1.
    """

    name: str
    dtype: int
    order: tuple[int | None, ...]


@dataclass(slots=True)
class Captures:
    """What a term's variables stand for; scalars and absent captures are numbers, and `fill_in` puts them there."""

    tensors: Mapping[str, Given]
    rests: Mapping[str, Sequence[Beside]]
    letters: Mapping[str, tuple[str, ...]]
    """For each letter the labels of its axes; a letter that is not named is its own label."""


class Speller:
    """Writes one term.

    Args:
        writer: where the nodes go.
        captures: what the variables are.
        order: labels in the order in which a result has them where its operands do not settle it.
        noisy: whether Identity, Dropout and the like are strewn in; one in so many values, 0 for none.

    Attributes:
        kept: what became of `Kept` atoms, by index.
        guarded: whether a NaN guard was written.
    """

    def __init__(
        self, writer: Writer, captures: Captures, order: Sequence[str], *, noisy: int = 16, guarded: bool | None = None
    ) -> None:
        self.writer = writer
        self.draw: Draw = writer.draw
        self.captures = captures
        self.order = order
        self.noisy = noisy
        self.kept: dict[int, Written] = {}
        self.guarded = bool(guarded)
        self._may_guard = guarded is None
        self._uses: Counter[Atom] = Counter()
        self._whole: Atom | None = None
        self._memo: dict[Atom, Written] = {}

    def spell(self, term: Prod, axes: Axes) -> Written:
        """Write the term, in the end with these axes."""
        self._uses, self._whole = Counter(atoms(term)), term.single
        return arrange(self.writer, self.value(term), axes)

    # -- what the laws ask for ----------------------------------------------------------------------------------------

    def value(self, term: Prod, *, flat: bool = False) -> Written:
        """Write a term; `flat` where it is a summand, so that distributing it would change the sum around it."""
        return noise.spell(ring.spell(term, self, flat=flat), self)

    def atom(self, atom: Atom, coef: float = 1.0) -> tuple[Written, float]:
        """Write an atom, and what it takes in of a number before it; return the number that is left.

        An atom that occurs again is the same value, or, now and then, the same formula once more.
        """
        known = self._memo.get(atom)
        if known is not None and (isinstance(atom, Group | p.Kept) or not self.draw.chance(4)):
            return known, coef
        written, left = self._atom(atom, coef)
        if left == coef:
            self._memo[atom] = written
        return written, left

    def elementwise(self, op: str, *operands: Written, **attributes: object) -> Written:
        """Append an elementwise node, its operands brought into axes that broadcast."""
        aligned, axes = align(self.writer, operands, self.order)
        return self.writer.node(op, aligned, axes, **attributes)

    def scaled(self, value: Written, coef: float) -> Written:
        """Multiply by a number."""
        return ring.fold([(value, False)], coef, self) if coef != 1.0 else value

    def labels(self, letters: Sequence[str]) -> tuple[str, ...]:
        """The labels of the axes that letters stand for."""
        return tuple(label for letter in letters for label in self.captures.letters.get(letter, (letter,)))

    def is_rest(self, item: Item) -> bool:
        """Whether a summand stands for everything else that is added or masked."""
        return any(isinstance(atom, p.Var) and atom.name in self.captures.rests for atom, _ in item.factors)

    def rest(self, item: Item) -> Sequence[Beside]:
        """What a `rest` summand stands for, innermost first."""
        atom = item.factors[0][0]
        assert isinstance(atom, p.Var), "a rest capture is a summand of its own"
        return self.captures.rests[atom.name]

    def is_variable(self, atom: Atom) -> bool:
        """Whether an atom is a capture, or written already: using it twice computes nothing twice."""
        return isinstance(atom, p.Var | Done)

    def done(self, term: Prod) -> Atom:
        """The term, written now, so that it is computed once wherever it is used."""
        return Done(self.value(term, flat=True))

    def variable_of(self, item: Item) -> Written | None:
        """The value of a summand that is a capture alone."""
        single = Prod(item.coef, item.factors).single
        return self.atom(single)[0] if isinstance(single, p.Var) else None

    def labels_in(self, term: Prod) -> set[str]:
        """The labels of a term's axes."""
        found: set[str] = set()
        for atom, _ in term.factors:
            if isinstance(atom, Done):
                found.update(atom.value.labels)
            elif isinstance(atom, p.Var):
                found.update(self._variable(atom).labels)
            else:
                inner = set().union(*(self.labels_in(child) for child in p.children(atom)))
                found |= inner - set(self.labels(atom.letters)) if isinstance(atom, p.Reduction | p.MatMul) else inner
        return found

    def contraction_of(self, item: Item) -> p.MatMul | None:
        """The contraction that a summand is, but for a number."""
        single = Prod(1.0, item.factors).single
        return single if isinstance(single, p.MatMul) and not self.is_shared(single) else None

    def is_shared(self, atom: Atom) -> bool:
        """Whether the term uses an atom more than once."""
        return self._uses[atom] > 1

    def is_whole(self, atom: Atom) -> bool:
        """Whether the formula is this atom and nothing else."""
        return atom is self._whole

    def may_guard(self) -> bool:
        """Whether this softmax gets a NaN guard."""
        if self._may_guard:
            self._may_guard = False
            self.guarded = self.draw.chance(3)
        return self.guarded

    # -- atoms --------------------------------------------------------------------------------------------------------

    def _atom(self, atom: Atom, coef: float) -> tuple[Written, float]:
        if isinstance(atom, Done):
            return atom.value, coef
        if isinstance(atom, p.Var):
            return self._variable(atom), coef
        if isinstance(atom, p.Join):
            return pieces.spell_join(atom, self), coef
        if isinstance(atom, p.Concat):
            return pieces.spell_concat(atom, self), coef
        if isinstance(atom, Sum):
            return ring.spell_sum(atom, self), coef
        if isinstance(atom, Group):
            return self.value(atom.product), coef
        if isinstance(atom, p.Op) and atom.name == "Clamp":
            return clamps.spell(atom, self), coef
        if isinstance(atom, p.Op):
            operand = self.value(atom.child)
            return self.writer.node(atom.name, [operand], operand.axes), coef
        if isinstance(atom, p.Reduction):
            return reduction.spell(atom, self), coef
        if isinstance(atom, p.Softmax):
            return softmax.spell(atom, self), coef
        if isinstance(atom, p.MatMul):
            return contraction.spell(atom, coef, self)
        if isinstance(atom, p.Kept):
            self.kept[atom.slot] = self.value(atom.child)
            return self.kept[atom.slot], coef
        raise TypeError(f"{type(atom).__name__} cannot be spelled")

    def _variable(self, atom: p.Var) -> Written:
        if atom.piece is not None:
            return pieces.spell_piece(self.atom(atom._replace(piece=None))[0], atom.piece, self)
        given = self.captures.tensors[atom.name]
        groups = axes_of(atom.dims or (), self.captures.letters)
        axes = tuple(() if index is None else groups[index] for index in given.order)
        return Written(given.name, axes, given.dtype)


def axes_of(dims: Dims, letters: Mapping[str, tuple[str, ...]]) -> Axes:
    """The axes of a capture: a letter is one axis for each of its labels, a group is one axis."""
    axes: list[tuple[str, ...]] = []
    for token in dims:
        if isinstance(token, str):
            axes.extend((label,) for label in letters.get(token, (token,)))
        else:
            axes.append(tuple(label for letter in token for label in letters.get(letter, (letter,))))
    return tuple(axes)


def atoms(term: Prod) -> Iterator[Atom]:
    """Every atom of a term, those inside atoms too, as often as it occurs."""
    for atom, _ in term.factors:
        yield atom
        for child in p.children(atom):
            yield from atoms(child)


def fill_in(term: Prod, numbers: Mapping[str, float], absent: Collection[str] = ()) -> Prod:
    """The term with numbers for some of its captures, and without some: those add 0 where they are a summand, else 1.

    Raises:
        ValueError: a power of one of the numbers is not defined.
    """
    result = number(term.coef)
    for atom, exponent in term.factors:
        raised = power(_filled(atom, numbers, absent), exponent)
        if raised is None:
            raise ValueError(f"{atom} ** {exponent:g} is not defined with {dict(numbers)}")
        result = multiply(result, raised)
    return result


def _filled(atom: Atom, numbers: Mapping[str, float], absent: Collection[str]) -> Prod:
    def inside(term: Prod) -> Prod:
        return fill_in(term, numbers, absent)

    if isinstance(atom, p.Var):
        given = 1.0 if atom.name in absent else numbers.get(atom.name)
        return leaf(atom) if given is None else number(given)
    if isinstance(atom, Sum):
        terms = [inside(Prod(item.coef, item.factors)) for item in atom.items if _name(item) not in absent]
        return add(atom.const, [Item(term.coef, term.factors) for term in terms])
    if isinstance(atom, Group):
        product = inside(atom.product)
        return product if product.single is not None or not product.factors else leaf(Group(product))
    if isinstance(atom, p.Op | p.Reduction | p.Kept):
        return leaf(atom._replace(child=inside(atom.child)))
    if isinstance(atom, p.Softmax):
        return leaf(atom._replace(child=inside(atom.child), beside=atom.beside and inside(atom.beside)))
    if isinstance(atom, p.MatMul):
        return leaf(atom._replace(left=inside(atom.left), right=inside(atom.right)))
    if isinstance(atom, p.Join | p.Concat):
        return leaf(atom._replace(parts=tuple(map(inside, atom.parts))))
    return leaf(atom)


def _name(item: Item) -> str:
    """The name of the capture that a summand is, else an empty one."""
    single = Prod(item.coef, item.factors).single
    return single.name if isinstance(single, p.Var) else ""
