"""Norms of a residual sum, alone and in other element types than the residual."""

from __future__ import annotations

import numpy as np
import pytest
from building import DOUBLE, FLOAT, HALF, Build, layer_norm, numbers, operators, same
from test_norms import NORMED, rms_norm

# Residuals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [("B", "S", 5), (1, "S", 5), ("S", 5), (1, 1, 5), (5,), ("B", 1, 5), ("B", "S", 1), ()]
)
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("rms", [False, True])
def test_a_residual_of_any_shape(shape, first, rms):
    """The kernel broadcasts over the batch alone, and in one slot only (traps N14, N15)."""
    b = Build()
    x, skip = b.input("x", ["B", "S", 5]), b.input("skip", list(shape))
    total = b.add(skip, x) if first else b.add(x, skip)
    gamma = numbers(5, seed=1)
    y = rms_norm(b, total, gamma, eps=1e-3) if rms else layer_norm(b, total, gamma, eps=1e-3)
    sizes = [{"B": 2, "S": 3}.get(size, size) for size in shape]
    result = same(b.model(y, b.relu(total)), {"x": numbers(2, 3, 5), "skip": numbers(*sizes, seed=3)})
    assert sum(result.counts.values()) == 1


@pytest.mark.parametrize("shape", [("B", "S", 5), ("S", 5), (1, 1, 5), (5,), ("B", 2, "S", 5)])
def test_a_residual_of_unknown_sizes_is_not_guessed(shape):
    """The declared sizes of skip are anonymous: nothing says that they are those of x."""
    b = Build()
    x, skip = b.input("x", list(shape)), b.input("skip", [None] * len(shape))
    sizes = [{"B": 2, "S": 3}.get(size, size) for size in shape]
    y = layer_norm(b, b.add(x, skip), numbers(5, seed=1), eps=1e-3)
    feeds = [
        {"x": numbers(*sizes), "skip": numbers(*sizes, seed=3)},
        {"x": numbers(*sizes), "skip": numbers(*[1] * (len(sizes) - 1), 5, seed=3)},
    ]
    same(b.model(y), feeds)


@pytest.mark.parametrize("axis", [-1, 1, 2, 0, -2])
def test_a_norm_node_over_more_than_the_last_axis_takes_no_residual(axis):
    """LayerNormalization reads its axis; SkipLayerNormalization has none (trap N17)."""
    b = Build()
    total = b.add(b.input("x", ["B", 3, 5]), b.input("skip", ["B", 3, 5]))
    shape = {-1: (5,), 2: (5,), 1: (3, 5), -2: (3, 5), 0: (2, 3, 5)}[axis]
    y = b.node("LayerNormalization", total, numbers(*shape, seed=1), numbers(*shape, seed=2), axis=axis, epsilon=1e-3)
    result = same(b.model(y), {"x": numbers(2, 3, 5), "skip": numbers(2, 3, 5, seed=4)})
    assert result.counts == ({"skip_layer_norm": 1} if axis in (-1, 2) else {})


def test_a_residual_with_a_scale_of_three_axes():
    """gamma of shape (1, 1, D): the kernel takes (D,) alone (trap N7), and that is how it is written then."""
    b = Build()
    total = b.add(b.input("x", ["B", "S", 5]), b.input("skip", ["B", "S", 5]))
    y = layer_norm(b, total, numbers(1, 1, 5, seed=1), numbers(1, 1, 5, seed=2), eps=1e-3)
    result = same(b.model(y), {"x": numbers(2, 3, 5), "skip": numbers(2, 3, 5, seed=4)})
    assert operators(result.model) == {"SkipLayerNormalization": 1}
    shapes = [list(tensor.dims) for tensor in result.model.graph.initializer]
    assert shapes.count([5]) == 2


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_a_residual_of_any_rank(rank):
    b = Build()
    shape = (2, 3, 4, 5)[-rank:]
    total = b.add(b.input("x", shape), b.input("skip", shape))
    y = layer_norm(b, total, numbers(5, seed=1), numbers(5, seed=2), eps=1e-3)
    result = same(b.model(y), {"x": numbers(*shape), "skip": numbers(*shape, seed=4)})
    assert ("skip_layer_norm" in result.counts) <= (rank in (2, 3))


