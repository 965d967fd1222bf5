"""Pieces of an axis: what the language says of them, and what the engine proves of values that are put together."""

from __future__ import annotations

import numpy as np
import pytest
from building import INT64, Build, numbers, operators, run, same

import fusion
from fusion.errors import PatternError
from fusion.facts import Facts
from fusion.language import concat, join, pattern, pieces
from fusion.layout import Layout
from fusion.matching.congruence import same as congruent
from fusion.matching.parts import appended, joined
from fusion.models.graph import Graph
from fusion.models.model import load
from fusion.plan import Concat, Join, Piece, Var, plans_of
from fusion.terms import Ref
from fusion.view import View

LARGE = np.iinfo(np.int64).max

# The language --------------------------------------------------------------------------------------------------------


def test_pieces_and_join_on_arrays_are_halves_or_every_other_element():
    x = np.arange(12).reshape(2, 6)
    first, second = pieces(x, "... (K P) -> K ... P", 2)
    assert first.tolist() == [[0, 1, 2], [6, 7, 8]]
    assert second.tolist() == [[3, 4, 5], [9, 10, 11]]
    assert join((second, first), "K ... P -> ... (K P)").tolist() == [[3, 4, 5, 0, 1, 2], [9, 10, 11, 6, 7, 8]]
    even, odd = pieces(x, "... (P K) -> K ... P", 2)
    assert even.tolist() == [[0, 2, 4], [6, 8, 10]]
    assert join((even, odd), "K ... P -> ... (P K)").tolist() == x.tolist()
    thirds = pieces(x, "A (K P) -> K A P", 3)
    assert [third.tolist() for third in thirds] == [[[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5], [10, 11]]]


def test_concat_on_arrays_puts_parts_of_any_length_side_by_side():
    assert concat((np.ones((2, 1)), np.zeros((2, 3))), "... D").tolist() == [[1, 0, 0, 0]] * 2


@pattern(x="... (K P)", c="... P")
def _swapped(x, c):
    first, second = pieces(x, "... (K P) -> K ... P", 2)
    return join((second * c, first * c), "K ... P -> ... (K P)")


def test_a_call_cuts_the_callers_capture():
    @pattern(y="... (A B)", c="... B", rest="... T")
    def outer(y, c, rest):
        return concat((_swapped(y, c), rest), "... D")

    (plan,) = plans_of(outer)
    atom = plan.root.single
    assert isinstance(atom, Concat)
    assert (atom.dims, atom.letters) == (("...", "D"), ("", "T"))
    inner = atom.parts[0].single
    assert isinstance(inner, Join)
    assert (inner.letter, inner.dims) == ("A", ("...", ("A", "B")))
    ((whole, _), _) = inner.parts[0].factors
    assert whole == Var("y", ("...", ("A", "B")), Piece("A", 1, 2))
    y = np.arange(4.0)
    assert outer(y, np.array([1.0, 2.0]), np.array([9.0])).tolist() == [2.0, 6.0, 0.0, 2.0, 9.0]


MISUSES = {
    "the same letters on both sides": lambda x: pieces(x, "... (K P) -> K ...", 2)[0],
    "one of them in front": lambda x: pieces(x, "... (K P) -> ... K P", 2)[0],
    "merges axes where the pieces are": lambda x: pieces(x, "B (K P) -> K (B P)", 2)[0],
    "are taken of a capture with these axes": lambda x: pieces(x, "... (P K) -> K ... P", 2)[0],
    "is applied to '... P'": lambda x: join(pieces(x, "... (K P) -> K ... P", 2), "K ... Q -> ... (K Q)"),
    "must merge 'K' with one other letter": lambda x: join(pieces(x, "... (K P) -> K ... P", 2), "K ... P -> ... K P"),
    "concat 'B D' is applied to '... P'": lambda x: concat(pieces(x, "... (K P) -> K ... P", 2), "B D"),
}


@pytest.mark.parametrize("message", MISUSES)
def test_misuse_says_what_is_wrong(message):
    with pytest.raises(PatternError) as error:
        pattern(x="... (K P)")(MISUSES[message])
    assert message in str(error.value)


def test_pieces_of_a_formula_are_refused():
    @pattern(x="... (K P)", c="... P")
    def outer(x, c):
        return _swapped(_swapped(x, c), c)

    with pytest.raises(PatternError, match="which is no whole capture"):
        plans_of(outer)


# Layouts -------------------------------------------------------------------------------------------------------------


def test_pieces_of_one_value_are_joined_where_they_follow_each_other_evenly():
    x = Layout.identity((3, 12))
    for sizes, axis in (((2, 6), 1), ((6, 2), 2)):
        split = x.split(1, sizes)
        cut = [split.slice(axis, index, 1) for index in range(2)]
        assert joined(cut, axis) == split
        backwards = joined(cut[::-1], axis)
        assert backwards is not None
        assert backwards != split
    uneven = [x.split(1, (4, 3)).slice(1, index, 1) for index in (0, 1, 3)]
    assert joined(uneven, 1) is None
    halves = [x.split(1, (2, 6)).slice(1, 0, 1), x.transpose((1, 0)).split(0, (2, 6)).slice(0, 1, 1)]
    assert joined(halves, 1) is None
    assert joined([halves[0], halves[0]], 1).axes[1] == ((None, 0, 2),)


def test_neighbours_are_appended_and_others_are_not():
    x = Layout.identity((3, 12))
    assert appended(x.slice(1, 0, 4), x.slice(1, 4, 8)) == x
    assert appended(x.slice(1, 1, 1), x.slice(1, 2, 3)) == x.slice(1, 1, 4)
    for other in (x.slice(1, 5, 7), x.slice(1, 0, 4), x.slice(1, 4, 4, 2), x.slice(0, 0, 2).slice(1, 4, 8)):
        assert appended(x.slice(1, 0, 4), other) is None


