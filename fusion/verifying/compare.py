"""Are two outputs equal, as far as their element type can tell?

Integers, booleans and strings are equal exactly. Floats are equal within a number of units of their type's epsilon,
measured against the magnitude of the element plus the typical magnitude of the whole tensor: a rewrite that adds up in
another order moves small elements by rounding errors of the large ones. NaN and infinities lie at the same places.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]

TOLERANCE_IN_EPSILONS: dict[str, int] = {
    # Headroom for the deep models we verified: narrow types round at every operator, wide ones only add up differently.
    "float64": 8192,
    "float32": 1024,
    "float16": 16,
    "bfloat16": 8,
}
NARROW_FLOAT_IN_EPSILONS = 2


@dataclass(frozen=True, slots=True)
class Comparison:
    """What comparing one output gave.

    Attributes:
        equal: whether the second value may stand for the first.
        reason: one sentence that says what differs; empty where nothing does.
        error: the worst relative error, 0.0 where nothing differs, infinity where the values cannot be measured
            against each other (shape, type, NaN in one only).
        epsilons: the same error in units of the element type's epsilon; 0.0 for types without one.
        tolerance: the relative error that was allowed.
        where: index of the worst element, or None.
    """

    equal: bool
    reason: str = ""
    error: float = 0.0
    epsilons: float = 0.0
    tolerance: float = 0.0
    where: tuple[int, ...] | None = None


SAME = Comparison(True)


def compare(
    expected: Any,
    got: Any,
    dtype: np.dtype[Any] | None = None,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    slack: float = 1.0,
) -> Comparison:
    """Compare two values of one output.

    Args:
        expected: an array; or, for sequence, map and optional outputs, a list, a dict or None of them.
        got: the value to be judged.
        dtype: a narrower float type in which the values were computed; by default that of `expected`.
        rtol: allowed relative error instead of the type's own.
        atol: absolute error that is allowed besides; 0 by default, because the typical magnitude already counts.
        slack: factor on the type's own error; a given `rtol` is taken as it is.

    Returns:
        The comparison; never raises on data.
    """

    def judge(a: Any, b: Any) -> Comparison:
        return compare(a, b, dtype, rtol=rtol, atol=atol, slack=slack)

    if isinstance(expected, Mapping) and isinstance(got, Mapping):
        if expected.keys() != got.keys():
            return _unlike(f"keys {sorted(map(str, expected))} became {sorted(map(str, got))}")
        pairs = {f"[{key!r}]": judge(value, got[key]) for key, value in expected.items()}
    elif isinstance(expected, list | tuple) and isinstance(got, list | tuple):
        if len(expected) != len(got):
            return _unlike(f"a sequence of {len(expected)} became one of {len(got)}")
        pairs = {f"[{i}]": judge(a, b) for i, (a, b) in enumerate(zip(expected, got, strict=True))}
    elif _kind(expected) != _kind(got):
        return _unlike(f"{_kind(expected)} became {_kind(got)}")
    elif expected is None or isinstance(expected, str | bytes):
        return SAME if expected == got else _unlike(f"{expected!r} became {got!r}")
    else:
        return _arrays(np.asarray(expected), np.asarray(got), dtype, rtol, atol or 0.0, slack)
    result = SAME
    for place, one in pairs.items():
        result = worse(result, replace(one, reason=f"{place}: {one.reason}") if one.reason else one)
    return result


def worse(first: Comparison, second: Comparison) -> Comparison:
    """Return the comparison that a person has to hear about first."""
    return max(first, second, key=lambda c: (not c.equal, c.error))


@cache
def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether the type rounds: IEEE floats and complex numbers, bfloat16 and the float8 family."""
    try:
        ml_dtypes.finfo(dtype)
    except (ValueError, TypeError, KeyError):
        return False
    return True


@cache
def epsilon(dtype: np.dtype[Any]) -> float:
    """Return the distance from 1.0 to the next number of a float type."""
    return float(ml_dtypes.finfo(dtype).eps)


