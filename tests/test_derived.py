"""Derived tests: every registered pattern, drawn as exporters might spell it, matches, and computes what it says.

Instances and mutants come from the pattern alone; a new pattern is tested here without a line of its own. More of them:
`FUSION_DERIVED=40 python -m pytest tests/test_derived.py`.
"""

from __future__ import annotations

import os

import pytest
from onnx import TensorProto

from fusion.api import library
from fusion.targets import target_named
from fusion.testing import check_instance, check_mutant, instances, mutants

COUNT = int(os.environ.get("FUSION_DERIVED", "4"))
OPSETS = (11, 13, 17, 18, 20, target_named("ort-cpu").newest_opset)
DTYPES = {"float": TensorProto.FLOAT, "half": TensorProto.FLOAT16, "double": TensorProto.DOUBLE}
PATTERNS = {name: pattern for name, pattern in library().items() if "ort-cpu" in pattern.targets}


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("name", PATTERNS)
def test_instances_match_once_and_compute_the_same(name, opset):
    for instance in instances(PATTERNS[name], opset=opset, count=COUNT, seed=opset):
        checked = check_instance(instance)
        assert checked.holds, f"{checked.reason}\n{instance}"


@pytest.mark.parametrize("name", PATTERNS)
def test_some_instances_are_written(name):
    drawn = instances(PATTERNS[name], opset=17, count=24)
    assert sum(check_instance(instance).fused for instance in drawn) >= 4


@pytest.mark.parametrize("dtype", ["half", "double"])
@pytest.mark.parametrize("name", PATTERNS)
def test_other_element_types_are_equal_or_refused(name, dtype):
    for instance in instances(PATTERNS[name], opset=17, dtype=DTYPES[dtype], count=COUNT):
        checked = check_instance(instance)
        assert checked.holds, f"{checked.reason}\n{instance}"


@pytest.mark.parametrize("name", PATTERNS)
def test_a_mutant_is_left_alone_or_stays_equal(name):
    for instance in instances(PATTERNS[name], opset=17, count=COUNT):
        for mutant in mutants(instance):
            checked = check_mutant(instance, mutant)
            assert checked.holds or not checked.fused, f"{mutant}\n{checked.reason}\n{instance}"


@pytest.mark.parametrize("name", PATTERNS)
def test_most_mutants_are_explained_by_the_obligation_they_break(name):
    judged = [
        check_mutant(instance, mutant).holds
        for instance in instances(PATTERNS[name], opset=17, count=COUNT)
        if check_instance(instance).fused
        for mutant in mutants(instance)
    ]
    # What replaces the only operator of its kind leaves no anchor, and so nothing to explain: most of swish's mutants.
    assert sum(judged) >= 0.3 * len(judged)
