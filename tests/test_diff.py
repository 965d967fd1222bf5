"""The structural difference of two models: what is reported, and as what."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, helper, numpy_helper, parser
from rich.console import Console

from fusion.diffing.diff import Diff, diff
from fusion.errors import ModelError, OutputError

MODELS = Path(__file__).parent / "models"


def model(text: str, opsets: str = '"" : 20') -> ModelProto:
    return parser.parse_model(f"<ir_version: 10, opset_import: [{opsets}]>\n{text}")


def graph(body: str, weights: str = "") -> ModelProto:
    return model(f"g (float[n] x) => (float[n] y) {f'<{weights}>' if weights else ''} {{ {body} }}")


CONSTANTS = "float root = {1.41421356}, float one = {1.0}, float half = {0.5}"
GELU = "d = Div (r, root) e = Erf (d) a = Add (e, one) m = Mul (r, a) g = Mul (m, half)"


def provenance(node: NodeProto, pattern: str, replaced: str, laws: str = "") -> None:
    for key, value in (("pattern", pattern), ("replaced", replaced), ("laws", laws)):
        node.metadata_props.add(key=f"fusion.{key}", value=value)


def operators(nodes: object) -> list[str]:
    return [n.operator for n in nodes]  # type: ignore[attr-defined]


# Nothing differs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(path.stem for path in MODELS.glob("*.onnx")))
def test_a_model_has_no_difference_to_itself(name: str) -> None:
    path = MODELS / f"{name}.onnx"
    difference = diff(path, onnx.load(path))
    assert difference.empty
    assert difference.nodes_before == difference.nodes_after > 0


def test_names_doc_strings_and_metadata_are_no_difference() -> None:
    a, b = graph("y = Neg (x)"), graph("y = Neg (x)")
    b.graph.node[0].name, b.graph.node[0].doc_string, b.producer_name = "other", "text", "someone"
    provenance(b.graph.node[0], "p", "q")
    assert diff(a, b).empty


def test_values_under_other_names_are_no_difference() -> None:
    a, b = graph("r = Relu (x) s = Sqrt (r) y = Mul (r, s)"), graph("k = Relu (x) l = Sqrt (k) y = Mul (k, l)")
    assert diff(a, b).empty


def test_an_attribute_that_says_the_default_is_no_difference() -> None:
    assert diff(graph("y = Softmax (x)"), graph("y = Softmax <axis = -1> (x)")).empty
    assert not diff(graph("y = Softmax (x)"), graph("y = Softmax <axis = 0> (x)")).empty


def test_the_default_is_that_of_the_models_opset() -> None:
    """Softmax worked along axis 1 by default below opset 13."""
    plain, first, last = (
        model(f"g (float[n, 3, 4] x) => (float[n, 3, 4] y) {{ y = Softmax {axis} (x) }}", '"" : 11')
        for axis in ("", "<axis = 1>", "<axis = -1>")
    )
    assert diff(plain, first).empty
    assert not diff(plain, last).empty


def test_an_output_that_is_left_out_names_nothing() -> None:
    a = graph("d, k = Dropout (x) y = Clip (d, , d)")
    b = graph("d = Dropout (x) y = Clip (d, , d)")
    b.graph.node[0].output.append("")
    assert diff(a, b).empty


def test_renamed_values_are_no_difference_where_a_body_reads_them() -> None:
    text = """g (bool c, float[n] x) => (float[n] y) { r = Relu (x) w = Constant <value = float {2}> ()
      y = If (c) <then_branch = t () => (float[n] a) { a = Mul (r, w) },
                  else_branch = e () => (float[n] b) { b = Abs (r) }> }"""
    other = text.replace("r = Relu", "k = Relu").replace("(r", "(k").replace("w = C", "v = C").replace(", w)", ", v)")
    assert diff(model(text), model(other)).empty


def test_attributes_that_refer_to_a_parameter_are_compared() -> None:
    text = """g (float[n] x) => (float[n] y) { y = f.p <v = 1> (x) }
    <domain: "f", opset_import: ["" : 20]> p <v, u> (x) => (y) {
      c = Constant <value : tensor = @v> () y = Mul (x, c) }"""
    a, b = (model(text.replace("@v", ref), '"" : 20, "f" : 1') for ref in ("@v", "@u"))
    (change,) = diff(a, b).scopes[0].changed
    assert change.changes == ("attribute value: @v became @u",)


def test_equal_constants_under_other_names_are_no_difference() -> None:
    a = graph("c = Constant <value = float {2}> () y = Mul (x, c)")
    b = graph("c = Constant <value = float {2}> () y = Mul (x, two)", "float two = {2}")
    assert [s.changed for s in diff(a, b).scopes] == [[]]
    c = graph("c = Constant <value = float {2}> () y = Mul (x, two)", "float two = {3}")
    assert diff(a, c).scopes[0].changed[0].changes == ("input 1: c became two",)


# Nodes --------------------------------------------------------------------------------------------------------


def test_a_changed_attribute_and_a_changed_input_are_said() -> None:
    a = model("g (float[2, 3] x, float[2, 3] z) => (float[2, 3] y) { t = Softmax <axis = 0> (x) y = Add (t, x) }")
    b = model("g (float[2, 3] x, float[2, 3] z) => (float[2, 3] y) { t = Softmax <axis = 1> (x) y = Add (t, z) }")
    (scope,) = diff(a, b).scopes
    assert [c.changes for c in scope.changed] == [
        ("attribute axis: 0 became 1",),
        ("input 1: x became z",),
    ]
    assert (scope.removed, scope.added, scope.regions) == ([], [], [])


def test_another_operator_for_the_same_value_is_a_replacement() -> None:
    (scope,) = diff(graph("y = Neg (x)"), graph("y = Abs (x)")).scopes
    (region,) = scope.regions
    assert (operators(region.removed), operators(region.added)) == (["Neg"], ["Abs"])
    assert (region.inputs, region.outputs) == (("x",), ("y",))


def test_operators_of_other_domains_are_named_with_them() -> None:
    b = model("g (float[n] x) => (float[n] y) { y = com.microsoft.Gelu (x) }", '"" : 20, "com.microsoft" : 1')
    difference = diff(graph("y = Gelu (x)"), b)
    assert operators(difference.regions[0].added) == ["com.microsoft::Gelu"]
    assert difference.opsets == {"com.microsoft": (None, 1)}
    assert (difference.operators_before, difference.operators_after) == ({"Gelu": 1}, {"com.microsoft::Gelu": 1})


# Regions ------------------------------------------------------------------------------------------------------


def test_a_fused_subgraph_is_one_region_with_its_border() -> None:
    a = graph(f"r = Relu (x) {GELU} y = Tanh (g)", CONSTANTS)
    b = graph("r = Relu (x) g = Gelu (r) y = Tanh (g)", CONSTANTS)
    difference = diff(a, b)
    (region,) = difference.regions
    assert operators(region.removed) == ["Div", "Erf", "Add", "Mul", "Mul"]
    assert operators(region.added) == ["Gelu"]
    assert (region.inputs, region.outputs) == (("r",), ("g",))
    assert (region.kind, region.pattern) == ("Gelu", "")
    assert (difference.nodes_before, difference.nodes_after) == (7, 3)


def test_provenance_names_the_pattern_and_its_laws() -> None:
    a = graph(f"r = Relu (x) {GELU} y = Tanh (g)", CONSTANTS)
    b = graph("r = Relu (x) g = Gelu (r) y = Tanh (g)", CONSTANTS)
    provenance(b.graph.node[1], "gelu", "", "ring,powers")
    (region,) = diff(a, b).regions
    assert (region.kind, region.laws) == ("gelu", ("ring", "powers"))


def test_neighbouring_regions_stay_apart_at_the_value_between_them() -> None:
    second = GELU.replace("r,", "g,").replace("(r", "(g").replace("g = Mul (m", "y = Mul (m")
    for name in "deam":
        second = second.replace(f"{name} = ", f"{name}2 = ").replace(f"({name})", f"({name}2)")
        second = second.replace(f"({name},", f"({name}2,").replace(f", {name})", f", {name}2)")
    a = graph(f"r = Relu (x) {GELU} {second}", CONSTANTS)
    onnx.checker.check_model(a)
    b = graph("r = Relu (x) g = Gelu (r) y = Gelu (g)", CONSTANTS)
    assert [(len(r.removed), r.inputs, r.outputs) for r in diff(a, b).regions] == [
        (5, ("r",), ("g",)),
        (5, ("g",), ("y",)),
    ]


def test_a_constant_of_two_regions_does_not_join_them() -> None:
    a = graph(
        "two = Constant <value = float {2}> () p = Pow (x, two) u = Sqrt (p) q = Pow (u, two) y = Sqrt (q)",
    )
    b = graph("u = Abs (x) y = Abs (u)")
    regions = diff(a, b).regions
    assert [operators(r.removed) for r in regions] == [["Pow", "Sqrt"], ["Pow", "Sqrt"], ["Constant"]]
    assert [operators(r.added) for r in regions] == [["Abs"], ["Abs"], []]


def test_shape_arithmetic_goes_with_the_region_that_alone_used_it() -> None:
    a = model("""g (float[n, 6] x) => (float[n, 6] y) <int64[1] rest = {6}, int64 zero = {0}, int64[1] ax = {0}> {
      s = Shape (x) n = Gather (s, zero) u = Unsqueeze (n, ax)
      to = Concat <axis = 0> (u, rest) y = Reshape (x, to) }""")
    b = model("g (float[n, 6] x) => (float[n, 6] y) { y = Identity (x) }")
    (region,) = diff(a, b).regions
    assert operators(region.removed) == ["Shape", "Gather", "Unsqueeze", "Concat", "Reshape"]


def test_different_rewrites_are_different_regions_though_they_share_a_value() -> None:
    a = graph("t = Abs (x) u = Neg (t) v = Exp (t) w = Add (u, v) y = Tanh (w)")
    b = graph("u = Sin (x) v = Cos (x) w = Add (u, v) y = Tanh (w)")
    for node, name in zip(a.graph.node, "tuvwy", strict=True):
        node.name = name
    provenance(b.graph.node[0], "first", "t, u", "ring, powers")
    provenance(b.graph.node[1], "second", "v")
    assert [(r.kind, operators(r.removed)) for r in diff(a, b).regions] == [
        ("first", ["Abs", "Neg"]),
        ("second", ["Exp"]),
    ]
    assert diff(a, b).regions[0].laws == ("ring", "powers")


def test_what_went_for_nothing_is_a_region_of_its_own_at_the_end() -> None:
    regions = diff(graph("d = Neg (x) r = Abs (x) y = Exp (r)"), graph("r = Sin (x) y = Exp (r)")).regions
    assert [(r.kind, operators(r.removed)) for r in regions] == [("Sin", ["Abs"]), ("removed", ["Neg"])]


def test_regions_of_a_real_model_that_onnxruntime_rewrote(tmp_path: Path) -> None:
    """onnxruntime keeps the names of values and writes no provenance: five LayerNorms out of nine nodes each."""
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "out.onnx")
    path = MODELS / "distilbert__ts11_eager.onnx"
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    regions = [r for r in diff(path, tmp_path / "out.onnx").regions if operators(r.added) == ["LayerNormalization"]]
    assert len(regions) == 5
    core = {"ReduceMean", "Sub", "Pow", "Add", "Sqrt", "Div", "Mul"}
    assert all(core <= set(operators(r.removed)) for r in regions)
    assert all(operators(r.removed).count("ReduceMean") == 2 for r in regions)
    assert all(len(r.outputs) == 1 for r in regions)


# Initializers, interfaces, other scopes -----------------------------------------------------------------------


def test_initializers_are_compared_by_their_bits() -> None:
    def weights(**arrays: np.ndarray) -> ModelProto:
        made = graph("y = Neg (x)")
        made.graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in arrays.items())
        return made

    large = np.full((50, 50), np.nan, "float32")  # above what stays in a shell
    other = large.copy()
    other[7, 7] = 1
    a = weights(same=large, bits=large, shape=np.zeros((2, 3)), gone=np.zeros(2))
    b = weights(same=large, bits=other, shape=np.zeros((3, 2)), new=np.zeros(2, "int64"))
    assert diff(a, b).scopes[0].initializers == {
        "bits": "values changed",
        "shape": "double[2, 3] became double[3, 2]",
        "gone": "removed",
        "new": "added: int64[2]",
    }


def test_external_data_counts_as_what_it_holds(tmp_path: Path) -> None:
    path = MODELS / "whisper_encoder__ts17_eager.onnx"
    onnx.save_model(onnx.load(path), tmp_path / "m.onnx", save_as_external_data=True, location="w", size_threshold=0)
    assert diff(path, tmp_path / "m.onnx").empty
    data = bytearray((tmp_path / "w").read_bytes())
    data[5] ^= 1
    (tmp_path / "w").write_bytes(data)
    assert list(diff(path, tmp_path / "m.onnx").scopes[0].initializers.values()) == ["values changed"]


def test_inputs_and_outputs_are_compared() -> None:
    a = model("g (float[n] x, float[n] z) => (float[n] y, float[n] w) { y = Neg (x) w = Neg (z) }")
    b = model("g (float[m] x, float[n] v) => (float[n] w, float[n] y) { y = Neg (x) w = Neg (v) }")
    interface = diff(a, b).scopes[0].interface
    assert interface[:2] == ["input 'z' is missing in the second model", "input 'v' is new in the second model"]
    assert "the outputs are in another order: y, w became w, y" in interface
    assert any(s.startswith("input 'x': ") for s in interface)


def test_opsets_are_compared() -> None:
    assert diff(model("g (float[n] x) => (float[n] y) { y = Neg (x) }", '"" : 17'), graph("y = Neg (x)")).opsets == {
        "": (17, 20)
    }


def test_bodies_and_functions_are_scopes_of_their_own() -> None:
    text = """g (bool c, float[n] x) => (float[n] y) {
      y = If (c) <then_branch = t () => (float[n] a) { a = Neg (x) },
                  else_branch = e () => (float[n] b) { b = Abs (x) }> }"""
    (scope,) = diff(model(text), model(text.replace("Abs", "Exp"))).scopes
    assert scope.name == "main / If.else_branch"
    assert operators(scope.removed) == ["Abs"]

    function = (
        'g (float[n] x) => (float[n] y) { y = f.twice (x) }\n<domain: "f", opset_import: ["" : 20]> twice (v) => (w)'
    )
    a, b = (model(f"{function} {{ w = Add (v, v) }}".replace("Add", op), '"" : 20, "f" : 1') for op in ("Add", "Mul"))
    (scope,) = diff(a, b).scopes
    assert scope.name == "function f::twice"
    assert (operators(scope.removed), operators(scope.added)) == (["Add"], ["Mul"])
    gone = model("g (float[n] x) => (float[n] y) { y = f.twice (x) }", '"" : 20, "f" : 1')
    assert diff(a, gone).scopes[0].interface == ["the function is missing in the second model"]


# Ways to read it ----------------------------------------------------------------------------------------------


def fused() -> Diff:
    a = graph(f"r = Relu (x) {GELU} y = Tanh (g)", CONSTANTS)
    b = graph("r = Relu (x) g = Gelu (r) y = Tanh (g)", CONSTANTS)
    provenance(b.graph.node[1], "gelu", "", "ring")
    return diff(a, b)


def printed(difference: Diff) -> str:
    console = Console(file=io.StringIO(), width=100)
    difference.print(console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_printed_difference_counts_operators_and_kinds_of_regions() -> None:
    text = printed(fused())
    assert "nodes 7 → 3" in text
    assert "gelu: Gelu" in text
    assert "Mul ×2, Add, Div, Erf" in text
    assert printed(diff(graph("y = Neg (x)"), graph("y = Neg (x)"))) == "no difference\n"


def test_markup_in_names_is_printed_as_it_is() -> None:
    a, b = (
        model('g (float[n] x) => (float[n] y) { ["odd[/red]"] y = Softmax <axis = 0> (x) }'.replace("0", axis))
        for axis in "01"
    )
    assert "odd[/red]: attribute axis: 0 became 1" in printed(diff(a, b))


def test_json_has_everything_once() -> None:
    data = json.loads(fused().to_json())
    assert (data["nodes_before"], data["nodes_after"]) == (7, 3)
    (region,) = data["scopes"][0]["regions"]
    assert (region["pattern"], region["laws"]) == ("gelu", ["ring"])
    assert [n["operator"] for n in region["added"]] == ["Gelu"]
    assert region["removed"][0]["inputs"] == ["r", "root"]


def test_the_page_draws_both_sides_and_needs_nothing_else(tmp_path: Path) -> None:
    fused().to_html(tmp_path / "diff.html", title="A <b> title")
    text = (tmp_path / "diff.html").read_text()
    assert "A &lt;b&gt; title" in text
    assert text.count("<svg") == 2
    assert ">Erf</text>" in text
    assert ">Gelu</text>" in text
    assert "http" not in text
    assert [p.name for p in tmp_path.iterdir()] == ["diff.html"]


def test_sizes_are_counted_and_not_drawn(tmp_path: Path) -> None:
    """What only a shape is made of is no part of the picture; a number that is computed with is."""
    sized = """zero = Constant <value_ints = [0]> () s = Shape (x) d = Gather (s, zero)
      t = Concat <axis = 0> (d, zero) r = Reshape (x, t) h = Constant <value_float = 0.5> () y = Mul (r, h)"""
    diff(graph(sized), graph("y = Exp (x)")).to_html(tmp_path / "d.html")
    text = (tmp_path / "d.html").read_text()
    assert [op for op in ("Shape", "Gather", "Concat", "Reshape", "Mul", "0.5", "Exp") if f">{op}</text>" in text] == [
        "Reshape", "Mul", "0.5", "Exp",
    ]  # fmt: skip
    assert "4 nodes that compute sizes and axes are not drawn" in text


def test_the_page_escapes_names(tmp_path: Path) -> None:
    a, b = graph("r = Neg (x) y = Exp (r)"), graph("r = Abs (x) y = Exp (r)")
    for proto in (a, b):
        proto.graph.node[0].name = "<script>alert(1)</script>"
    diff(a, b).to_html(tmp_path / "d.html")
    assert "<script" not in (tmp_path / "d.html").read_text()


def test_a_circle_of_nodes_is_listed_and_not_drawn(tmp_path: Path) -> None:
    a, b = graph("p = Add (x, x) q = Neg (p) y = Exp (q)"), graph("y = Abs (x)")
    a.graph.node[0].input[1] = "q"
    diff(a, b).to_html(tmp_path / "d.html")
    text = (tmp_path / "d.html").read_text()
    assert text.count("<svg") == 1
    assert '<p class="quiet">Add, Exp, Neg</p>' in text


def test_the_page_draws_a_limited_number_of_regions_and_says_how_many_more(tmp_path: Path) -> None:
    a = graph(" ".join(f"v{i} = {'Neg'} ({f'v{i - 1}' if i else 'x'})" for i in range(9)) + " y = Exp (v8)")
    b = graph(" ".join(f"v{i} = {'Abs'} ({f'v{i - 1}' if i else 'x'})" for i in range(9)) + " y = Exp (v8)")
    diff(a, b).to_html(tmp_path / "d.html", limit=4)
    text = (tmp_path / "d.html").read_text()
    assert text.count("<svg") == 8
    assert "and 5 more regions" in text


def test_an_unwritable_page_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"absent/d\.html cannot be written: No such file or directory"):
        fused().to_html(tmp_path / "absent" / "d.html")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="folder cannot be written"):
        fused().to_html(tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_what_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent\.onnx"):
        diff(tmp_path / "absent.onnx", graph("y = Neg (x)"))


def test_time_grows_with_the_number_of_nodes_and_not_with_its_square() -> None:
    def chain(count: int, op: str) -> ModelProto:
        nodes, last = [], "x"
        for i in range(count):
            nodes += [helper.make_node("Relu", [last], [f"r{i}"]), helper.make_node(op, [f"r{i}"], [f"v{i}"])]
            last = f"v{i}"
        info = [helper.make_tensor_value_info(name, 1, ["n"]) for name in ("x", last)]
        made = helper.make_graph(nodes, "g", [info[0]], [info[1]])
        return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)])

    def seconds(count: int) -> float:
        a, b = chain(count, "Neg"), chain(count, "Abs")
        start = time.perf_counter()
        assert len(diff(a, b).regions) == count
        return time.perf_counter() - start

    seconds(500)
    small = min(seconds(1000) for _ in range(3))
    assert seconds(8000) < 8 * small * 4  # a square would be 8 times as much again