def tolerance(dtype: np.dtype[Any]) -> float:
    """Return the relative error that two equal computations in a float type may show."""
    real = np.zeros(0, dtype).real.dtype if dtype.kind == "c" else dtype
    return TOLERANCE_IN_EPSILONS.get(real.name, NARROW_FLOAT_IN_EPSILONS) * epsilon(dtype)


def _unlike(reason: str) -> Comparison:
    return Comparison(False, reason, np.inf)


def _arrays(
    expected: Array, got: Array, dtype: np.dtype[Any] | None, rtol: float | None, atol: float, slack: float
) -> Comparison:
    if expected.dtype != got.dtype:
        return _unlike(f"element type {expected.dtype} became {got.dtype}")
    if expected.shape != got.shape:
        return _unlike(f"shape {list(expected.shape)} became {list(got.shape)}")
    if not expected.size:
        return SAME
    if not is_float(expected.dtype):
        return _differing(expected != got, expected, got, "{count} of {size} elements differ") or SAME
    # The coarser of the two decides: a half-precision output of a model that computes in single stays half.
    precision = max((d for d in (dtype, expected.dtype) if d is not None), key=epsilon)
    allowed = tolerance(precision) * slack if rtol is None else rtol
    return _roughly(expected, got, allowed, atol, epsilon(precision))


def _differing(
    differs: Array, a: Array, b: Array, what: str, error: float | None = None, allowed: float = 0.0
) -> Comparison | None:
    """The comparison where one must not be unlike the other anywhere; None where nothing `differs`."""
    if not differs.any():
        return None
    count = int(differs.sum())
    where = _index(int(np.argmax(differs)), a.shape)
    reason = f"{what.format(count=count, size=a.size)}, first at {list(where)}: {a[where]} became {b[where]}"
    return Comparison(False, reason, count / a.size if error is None else error, tolerance=allowed, where=where)


def _roughly(expected: Array, got: Array, allowed: float, atol: float, eps: float) -> Comparison:
    wide = np.complex128 if expected.dtype.kind == "c" else np.float64
    a, b = expected.astype(wide), got.astype(wide)
    finite = np.isfinite(a)
    if not (finite.all() and np.isfinite(b).all()):
        infinite = np.isinf(a) | np.isinf(b)
        for name, moved in (("NaN", np.isnan(a) != np.isnan(b)), ("infinity", infinite & (a != b))):
            if found := _differing(moved, a, b, name + " differs in {count} of {size} elements", np.inf, allowed):
                return found
    magnitude = np.where(finite, np.abs(a), 0.0)
    with np.errstate(all="ignore"):
        apart = np.where(finite, np.abs(a - b), 0.0)
        scale = magnitude + _typical(magnitude)
        # Equal elements never err (0/0); an exact zero that became something errs without bound.
        error = np.where(apart > 0, np.maximum(apart - atol, 0.0) / scale, 0.0)
    worst = int(np.argmax(error))
    value, where = float(error.flat[worst]), _index(worst, a.shape)
    reason = ""
    if value > allowed:
        reason = (
            f"{int((error > allowed).sum())} of {a.size} elements differ, worst at {list(where)}: "
            f"{a[where]:.7g} became {b[where]:.7g} (relative error {value:.1e}, allowed {allowed:.1e})"
        )
    return Comparison(not reason, reason, value, value / eps, allowed, where)


def _typical(magnitude: Array) -> float:
    """Return the lower quartile of the nonzero magnitudes: outliers such as mask fills must not hide errors."""
    nonzero = magnitude[magnitude > 0]
    return float(np.quantile(nonzero, 0.25)) if nonzero.size else 0.0


def _index(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(flat, shape))


def _kind(value: Any) -> str:
    kinds = {type(None): "nothing", np.ndarray: "a tensor", list: "a sequence", dict: "a map"}
    if isinstance(value, np.generic):
        return "a tensor"
    return kinds.get(type(value), type(value).__name__)