# Equal by what computes them -----------------------------------------------------------------------------------------


def halves(build):
    """Whether the two halves of the last axis of what `build` makes of x (S, 4) are proved equal."""
    b = Build(opset=17)
    x, ids = b.input("x", ["S", 4]), b.input("ids", ["S"], INT64)
    model = b.model(b.node("Identity", build(b, x, ids)))
    graph = Graph(load(model))
    view = View(graph, Facts(graph))
    root = view.root(graph.main.outputs[0])
    size = root.layout.shape[-1] // 2
    last = len(root.layout.axes) - 1
    first, second = (Ref(root.value, root.layout.slice(last, start, size)) for start in (0, size))
    proved = congruent(view, first, second)
    feeds = {"x": numbers(3, 4), "ids": np.array([2, 0, 1])}
    (got,) = run(model, {name: feeds[name] for name in (value.name for value in model.graph.input)}).values()
    equal = bool(np.array_equal(got[..., :size], got[..., size:]))
    assert equal or not proved
    return proved


def twice(b, x):
    return b.concat(x, x, axis=-1)


TABLE = np.tile(numbers(5, 4), 2)
OTHER = TABLE.copy()
OTHER[3, 6] += 1.0
EQUAL = {
    "copies": lambda b, x, ids: twice(b, x),
    "copies in two spellings": lambda b, x, ids: b.concat(b.reshape(b.unsqueeze(x, [0]), [-1, 4]), x, axis=-1),
    "a function of copies": lambda b, x, ids: b.tanh(b.mul(twice(b, x), 3.0)),
    "two functions of one value": lambda b, x, ids: b.concat(b.tanh(x), b.tanh(x), axis=-1),
    "an equal table": lambda b, x, ids: b.gather(TABLE, ids, axis=0),
    "rows of copies": lambda b, x, ids: b.gather(twice(b, x), ids, axis=0),
    "an equal factor": lambda b, x, ids: b.mul(twice(b, x), np.tile(numbers(4), 2)),
    "a mean beside copies": lambda b, x, ids: b.sub(twice(b, x), b.mean(x)),
    "columns of a product": lambda b, x, ids: b.matmul(x, TABLE[:4]),
    "where": lambda b, x, ids: b.where(b.node("Less", twice(b, x), 0.0), 0.0, twice(b, x)),
    "one number": lambda b, x, ids: b.constant(np.full((3, 8), 2.0, np.float32)),
}
UNEQUAL = {
    "two values": lambda b, x, ids: b.concat(x, b.neg(x), axis=-1),
    "another function": lambda b, x, ids: b.concat(b.tanh(x), b.sigmoid(x), axis=-1),
    "another attribute": lambda b, x, ids: b.concat(b.node("Elu", x), b.node("Elu", x, alpha=2.0), axis=-1),
    "an unequal table": lambda b, x, ids: b.gather(OTHER, ids, axis=0),
    "an unequal factor": lambda b, x, ids: b.mul(twice(b, x), numbers(8)),
    "unequal columns": lambda b, x, ids: b.matmul(x, OTHER[:4]),
    "halves of a value": lambda b, x, ids: x,
    "running sums": lambda b, x, ids: b.node("CumSum", twice(b, x), np.array(1, np.int64)),
    "a softmax": lambda b, x, ids: b.softmax(x, axis=-1),
    "random": lambda b, x, ids: b.node("RandomNormalLike", twice(b, x)),
}


@pytest.mark.parametrize("name", EQUAL)
def test_equal_halves_are_proved(name):
    assert halves(EQUAL[name])


@pytest.mark.parametrize("name", UNEQUAL)
def test_what_is_not_equal_is_not_proved(name):
    assert not halves(UNEQUAL[name])


# Matching and writing ------------------------------------------------------------------------------------------------


@pattern(x="... (K P)", c="... P")
def _thirds(x, c):
    """A pattern of three pieces, each with its own formula."""
    first, second, third = pieces(x, "... (K P) -> K ... P", 3)
    return join((second * c, third + first, 2 * first), "K ... P -> ... (K P)")


def test_a_pattern_of_three_pieces_is_found_and_its_captures_are_whole():
    b = Build(opset=17)
    x, c = b.input("x", ["B", 6]), b.input("c", ["B", 2])
    first, second, third = b.node("Split", x, np.array([2, 2, 2]), outputs=3, axis=-1)
    y = b.concat(b.mul(c, second), b.add(first, third), b.mul(first, 2.0), axis=-1)
    (place,) = fusion.find(b.model(y), [_thirds], target="onnx")
    assert place.pattern == "_thirds"
    assert len(place.nodes) == 4


def test_stacked_pieces_share_the_slices_of_their_caches():
    b = Build(opset=17)
    angles = b.input("angles", ["S", 3])
    cos, sin = b.node("Cos", twice(b, angles)), b.node("Sin", twice(b, angles))
    outputs = []
    for name in ("q", "k"):
        x = b.input(name, ["B", 2, "S", 6])
        first, second = b.node("Split", x, np.array([3, 3]), outputs=2, axis=-1)
        rotated = b.concat(b.neg(second), first, axis=-1)
        outputs.append(b.add(b.mul(x, cos), b.mul(rotated, sin)))
    feeds = {"angles": numbers(4, 3), "q": numbers(2, 2, 4, 6), "k": numbers(2, 2, 4, 6, seed=1)}
    result = same(b.model(*outputs), feeds)
    assert result.counts == {"rotary": 2}
    assert operators(result.model)["Slice"] == 2
