"""check=True: what is equal stays, what is not is undone and said, and nothing is left of it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import onnx
import pytest
from fusion.patterns.attention import sdpa
from fusion.patterns.norms import layer_norm
from onnx import ModelProto, TensorProto, helper, parser
from rich.console import Console

import fusion
from fusion.facts import Facts
from fusion.language import axes, erf, keep, optional, pattern, rest, scalar, sqrt
from fusion.models.graph import Graph
from fusion.models.model import load
from fusion.targets import target_named
from fusion.verifying.runtime import Session
from fusion.writing import cut as cutting
from fusion.writing.cut import cut
from fusion.writing.rewrite import Rewriter

MODELS = Path(__file__).parent / "models"
EXPORTS = sorted(path.stem for path in MODELS.glob("*.onnx"))
BERT = MODELS / "bert_seqcls__ts14_eager.onnx"


def parsed(text: str, opset: int = 17) -> ModelProto:
    return parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]>\n{text}')


def gelu_of(kind: str) -> ModelProto:
    return parsed(f"""
g ({kind}[batch, n] x) => ({kind}[batch, n] y)
<float root = {{1.4142135}}, float half = {{0.5}}, float one = {{1.0}}> {{
  s = Div (x, root) e = Erf (s) a = Add (e, one) m = Mul (x, a) y = Mul (m, half)
}}""")


GELU = gelu_of("float")

# Wrong on purpose -------------------------------------------------------------------------------------------------


@pattern(x="...")
def other_gelu(x):
    """Exact Gelu, written as its approximation."""
    return 0.5 * x * (1 + erf(x / sqrt(2)))


@other_gelu.emit("ort-cpu")
def _(found, op):
    return op.microsoft.FastGelu(found.x)


@pattern(x="... D", scale=optional("D"), bias=optional("D"), eps=scalar(0))
def other_epsilon(x, scale, bias, eps):
    """Layer normalization with twice its epsilon."""
    return layer_norm(x, scale, bias, eps)


@other_epsilon.emit("ort-cpu")
def _(found, op):
    scale = op.arranged(found.scale) or op.ones("D")
    return op.LayerNormalization(found.x, scale, op.arranged(found.bias), axis=-1, epsilon=2 * found.eps)


@pattern(q="B S (H D)", k="B T (H D)", v="B T (H E)", bias=rest("B H S T"), scale=scalar())
def no_mask(q, k, v, bias, scale):
    """Attention that forgets its mask."""
    q, k = axes(q, "B S (H D) -> B H S D"), axes(k, "B T (H D) -> B H T D")
    v = axes(v, "B T (H E) -> B H T E")
    return axes(sdpa(q, k, v, None, bias, scale), "B H S E -> B S (H E)")


@no_mask.emit("ort-cpu")
def _(found, op):
    q, k, v = (op.arranged(capture) for capture in (found.q, found.k, found.v))
    return op.guarded(op.microsoft.MultiHeadAttention(q, k, v, num_heads=found.size("H"), scale=found.scale))


@pattern(x="... D", skip="... D", shift=optional("D"), scale="D", bias=optional("D"), eps=scalar(0))
def other_sum(x, skip, shift, scale, bias, eps):
    """Layer normalization of a residual sum, right but for the sum itself, which comes without `shift`."""
    total = x + shift + skip
    return layer_norm(total, scale, bias, eps), keep(total)


@other_sum.emit("ort-cpu")
def _(found, op):
    inputs = (found.x, found.skip, found.scale, found.bias, found.shift)
    normed, _, _, _ = op.microsoft.SkipLayerNormalization(*inputs, outputs=4, epsilon=found.eps)
    return normed, op.Add(found.x, found.skip)


# Everything that is equal stays -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPORTS)
def test_the_library_passes_its_checks_on_real_exports(name: str) -> None:
    path = MODELS / f"{name}.onnx"
    plain, result = fusion.optimize(path), fusion.optimize(path, check=True)
    assert result.counts == plain.counts
    assert [match.unchecked for match in result.matches if not match.checked] == []
    assert result.model.SerializeToString() == plain.model.SerializeToString()
    assert all(match.checked is None for match in plain.matches)


@pytest.mark.parametrize("dtype", ["float", "double", "float16"])
def test_a_gelu_of_any_float_is_checked(dtype: str) -> None:
    model = gelu_of(dtype)
    model.opset_import[0].version = 20
    for tensor in model.graph.initializer:
        number = np.sqrt(2.0) if tensor.name == "root" else onnx.numpy_helper.to_array(tensor)
        array = np.asarray(number, helper.tensor_dtype_to_np_dtype(TensorProto.DataType.Value(dtype.upper())))
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    result = fusion.optimize(model, check=True, patterns=["gelu"], target="onnx")
    assert [match.checked for match in result.matches] == [True]


def test_large_constants_are_fed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "FED", 64)
    result = fusion.optimize(BERT, check=True)
    assert all(match.checked for match in result.matches)
    assert result.counts == fusion.optimize(BERT).counts


def test_a_match_in_a_body_reads_values_from_outside() -> None:
    model = parsed("""
