"""The index over a ModelProto: who defines and uses what, edits that can be undone, and what is written back."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from building import BOOL, FLOAT, Build, same, well_formed
from onnx import TensorProto, helper, numpy_helper, parser

from fusion.errors import ModelError
from fusion.models.graph import Graph, Node, Scope, Value, paused_collection
from fusion.models.model import load


def graph_of(model) -> Graph:
    return Graph(load(model, validate=False))


def parsed(text: str, opset: int = 17) -> Graph:
    return graph_of(parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]>\n{text}'))


def value(graph: Graph, name: str):
    return graph.main.values[name]


def producer(graph: Graph, name: str):
    return value(graph, name).producer


def order(model) -> list[str]:
    return [node.output[0] for node in model.graph.node]


def with_body():
    """y = c ? relu(outer) : relu(x), where the bodies read `outer` and `x` of the main graph."""
    bodies = {}
    for branch, read in (("then_branch", "outer"), ("else_branch", "x")):
        inner = Build(prefix=branch)
        bodies[branch] = inner.graph(inner.relu(read))
    b = Build()
    x, c = b.input("x", [2]), b.input("c", [], BOOL)
    outer = b.neg(x, output="outer")
    b.abs(outer, output="kept")
    b.node("If", c, output="y", **bodies)
    return b.model("y", "kept")


# The index --------------------------------------------------------------------------------------------------------


def test_a_value_read_twice_by_one_node_has_one_use_of_two_slots():
    graph = parsed("g (float[2] x) => (float[2] y) { y = Mul (x, x) }")
    x = value(graph, "x")
    assert list(x.uses.values()) == [2]
    assert x.only_use is producer(graph, "y")
    assert (x.producer, x.is_output) == (None, False)


def test_a_graph_output_with_one_reader_has_no_only_use():
    graph = parsed("g (float[2] x) => (float[2] y, float[2] h) { h = Relu (x) y = Neg (h) }")
    assert value(graph, "h").is_output
    assert value(graph, "h").only_use is None
    assert len(value(graph, "h").uses) == 1


def test_an_optional_input_left_out_is_none_and_keeps_its_slot():
    graph = parsed("g (float[2] x, float top) => (float[2] y) { y = Clip (x, , top) }")
    clip = producer(graph, "y")
    assert [v and v.name for v in clip.inputs] == ["x", None, "top"]
    assert clip.input(1) is None
    assert clip.input(7) is None


def test_an_optional_output_left_out_is_none():
    node = helper.make_node("TopK", ["x", "k"], ["", "i"])
    b = Build()
    b.input("x", [4])
    b.constant(np.array([2]), "k")
    b.nodes.append(node)
    graph = graph_of(b.model(("i", TensorProto.INT64, [2])))
    topk = producer(graph, "i")
    assert topk.outputs[0] is None
    assert value(graph, "i").slot == 1
    assert topk.label == "TopK -> i"


def test_bodies_are_scopes_whose_captures_count_as_uses():
    graph = graph_of(with_body())
    assert [scope.name for scope in graph.scopes] == ["graph", "body of If_y", "body of If_y"]
    outer = value(graph, "outer")
    assert {node.op for node in outer.uses} == {"Abs", "Relu"}
    assert {node.scope.name for node in outer.uses} == {"graph", "body of If_y"}
    assert outer.only_use is None
    body = graph.scopes[1]
    assert body.parent is graph.main
    assert body.owner is producer(graph, "y")
    assert body.find("outer") is outer
    assert graph.main.find(body.outputs[0].name) is None


def test_a_body_that_returns_a_captured_value_makes_it_an_output():
    inner = Build(prefix="b")
    inner.inputs = []
    body = inner.graph("outer")
    b = Build()
    x, c = b.input("x", [2]), b.input("c", [], BOOL)
    b.neg(x, output="outer")
    b.node("If", c, output="y", then_branch=body, else_branch=body)
    outer = value(graph_of(b.model("y")), "outer")
    assert outer.is_output
    assert outer.only_use is None


def test_an_initializer_that_is_an_input_is_not_a_constant():
    b = Build()
    b.input("x", [2])
    b.input("w", [2])
    b.constant(np.ones(2, np.float32), "w")
    b.constant(np.ones(2, np.float32), "v")
    b.add(b.add("x", "w"), "v", output="y")
    graph = graph_of(b.model("y"))
    assert value(graph, "w").tensor is None
    assert value(graph, "v").tensor.name == "v"


def test_declared_types_are_kept_but_never_for_a_name_the_graph_lacks():
    b = Build()
    b.relu(b.input("x", [2]), output="h")
    b.neg("h", output="y")
    model = b.model("y")
    model.graph.value_info.extend(helper.make_tensor_value_info(n, FLOAT, [2]) for n in ("h", "ghost"))
    graph = graph_of(model)
    assert value(graph, "h").info.name == "h"
    assert "ghost" not in graph.main.values


def function_model():
    function = helper.make_function(
        "local",
        "Twice",
        ["a"],
        ["b"],
        [helper.make_node("Neg", ["a"], ["h"]), helper.make_node("Sum", ["h", "h"], ["b"])],
        [helper.make_opsetid("", 13)],
    )
    b = Build(opset=17)
    b.node("Twice", b.input("x", [2]), output="y", domain="local")
    return b.model("y", functions=[function], domains=["local"])


def test_a_function_is_a_scope_of_its_own_opsets():
    graph = graph_of(function_model())
    main, function = graph.scopes
    assert (main.name, function.name) == ("graph", "function Twice")
    assert function.parent is None
    assert function.find("x") is None
    total = function.values["b"].producer
    assert (total.version, next(iter(main.nodes)).version) == (13, 1)
    assert function.values["a"].producer is None
    assert function.values["b"].is_output
    assert graph.by_op.keys() == {"local::Twice", "Neg", "Sum"}


def test_the_domain_ai_onnx_is_the_standard_one():
    b = Build()
    b.node("Relu", b.input("x", [2]), output="y", domain="ai.onnx")
    graph = graph_of(b.model("y"))
    assert list(graph.by_op) == ["Relu"]
    assert producer(graph, "y").version == 17


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{ y = Relu (x) y = Neg (x) }", "the value 'y' is defined twice"),
        ("{ x = Relu (x) y = Neg (x) }", "the value 'x' is defined twice"),
        ("{ y = Relu (nowhere) }", "reads 'nowhere', which no earlier node, input or initializer defines"),
        ("{ h = Relu (x) }", "the output 'y' is not produced by any node"),
    ],
)
def test_a_broken_graph_is_named(text: str, sentence: str):
    with pytest.raises(ModelError, match=sentence) as caught:
        parsed(f"g (float[2] x) => (float[2] y) {text}")
    assert str(caught.value).startswith("graph: ")


def test_a_broken_function_is_named_with_its_place():
    model = function_model()
    model.functions[0].output[0] = "lost"
    with pytest.raises(ModelError, match="function Twice: the output 'lost' is not produced"):
        graph_of(model)


# Edits ------------------------------------------------------------------------------------------------------------

CHAIN = "g (float[2] x) => (float[2] y) { a = Relu (x) b = Neg (a) c = Abs (b) y = Exp (c) }"


def state(graph: Graph):
    """Everything an edit may change, by names."""
    return (
        {node.label: [v and v.name for v in (*node.inputs, *node.outputs)] for node in graph.nodes()},
        {
            name: (v.producer and v.producer.label, v.slot, {node.label: count for node, count in v.uses.items()})
            for name, v in graph.main.values.items()
        },
        {key: [node.label for node in nodes] for key, nodes in graph.by_op.items() if nodes},
    )


def test_a_graph_without_edits_leaves_the_protobuf_untouched():
    model = load(with_body(), validate=False)
    before = model.proto.SerializeToString(deterministic=True)
    assert Graph(model).commit() is False
    assert model.proto.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("edit", [True, False])
def test_a_graph_that_is_spent_leaves_nothing_to_the_collector(edit):
    def count() -> int:
        return sum(isinstance(found, Node | Value | Scope) for found in gc.get_objects())

    gc.collect()
    with paused_collection():
        before = count()
        graph = graph_of(with_body())
        if edit:
            y = value(graph, "y")
            graph.add_node(graph.main, "Identity", [value(graph, "x")], [y], at=y.producer)
            graph.remove_dead(list(graph.by_op["If"]))
            del y
        assert count() > before
        graph.commit()
        del graph
        assert count() == before


def test_a_new_node_takes_over_the_name_of_an_output():
    graph = parsed(CHAIN)
    y, b = value(graph, "y"), value(graph, "b")
    old = y.producer
    node = graph.add_node(graph.main, "Sqrt", [b], [y], at=old, name="new")
    removed = graph.remove_dead([old])
    assert [n.op for n in removed] == ["Exp", "Abs"]
    assert y.producer is node
    assert y.is_output
    assert graph.commit() is True
    assert order(graph.model.proto) == ["a", "b", "y"]
    assert list(graph.model.proto.graph.node[-1].input) == ["b"]


def test_an_edit_that_fails_is_undone():
    graph = parsed(CHAIN)
    before = state(graph)

    def edit():
        y, x = value(graph, "y"), value(graph, "x")
        old = y.producer
        made = graph.add_node(graph.main, "Sqrt", [x, x], ["fresh"], at=old)
        graph.add_node(graph.main, "Tanh", [made.outputs[0]], [y], at=old)
        graph.declare(made.outputs[0], TensorProto.FLOAT, [2, None])
        graph.add_initializer(graph.main, numpy_helper.from_array(np.ones(2, np.float32), "ones"), old)
        graph.remove_dead([old, *graph.by_op["Abs"]])
        assert state(graph) != before
        raise KeyError

    declared = list(graph.main.proto.value_info)
    with pytest.raises(KeyError), graph.transaction():
        edit()
    assert state(graph) == before
    assert list(graph.main.proto.value_info) == declared


def test_an_inner_transaction_is_undone_with_the_outer_one():
    graph = parsed(CHAIN)
    before = state(graph)

    def inner():
        with graph.transaction():
            graph.add_node(graph.main, "Sqrt", [value(graph, "x")], ["q"], at=producer(graph, "y"))
        raise KeyError

    with pytest.raises(KeyError), graph.transaction():
        inner()
    assert state(graph) == before


def test_dead_initializers_go_with_their_last_reader_and_shared_ones_stay():
    text = "<float[2] w = {1, 2}, float[2] v = {3, 4}>"
    graph = parsed(
        f"g (float[2] x) => (float[2] y, float[2] z) {text} {{ h = Mul (x, w) y = Add (h, v) z = Mul (x, v) }}"
    )
    y = value(graph, "y")
    old = y.producer
    graph.add_node(graph.main, "Relu", [value(graph, "x")], [y], at=old)
    graph.remove_dead([old])
    graph.commit()
    proto = graph.model.proto.graph
    assert [tensor.name for tensor in proto.initializer] == ["v"]
    assert order(graph.model.proto) == ["y", "z"]


def test_what_was_dead_before_is_left_alone():
    graph = parsed("g (float[2] x) => (float[2] y) { dead = Exp (x) a = Relu (x) y = Neg (a) }")
    y = value(graph, "y")
    old = y.producer
    graph.add_node(graph.main, "Abs", [value(graph, "x")], [y], at=old)
    graph.remove_dead([old])
    graph.commit()
    assert order(graph.model.proto) == ["dead", "y"]


def test_removing_a_node_with_bodies_frees_what_they_captured():
    graph = graph_of(with_body())
    y, x = value(graph, "y"), value(graph, "x")
    old = y.producer
    graph.add_node(graph.main, "Relu", [x], [y], at=old)
    graph.remove_dead([old])
    assert {node.op for node in value(graph, "outer").uses} == {"Abs"}
    graph.commit()
    well_formed(graph.model.proto)
    assert [node.op_type for node in graph.model.proto.graph.node] == ["Neg", "Abs", "Relu"]


def test_what_only_a_removed_body_read_goes_with_it():
    model = with_body()
    del model.graph.output[1:], model.graph.node[1]  # nothing but a body reads `outer` now
    assert [node.op_type for node in model.graph.node] == ["Neg", "If"]
    graph = graph_of(model)
    y = value(graph, "y")
    old = y.producer
    graph.add_node(graph.main, "Relu", [value(graph, "x")], [y], at=old)
    assert [node.op for node in graph.remove_dead([old])] == ["If", "Neg"]
    assert "outer" not in graph.main.values


def test_a_fresh_name_is_no_nodes_name_either():
    graph = graph_of(with_body())
    assert graph.fresh("If_y") != "If_y"


def test_a_body_in_a_function_imports_into_the_function():
    inner = Build(prefix="b")
    body = inner.graph(inner.relu("a"))
    nodes = [helper.make_node("If", ["c"], ["b"], then_branch=body, else_branch=body)]
    function = helper.make_function("local", "F", ["a", "c"], ["b"], nodes, [helper.make_opsetid("", 17)])
    b = Build(opset=17)
    b.node("F", b.input("x", [2]), b.input("c", [], BOOL), output="y", domain="local")
    graph = graph_of(b.model("y", functions=[function], domains=["local"]))
    scope = graph.scopes[2]
    (result,) = scope.outputs
    old = result.producer
    graph.import_opset("com.microsoft", 1)
    graph.add_node(scope, "Gelu", [scope.find("a")], [result], at=old, domain="com.microsoft")
    graph.remove_dead([old])
    graph.commit()
    proto = graph.model.proto
    assert "com.microsoft" in {entry.domain for entry in proto.functions[0].opset_import}
    assert "com.microsoft" not in {entry.domain for entry in proto.opset_import}


def test_fresh_names_avoid_the_names_of_every_scope_and_each_other():
    graph = graph_of(with_body())
    inner = graph.scopes[1].outputs[0].name
    made = [graph.fresh(inner), graph.fresh("outer"), graph.fresh("outer"), graph.fresh("free"), graph.fresh("free")]
    taken = {name for scope in graph.scopes for name in scope.values}
    assert len(set(made)) == 5
    assert not taken & set(made)
    assert made[3] == "free"


def test_a_domain_is_imported_once_and_only_where_it_is_used():
    graph = parsed(CHAIN)
    graph.import_opset("com.microsoft", 1)
    graph.import_opset("com.microsoft", 1)
    graph.import_opset("never.used", 1)
    y = value(graph, "y")
    old = y.producer
    graph.add_node(graph.main, "Gelu", [value(graph, "x")], [y], at=old, domain="com.microsoft")
    graph.remove_dead([old])
    graph.commit()
    assert [(o.domain, o.version) for o in graph.model.proto.opset_import] == [("", 17), ("com.microsoft", 1)]


def test_an_edit_in_a_function_imports_there_and_makes_constants_nodes():
    graph = graph_of(function_model())
    function = graph.scopes[1]
    b, a = function.values["b"], function.values["a"]
    old = b.producer
    graph.import_opset("com.microsoft", 1)
    constant = graph.add_initializer(function, numpy_helper.from_array(np.ones(2, np.float32), "one"), old)
    graph.add_node(function, "BiasGelu", [a, constant], [b], at=old, domain="com.microsoft")
    graph.remove_dead([old])
    graph.commit()
    proto = graph.model.proto.functions[0]
    assert [node.op_type for node in proto.node] == ["Constant", "BiasGelu"]
    assert ("com.microsoft", 1) in [(o.domain, o.version) for o in proto.opset_import]
    well_formed(graph.model.proto)


# Order ------------------------------------------------------------------------------------------------------------


def test_committed_nodes_keep_their_order_where_it_still_holds():
    nodes = "a = Relu (x) z = Tanh (x) b = Neg (a) k = Exp (x) y = Add (b, k)"
    graph = parsed(f"g (float[2] x) => (float[2] y, float[2] z) {{ {nodes} }}")
    b = value(graph, "b")
    old = b.producer
    graph.add_node(graph.main, "Abs", [value(graph, "a")], [b], at=old)
    graph.remove_dead([old])
    graph.commit()
    assert order(graph.model.proto) == ["a", "z", "b", "k", "y"]


def test_a_node_placed_too_early_comes_after_what_it_reads_and_others_stay():
    text = "g (float[2] x) => (float[2] y, float[2] z) { a = Relu (x) z = Tanh (x) b = Neg (x) y = Add (a, b) }"
    graph = parsed(text)
    a = value(graph, "a")
    old = a.producer
    graph.add_node(graph.main, "Abs", [value(graph, "b")], [a], at=old)
    graph.remove_dead([old])
    graph.commit()
    made = order(graph.model.proto)
    assert made.index("b") < made.index("a") < made.index("y")
    assert made.index("z") < made.index("b")
    well_formed(graph.model.proto)


def test_what_a_body_captures_is_committed_before_the_node_that_holds_the_body():
    graph = graph_of(with_body())
    outer = value(graph, "outer")
    old = outer.producer
    late = graph.add_node(graph.main, "Exp", [value(graph, "x")], ["late"], at=producer(graph, "y"))
    graph.add_node(graph.main, "Abs", [late.outputs[0]], [outer], at=old)
    graph.remove_dead([old])
    graph.commit()
    well_formed(graph.model.proto)
    made = order(graph.model.proto)
    assert made.index("late") < made.index("outer") < made.index("y")


def test_a_cycle_is_an_error_that_names_its_nodes():
    graph = parsed(CHAIN)
    a = value(graph, "a")
    old = a.producer
    graph.add_node(graph.main, "Floor", [value(graph, "b")], [a], at=old, name="floor")
    graph.remove_dead([old])
    with pytest.raises(ModelError, match=r"the nodes form a cycle: .*floor"):
        graph.commit()


def test_trailing_inputs_left_out_are_not_written_but_holes_are():
    graph = parsed(CHAIN)
    y, x = value(graph, "y"), value(graph, "x")
    old = y.producer
    graph.add_node(graph.main, "Clip", [x, None, x, None, None], [y, None], at=old)
    graph.remove_dead([old])
    graph.commit()
    clip = graph.model.proto.graph.node[-1]
    assert list(clip.input) == ["x", "", "x"]
    assert list(clip.output) == ["y"]


def test_a_model_with_bodies_and_functions_survives_optimizing():
    feeds = [{"x": np.array([1, -2], np.float32), "c": np.array(flag)} for flag in (True, False)]
    assert same(with_body(), feeds).counts == {}
    assert same(function_model(), {"x": np.array([1, -2], np.float32)}).counts == {}
