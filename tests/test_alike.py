"""Dimensions that only the user knows to be equal."""

from __future__ import annotations

import numpy as np
import pytest
from building import numbers, run
from test_attention import Attention

import fusion
from fusion.errors import FusionError


def separate(b: Attention):
    """Attention of projections, their shapes computed, and a mask of which the batch has a name of its own."""
    s = b.sizes
    mask = b.input("mask", ["N", 1, 1, "S"])
    batch = b.node("Gather", b.shape("x"), np.array([0]), axis=0)
    q, k, v = (b.heads(b.projection("x", s.hidden), s.D, perm) for perm in ((0, 2, 1, 3), (0, 2, 3, 1), (0, 2, 1, 3)))
    weights = b.softmax(b.add(b.mul(b.matmul(q, k), 0.4), mask), axis=-1)
    whole = b.concat(batch, np.array([-1, s.hidden]), axis=0)
    return b.model(b.reshape_to(b.transpose(b.matmul(weights, v), perm=[0, 2, 1, 3]), whole))


class Separate(Attention):
    def reshape_to(self, x: str, shape: str) -> str:
        return self.node("Reshape", x, shape)


def test_a_mask_whose_batch_has_another_name_is_one_where_the_user_says_so():
    b = Separate()
    model = separate(b)
    assert not fusion.optimize(model).counts.keys() & {"self_attention", "multi_head_attention"}
    result = fusion.optimize(model, same=[("B", "N")])
    assert result.counts["self_attention"] == 1
    feeds = {**b.feeds, "mask": numbers(2, 1, 1, 5, seed=4)}
    for expected, got in zip(run(model, feeds).values(), run(result.model, feeds).values(), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert fusion.find(model, ["sdpa"], same=[("N", "B")])
    assert fusion.verify(model, result.model).equal


def test_groups_of_names_join():
    b = Separate()
    names = {dim.dim_param for given in fusion.optimize(separate(b), same=[("B", "N"), ("N", "S")]).model.graph.input
             for dim in given.type.tensor_type.shape.dim}  # fmt: skip
    assert names - {""} == {"B"}


def test_a_name_that_no_input_has():
    with pytest.raises(FusionError, match=r"no input has a dimension 'M'.* There are B, S, N"):
        fusion.optimize(separate(Separate()), same=[("B", "M")])
