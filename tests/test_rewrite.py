"""Rewriting: the safety rules that no fusion may break, whatever the pattern; determinism, idempotence, provenance."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from building import BOOL, FLOAT, INT64, Build, gelu, layer_norm, misses, numbers, operators, run, same, well_formed
from onnx import helper

import fusion

MODELS = Path(__file__).parent / "models"
INDEX = {entry["name"]: entry for entry in json.loads((MODELS / "INDEX.json").read_text())}
FEED = {"x": numbers(2, 3, 5)}


def written_gelu(b: Build, x: str) -> dict[str, str]:
    """Gelu written out, with every interior value by its role."""
    values = {}
    values["scaled"] = b.div(x, 2.0**0.5)
    values["erf"] = b.erf(values["scaled"])
    values["shifted"] = b.add(values["erf"], 1.0)
    values["product"] = b.mul(x, values["shifted"])
    values["result"] = b.mul(values["product"], 0.5)
    return values


INTERIOR = ("scaled", "erf", "shifted", "product")


# Interior values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interior", INTERIOR)
def test_an_interior_value_that_is_a_graph_output_blocks_the_match(interior):
    b = Build()
    values = written_gelu(b, b.input("x", ["B", "S", 5]))
    result = same(b.model(values["result"], values[interior]), FEED)
    assert result.counts == {}
    if interior in ("erf", "shifted"):
        assert misses(result, "gelu") == [("privacy", f"{values[interior]} inside the region is a graph output")]


@pytest.mark.parametrize("half", ["mul", "div"])
def test_a_number_of_the_formula_may_be_in_a_value_that_it_uses_twice(half):
    b = Build()
    x = b.input("x", ["B", "S", 5])
    h = b.mul(x, 0.5) if half == "mul" else b.div(x, 2.0)
    result = same(b.model(b.add(h, b.mul(h, b.erf(b.div(x, 2.0**0.5))))), FEED)
    assert operators(result.model) == {"Gelu": 1}


@pytest.mark.parametrize("interior", INTERIOR)
def test_an_interior_value_with_a_second_consumer_blocks_the_match(interior):
    b = Build()
    values = written_gelu(b, b.input("x", ["B", "S", 5]))
    side = b.relu(values[interior])
    result = same(b.model(values["result"], side), FEED)
    assert result.counts == {}
    if interior in ("erf", "shifted"):
        sentence = f"{values[interior]} inside the region is also read by Relu_{side}"
        assert misses(result, "gelu") == [("privacy", sentence)]


@pytest.mark.parametrize("interior", INTERIOR)
def test_who_asks_for_the_sizes_of_an_interior_value_reads_them_off_the_input(interior):
    b = Build(opset=20)
    values = written_gelu(b, b.input("x", ["B", "S", 5]))
    asked = b.shape(values[interior])
    result = same(b.model(values["result"], (asked, INT64, [3])), FEED)
    assert result.counts == {"gelu": 1}
    np.testing.assert_array_equal(run(result.model, FEED)[asked], [2, 3, 5])
    assert "Erf" not in operators(result.model)


def test_sizes_that_cannot_be_read_elsewhere_block_the_match():
    b = Build(opset=20)
    values = written_gelu(b, b.reshape(b.input("x", ["B", "S", 5]), [-1, 5]))
    asked = b.shape(values["erf"])
    result = same(b.model(values["result"], (asked, INT64, [2])), FEED)
    assert result.counts == {}
    assert {text for _, text in misses(result, "gelu")} == {"the size B*S cannot be read off any capture or input"}


@pytest.mark.parametrize("interior", INTERIOR)
def test_an_interior_value_captured_by_a_body_blocks_the_match(interior):
    b = Build()
    values = written_gelu(b, b.input("x", ["B", "S", 5]))
    branches = {}
    for branch, op in (("then_branch", "Relu"), ("else_branch", "Neg")):
        inner = Build(prefix=branch)
        branches[branch] = inner.graph(inner.node(op, values[interior]))
    side = b.node("If", b.input("c", [], BOOL), **branches)
    feeds = [{**FEED, "c": np.array(flag)} for flag in (True, False)]
    assert same(b.model(values["result"], side), feeds).counts == {}


@pytest.mark.parametrize("interior", INTERIOR)
def test_who_reads_only_the_shape_of_an_interior_value_does_not_get_another_answer(interior):
    b = Build()
    values = written_gelu(b, b.input("x", ["B", "S", 5]))
    side = b.shape(values[interior])
    same(b.model(values["result"], (side, INT64, [3])), FEED)


def test_readers_that_lead_nowhere_go_with_the_match():
    b = Build()
    values = written_gelu(b, b.input("x", ["B", "S", 5]))
    b.neg(b.relu(values["erf"]))
    result = same(b.model(values["result"]), FEED)
    assert operators(result.model) == {"Gelu": 1}
    assert len(result.model.graph.initializer) == 0


def test_the_result_of_a_match_may_have_many_readers_and_be_an_output():
    b = Build()
    y = gelu(b, b.input("x", ["B", "S", 5]))
    result = same(b.model(y, b.relu(y), b.neg(y)), FEED)
    assert result.counts == {"gelu": 1}
    assert operators(result.model) == {"Gelu": 1, "Relu": 1, "Neg": 1}


def test_the_captured_value_may_have_many_readers_and_be_an_output():
    b = Build()
    x = b.tanh(b.input("x", ["B", "S", 5]))
    result = same(b.model(gelu(b, x), x, b.relu(x)), FEED)
    assert result.counts == {"gelu": 1}
    assert operators(result.model) == {"Tanh": 1, "Gelu": 1, "Relu": 1}


def test_two_outputs_in_one_chain_keep_both():
    b = Build()
    first = gelu(b, b.input("x", ["B", "S", 5]))
    second = gelu(b, first)
    result = same(b.model(first, second), FEED)
    assert result.counts == {"gelu": 2}
    assert operators(result.model) == {"Gelu": 2}


def test_one_value_listed_twice_as_output_is_kept_twice():
    b = Build()
    y = gelu(b, b.input("x", ["B", "S", 5]))
    model = b.model(y, b.relu(y))
    before = run(model, FEED)
    after = run(same(model, FEED).model, FEED)
    assert list(before) == list(after)


# Kept outputs -----------------------------------------------------------------------------------------------------


def residual(b: Build):
    """x + skip, then a layer norm of it with a scale and a bias."""
    x, skip = b.input("x", ["B", "S", 5]), b.input("skip", ["B", "S", 5])
    total = b.add(x, skip)
    return total, lambda: layer_norm(b, total, numbers(5, seed=1), numbers(5, seed=2), eps=1e-3)


PAIR = {"x": numbers(2, 3, 5, seed=3), "skip": numbers(2, 3, 5, seed=4)}


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("output", [False, True])
def test_a_kept_sum_may_be_read_before_and_after_the_norm_and_be_an_output(before, after, output):
    b = Build()
    total, norm = residual(b)
    outputs = [b.relu(total)] if before else []
    outputs.append(norm())
    outputs += [b.neg(total)] if after else []
    outputs += [total] if output else []
    result = same(b.model(*outputs), PAIR)
    assert result.counts == {"skip_layer_norm": 1}
    (node,) = [node for node in result.model.graph.node if node.op_type == "SkipLayerNormalization"]
    assert [bool(name) for name in [*node.output, "", "", ""][:4]] == [True, False, False, before or after or output]
    assert "Add" not in operators(result.model)


def test_a_scale_computed_from_the_kept_sum_is_no_input_of_the_node_that_computes_the_sum():
    b = Build()
    x, skip = b.input("x", ["B", "S", 5]), b.input("skip", ["B", "S", 5])
    total = b.add(x, skip)
    scale = b.mean(total, axes=(0, 1), keepdims=0)
    result = same(b.model(layer_norm(b, total, scale, eps=1e-3)), PAIR)
    assert "skip_layer_norm" not in result.counts


def test_a_scale_computed_between_the_sum_and_the_norm_closes_no_cycle():
    b = Build()
    x, skip, w = b.input("x", ["B", "S", 5]), b.input("skip", ["B", "S", 5]), b.input("w", [5])
    total = b.add(x, skip)
    early = b.relu(total)
    scale = b.tanh(w)
    late = b.neg(total)
    result = same(b.model(early, layer_norm(b, total, scale, eps=1e-3), late), {**PAIR, "w": numbers(5, seed=9)})
    assert sum(result.counts.values()) == 1


def test_a_bias_computed_after_everything_it_is_added_to_is_fine_where_the_root_comes_last():
    b = Build()
    x, w = b.input("x", ["B", "S", 5]), b.input("w", [5])
    normed = layer_norm(b, x, numbers(5, seed=1), eps=1e-3)
    y = b.add(normed, b.tanh(w))
    result = same(b.model(y), {**FEED, "w": numbers(5, seed=9)})
    assert result.counts == {"layer_norm": 1}


# Scopes -----------------------------------------------------------------------------------------------------------


def test_a_match_inside_a_body_is_rewritten_there():
    then = Build(prefix="then")
    gelu_of = gelu(then, "x")
    other = Build(prefix="else")
    norm_of = layer_norm(other, "x", numbers(5, seed=1), numbers(5, seed=2), eps=1e-3)
    b = Build()
    b.input("x", ["B", "S", 5])
    y = b.node("If", b.input("c", [], BOOL), then_branch=then.graph(gelu_of), else_branch=other.graph(norm_of))
    result = same(b.model(y), [{**FEED, "c": np.array(flag)} for flag in (True, False)])
    assert result.counts == {"gelu": 1, "layer_norm": 1}
    assert operators(result.model) == {"If": 1}
    (node,) = result.model.graph.node
    assert [[n.op_type for n in attribute.g.node] for attribute in node.attribute] == [["LayerNormalization"], ["Gelu"]]
    assert [len(attribute.g.initializer) for attribute in node.attribute] == [2, 0]
    assert [opset.domain for opset in result.model.opset_import] == ["", "com.microsoft"]


def test_a_formula_that_crosses_into_a_body_is_left_alone():
    b = Build()
    x = b.input("x", ["B", "S", 5])
    shifted = b.add(b.erf(b.div(x, 2.0**0.5)), 1.0)
    then = Build(prefix="then")
    half = then.mul(then.mul("x", shifted), 0.5)
    other = Build(prefix="else")
    y = b.node("If", b.input("c", [], BOOL), then_branch=then.graph(half), else_branch=other.graph(other.neg("x")))
    assert same(b.model(y), [{**FEED, "c": np.array(flag)} for flag in (True, False)]).counts == {}


def test_names_are_fresh_across_scopes():
    """A first run says which names the rewriter likes; then a body of another model already has all of them."""

    def model(taken=()):
        inner = Build(prefix="taken")
        value = "x"
        for name in taken:
            value = inner.node("Neg", value, output=name)
        branches = inner.graph(inner.relu(value))
        other = Build(prefix="other")
        b = Build()
        x, skip = b.input("x", ["B", "S", 5]), b.input("skip", ["B", "S", 5])
        y = layer_norm(b, b.add(x, skip), numbers(5, seed=1), eps=1e-3)
        mask = b.where(b.input("m", ["S", 1], BOOL), y, layer_norm(b, x, eps=1e-3))
        side = b.node(
            "If", b.input("c", [], BOOL), then_branch=branches, else_branch=other.graph(other.relu("x")), output="side"
        )
        return b.model(mask, side)

    feed = {**PAIR, "c": np.array(True), "m": np.array([[True], [False], [True]])}
    first = model()
    made = same(first, feed).model
    known = {name for node in first.graph.node for name in node.output} | {t.name for t in first.graph.initializer}
    liked = {name for node in made.graph.node for name in (*node.output, node.name)}
    liked |= {tensor.name for tensor in made.graph.initializer}
    liked -= known | {""} | {node.name for node in first.graph.node}
    assert liked, "the rewriter invents at least a name for the node and for the ones"
    result = same(model(sorted(liked)), feed)
    assert sum(result.counts.values()) == 2


def test_a_match_inside_a_function_is_right_or_left_alone():
    inner = Build(prefix="f")
    result_name = gelu(inner, "a")
    constants = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in inner.tensors]
    function = helper.make_function(
        "local", "Act", ["a"], [result_name], [*constants, *inner.nodes], [helper.make_opsetid("", 17)]
    )
    b = Build()
    y = b.node("Act", b.input("x", ["B", "S", 5]), domain="local")
    z = gelu(b, y)
    model = b.model(z, functions=[function], domains=["local"])
    model.graph.value_info.append(helper.make_tensor_value_info(y, FLOAT, ["B", "S", 5]))
    result = same(model, FEED)
    assert operators(result.model) == {"Act": 1, "Gelu": 1}


# Constants --------------------------------------------------------------------------------------------------------


def shared_gelu(b: Build, x: str, names: dict[str, str]) -> dict[str, str]:
    erf = b.erf(b.div(x, names["root"]))
    return {"erf": erf, "result": b.mul(b.mul(x, b.add(erf, names["one"])), names["half"])}


def shared_constants(b: Build) -> dict[str, str]:
    return {name: b.constant(number, name) for name, number in (("root", 2.0**0.5), ("one", 1.0), ("half", 0.5))}


def test_constants_shared_by_two_matches_go_with_the_second():
    b = Build()
    names = shared_constants(b)
    first = shared_gelu(b, b.input("x", ["B", "S", 5]), names)["result"]
    second = shared_gelu(b, first, names)["result"]
    result = same(b.model(second), FEED)
    assert result.counts == {"gelu": 2}
    assert len(result.model.graph.initializer) == 0


def test_constants_shared_with_what_is_left_alone_stay():
    b = Build()
    names = shared_constants(b)
    first = shared_gelu(b, b.input("x", ["B", "S", 5]), names)["result"]
    second = shared_gelu(b, first, names)
    result = same(b.model(second["result"], second["erf"]), FEED)
    assert result.counts == {"gelu": 1}
    assert sorted(tensor.name for tensor in result.model.graph.initializer) == ["half", "one", "root"]


def test_constants_that_nobody_read_before_are_left_alone():
    b = Build()
    y = gelu(b, b.input("x", ["B", "S", 5]))
    b.constant(7.0, "spare")
    result = same(b.model(y), FEED)
    assert [tensor.name for tensor in result.model.graph.initializer] == ["spare"]


@pytest.mark.parametrize("overridden", [False, True])
@pytest.mark.parametrize("name", ["root", "one", "half"])
def test_an_initializer_that_is_an_input_may_be_overridden(name, overridden):
    b = Build()
    names = shared_constants(b)
    b.input(name, [])
    y = shared_gelu(b, b.input("x", ["B", "S", 5]), names)["result"]
    feed = {**FEED, name: np.array(3.0, np.float32)} if overridden else FEED
    result = same(b.model(y), feed)
    assert result.counts == {}


def test_a_weight_that_is_an_input_is_passed_on():
    b = Build()
    b.constant(numbers(5, seed=1), "gamma")
    b.input("gamma", [5])
    y = layer_norm(b, b.input("x", ["B", "S", 5]), "gamma", eps=1e-3)
    result = same(b.model(y), [FEED, {**FEED, "gamma": numbers(5, seed=7)}])
    assert result.counts == {"layer_norm": 1}


# Names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["unique", "none"])
def test_node_names_are_no_identity(names):
    b = Build(names=names)
    x = b.input("x", ["B", "S", 5])
    h = gelu(b, x)
    values = written_gelu(b, h)
    result = same(b.model(layer_norm(b, h, eps=1e-3), values["result"], values["erf"]), FEED)
    assert result.counts == {"gelu": 1, "layer_norm": 1}
    assert operators(result.model)["Erf"] == 1


def test_nodes_of_one_name_are_told_apart():
    """onnxruntime refuses such a model; what is fused away no longer hinders it."""
    made = {}
    for names in ("unique", "same"):
        b = Build(names=names)
        h = gelu(b, gelu(b, b.input("x", ["B", "S", 5])))
        made[names] = b.model(layer_norm(b, h, eps=1e-3))
    result = fusion.optimize(made["same"])
    assert result.counts == {"gelu": 2, "layer_norm": 1}
    (expected,), (got,) = run(made["unique"], FEED).values(), run(result.model, FEED).values()
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_a_node_named_like_a_value_is_no_value():
    b = Build()
    x = b.input("x", ["B", "S", 5])
    values = written_gelu(b, x)
    model = b.model(values["result"], b.relu(values["result"]))
    for node, name in zip(model.graph.node, ("x", *values.values()), strict=True):
        node.name = name
    assert same(model, FEED).counts == {"gelu": 1}


# What new nodes say -----------------------------------------------------------------------------------------------


def test_a_new_node_says_which_pattern_made_it_and_what_it_replaced():
    b = Build()
    values = written_gelu(b, b.input("x", ["B", "S", 5]))
    labels = [node.name for node in b.nodes]
    result = same(b.model(values["result"]), FEED)
    (node,) = result.model.graph.node
    provenance = {entry.key: entry.value for entry in node.metadata_props}
    assert provenance["fusion.pattern"] == "gelu"
    assert provenance["fusion.replaced"].split(", ") == labels
    assert provenance["fusion.laws"] == "ring"
    (match,) = result.matches
    assert (match.pattern, match.root, match.scope) == ("gelu", values["result"], "graph")
    assert match.operators == ("com.microsoft::Gelu",)
    assert list(match.replaced) == labels
    assert (result.nodes_before, result.nodes_after) == (5, 1)


def test_the_domain_is_imported_once():
    b = Build()
    h = gelu(b, gelu(b, b.input("x", ["B", "S", 5])))
    once = same(b.model(h), FEED)
    assert [(o.domain, o.version) for o in once.model.opset_import] == [("", 17), ("com.microsoft", 1)]
    b = Build()
    h = gelu(b, gelu(b, b.input("x", ["B", "S", 5])))
    again = same(b.model(h, domains=["com.microsoft"]), FEED)
    assert [(o.domain, o.version) for o in again.model.opset_import] == [("", 17), ("com.microsoft", 1)]


def test_a_standard_operator_imports_nothing():
    b = Build(opset=20)
    result = same(b.model(gelu(b, b.input("x", ["B", "S", 5]))), FEED)
    assert [(o.domain, o.version) for o in result.model.opset_import] == [("", 20)]
    (node,) = result.model.graph.node
    assert (node.op_type, node.domain) == ("Gelu", "")


def test_declared_types_of_values_that_are_gone_go_too():
    b = Build()
    values = written_gelu(b, b.input("x", ["B", "S", 5]))
    model = b.model(b.relu(values["result"]))
    infos = [helper.make_tensor_value_info(name, FLOAT, ["B", "S", 5]) for name in values.values()]
    model.graph.value_info.extend(infos)
    result = same(model, FEED)
    assert [info.name for info in result.model.graph.value_info] == [values["result"]]


# Whole models -----------------------------------------------------------------------------------------------------

NAMES = sorted(INDEX)


@pytest.fixture(scope="module")
def optimized(tmp_path_factory):
    """Every model, optimized once: name → (result, file)."""
    folder = tmp_path_factory.mktemp("optimized")
    made = {}
    for name in NAMES:
        destination = folder / f"{name}.onnx"
        made[name] = (fusion.optimize(MODELS / f"{name}.onnx", destination), destination)
    return made


@pytest.mark.parametrize("name", NAMES)
def test_a_real_export_is_fused_as_often_as_its_modules_were_called(optimized, name):
    model = onnx.load(optimized[name][1])
    found = operators(model)
    alphas = [
        round(attribute.f, 3)
        for node in model.graph.node
        if node.op_type == "QuickGelu"
        for attribute in node.attribute
        if attribute.name == "alpha"
    ]
    counted = {
        "attention": found["Attention"] + found["MultiHeadAttention"] + found["GroupQueryAttention"],
        "layernorm": found["LayerNormalization"] + found["SkipLayerNormalization"],
        "rmsnorm": found["SimplifiedLayerNormalization"]
        + found["RMSNormalization"]
        + found["SkipSimplifiedLayerNormalization"],
        "gelu": found["Gelu"] + found["BiasGelu"] + found["FastGelu"] + alphas.count(1.702),
        "silu": alphas.count(1.0),
    }
    expected = INDEX[name]["expected"]
    assert counted == {kind: expected[kind] for kind in counted}


@pytest.mark.parametrize("name", NAMES)
def test_a_fused_export_is_sound_and_computes_the_same(optimized, name):
    before, after = onnx.load(MODELS / f"{name}.onnx"), onnx.load(optimized[name][1])
    well_formed(after)
    assert [value.SerializeToString() for value in before.graph.input] == [
        value.SerializeToString() for value in after.graph.input
    ]
    feeds = dict(np.load(MODELS / f"{name}.npz"))
    expected, got = run(before, feeds), run(after, feeds)
    assert list(expected) == list(got)
    for key, array in expected.items():
        np.testing.assert_allclose(got[key], array, rtol=1e-3, atol=2e-5, err_msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_optimizing_twice_changes_nothing(optimized, name, tmp_path):
    first = optimized[name][1]
    again = fusion.optimize(first, tmp_path / "again.onnx")
    assert again.counts == {}
    assert (tmp_path / "again.onnx").read_bytes() == first.read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_does_not_change_is_written_as_it_was(optimized, name):
    result, destination = optimized[name]
    unchanged = (MODELS / f"{name}.onnx").read_bytes() == destination.read_bytes()
    assert unchanged == (not result.matches and not result.simplified)


def test_the_same_bytes_come_out_whatever_the_hash_seed(optimized, tmp_path):
    script = (
        "import sys, fusion\nfor name in sys.argv[2:]: fusion.optimize(f'{sys.argv[1]}/{name}.onnx', f'{name}.onnx')"
    )
    expected = {name: hashlib.sha256(optimized[name][1].read_bytes()).hexdigest() for name in NAMES}
    for seed in ("0", "1"):
        folder = tmp_path / seed
        folder.mkdir()
        subprocess.run(
            [sys.executable, "-c", script, str(MODELS), *NAMES],
            check=True,
            cwd=folder,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        made = {name: hashlib.sha256((folder / f"{name}.onnx").read_bytes()).hexdigest() for name in NAMES}
        assert made == expected


def test_the_rewritten_model_is_of_the_kind_that_came_in_and_the_original_is_left_alone():
    b = Build()
    model = b.model(gelu(b, b.input("x", ["B", "S", 5])))
    before = model.SerializeToString(deterministic=True)
    result = fusion.optimize(model)
    assert isinstance(result.model, onnx.ModelProto)
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("patterns", [["gelu"], ["layer_norm"], []])
def test_only_chosen_patterns_are_written(patterns):
    b = Build()
    model = b.model(layer_norm(b, gelu(b, b.input("x", ["B", "S", 5])), eps=1e-3))
    assert same(model, FEED, patterns=patterns).counts == dict.fromkeys(patterns, 1)


@pytest.mark.parametrize("bias", [numbers(5, seed=1), numbers(1, seed=1), numbers(3, 1, seed=1), numbers(1, 1, 5)])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_bias_before_gelu_is_one_only_along_the_last_axis(bias, swapped):
    b = Build()
    x = b.input("x", ["B", 3, 5])
    result = same(b.model(gelu(b, b.add(*((bias, x) if swapped else (x, bias))))), FEED)
    assert ("bias_gelu" in result.counts) <= (bias.size == 5)
    assert sum(result.counts.values()) == 1


def test_two_activations_added_before_gelu_are_no_bias():
    b = Build()
    x, y = b.input("x", ["B", "S", 5]), b.input("skip", ["B", "S", 5])
    assert same(b.model(gelu(b, b.add(x, y))), PAIR).counts == {"gelu": 1}


@pytest.mark.parametrize("opset", [11, 13, 17, 18, 20, 23])
@pytest.mark.parametrize("dtype", [FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16])
def test_every_element_type_and_opset_gives_a_model_that_runs(opset, dtype):
    b = Build(opset, dtype)
    x = b.input("x", ["B", "S", 5])
    model = b.model(layer_norm(b, gelu(b, x), numbers(5, seed=1, dtype=dtype), eps=1e-3))
    same(model, {"x": numbers(2, 3, 5, dtype=dtype)}, tolerance=2e-2 if dtype == onnx.TensorProto.FLOAT16 else None)
