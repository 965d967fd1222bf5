"""Tests that follow from the patterns themselves, for every one that is registered, in every opset and element type.

Drawn instances match exactly once and compute the same as before, and as the pattern called on arrays. What differs
from them in one place is rejected, with the obligation that it breaks as the reason, or computes the same. A new
pattern is tested here without a line of its own. More of them: `FUSION_DERIVED=40 pytest tests/test_derived.py`.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
from onnx import TensorProto

from fusion.api import library, optimize
from fusion.instances.instance import text_of
from fusion.language import axes, erf, keep, mean, optional, pattern, rest, scalar, softmax, sqrt, tanh
from fusion.targets import target_named
from fusion.testing import Draw, check_instance, check_mutant, draw_instance, instances, mutants

COUNT = int(os.environ.get("FUSION_DERIVED", "4"))
OPSETS = (11, 13, 17, 18, 20, target_named("ort-cpu").newest_opset)
DTYPES = {"float": TensorProto.FLOAT, "half": TensorProto.FLOAT16, "double": TensorProto.DOUBLE}
PATTERNS = {name: pattern for name, pattern in library().items() if "ort-cpu" in pattern.targets and pattern.is_formula}


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("name", PATTERNS)
def test_the_plainest_spelling_is_fused(name, opset):
    instance = draw_instance(PATTERNS[name], Draw(lambda count: 0), opset=opset)
    checked = check_instance(instance)
    assert (checked.holds, checked.fused) == (True, True), f"{checked.reason}\n{instance}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("name", PATTERNS)
def test_instances_match_once_and_compute_the_same(name, opset, dtype):
    for instance in instances(PATTERNS[name], opset=opset, dtype=DTYPES[dtype], count=COUNT, seed=opset):
        checked = check_instance(instance)
        assert checked.holds, f"{checked.reason}\n{instance}"


@pytest.mark.parametrize("name", PATTERNS)
def test_some_instances_are_written(name):
    """Kernels refuse some of the traps, not all of them."""
    drawn = instances(PATTERNS[name], opset=17, count=24)
    assert sum(check_instance(instance).fused for instance in drawn) >= 4


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("name", PATTERNS)
def test_a_mutant_is_rejected_for_the_right_reason_or_stays_equal(name, opset):
    for index, instance in enumerate(instances(PATTERNS[name], opset=opset, count=COUNT, seed=opset)):
        if check_instance(instance).fused:
            for mutant in mutants(instance, Draw.seeded(f"{name} {opset} {index}")):
                checked = check_mutant(instance, mutant)
                assert checked.holds, f"{mutant.kind}: {mutant.change}: {checked.reason}\n{text_of(mutant.model)}"


@pytest.mark.parametrize("name", PATTERNS)
def test_the_whole_library_leaves_nothing_to_fuse(name):
    for instance in instances(PATTERNS[name], opset=17, count=COUNT):
        once = optimize(instance.model)
        twice = optimize(once.model)
        assert twice.counts == {}, f"after {once.counts}\n{instance}"
        assert twice.model.SerializeToString() == once.model.SerializeToString()


# -- the tester itself ------------------------------------------------------------------------------------------------


@pattern(x="... D", gain="D", shift=optional("D"), low=scalar(0, 1))
def squashed(x, gain, shift, low):
    return tanh(x / sqrt(mean(x**2) + low)) * gain + shift


@pattern(q="B S D", k="B T D", bias=rest("B S T"), scale=scalar())
def affinity(q, k, bias, scale):
    return softmax(scale * (q @ axes(k, "B T D -> B D T")) + bias)


@pattern(x="... D", y="... D")
def kept_sum(x, y):
    total = x + y
    return tanh(total * mean(total)), keep(total)


@pattern(x="...")
def gelu_of_tanh(x):
    return 0.5 * x * (1 + erf(x / sqrt(2)))


@gelu_of_tanh.emit("ort-cpu")
def _(found, op):
    return op.Gelu(found.x, approximate="tanh")


@pytest.mark.parametrize("own", [squashed, affinity, kept_sum], ids=lambda own: own.name)
def test_a_pattern_without_an_emission_is_spelled_too(own):
    for instance in instances(own, count=20):
        checked = check_instance(instance)
        assert "does not compute" not in checked.reason, f"{checked.reason}\n{instance}"
        assert not checked.fused


def test_a_wrong_emission_is_caught():
    checked = [check_instance(instance) for instance in instances(gelu_of_tanh, opset=20, count=10)]
    assert any("computes another thing" in one.reason for one in checked)


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
