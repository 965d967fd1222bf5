"""The pattern language: what it accepts, and what it says about misuse."""

from __future__ import annotations

import re

import numpy as np
import pytest

from fusion.errors import PatternError
from fusion.language import along, axes, erf, keep, mean, operand, operator, optional, pattern, scalar, softmax, sqrt
from fusion.testing import instances


def declare(function, **captures):
    return pattern(**captures)(function)


def test_a_pattern_computes_on_arrays():
    @pattern(x="... D", scale=optional("D"), bias=optional("D"), eps=scalar(0))
    def norm(x, scale, bias, eps):
        d = x - mean(x)
        return d / sqrt(mean(d**2) + eps) * scale + bias

    x = np.array([[1.0, 3.0], [2.0, 2.0]])
    assert np.allclose(norm(x, np.array([2.0, 2.0]), np.array([0.5, -0.5]), 0.0 + 1e-12), [[-1.5, 1.5], [0.5, -0.5]])
    assert np.allclose(norm(x, None, None, 3.0), [[-0.5, 0.5], [0.0, 0.0]])


def test_axes_splits_by_the_sizes_given():
    @pattern(x="B S (H D)")
    def split(x):
        return axes(x, "B S (H D) -> B H S D")

    x = np.arange(12).reshape(1, 2, 6)
    with split.reference(H=3):
        heads = split(x)
    assert heads.shape == (1, 3, 2, 2)
    assert heads[0, 1].tolist() == [[2, 3], [8, 9]]


def test_a_split_without_sizes_says_which_are_missing():
    @pattern(x="B S (H D)")
    def split(x):
        return axes(x, "B S (H D) -> B H S D")

    with pytest.raises(PatternError, match="sizes of H, D"):
        split(np.zeros((1, 2, 6)))


MISUSES = {
    "capture 'scael' is no parameter of f; did you mean 'scale'": (
        lambda: declare(lambda_named("f", "x, scale", "x * scale"), x="...", scael="D")
    ),
    "parameter 'y' of f has no capture": lambda: declare(lambda_named("f", "x, y", "x + y"), x="..."),
    "capture 'y' of f is never used": lambda: declare(lambda_named("f", "x, y", "x"), x="...", y="..."),
    "dimension 'H' of capture 'x' never binds in f: split (H D) with axes(...)": (
        lambda: declare(lambda_named("f", "x, b", "x + b"), x="B S (H D)", b="B S H D")
    ),
    "contracts the last axis of '... S D' with the last but one of '... T D'": (
        lambda: declare(lambda_named("f", "q, k", "q @ k"), q="... S D", k="... T D")
    ),
    "mean over 'E', which is no letter of '... D'": (
        lambda: declare(lambda_named("f", "x", "mean(x, 'E')"), x="... D")
    ),
    "must have the same letters on both sides": (
        lambda: declare(lambda_named("f", "x", "axes(x, 'B S -> B T')"), x="B S")
    ),
    "capture 'x' of f is an operand: only operator(...) takes it": lambda: declare(
        lambda_named("f", "x", "x + 1"), x=operand()
    ),
    "an operand of Conv is a capture declared as operand()": lambda: declare(
        lambda_named("f", "x", "operator('Conv', x, dims='N C ...')"), x="N C ..."
    ),
    "opens a bracket that it does not close": lambda: declare(lambda_named("f", "x", "x"), x="B (H D"),
    "'2B' is no dimension": lambda: declare(lambda_named("f", "x", "x"), x="2B S"),
    "an exponent is a number, not a capture": (
        lambda: declare(lambda_named("f", "x, e", "x ** e"), x="...", e=scalar())
    ),
    "further outputs of f are marked with keep": (
        lambda: declare(lambda_named("f", "x, y", "(x + y, x)"), x="...", y="...")
    ),
    "f must return what it computes": lambda: declare(lambda_named("f", "x", "None"), x="..."),
    "wants axes '... D'": lambda: declare(lambda_named("f", "x", "NORM(x, None)"), x=scalar()),
}

NORM = pattern(x="... D", scale=optional("D"))(lambda x, scale: x / mean(x) * scale)


def lambda_named(name, parameters, body):
    known = (mean, axes, keep, erf, softmax, along, operator)
    scope = {"NORM": NORM} | {function.__name__: function for function in known}
    exec(f"def {name}({parameters}):\n    return {body}", scope)
    return scope[name]


@pytest.mark.parametrize("message", MISUSES)
def test_misuse_fails_at_import_with_place_and_reason(message):
    with pytest.raises(PatternError, match=re.escape(message)) as caught:
        MISUSES[message]()
    assert caught.value.path
    assert caught.value.line > 0


def test_an_operator_without_a_formula_computes_nothing_and_has_no_instances():
    @pattern(x=operand(), bias="C")
    def biased(x, bias):
        return operator("Conv", x, dims="N C ...") + bias

    with pytest.raises(PatternError, match="Conv has no formula"):
        biased(np.zeros((1, 1, 2, 2)), np.zeros(1))
    with pytest.raises(PatternError, match="instances of it cannot be drawn"):
        next(instances(biased))