g (bool c, float[batch, n] x) => (float[batch, n] y)
<float root = {1.4142135}, float half = {0.5}, float one = {1.0}> {
  t = Neg (x)
  y = If (c) <
    then_branch = then_g () => (float[batch, n] y1) {
      s = Div (t, root) e = Erf (s) a = Add (e, one) m = Mul (t, a) y1 = Mul (m, half)
    },
    else_branch = else_g () => (float[batch, n] y2) { y2 = Identity (t) }
  >
}""")
    result = fusion.optimize(model, check=True, patterns=["gelu"])
    assert [(match.scope.partition(" ")[0], match.checked) for match in result.matches] == [("body", True)]
    assert not fusion.optimize(model, check=True, patterns=[other_gelu]).matches


def test_what_does_not_run_stays_and_says_why() -> None:
    """The numbers are of another type than x: no runtime computes this, and the checker does not see it."""
    result = fusion.optimize(gelu_of("float16"), check=True, patterns=["gelu"])
    (match,) = result.matches
    assert match.checked is False
    assert "no inputs were found that the original takes" in match.unchecked
    out = io.StringIO()
    result.print(Console(file=out, width=200))
    assert "0 checked, 1 not checked" in out.getvalue()
    assert "not checked: gelu at y: no inputs" in out.getvalue()
    assert result.to_dict()["matches"][0]["unchecked"] == match.unchecked


# What differs is undone -------------------------------------------------------------------------------------------

WRONG = {
    "another Gelu": (other_gelu, BERT, "relative error"),
    "another epsilon": (other_epsilon, BERT, "on tiny to large inputs"),
    "no mask": (no_mask, BERT, "relative error"),
    "no mask, guarded": (no_mask, MODELS / "bert__ts17_sdpa.onnx", "IsNaN"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_rewrite_is_refused_and_the_model_unchanged(case: str) -> None:
    wrong, path, text = WRONG[case]
    assert fusion.optimize(path, patterns=[wrong]).matches, "without the check it is made"
    result = fusion.optimize(path, patterns=[wrong], check=True)
    assert result.matches == []
    misses = [miss for near in result.near_misses for miss in near.misses if miss.kind == "check"]
    assert len(misses) >= 2
    assert all(text in miss.text for miss in misses)
    assert result.model.SerializeToString() == path.read_bytes()


def test_a_wrong_second_output_is_refused_where_somebody_reads_it() -> None:
    result = fusion.optimize(MODELS / "whisper_encoder__ts17_eager.onnx", patterns=[other_sum], check=True)
    refused = [near.misses[0].text for near in result.near_misses if near.misses[0].kind == "check"]
    sums = [text.partition("output /model/")[2].partition(":")[0] for text in refused]
    assert sums == ["layers.0/Add_output_0", "layers.0/Add_1_output_0", "layers.1/Add_output_0"]
    assert [match.root for match in result.matches] == ["output"]


def test_the_message_names_inputs_output_and_error() -> None:
    (near,) = fusion.optimize(GELU, patterns=[other_gelu], check=True).near_misses
    (miss,) = near.misses
    assert (near.pattern, near.root, miss.place) == ("other_gelu", "y", "y")
    start = "com.microsoft::FastGelu: on random inputs (x [2, 3]), output y: "
    assert miss.text.startswith(start)
    assert miss.text.endswith("allowed 1.2e-04)")
    out = io.StringIO()
    fusion.optimize(GELU, patterns=[other_gelu], check=True).print(Console(file=out, width=200))
    assert "0 checked, 1 refused" in out.getvalue()


def test_a_refused_rewrite_leaves_no_trace_in_what_follows() -> None:
    both = fusion.optimize(BERT, patterns=[other_gelu, no_mask, "layer_norm"], check=True)
    alone = fusion.optimize(BERT, patterns=["layer_norm"])
    assert both.counts == alone.counts == {"layer_norm": 5}
    assert both.model.SerializeToString() == alone.model.SerializeToString()


def state(graph: Graph) -> object:
    """Everything an index knows, in order."""
    values = [value for scope in graph.scopes for value in scope.values.values()]
    return (
        [[(node, node.inputs[:], node.outputs[:], node.position) for node in scope.nodes] for scope in graph.scopes],
        {(value.scope, name): value for scope in graph.scopes for name, value in scope.values.items()},
        {value: (value.producer, value.slot, dict(value.uses), value.is_output) for value in values},
        {value: list(value.uses) for value in values},
        {key: list(nodes) for key, nodes in graph.by_op.items() if nodes},
        [(dict(scope.opsets), scope.edited) for scope in graph.scopes],
        set(graph.names),
        (graph._fresh, graph._sequence),
    )


@pytest.mark.parametrize("case", WRONG)
def test_after_a_refused_rewrite_the_graph_is_as_it_was(case: str) -> None:
    wrong, path, _ = WRONG[case]
    model = load(path)
    graph = Graph(model)
    before = state(graph)
    rewriter = Rewriter(graph, [wrong], target_named("ort-cpu"), check=True)
    assert rewriter.run().rewritten == []
    assert state(graph) == before
    fresh = Facts(graph)
    while fresh.learn() | rewriter.search.facts.learn():
        pass
    for value in before[2]:  # type: ignore[index]
        assert rewriter.search.facts.shape(value) == fresh.shape(value)
        assert rewriter.search.facts.number(value) == fresh.number(value)
        assert rewriter.search.facts.through(value) == fresh.through(value)
    assert not graph.commit()


# Cutting ----------------------------------------------------------------------------------------------------------


def test_nothing_behind_a_shape_is_needed() -> None:
    graph = Graph(
        load(
            parsed("""
