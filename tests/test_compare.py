"""Comparing outputs: expected verdicts follow from the definition of the number formats."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from fusion.verifying.compare import compare, epsilon, is_float, tolerance, worse


def normal(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize(
    ("dtype", "eps"),
    [("float64", 2.0**-52), ("float32", 2.0**-23), ("float16", 2.0**-10), (ml_dtypes.bfloat16, 2.0**-7)],
)
def test_epsilon_is_that_of_the_format(dtype: object, eps: float) -> None:
    assert epsilon(np.dtype(dtype)) == eps


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_one_rounding_is_equal_and_a_quarter_is_not(dtype: object) -> None:
    kind = np.dtype(dtype)
    a = (np.abs(normal(50)) + 1).astype(kind)
    one_rounding = (a.astype("f8") * (1 + epsilon(kind) / 2)).astype(kind)
    assert compare(a, one_rounding).equal
    assert not compare(a, (a.astype("f8") * 1.5).astype(kind)).equal


def test_an_error_of_one_in_a_thousand_is_a_difference_in_single_but_not_in_half_precision() -> None:
    a = normal(100)
    assert not compare(a, a * np.float32(1.001)).equal
    assert compare(a.astype("float16"), (a * np.float32(1.001)).astype("float16")).equal


def test_a_coarser_compute_type_widens_the_tolerance_and_a_finer_one_does_not_narrow_it() -> None:
    a = normal(100)
    off = a * np.float32(1.001)
    assert compare(a, off, np.dtype("float16")).equal
    half = a.astype("float16")
    assert compare(half, np.nextafter(half, np.float16(9)), np.dtype("float64")).equal


def test_small_elements_are_judged_by_the_magnitude_of_the_tensor() -> None:
    a = np.ones(100, "float32")
    a[0] = 0.0
    b = a.copy()
    b[0] = 1e-6  # what a sum in another order leaves of 1 - 1
    assert compare(a, b).equal
    b[0] = 1e-2
    assert not compare(a, b).equal


def test_a_tensor_of_tiny_numbers_is_not_equal_to_zero() -> None:
    a = normal(100) * np.float32(1e-9)
    result = compare(a, np.zeros_like(a))
    assert not result.equal
    assert result.error == pytest.approx(1, rel=0.2)


def test_mask_fills_do_not_hide_errors() -> None:
    a = normal(100)
    a[:60] = np.finfo("float32").min
    b = a.copy()
    b[70:] *= np.float32(1.01)
    # 60 % fills: the typical magnitude is a fill, but not that of the lower quartile.
    assert not compare(a, b).equal


def test_zeros_that_became_something_are_a_difference() -> None:
    assert not compare(np.zeros(4, "float32"), np.full(4, 1e-30, "float32")).equal
    assert compare(np.zeros(4, "float32"), np.full(4, -0.0, "float32")).equal


def test_integers_and_booleans_are_equal_exactly() -> None:
    a = np.arange(6).reshape(2, 3)
    b = a.copy()
    assert compare(a, b).equal
    b[1, 2] = 6
    result = compare(a, b)
    assert not result.equal
    assert result.where == (1, 2)
    assert result.reason == "1 of 6 elements differ, first at [1, 2]: 5 became 6"
    assert not compare(np.array([True]), np.array([False])).equal


def test_strings_are_equal_exactly() -> None:
    assert compare(np.array(["a", "b"], object), np.array(["a", "b"], object)).equal
    assert not compare(np.array(["a", "b"], object), np.array(["a", "c"], object)).equal


@pytest.mark.parametrize(("a", "b"), [(np.nan, 1.0), (1.0, np.nan), (np.inf, 1.0), (np.inf, -np.inf), (np.nan, np.inf)])
def test_what_is_not_finite_has_to_be_the_same(a: float, b: float) -> None:
    left, right = np.array([a, 2.0], "float32"), np.array([b, 2.0], "float32")
    assert compare(left, left).equal
    result = compare(left, right)
    assert not result.equal
    assert result.error == np.inf
    assert result.where == (0,)


def test_shape_and_type_are_part_of_the_value() -> None:
    a = normal(2, 3)
    assert compare(a, a.reshape(3, 2)).reason == "shape [2, 3] became [3, 2]"
    assert compare(a, a.astype("float64")).reason == "element type float32 became float64"


def test_no_elements_are_equal_if_the_shapes_are() -> None:
    assert compare(normal(0, 3), normal(0, 3)).equal
    assert not compare(normal(0, 3), normal(3, 0)).equal


def test_given_tolerances_are_taken_as_they_are() -> None:
    a = np.ones(4, "float32")
    assert compare(a, a + np.float32(0.01), rtol=0.02).equal
    assert not compare(a, a + np.float32(0.01), rtol=1e-6).equal
    assert compare(a, a + np.float32(0.01), rtol=1e-6, atol=0.02).equal
    assert not compare(a, a + np.float32(0.01), rtol=1e-6, slack=1e9).equal


def test_slack_widens_the_types_own_tolerance() -> None:
    a = np.ones(4, "float32")
    b = a + np.float32(5 * tolerance(a.dtype))  # relative to 1 + 1: two and a half times what is allowed
    assert not compare(a, b).equal
    assert compare(a, b, slack=4).equal


def test_complex_numbers_are_compared_as_such() -> None:
    a = normal(8).astype("complex64")
    assert compare(a, a).equal
    assert not compare(a, a + np.complex64(0.1j)).equal


def test_sequences_maps_and_nothing() -> None:
    a, b = normal(3), normal(3) + 1
    assert compare([a, b], [a, b]).equal
    assert compare([a, b], [a, a]).reason.startswith("[1]: ")
    assert compare([a], [a, b]).reason == "a sequence of 1 became one of 2"
    assert compare({"x": a}, {"x": b}).reason.startswith("['x']: ")
    assert compare({"x": a}, {"y": a}).reason == "keys ['x'] became ['y']"
    assert compare(None, None).equal
    assert compare(None, a).reason == "nothing became a tensor"
    assert compare([{"k": 1.0}], [{"k": 1.0}]).equal
    assert not compare([{"k": 1.0}], [{"k": 1.1}]).equal


def test_worse_prefers_a_difference_to_any_error_that_is_allowed() -> None:
    fine = compare(np.ones(3, "float16"), np.full(3, 1.01, "float16"))
    wrong = compare(np.arange(3), np.array([0, 1, 3]))
    assert fine.equal
    assert worse(fine, wrong) is wrong
    assert worse(wrong, fine) is wrong


def test_floats_are_what_rounds() -> None:
    assert is_float(np.dtype("float16"))
    assert is_float(np.dtype(ml_dtypes.bfloat16))
    assert not is_float(np.dtype(ml_dtypes.int4))
    assert not is_float(np.dtype("int64"))
    assert not is_float(np.dtype(object))
