"""The logistic function written out, where exp overflows too."""

from __future__ import annotations

import numpy as np
import pytest
from building import HALF, Build, numbers, operators, run, same

EDGES = np.array([[-np.inf, -1e30, -104.0, -89.0, -17.0, 0.0, 17.0, 89.0, 1e30, np.inf, np.nan]], np.float32)


@pytest.mark.parametrize("opset", [11, 17, 21])
@pytest.mark.parametrize("product", [False, True])
def test_a_logistic_function_written_out(product, opset):
    b = Build(opset)
    x = b.input("x", ["B", 11])
    y = b.div(x if product else 1.0, b.add(1.0, b.node("Exp", b.neg(x))))
    result = same(b.model(y), [{"x": numbers(3, 11)}, {"x": EDGES}])
    assert operators(result.model) == {"QuickGelu" if product else "Sigmoid": 1}
    (got,) = run(result.model, {"x": numbers(3, 11)}).values()
    x64 = numbers(3, 11).astype(np.float64)
    np.testing.assert_allclose(got, (x64 if product else 1.0) / (1 + np.exp(-x64)), rtol=1e-5)


@pytest.mark.parametrize("wrong", ["two", "no minus", "other x"])
def test_what_is_no_logistic_function(wrong):
    b = Build()
    x = b.input("x", ["B", 11])
    power = b.node("Exp", x if wrong == "no minus" else b.neg(b.relu(x) if wrong == "other x" else x))
    y = b.div(x, b.add(2.0 if wrong == "two" else 1.0, power))
    result = same(b.model(y), {"x": numbers(3, 11)})
    assert "QuickGelu" not in operators(result.model) or wrong == "no minus"


def test_half_precision_stays_equal():
    b = Build(dtype=HALF)
    x = b.input("x", ["B", 11])
    same(b.model(b.div(1.0, b.add(1.0, b.node("Exp", b.neg(x))))), {"x": numbers(3, 11, dtype=HALF)})
