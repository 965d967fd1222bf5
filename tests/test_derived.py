"""Tests that follow from the patterns themselves: for every one that is registered, in every opset and element type.

Drawn instances match exactly once and compute the same as before and as the pattern called on arrays; what differs from
them in one place is rejected for the right reason, or computes the same. More of both: `FUSION_EXAMPLES=300 pytest
tests/test_derived.py`.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, event, given, note, settings
from hypothesis import strategies as st
from onnx import TensorProto

from fusion.api import library, optimize
from fusion.instance import text_of
from fusion.language import erf, keep, mean, optional, pattern, rest, scalar, softmax, sqrt, tanh
from fusion.plan import Fused
from fusion.rewrite import plans_of
from fusion.spell import atoms
from fusion.targets import target_named
from fusion.testing import Draw, check_instance, check_mutant, draw_instance, instances, mutants

TARGET = target_named("ort-cpu")
PATTERNS = {name: found for name, found in library().items() if TARGET.name in found.targets}
OPSETS = (11, 13, 17, 18, 20, TARGET.newest_opset)
DTYPES = {"float": TensorProto.FLOAT, "half": TensorProto.FLOAT16, "double": TensorProto.DOUBLE}
DEEP = "FUSION_EXAMPLES" in os.environ
EXAMPLES = int(os.environ.get("FUSION_EXAMPLES", "4"))

derived = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=not DEEP,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink) if DEEP else (Phase.generate,),
    report_multiple_bugs=False,
)


def drawn(data):
    return Draw(lambda count: data.draw(st.integers(0, count - 1)))


def plainest(name, opset, dtype=TensorProto.FLOAT):
    return draw_instance(PATTERNS[name], Draw(lambda count: 0), opset=opset, dtype=dtype)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("name", PATTERNS)
def test_the_plainest_spelling_is_fused(name, opset):
    instance = plainest(name, opset)
    checked = check_instance(instance)
    assert checked.holds, f"{checked.reason}\n{instance}"
    assert checked.fused, f"{checked.reason}\n{instance}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("name", PATTERNS)
@derived
@given(data=st.data())
def test_instances_match_once_and_compute_the_same(name, opset, dtype, data):
    instance = draw_instance(PATTERNS[name], drawn(data), opset=opset, dtype=DTYPES[dtype])
    checked = check_instance(instance)
    event("fused" if checked.fused else "not written")
    assert checked.holds, f"{checked.reason}\n{instance}"


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("name", PATTERNS)
@settings(derived, max_examples=max(2, EXAMPLES // 2))
@given(data=st.data())
def test_mutants_are_rejected_for_the_right_reason_or_equal(name, opset, data):
    draw = drawn(data)
    instance = draw_instance(PATTERNS[name], draw, opset=opset)
    if not check_instance(instance).fused:
        return
    for mutant in mutants(instance, draw):
        checked = check_mutant(instance, mutant)
        event(f"{mutant.kind}: {'fused' if checked.fused else 'rejected'}")
        assert checked.holds, f"{mutant.kind}: {mutant.change}: {checked.reason}\n{text_of(mutant.model)}"


@pytest.mark.parametrize("name", PATTERNS)
@derived
@given(data=st.data())
def test_a_pattern_finds_what_its_parts_were_fused_to_before(name, data):
    found = PATTERNS[name]
    parts = {atom.pattern for plan in plans_of(found) for atom in atoms(plan.root) if isinstance(atom, Fused)}
    parts = {part for part in parts if TARGET.name in part.targets}
    if not parts:
        pytest.skip("it calls no pattern that is fused by itself")
    instance = draw_instance(found, drawn(data), opset=17)
    if not check_instance(instance).fused:
        return
    first = optimize(instance.model, patterns=parts)
    note(text_of(first.model))
    second = optimize(first.model, patterns=[found])
    assert second.counts == {name: 1}, f"after {first.counts}: {second.counts}\n{instance}"


@pytest.mark.parametrize("name", PATTERNS)
@derived
@given(data=st.data())
def test_the_whole_library_leaves_nothing_to_fuse(name, data):
    instance = draw_instance(PATTERNS[name], drawn(data), opset=17)
    once = optimize(instance.model)
    twice = optimize(once.model)
    assert twice.counts == {}, f"after {once.counts}: {twice.counts}\n{instance}"
    assert twice.model.SerializeToString() == once.model.SerializeToString()


# -- a pattern of one's own -------------------------------------------------------------------------------------------


@pattern(x="... D", gain="D", shift=optional("D"), low=scalar(0, 1))
def squashed(x, gain, shift, low):
    return tanh(x / sqrt(mean(x**2) + low)) * gain + shift


@pattern(q="B S D", k="B T D", bias=rest("B S T"), scale=scalar())
def affinity(q, k, bias, scale):
    from fusion.language import axes

    scores = scale * (q @ axes(k, "B T D -> B D T"))
    return softmax(scores + bias)


@pattern(x="...")
def gelu_of_tanh(x):
    return 0.5 * x * (1 + erf(x / sqrt(2)))


@pattern(x="... D", y="... D")
def kept_sum(x, y):
    total = x + y
    return tanh(total * mean(total)), keep(total)


@pytest.mark.parametrize("own", [squashed, affinity, kept_sum], ids=lambda own: own.name)
def test_a_pattern_without_an_emission_is_spelled_too(own):
    for instance in instances(own, count=20):
        checked = check_instance(instance)
        assert "does not compute" not in checked.reason, f"{checked.reason}\n{instance}"
        assert not checked.fused


def test_a_wrong_emission_is_caught():
    """The tester itself: the tanh form is written for the exact one."""

    @gelu_of_tanh.emit("ort-cpu")
    def _(found, op):
        return op.Gelu(found.x, approximate="tanh")

    checked = [check_instance(instance) for instance in instances(gelu_of_tanh, opset=20, count=10)]
    assert any("computes another thing" in one.reason for one in checked)
    assert not any(one.holds and one.fused for one in checked)


def test_instances_depend_on_the_seed_only():
    first, again, other = (
        [one.model.SerializeToString() for one in instances(PATTERNS["layer_norm"], count=5, seed=seed)]
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_what_an_instance_must_compute_is_the_formula_written_out():
    x = np.array([[1.0, 3.0], [2.0, -2.0]])
    normed = PATTERNS["layer_norm"](x, None, None, 3.0)
    assert np.allclose(normed, [[-0.5, 0.5], [2 / np.sqrt(7), -2 / np.sqrt(7)]])