g (float[b, s, 6] x) => (float[b, s, 2, 3] y) <int64[2] tail = {2, 3}, int64[1] start = {0}, int64[1] stop = {2}> {
  h = Exp (x) g = Tanh (h) f = Sin (h)
  dims = Shape (f) head = Slice (dims, start, stop) whole = Concat <axis = 0> (head, tail)
  r = Reshape (g, whole) y = Neg (r)
}""")
        )
    )
    facts, values = Facts(graph), graph.main.values
    part = cut(graph, facts, [values["y"]], [values["g"]])
    assert set(part.inputs) == {"f", "g"}
    assert part.asked == {"f"}
    assert [node.op_type for node in part.model.graph.node if node.op_type in ("Exp", "Tanh", "Sin")] == []
    g = np.arange(36, dtype=np.float32).reshape(3, 2, 6)
    result = Session(part.model).run({"f": np.zeros_like(g), "g": g})
    assert np.array_equal(result["y"], -g.reshape(3, 2, 2, 3))


def test_a_cut_may_stop_at_one_output_of_a_node_and_compute_another() -> None:
    graph = Graph(
        load(
            parsed("""
g (float[4, 2] x) => (float[2, 2] y) { a, b = Split <axis = 0> (x) c = Relu (a) y = Add (c, b) }""")
        )
    )
    values = graph.main.values
    part = cut(graph, Facts(graph), [values["y"]], [values["a"]])
    assert set(part.inputs) == {"a", "x"}
    x = np.float32([[1, 2], [3, 4], [5, 6], [7, 8]])
    assert np.array_equal(Session(part.model).run({"a": -x[:2], "x": x})["y"], x[2:])
