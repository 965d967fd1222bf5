"""Testing of patterns, for those who write them: instances that must match, and mutants that must not match wrongly.

    for instance in instances(my_pattern, opset=17, count=20):
        checked = check_instance(instance)
        assert checked.holds, f"{checked.reason}\n{instance}"

An instance is the pattern's own formula, spelled as an exporter might, around arrays for its captures; what it must
compute is the pattern called on these arrays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper

from fusion.api import Place, optimize, why
from fusion.errors import ModelError
from fusion.instances.instance import Instance, draw_instance
from fusion.instances.mutate import Mutant, mutants_of
from fusion.language import Pattern
from fusion.laws.draw import Draw
from fusion.verifying.compare import Comparison, compare, epsilon, is_float
from fusion.verifying.runtime import Refused, Session
from fusion.writing.found import GAIN

__all__ = [
    "Checked", "Draw", "Instance", "Mutant", "check_instance", "check_mutant", "draw_instance", "instances", "mutants",
]  # fmt: skip

SLACK = 4.0
"""How much more than `compare` allows by itself: small sizes leave nothing to average rounding errors over."""

REFUSALS = frozenset({"kernel", "requirement", "dimension", "dtype"})
"""Obligations of an emission; kernels are made for fewer forms than a formula has."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What came of an instance or a mutant.

    Attributes:
        holds: whether what must hold does.
        fused: whether the model was rewritten.
        reason: why not, or what is wrong.
    """

    holds: bool
    fused: bool
    reason: str = ""


def instances(
    pattern: Pattern, *, opset: int = 17, dtype: int = TensorProto.FLOAT, count: int = 10, seed: int = 0
) -> Iterator[Instance]:
    """Yield instances of a pattern; the same for the same arguments.

    Args:
        pattern: what to spell.
        opset: of the standard operators.
        dtype: element type (TensorProto.DataType).
        count: how many.
        seed: for other ones.
    """
    for index in range(count):
        yield draw_instance(pattern, Draw.seeded(f"{pattern.name} {seed} {index}"), opset=opset, dtype=dtype)


def check_instance(instance: Instance, *, target: str = "ort-cpu") -> Checked:
    """Check that an instance matches exactly once, and that it computes the same before and after, and as the pattern.

    Where something is special about it, the emissions may refuse it, and where the kernel is made for some sizes only;
    then it still has to match.
    """
    name = instance.pattern.name
    before = _run(Session(instance.model), instance.feeds)
    wrong = _differs(_single(instance.expected), _single(before))
    if wrong:
        return Checked(False, False, f"the spelled model does not compute the pattern: {wrong}")
    result = optimize(instance.model, patterns=[instance.pattern], target=target)
    count = result.counts.get(name, 0)
    if count > 1:
        return Checked(False, True, f"matched {count} times")
    if count == 0:
        places = why(instance.model, instance.pattern, target=target).places
        if not any(place.nodes for place in places):
            return Checked(False, False, f"no match; near it: {_text(places)}")
        places = [place for place in places if place.nodes]
        misses = [miss for place in places for miss in place.misses]
        if misses and all(miss.kind == GAIN for miss in misses):
            return Checked(True, False, "it stands there already")
        special = bool(instance.traps) or instance.dtype != TensorProto.FLOAT
        refused = any(miss.kind == "kernel" for miss in misses) or (
            special and misses[:1] and misses[0].kind in REFUSALS
        )
        return Checked(bool(refused), False, f"not written: {_text(places)}")
    wrong = _changed(before, result.model, instance.feeds, instance.expected, dtype=instance.dtype)
    return Checked(not wrong, True, wrong)


def mutants(instance: Instance, draw: Draw | None = None) -> Iterator[Mutant]:
    """Yield variants of an instance, one for each kind of change that has a place in it.

    Args:
        instance: what to change.
        draw: where to change it; by default the first place there is.
    """
    yield from mutants_of(instance, draw or Draw(lambda count: 0))


def check_mutant(instance: Instance, mutant: Mutant, *, target: str = "ort-cpu") -> Checked:
    """Check that a mutant is not rewritten, and `why` names what it breaks; or that it computes the same afterwards.

    It may be the formula still, of other values; then it is an emission that refuses it, or nothing would be saved. Who
    else reads a value is no part of the formula.
    """
    try:
        before = _run(Session(mutant.model), mutant.feeds)
    except (Refused, ModelError):
        return Checked(True, False, "no valid model")
    result = optimize(mutant.model, patterns=[instance.pattern], target=target)
    if result.counts:
        wrong = _changed(before, result.model, mutant.feeds, dtype=instance.dtype)
        return Checked(not wrong, True, wrong)
    places = why(mutant.model, instance.pattern, target=target).places
    matched = [place.misses for place in places if place.nodes]
    private = "privacy" in mutant.expects
    refused = any(not private or all(miss.kind == GAIN for miss in misses) for misses in matched)
    named = refused or any(miss.kind in mutant.expects for place in places for miss in place.misses)
    return Checked(named, False, f"expected {' or '.join(sorted(mutant.expects))}; why says {_text(places)}")


def _text(places: Sequence[Place]) -> str:
    return "; ".join(f"{miss.kind}: {miss.text}" for place in places for miss in place.misses) or "nothing"


def _run(session: Session, feeds: Mapping[str, Any]) -> dict[str, Any]:
    return session.run({name: feeds[name] for name in session.inputs})


def _changed(
    before: Mapping[str, Any],
    model: ModelProto,
    feeds: Mapping[str, Any],
    exact: Mapping[str, Any] | None = None,
    *,
    dtype: int,
) -> str:
    """What a rewritten model computes otherwise; empty where nothing, or where it is as near to `exact` as before.

    Args:
        dtype: what the model computes in; interior values may be cast to a wider type.
    """
    try:
        session = Session(model)
        if session.refusal:
            return f"the runtime refuses the rewritten model: {session.refusal}"
        after = _run(session, feeds)
    except Refused as refused:
        return f"the rewritten model does not run: {refused}"
    wrong = _differs(before, after, helper.tensor_dtype_to_np_dtype(dtype))
    if wrong and exact is not None and _error(exact, after) <= SLACK * _error(exact, before):
        return ""
    return f"the rewritten model computes another thing: {wrong}" if wrong else ""


def _single(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """In single precision at most: where the runtime has no kernel for double, it computes so."""
    return {name: np.float32(array) if array.dtype == np.float64 else array for name, array in arrays.items()}


def _differs(expected: Mapping[str, Any], got: Mapping[str, Any], dtype: np.dtype[Any] | None = None) -> str:
    """The first difference between outputs; empty where they are equal."""
    for name, array in expected.items():
        compared = _compared(array, got[name], dtype)
        if not compared.equal:
            return f"{name}: {compared.reason}"
    return ""


def _compared(expected: Any, got: Any, dtype: np.dtype[Any] | None = None, rtol: float | None = None) -> Comparison:
    array = np.asarray(expected)
    # Terms of about 1 cancel: that leaves an error which a small result cannot tell.
    kinds = [kind for kind in (array.dtype, dtype) if kind is not None and is_float(kind)]
    atol = SLACK * max(epsilon(kind) for kind in kinds) if is_float(array.dtype) else 0.0
    return compare(array, got, dtype, rtol=rtol, atol=atol, slack=SLACK)


def _error(expected: Mapping[str, Any], got: Mapping[str, Any]) -> float:
    return max(_compared(array, got[name], rtol=np.inf).error for name, array in expected.items())