@pytest.mark.parametrize("shape", [(5,), (1, 5), (3, 5), (3, 1), (1,)])
def test_a_projection_bias_in_the_residual_sum(shape):
    b = Build()
    x, skip = b.input("x", ["B", 3, 4]), b.input("skip", ["B", 3, 5])
    projected = b.add(b.matmul(x, numbers(4, 5, seed=1)), numbers(*shape, seed=2))
    y = layer_norm(b, b.add(projected, skip), numbers(5, seed=3), numbers(5, seed=4), eps=1e-3)
    same(b.model(y), {"x": numbers(2, 3, 4), "skip": numbers(2, 3, 5, seed=5)})


def test_a_sum_of_a_value_with_itself():
    b = Build()
    x = b.input("x", ["B", "S", 5])
    y = layer_norm(b, b.add(x, x), numbers(5, seed=1), numbers(5, seed=2), eps=1e-3)
    same(b.model(y), {"x": numbers(2, 3, 5)})


def test_a_weighted_residual_is_no_residual():
    b = Build()
    x, skip = b.input("x", ["B", "S", 5]), b.input("skip", ["B", "S", 5])
    y = layer_norm(b, b.add(b.mul(x, 0.5), skip), numbers(5, seed=1), numbers(5, seed=2), eps=1e-3)
    same(b.model(y), {"x": numbers(2, 3, 5), "skip": numbers(2, 3, 5, seed=5)})


def test_a_difference_is_no_residual():
    b = Build()
    x, skip = b.input("x", ["B", "S", 5]), b.input("skip", ["B", "S", 5])
    y = layer_norm(b, b.sub(x, skip), numbers(5, seed=1), numbers(5, seed=2), eps=1e-3)
    assert same(b.model(y), {"x": numbers(2, 3, 5), "skip": numbers(2, 3, 5, seed=5)}).counts == NORMED


# A residual in single precision before a norm in half ----------------------------------------------------------------


def narrowed(b: Build, x: str, outer: int = HALF) -> tuple[str, int, None]:
    """Computed in the type of the graph, given on in a narrower one."""
    return b.mul(b.cast(rms_norm(b, x), to=outer), numbers(5, seed=1, dtype=outer)), outer, None


def test_what_is_too_large_for_half_is_not_cast_to_it():
    b = Build()
    y = narrowed(b, b.input("x", ["B", 5]))
    result = same(b.model(y), {"x": numbers(2, 5) * np.float32(1e6)}, tolerance=2e-2)
    assert result.counts == {"rms_norm": 1}, "computed in single precision, as before"


@pytest.mark.parametrize(("inner", "outer"), [(FLOAT, HALF), (DOUBLE, FLOAT)])
def test_a_residual_sum_keeps_its_type(inner, outer):
    """Also where what it is made of has been cast for norms of its own."""
    b = Build(dtype=inner)
    x, skip = b.input("x", ["B", 4, 5]), b.input("skip", ["B", 4, 5])
    total = b.add(x, skip)
    model = b.model(*(narrowed(b, value, outer) for value in (x, skip, total)), b.relu(total))
    feeds = {"x": numbers(2, 4, 5, dtype=inner), "skip": numbers(2, 4, 5, seed=1, dtype=inner)}
    made = operators(same(model, feeds, tolerance=2e-2).model)
    assert sum(count for name, count in made.items() if name.endswith("LayerNormalization")) == 3


@pytest.mark.parametrize(("eps", "written"), [(1e-5, True), (0.125, True), (0.1, False)])
def test_an_epsilon_that_single_precision_rounds_moves_a_double_only_where_it_is_tiny(eps, written):
    b = Build(dtype=DOUBLE)
    result = same(
        b.model(layer_norm(b, b.input("x", [3, 8]), eps=eps)), {"x": numbers(3, 8, dtype=DOUBLE)}, tolerance=1e-12
    )
    assert bool(result.matches) == written


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_nothing_is_written_for_no_elements(shape):
    b = Build()
    result = same(b.model(layer_norm(b, b.input("x", list(shape)))), {"x": numbers(*shape)})
    assert not result.matches
