"""Are two outputs equal, as far as their element type can tell?

Integers, booleans and strings are equal exactly. Floats are equal within a number of units of their type's epsilon,
measured against the magnitude of the element plus the typical magnitude of the whole tensor: a rewrite that adds up in
another order moves small elements by rounding errors of the large ones. NaN and infinities lie at the same places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
    return _Judge(dtype, rtol, atol or 0.0, slack).structures(expected, got)


def worse(first: Comparison, second: Comparison) -> Comparison:
    """Return the comparison that a person has to hear about first."""
    return max(first, second, key=lambda c: (not c.equal, c.error))


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether the type rounds: IEEE floats and complex numbers, bfloat16 and the float8 family."""
    return dtype.kind in "fc" or _narrow(dtype)


def epsilon(dtype: np.dtype[Any]) -> float:
    """Return the distance from 1.0 to the next number of a float type."""
    return float(ml_dtypes.finfo(dtype).eps if _narrow(dtype) else np.finfo(dtype).eps)


def tolerance(dtype: np.dtype[Any]) -> float:
    """Return the relative error that two equal computations in a float type may show."""
    real = np.zeros(0, dtype).real.dtype if dtype.kind == "c" else dtype
    return TOLERANCE_IN_EPSILONS.get(real.name, NARROW_FLOAT_IN_EPSILONS) * epsilon(dtype)


def _narrow(dtype: np.dtype[Any]) -> bool:
    # numpy knows the types of ml_dtypes only as opaque ones ("V"); their integers (int4) answer no finfo.
    if dtype.kind not in "Vf" or dtype.fields:
        return False
    try:
        ml_dtypes.finfo(dtype)
    except (ValueError, TypeError, KeyError):
        return False
    return True


@dataclass(frozen=True, slots=True)
class _Judge:
    """The arguments of `compare` that stay the same on the way down into sequences and maps."""

    dtype: np.dtype[Any] | None
    rtol: float | None
    atol: float
    slack: float

    def arrays(self, expected: Array, got: Array) -> Comparison:
        if expected.dtype != got.dtype:
            return Comparison(False, f"element type {expected.dtype} became {got.dtype}", np.inf)
        if expected.shape != got.shape:
            return Comparison(False, f"shape {list(expected.shape)} became {list(got.shape)}", np.inf)
        if not expected.size:
            return SAME
        if not is_float(expected.dtype):
            return _exactly(expected, got)
        # The coarser of the two decides: a half-precision output of a model that computes in single stays half.
        precision = max((d for d in (self.dtype, expected.dtype) if d is not None), key=epsilon)
        allowed = tolerance(precision) * self.slack if self.rtol is None else self.rtol
        return _roughly(expected, got, allowed, self.atol, epsilon(precision))

    def structures(self, expected: Any, got: Any) -> Comparison:
        """Compare sequences, maps and optional values element by element."""
        if isinstance(expected, np.ndarray | np.generic) and isinstance(got, np.ndarray | np.generic):
            return self.arrays(np.asarray(expected), np.asarray(got))
        if isinstance(expected, Mapping) and isinstance(got, Mapping):
            if expected.keys() != got.keys():
                return Comparison(False, f"keys {sorted(map(str, expected))} became {sorted(map(str, got))}", np.inf)
            pairs = [(f"[{key!r}]", expected[key], got[key]) for key in expected]
        elif _is_list(expected) and _is_list(got):
            if len(expected) != len(got):
                return Comparison(False, f"a sequence of {len(expected)} became one of {len(got)}", np.inf)
            pairs = [(f"[{i}]", a, b) for i, (a, b) in enumerate(zip(expected, got, strict=True))]
        elif type(expected) is not type(got):
            return Comparison(False, f"{_kind(expected)} became {_kind(got)}", np.inf)
        elif expected is None or isinstance(expected, str | bytes):
            return SAME if expected == got else Comparison(False, f"{expected!r} became {got!r}", np.inf)
        else:
            return self.arrays(np.asarray(expected), np.asarray(got))
        result = SAME
        for place, a, b in pairs:
            one = self.structures(a, b)
            result = worse(result, replace(one, reason=f"{place}: {one.reason}") if one.reason else one)
        return result


def _exactly(expected: Array, got: Array) -> Comparison:
    differs = np.asarray(expected != got)
    if not differs.any():
        return SAME
    where = _index(int(np.argmax(differs)), expected.shape)
    count = int(differs.sum())
    reason = (
        f"{count} of {expected.size} elements differ, first at {list(where)}: {expected[where]} became {got[where]}"
    )
    return Comparison(False, reason, count / expected.size, where=where)


def _roughly(expected: Array, got: Array, allowed: float, atol: float, eps: float) -> Comparison:
    wide = np.complex128 if expected.dtype.kind == "c" else np.float64
    a, b = expected.astype(wide), got.astype(wide)
    for name, of in (("NaN", np.isnan), ("infinity", np.isinf)):
        mine, theirs = of(a), of(b)
        moved = mine != theirs
        if name == "infinity":
            with np.errstate(invalid="ignore"):
                moved |= mine & theirs & (a != b)
        if moved.any():
            where = _index(int(np.argmax(moved)), a.shape)
            count = int(moved.sum())
            reason = (
                f"{name} differs in {count} of {a.size} elements, first at {list(where)}: {a[where]} became {b[where]}"
            )
            return Comparison(False, reason, np.inf, tolerance=allowed, where=where)
    finite = np.isfinite(a)
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


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, np.ndarray | np.generic):
        return "a tensor"
    return {"list": "a sequence", "dict": "a map"}.get(type(value).__name__, type(value).__name__)
