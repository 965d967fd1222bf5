"""The laws: a term that is spelled in any way and read back is the same term, and computes the same."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from law_reference import evaluate, frozen, of_graph, of_term
from onnx import TensorProto, helper

from fusion import plan as p
from fusion.facts import Facts
from fusion.instances.spell import Captures, Given, Speller, atoms, axes_of
from fusion.laws.arrange import arrange
from fusion.laws.draw import Draw
from fusion.laws.writer import Writer
from fusion.models.graph import Graph
from fusion.models.model import load
from fusion.terms import Item, add, leaf, multiply, number, power
from fusion.verifying.compare import compare
from fusion.verifying.runtime import Session
from fusion.view import MERGED, View

EXAMPLES = int(os.environ.get("FUSION_EXAMPLES", "150"))
DOUBLE = TensorProto.DOUBLE
OPSETS = (20, 11, 13, 17, 18)

laws = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink),
    report_multiple_bugs=False,
)


class Spelled:
    """A term written as a model over inputs of these axes, in double: then numbers survive the round trip.

    Attributes:
        dims: axes of each variable.
    """

    def __init__(self, data, term, dims, order, sizes, *, noisy=0, guarded=False, root=None, low=0.5):
        self.low = low
        self.draw = Draw(lambda count: data.draw(st.integers(0, count - 1)))
        self.term, self.order, self.dims = term, tuple(order), dims
        self.sizes = sizes
        writer = Writer(self.draw, opset=self.draw.choose(*OPSETS), dtype=DOUBLE, sizes=sizes)
        tensors = {}
        for name, spec in dims.items():
            axes = axes_of(spec, {})
            places = self.draw.shuffled(range(len(axes)))
            writer.input(name, tuple(axes[place] for place in places), DOUBLE)
            tensors[name] = Given(name, DOUBLE, tuple(places))
        self.speller = Speller(writer, Captures(tensors, {}, {}), order, noisy=noisy, guarded=guarded)
        labels = self.speller.labels_in(term)
        self.coordinates = [label for label in root or order if label in labels]
        result = self.speller.spell(term, tuple((label,) for label in self.coordinates))
        writer.nodes.append(helper.make_node("Identity", [result.name], ["out"]))
        output = writer.info("out", result.axes, DOUBLE)
        self.model = writer.model([output])
        self.writer, self.root = writer, result.name

    def check(self):
        self.compute()
        graph = Graph(load(self.model))
        view = View(graph, Facts(graph))
        self.view = view
        self.ref = view.root(graph.scopes[0].values["out"])
        assert self.ref is not None
        expected = of_term(self.term, self.speller, self.coordinates)
        assert frozen(of_graph(view, self.ref)) == frozen(expected)

    def compute(self):
        rng = np.random.default_rng(0)
        feeds, arrays = {}, {}
        for name, spec in self.dims.items():
            axes = axes_of(spec, {})
            labels = [label for group in axes for label in group]
            logical = rng.uniform(self.low, 1.5, [self.sizes[label] for label in labels])
            places = self.speller.captures.tensors[name].order
            merged = logical.reshape(self.writer.shape(axes))
            feeds[name] = merged.transpose(places) if places else merged
            spread = [label for label in self.order if label in labels]
            full = logical.transpose([labels.index(label) for label in spread])
            arrays[name] = full.reshape([self.sizes[label] if label in labels else 1 for label in self.order])
        with np.errstate(all="ignore"):
            value = evaluate(self.term, arrays, self.order)
        assume(np.isfinite(value).all() and np.abs(value).max(initial=0) < 1e6)
        expected = np.broadcast_to(value, [self.sizes[c] if c in self.coordinates else 1 for c in self.order])
        present = [c for c in self.order if c in self.coordinates]
        expected = expected.reshape([self.sizes[c] for c in present])
        expected = expected.transpose([present.index(c) for c in self.coordinates])
        got = Session(self.model).run(feeds)["out"]
        result = compare(expected, got, rtol=1e-6)
        assert result.equal, result.reason


def var(name, dims):
    return leaf(p.Var(name, dims))


ELEMENTWISE = {"x": ("B", "S", "D"), "y": ("S", "D"), "z": ("D",)}
SIZES = {"B": 2, "S": 3, "D": 4}


def labels_of(term):
    """The labels of the variables of a term without contractions."""
    return {label for atom in atoms(term) if isinstance(atom, p.Var) for label in atom.dims}


def drawn(data):
    return Draw(lambda count: data.draw(st.integers(0, count - 1)))


def polynomial(draw, depth, leaves):
    """A random expression of sums, products and numbers."""
    kind = draw.choose("leaf", "product", "sum", "scaled") if depth else "leaf"
    if kind == "leaf":
        return draw.choose(*leaves)
    if kind == "scaled":
        return multiply(number(draw.number()), polynomial(draw, depth - 1, leaves))
    parts = [polynomial(draw, depth - 1, leaves) for _ in range(draw.choose(2, 3))]
    if kind == "product":
        return multiply(*parts)
    items = [Item(part.coef * draw.choose(1.0, -1.0, 2.0), part.factors) for part in parts]
    return add(draw.choose(0.0, 0.0, 1.0, -0.5), items)


def variables(dims):
    return [var(name, own) for name, own in dims.items()]


@laws
@given(st.data())
def test_ring(data):
    term = polynomial(drawn(data), 3, variables(ELEMENTWISE))
    assume(term.factors)
    spelled = Spelled(data, term, ELEMENTWISE, "BSD", SIZES)
    spelled.check()


@laws
@given(st.data())
def test_a_private_chain_of_products_is_opened_as_a_whole(data):
    draw = drawn(data)
    term = multiply(number(draw.number()), *(draw.choose(*variables(ELEMENTWISE)) for _ in range(4)))
    spelled = Spelled(data, term, ELEMENTWISE, "BSD", SIZES)
    spelled.check()
    for atom, _ in spelled.view.expand(spelled.ref).factors:
        node = atom.value.producer
        assert node is None or node.key not in MERGED


@laws
@given(st.data())
def test_powers(data):
    draw = drawn(data)
    factors = []
    for _ in range(draw.choose(1, 2, 3)):
        base = draw.choose(*variables(ELEMENTWISE), polynomial(draw, 2, variables(ELEMENTWISE)))
        raised = power(base, draw.choose(2.0, 0.5, -1.0, -0.5, 3.0, 1.5, -2.0))
        assume(raised is not None and raised.coef == raised.coef)
        factors.append(raised)
    term = multiply(number(draw.number()), *factors)
    assume(term.factors)
    Spelled(data, term, ELEMENTWISE, "BSD", SIZES).check()


@laws
@given(st.data())
def test_an_even_power_under_a_root_stays_there(data):
    dims = {"x": ("D",)}
    x = var("x", ("D",))
    spelled = Spelled(data, power(power(x, 2.0), 0.5), dims, "D", SIZES, low=-1.5)
    spelled.check()
    assert frozen(of_graph(spelled.view, spelled.ref)) != frozen(of_term(x, spelled.speller, ("D",)))


@laws
@given(st.data())
def test_reductions(data):
    draw = drawn(data)
    over = draw.choose(("D",), ("S", "D"), ("S",))
    inner = polynomial(draw, 2, variables(ELEMENTWISE))
    inner = draw.choose(inner, power(inner, 2.0))
    assume(set(over) <= labels_of(inner))
    mean = leaf(p.Reduction("mean", inner, over))
    outer = polynomial(draw, 2, [mean, *variables(ELEMENTWISE)])
    assume(outer.factors)
    Spelled(data, outer, ELEMENTWISE, "BSD", SIZES).check()


CONTRACTIONS = {
    "projection": ({"x": ("B", "S", "D"), "w": ("D", "N"), "b": ("N",)}, "BSDN", "D"),
    "merged columns": ({"x": ("B", "S", "D"), "w": ("D", ("H", "N")), "b": (("H", "N"),)}, "BSHND", "D"),
    "batches": ({"x": ("B", "H", "S", "D"), "w": ("B", "H", "T", "D"), "b": ("B", "T")}, "BHSTD", "D"),
    "merged axes": ({"x": ("B", "S", ("H", "D")), "w": ("B", "T", ("H", "D")), "b": ("H", "T")}, "BHSTD", "D"),
    "one batch axis missing": ({"x": ("B", "H", "S", "D"), "w": ("B", "T", "D"), "b": ("S", "T")}, "BHSTD", "D"),
    "matrices": ({"x": ("S", "D"), "w": ("D", "T"), "b": ("T",)}, "STD", "D"),
}
WIDE = {"B": 2, "H": 3, "S": 3, "T": 5, "D": 4, "N": 5}


@pytest.mark.parametrize("form", CONTRACTIONS)
@settings(laws, max_examples=EXAMPLES // 3)
@given(st.data())
def test_contractions(form, data):
    dims, order, label = CONTRACTIONS[form]
    draw = drawn(data)
    x, w, b = variables(dims)
    sizes = draw.choose(WIDE, dict.fromkeys(WIDE, 4))
    left = draw.choose(x, multiply(number(draw.number()), x), multiply(x, x))
    product = multiply(number(draw.choose(1.0, draw.number())), leaf(p.MatMul(left, w, (label,))))
    term = draw.choose(product, add(0.0, [Item(product.coef, product.factors), Item(1.0, b.factors)]))
    Spelled(data, term, dims, order, sizes).check()


@settings(laws, max_examples=EXAMPLES // 2)
@given(st.data())
def test_guards_of_a_softmax(data):
    dims = {"q": ("B", "S", ("H", "D")), "k": ("B", "T", ("H", "D")), "v": ("B", "T", ("H", "E")), "m": ("B", "T")}
    draw = drawn(data)
    sizes = draw.choose({"B": 2, "H": 3, "S": 3, "T": 5, "D": 4, "E": 2}, dict.fromkeys("BHSTDE", 2))
    q, k, v, m = variables(dims)
    scores = multiply(number(draw.number()), leaf(p.MatMul(q, k, ("D",))))
    masked = add(0.0, [Item(scores.coef, scores.factors), Item(1.0, m.factors)])
    attention = leaf(p.MatMul(leaf(p.Softmax(draw.choose(scores, masked), ("T",))), v, ("T",)))
    spelled = Spelled(data, attention, dims, "BHSTDE", sizes, guarded=None, root="BHSE")
    spelled.check()


@laws
@given(st.data())
def test_noise(data):
    draw = drawn(data)
    mean = leaf(p.Reduction("mean", power(variables(ELEMENTWISE)[0], 2.0), ("D",)))
    activated = leaf(p.Op("Tanh", multiply(number(0.5), var("x", ELEMENTWISE["x"]))))
    term = polynomial(draw, 2, [*variables(ELEMENTWISE), mean, activated])
    assume(term.factors)
    Spelled(data, term, ELEMENTWISE, "BSD", SIZES, noisy=2).check()


@laws
@given(st.data())
def test_layouts(data):
    """Any sequence of splits, permutations and merges of an input is read as one map."""
    draw = drawn(data)
    sizes = draw.choose({"A": 2, "B": 3, "C": 4, "D": 5}, dict.fromkeys("ABCD", 2), {"A": 1, "B": 3, "C": 1, "D": 2})
    writer = Writer(draw, opset=draw.choose(*OPSETS), dtype=DOUBLE, sizes=sizes)
    start = grouped(draw, "ABCD")
    value = writer.input("x", start, DOUBLE)
    for _ in range(draw.choose(1, 2, 3)):
        value = arrange(writer, value, grouped(draw, "".join(draw.shuffled("ABCD"))))
    writer.nodes.append(helper.make_node("Identity", [value.name], ["out"]))
    model = writer.model([writer.info("out", value.axes, DOUBLE)])
    index = Graph(load(model))
    view = View(index, Facts(index))
    peeled = view.peel(view.root(index.scopes[0].values["out"]))
    assert peeled.ref.value.name == "x"
    labels = [label for group in start for label in group]
    x = np.arange(np.prod([sizes[label] for label in labels])).reshape([sizes[label] for label in labels])
    wanted = x.transpose([labels.index(label) for label in value.labels]).reshape(writer.shape(value.axes))
    feed = x.reshape(writer.shape(start))
    assert (read(peeled.ref.layout, feed) == wanted).all()
    assert (Session(model).run({"x": feed.astype(np.float64)})["out"] == wanted).all()


def grouped(draw, labels):
    """The labels in order, cut into axes at random, with axes of size 1 strewn in."""
    axes = [(labels[0],)]
    for label in labels[1:]:
        if draw.chance(3):
            axes[-1] = (*axes[-1], label)
        else:
            axes.append((label,))
    if draw.chance(3):
        axes.insert(draw.index(len(axes) + 1), ())
    return tuple(axes)


def read(layout, array):
    """What a layout says lies at every coordinate, element by element."""
    result = np.empty(layout.shape, array.dtype)
    for coordinate in np.ndindex(*layout.shape):
        index = list(layout.offsets)
        for place, axis in zip(coordinate, layout.axes, strict=True):
            for source, stride, size in reversed(axis):
                place, digit = divmod(place, size)
                if source is not None:
                    index[source] += digit * stride
        result[coordinate] = array[tuple(index)]
    return result
