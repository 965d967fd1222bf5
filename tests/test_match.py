"""Matching: which spellings a plan recognises, what it binds, and how it says what is missing."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from building import DOUBLE, FLOAT, HALF, Build, gelu, layer_norm, numbers
from onnx import helper

import fusion
from fusion.api import library
from fusion.language import erf, mean, optional, pattern, scalar, sqrt, tanh
from fusion.matching.explain import STEPS, Explainer
from fusion.matching.match import Matcher
from fusion.matching.search import Search
from fusion.models.graph import Graph
from fusion.models.model import load
from fusion.plan import plans_of
from fusion.terms import Ref
from fusion.verdict import Verdict


@pattern(x="...")
def half_gelu(x):
    """Gelu, by its formula."""
    return 0.5 * x * (1 + erf(x / sqrt(2)))


@pattern(x="... D", scale=optional("D"), bias=optional("D"), eps=scalar(0, 1e-2))
def norm(x, scale, bias, eps):
    """Layer normalization with a bounded epsilon."""
    d = x - mean(x)
    return d / sqrt(mean(d**2) + eps) * scale + bias


@pattern(x="...", y="...")
def squared_gap(x, y):
    """One capture twice, another once."""
    return tanh(x - y) * (x - y)


@pattern(x="...", alpha=scalar(1, 4))
def steep(x, alpha):
    """A number within bounds."""
    return tanh(alpha * x)


@pattern(x="...", y="...")
def twice(x, y):
    """x is used on both sides of the product."""
    return erf(x) * tanh(x * y)


def matches(model, pattern, value: str = "y") -> list[dict[str, object]]:
    """What every plan of a pattern binds at a value, captures by the names of the values they bind."""
    found = Search(Graph(load(model)), [pattern])
    root = found.graph.main.values[value]
    bound = []
    for plan in plans_of(pattern):
        for _, state in Matcher(found.view, plan).match(root):
            bound.append({k: v.value.name if isinstance(v, Ref) else v for k, v in state.bound.items()})
    return bound


def nearest(model, pattern, value: str = "y"):
    """The misses of the branch with the least unmet weight, over all plans."""
    found = Search(Graph(load(model)), [pattern])
    root = found.graph.main.values[value]
    states = [state for plan in plans_of(pattern) for _, state in Matcher(found.view, plan, record=True).match(root)]
    return min(states, key=lambda state: state.unmet).misses


def model_of(write, shape=("B", 5), opset: int = 17, dtype: int = FLOAT):
    """A model with input x and output y, where `write(b, x)` returns the value to be y."""
    b = Build(opset, dtype)
    made = write(b, b.input("x", shape))
    return renamed(b, made)


def renamed(b: Build, made: str):
    """The model whose output is called y."""
    for node in b.nodes:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == made:
                    names[index] = "y"
    return b.model("y")


# Spellings of one formula -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("orders", list(product((False, True), repeat=3)))
def test_operands_in_any_order(orders):
    def write(b, x):
        def pair(swap, left, right):
            return (right, left) if swap else (left, right)

        inner = b.add(*pair(orders[0], b.erf(b.div(x, 2.0**0.5)), 1.0))
        return b.mul(*pair(orders[1], b.mul(*pair(orders[2], x, inner)), 0.5))

    assert matches(model_of(write), half_gelu) == [{"x": "x"}]


ROOT = 2.0**0.5
GELUS = {
    "half first": lambda b, x: b.mul(b.mul(0.5, x), b.add(1.0, b.erf(b.mul(x, 1 / ROOT)))),
    "half inside": lambda b, x: b.mul(x, b.mul(0.5, b.add(1.0, b.erf(b.div(x, ROOT))))),
    "divided by two": lambda b, x: b.div(b.mul(x, b.add(b.erf(b.div(x, ROOT)), 1.0)), 2.0),
    "sqrt computed": lambda b, x: b.mul(b.mul(x, b.add(b.erf(b.div(x, b.sqrt(2.0))), 1.0)), 0.5),
    "two summands": lambda b, x: b.add(b.mul(b.mul(x, 0.5), b.erf(b.div(x, ROOT))), b.mul(x, 0.5)),
    "half of a sum": lambda b, x: b.mul(b.add(x, b.mul(x, b.erf(b.div(x, ROOT)))), 0.5),
    "half distributed": lambda b, x: b.mul(x, b.add(b.mul(b.erf(b.div(x, ROOT)), 0.5), 0.5)),
    "negated": lambda b, x: b.mul(b.mul(x, b.sub(-1.0, b.erf(b.div(x, ROOT)))), -0.5),
    "minus minus": lambda b, x: b.mul(b.mul(x, b.sub(1.0, b.neg(b.erf(b.div(x, ROOT))))), 0.5),
    "identities": lambda b, x: b.mul(
        b.identity(b.mul(b.identity(x), b.add(b.erf(b.identity(b.div(x, ROOT))), 1.0))), 0.5
    ),
    "numbers of shape (1,)": lambda b, x: b.mul(
        b.mul(x, b.add(b.erf(b.div(x, b.number(ROOT, (1,)))), b.number(1.0, (1,)))), b.number(0.5, (1, 1))
    ),
}


@pytest.mark.parametrize("write", GELUS.values(), ids=GELUS)
def test_gelu_in_every_spelling(write):
    assert matches(model_of(write), half_gelu) == [{"x": "x"}]


NOT_GELUS = {
    "root of three": lambda b, x: b.mul(b.mul(x, b.add(b.erf(b.div(x, 3.0**0.5)), 1.0)), 0.5),
    "minus erf": lambda b, x: b.mul(b.mul(x, b.sub(1.0, b.erf(b.div(x, ROOT)))), 0.5),
    "plus two": lambda b, x: b.mul(b.mul(x, b.add(2.0, b.erf(b.div(x, ROOT)))), 0.5),
    "no half": lambda b, x: b.mul(x, b.add(1.0, b.erf(b.div(x, ROOT)))),
    "two over": lambda b, x: b.div(2.0, b.mul(x, b.add(1.0, b.erf(b.div(x, ROOT))))),
    "tanh": lambda b, x: b.mul(b.mul(x, b.add(b.tanh(b.div(x, ROOT)), 1.0)), 0.5),
    "another x": lambda b, x: b.mul(b.mul(b.relu(x), b.add(b.erf(b.div(x, ROOT)), 1.0)), 0.5),
    "x squared": lambda b, x: b.mul(b.mul(b.mul(x, x), b.add(b.erf(b.div(x, ROOT)), 1.0)), 0.5),
    "one over x": lambda b, x: b.mul(b.mul(x, b.add(b.erf(b.div(ROOT, x)), 1.0)), 0.5),
    "root of two over": lambda b, x: b.mul(b.mul(x, b.add(b.erf(b.mul(x, ROOT)), 1.0)), 0.5),
    "transposed": lambda b, x: b.mul(b.mul(x, b.add(b.erf(b.div(b.transpose(x, perm=[1, 0]), ROOT)), 1.0)), 0.5),
}


@pytest.mark.parametrize("write", NOT_GELUS.values(), ids=NOT_GELUS)
def test_what_is_no_gelu(write):
    assert matches(model_of(write, shape=(5, 5)), half_gelu) == []


def test_a_factor_along_an_axis_is_no_number():
    def write(b, x):
        halves = np.full(5, 0.5, np.float32)
        return b.mul(b.mul(x, b.add(b.erf(b.div(x, ROOT)), 1.0)), halves)

    assert matches(model_of(write), half_gelu) == []


def test_an_overridable_number_is_no_number():
    def write(b, x):
        b.input("half", [])
        return b.mul(b.mul(x, b.add(b.erf(b.div(x, ROOT)), 1.0)), b.constant(0.5, "half"))

    assert matches(model_of(write), half_gelu) == []


# Captures ---------------------------------------------------------------------------------------------------------


def test_a_capture_used_twice_is_one_value():
    def pair(b, x):
        y = b.input("z", ["B", 5])
        return b.mul(b.tanh(b.sub(x, y)), b.sub(x, y))

    def another(b, x):
        y, z = b.input("z", ["B", 5]), b.input("w", ["B", 5])
        return b.mul(b.tanh(b.sub(x, y)), b.sub(x, z))

    def swapped(b, x):
        y = b.input("z", ["B", 5])
        return b.mul(b.tanh(b.sub(x, y)), b.sub(y, x))

    assert matches(model_of(pair), squared_gap) == [{"x": "x", "y": "z"}]
    assert matches(model_of(another), squared_gap) == []
    assert matches(model_of(swapped), squared_gap) == []


def test_a_sum_is_no_difference():
    def write(b, x):
        z = b.input("z", ["B", 5])
        return b.mul(b.tanh(b.add(x, z)), b.add(x, z))

    assert matches(model_of(write), squared_gap) == []


def test_a_capture_through_the_same_rearrangement_is_the_same_value_and_through_another_is_not():
    def turned(b, x, *perms):
        left, right = (b.transpose(x, perm=perm) for perm in perms)
        return b.mul(b.erf(left), b.tanh(b.mul(right, b.input("z", [5, 5, 5]))))

    same = model_of(lambda b, x: turned(b, x, [1, 0, 2], [1, 0, 2]), shape=(5, 5, 5))
    other = model_of(lambda b, x: turned(b, x, [1, 0, 2], [0, 2, 1]), shape=(5, 5, 5))
    assert matches(same, twice) == [{"x": "x", "y": "z"}]
    assert matches(other, twice) == []


def test_a_capture_may_stand_on_either_side_of_a_product():
    def write(b, x):
        z = b.input("z", ["B", 5])
        return b.mul(b.tanh(b.mul(z, x)), b.erf(z))

    assert matches(model_of(write), twice) == [{"x": "z", "y": "x"}]


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_optional_captures_are_bound_where_they_are_there(scale, bias):
    def write(b, x):
        gamma = b.constant(np.arange(1.0, 6.0), "gamma") if scale else None
        beta = b.constant(np.arange(5.0), "beta") if bias else None
        return layer_norm(b, x, gamma, beta, eps=1e-3)

    (bound,) = matches(model_of(write), norm)
    assert bound.pop("eps") == pytest.approx(1e-3, rel=1e-6)
    assert bound == {"x": "x", **({"scale": "gamma"} if scale else {}), **({"bias": "beta"} if bias else {})}


@pytest.mark.parametrize(("alpha", "fits"), [(1.0, True), (4.0, True), (2.5, True), (0.9, False), (4.5, False)])
def test_a_scalar_lies_within_its_bounds(alpha, fits):
    model = model_of(lambda b, x: b.tanh(b.mul(x, alpha)))
    if fits:
        (bound,) = matches(model, steep)
        assert bound == {"x": "x", "alpha": pytest.approx(alpha)}
    else:
        assert matches(model, steep) == []
        (miss,) = nearest(model, steep)
        assert miss.kind == "constant"
        assert miss.text == f"expected alpha between 1 and 4, found {alpha:g}"


def test_a_scalar_of_one_needs_no_node():
    assert matches(model_of(lambda b, x: b.tanh(x)), steep) == [{"x": "x", "alpha": 1.0}]


def test_an_epsilon_out_of_bounds_is_no_match():
    model = model_of(lambda b, x: layer_norm(b, x, eps=0.1))
    assert matches(model, norm) == []
    assert [miss.kind for miss in nearest(model, norm)] == ["constant"]


def test_a_bias_along_another_axis_is_no_bias():
    square = model_of(lambda b, x: layer_norm(b, x, bias=np.ones((5, 1), np.float32) * 2), shape=(5, 5))
    assert matches(square, norm) == []


# Shared values ----------------------------------------------------------------------------------------------------


def test_a_centred_value_shared_by_numerator_and_variance_is_the_same_as_two():
    def shared(b, x):
        return layer_norm(b, x)

    def apart(b, x):
        one, two = b.sub(x, b.mean(x)), b.sub(x, b.mean(x))
        return b.div(one, b.sqrt(b.add(b.mean(b.mul(two, two)), 1e-5)))

    for write in (shared, apart):
        (bound,) = matches(model_of(write), norm)
        assert bound["x"] == "x"


def test_an_interior_value_read_from_outside_still_matches_for_the_region_decides():
    def write(b, x):
        h = b.erf(b.div(x, ROOT))
        b.relu(h, output="side")
        return b.mul(b.mul(x, b.add(h, 1.0)), 0.5)

    model = model_of(write)
    model.graph.output.append(helper.make_tensor_value_info("side", FLOAT, ["B", 5]))
    assert matches(model, half_gelu) == [{"x": "x"}]
    assert fusion.find(model, ["gelu"]) == []


# Element types ----------------------------------------------------------------------------------------------------

ROUGH = 1.4140625
"""√2 as a half."""


@pytest.mark.parametrize(
    ("dtype", "root", "fits"),
    [
        (HALF, ROUGH, True),
        (FLOAT, 1.41421, True),
        (FLOAT, ROUGH, False),
        (DOUBLE, 1.41421, False),
        (DOUBLE, ROOT, True),
    ],
)
def test_a_constant_is_as_exact_as_its_element_type(dtype, root, fits):
    model = model_of(lambda b, x: b.mul(b.mul(x, b.add(b.erf(b.div(x, root)), 1.0)), 0.5), dtype=dtype)
    assert bool(matches(model, half_gelu)) is fits


# Unknown facts ----------------------------------------------------------------------------------------------------


def test_an_unknown_rank_is_unknown_and_not_no():
    model = model_of(gelu, shape=None)
    assert matches(model, half_gelu) == []
    (miss,) = nearest(model, half_gelu)
    assert (miss.kind, miss.verdict) == ("dimension", Verdict.UNKNOWN)
    assert miss.text == "expected a known rank, found y has none"


def test_a_model_without_ranks_is_left_alone():
    model = model_of(gelu, shape=None)
    result = fusion.optimize(model)
    assert result.counts == {}
    assert result.model.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)


# What is said about a near miss -----------------------------------------------------------------------------------

EXPLAINED = {
    "root of three": (
        lambda b, x: b.mul(b.mul(x, b.add(b.erf(b.div(x, 3.0**0.5)), 1.0)), 0.5),
        ("constant", "expected the factor 0.707107, found 0.57735"),
    ),
    "plus two": (
        lambda b, x: b.mul(b.mul(x, b.add(b.erf(b.div(x, ROOT)), 2.0)), 0.5),
        ("constant", "expected + 1, found + 2"),
    ),
    "no half": (
        lambda b, x: b.mul(x, b.add(b.erf(b.div(x, ROOT)), 1.0)),
        ("constant", "expected the factor 0.5, found 1"),
    ),
    "tanh for erf": (
        lambda b, x: b.mul(b.mul(x, b.add(b.tanh(b.div(x, ROOT)), 1.0)), 0.5),
        ("operator", "expected Erf, found Tanh"),
    ),
    "another value": (
        lambda b, x: b.mul(b.mul(b.relu(x), b.add(b.erf(b.div(x, ROOT)), 1.0)), 0.5),
        ("same value", "expected x = "),
    ),
    "one factor more": (
        lambda b, x: b.mul(b.mul(b.mul(x, b.input("z", ["B", 5])), b.add(b.erf(b.div(x, ROOT)), 1.0)), 0.5),
        ("arity", "expected no further factor, found z"),
    ),
}


@pytest.mark.parametrize("case", EXPLAINED)
def test_the_nearest_miss_names_what_differs(case):
    write, (kind, text) = EXPLAINED[case]
    model = model_of(write)
    assert matches(model, half_gelu) == []
    (miss,) = nearest(model, half_gelu)
    assert (miss.kind, miss.verdict) == (kind, Verdict.NO)
    assert text in miss.text
    assert miss.place


def test_recording_a_match_has_no_misses():
    assert nearest(model_of(gelu), half_gelu) == ()


def test_two_things_amiss_are_both_told():
    model = model_of(lambda b, x: b.mul(x, b.add(b.tanh(b.div(x, ROOT)), 1.0)))
    assert sorted(miss.kind for miss in nearest(model, half_gelu)) == ["constant", "operator"]


def test_why_tells_the_nearest_miss_of_a_library_pattern():
    model = model_of(lambda b, x: b.mul(b.mul(x, b.add(b.erf(b.div(x, 3.0**0.5)), 1.0)), 0.5))
    (place,) = [place for place in fusion.why(model, "gelu").places if place.pattern == "gelu"]
    assert (place.root, place.verdict) == ("y", Verdict.NO)
    assert [(miss.kind, miss.text) for miss in place.misses] == [
        ("constant", "expected the factor 0.707107, found 0.57735")
    ]


def chain_of_norms(layers: int):
    """Norms without epsilon, each of a sum of the one before and of what is computed from it."""
    b = Build(17)
    h = b.input("x", ("B", "S", 8))
    for _ in range(layers):
        h = layer_norm(b, b.add(h, b.relu(h)), numbers(8, seed=1), numbers(8, seed=2), eps=0.0)
    return b.model(h)


def test_explaining_goes_so_far_around_an_anchor_and_no_further():
    search = Search(Graph(load(chain_of_norms(12))), [library()["skip_layer_norm"]])
    explainer = Explainer(search)
    for plan in search.plans:
        for anchor in explainer.anchors(plan):
            before = explainer.steps
            explainer.explain(plan, anchor)
            assert explainer.steps - before <= 3 * STEPS  # what is begun is ended


def test_find_names_the_nodes_of_a_match():
    (place,) = fusion.find(model_of(gelu), ["gelu"])
    assert (place.pattern, place.root, place.verdict) == ("gelu", "y", Verdict.YES)
    assert [label.split("_")[0] for label in place.nodes] == ["Div", "Erf", "Add", "Mul", "Mul"]
